"""Score the answers in a folder; needs no model, and a judge only where the benchmark asks for one.

Paper: section 4.1.3 and appendix A.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava.errors import DataError
from tinyllava.evaluation.answers import read_answers, write_llava_answers
from tinyllava.evaluation.benchmark import Benchmark
from tinyllava.evaluation.files import check_files
from tinyllava.evaluation.judge import Judge, Reviews, save_reviews
from tinyllava.evaluation.predictions import write_predictions
from tinyllava.evaluation.results import Result, ResultTable

BLIND = "blind: every image replaced by one of the mean colour"


def _name_releases(benchmark: Benchmark, data: Path) -> list[str]:
    """Return a note on each data file whose releases give different numbers: which one it is."""
    found = check_files(data, [needed for needed in benchmark.files if needed.known_md5])
    return [f"{one.found[0].name}: {one.release}" for one in found if one.release]


def _notes(benchmark: Benchmark, data: Path, run: Mapping[str, Any], *, blind: bool) -> tuple[str, ...]:
    notes = _name_releases(benchmark, data)
    if "source" in run:
        notes.append(f"answers taken from {run['source']}")
    return (*notes, BLIND) if blind else tuple(notes)


def answers_folder(output: Path, benchmark: Benchmark, *, blind: bool = False) -> Path:
    """Return the folder that holds the answers to one benchmark."""
    return output / (f"{benchmark.name}-blind" if blind else benchmark.name)


def score(
    benchmark: Benchmark,
    data: Path,
    output: Path,
    *,
    blind: bool = False,
    limit: int = 0,
    judge: Judge | Reviews | None = None,
) -> Result:
    """Score a benchmark's answers; write predictions, the official upload files and ``output/results.json``.

    There, a result with blank images (or without) goes when it is of other data or another judge than this.

    Args:
        data: the benchmark's folder.
        output: the folder that the run wrote to.
        limit: count only the first questions; 0 means all.
        judge: asked, or its recorded reviews; None leaves a benchmark that needs one without a score.

    Raises:
        DataError: no answers there, or answers to other questions.
        JudgeError: the judge does not answer.
    """
    folder = answers_folder(output, benchmark, blind=blind)
    if not (folder / "run.json").is_file():
        raise DataError(f"{folder}: no answers there; ask a model first with `tinyllava evaluate`.")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    questions = benchmark.load(data)[: limit or None]
    answers = read_answers(folder, questions)
    reviews = judge if benchmark.judging is not None else None
    if isinstance(reviews, Judge):
        reviews = reviews.review(benchmark, questions, answers, data)
        name = re.sub(r"[^\w.-]", "_", reviews.judge)
        save_reviews(reviews, folder / f"reviews-{name}.jsonl")
    judge_name = reviews.judge if reviews else ""
    scored = benchmark.score(questions, answers, reviews.replies if reviews else None, judge_name)
    write_predictions(scored.predictions, folder / "predictions.jsonl")
    write_llava_answers(
        questions,
        answers,
        folder / "llava_answers.jsonl",
        model=run["model"],
        number_ids=benchmark.has_number_ids,
    )
    result = benchmark.result(
        questions,
        scored,
        model=f"{run['model']} (blank images)" if blind else run["model"],
        dtype=run["dtype"],
        decoding={} if "source" in run else None,  # nobody knows how another program's answers were made
        judge=judge_name or None,
        notes=_notes(benchmark, data, run, blind=blind),
    )
    path = output / "results.json"
    table = ResultTable.load(path) if path.exists() else ResultTable()
    table.fitting(result).with_result(result).save(path)
    if benchmark.export is not None and not blind:
        benchmark.export(questions, answers, data, folder / "upload")
    return result
