"""Score the answers in a folder. Needs no model, and a judge only if the benchmark uses one.

Paper: section 4.1.3 and appendix A.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyllava.errors import ConfigError, DataError
from tinyllava.evaluation.answers import check_edited, read_answers, write_llava_answers, write_predictions
from tinyllava.evaluation.benchmark import Benchmark
from tinyllava.evaluation.judge import Judge, Reviews, save_reviews
from tinyllava.evaluation.read import check_files
from tinyllava.evaluation.results import BLANK, Result, ResultTable, load_results
from tinyllava.files import held, read_object
from tinyllava.parts.folders import fingerprint

BLIND = "blind: every image replaced with its mean colour"


def _name_releases(benchmark: Benchmark, data: Path) -> list[str]:
    """Return a note on each data file whose releases give different numbers: which one it is."""
    found = check_files(data, [needed for needed in benchmark.files if needed.known_md5])
    return [f"{one.found[0].name}: {one.release}" for one in found if one.release]


def _notes(benchmark: Benchmark, data: Path, run: Mapping[str, Any], *, blind: bool) -> tuple[str, ...]:
    notes = _name_releases(benchmark, data)
    if "source" in run:
        notes.append(f"answers from {run['source']}")
    return (*notes, BLIND) if blind else tuple(notes)


def _name_decoding(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how the answers were made; nobody knows it of another program's."""
    if "source" in run:
        return {}
    known = run.get("max_new_tokens")  # own questions may be scored with another --max-tokens
    return {"do_sample": False, "num_beams": 1, "max_new_tokens": known} if known else None


def _read_run(folder: Path) -> dict[str, Any]:
    """Return whose answers a folder holds.

    Raises:
        DataError: it is not known any more.
    """
    run = read_object(folder / "run.json") or {}
    if not all(isinstance(run.get(name), str) for name in ("model", "dtype")):
        raise DataError(
            f"{folder / 'run.json'}: damaged, so the model of these answers is unknown. Delete {folder} and "
            "run `tinyllava evaluate` again."
        )
    return run


def _check_model(folder: Path, run: Mapping[str, Any], model: str) -> None:
    """Make sure that answers are a model's: by its weights, or by its name where these are unknown."""
    weights, known = fingerprint(Path(model)), run.get("weights")
    is_same = weights == known if weights and known else Path(model) == Path(run["model"])
    if not is_same:
        now = f" (weights {known}, now {weights})" if weights and known else ""
        raise ConfigError(
            f"{folder}: has answers of {run['model']}, not of {model}{now}. Name that model, or give the "
            "--output of this one."
        )


def set_aside_if_damaged(output: Path) -> Path | None:
    """Rename a results.json that cannot be read, and return its new name; None if it is fine."""
    path = output / "results.json"
    try:
        if path.exists():
            ResultTable.load(path)
    except DataError:
        return path.replace(path.with_name(f"{path.name}.damaged"))
    return None


def refuse_other_weights(output: Path, model: str, weights: str, dtype: str) -> None:
    """Make sure that a model's scores in an output folder are of the same weights, in as many bits.

    Raises:
        ConfigError: they are not; a table of both would be of no model.
    """
    path = output / "results.json"
    set_aside_if_damaged(output)
    for result in load_results(path) if path.exists() else ():
        name = result.model.removesuffix(BLANK)
        if name == model and result.weights and result.weights != weights:
            raise ConfigError(
                f"{path}: the score of {model} on {result.benchmark} belongs to other weights "
                f"({result.weights}, now {weights}). Choose another --output, or delete {output}."
            )
        is_same = name == model or (weights and result.weights == weights)
        if is_same and result.dtype and _bits_of(result.dtype) != _bits_of(dtype):
            raise ConfigError(
                f"{path}: the score of {name} on {result.benchmark} is of weights in {result.dtype}, but "
                f"this run has {dtype}. Choose another --output: a row of a table is one model."
            )


def _bits_of(dtype: str) -> str:
    """Return ``4bit`` of ``float32-4bit``; other types, which a model has on other devices, may be mixed."""
    return dtype.partition("-")[2]


def _record(result: Result, output: Path) -> Result:
    """Put a result into the folder's table; a model that is there under another name keeps that one."""
    path = output / "results.json"
    with held(path, is_folder=False, wait=True):
        set_aside_if_damaged(output)
        table = ResultTable.load(path) if path.exists() else ResultTable()
        blank = BLANK if result.model.endswith(BLANK) else ""
        names = (one.model for one in table.results if one.weights and one.weights == result.weights)
        name = next(names, result.model).removesuffix(BLANK)
        result = replace(result, model=f"{name}{blank}")
        table.fitting(result).with_result(result).save(path)
    return result


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
    model: str = "",
) -> Result:
    """Score a benchmark's answers; write predictions, the official upload files and ``output/results.json``.

    There, a result with blank images (or without) goes when it is of other data or another judge than this.

    Args:
        data: the benchmark's folder.
        output: the folder that the run wrote to.
        limit: count only the first questions; 0 means all.
        judge: asked, or its recorded reviews; None leaves a benchmark that needs one without a score.
        model: whose answers they have to be: a checkpoint folder, or a name; empty: whoever gave them.

    Raises:
        DataError: no answers there, or answers to other questions.
        ConfigError: the answers are another model's.
        OutputError: another process asks or scores there.
        JudgeError: the judge does not answer.
    """
    folder = answers_folder(output, benchmark, blind=blind)
    if not (folder / "run.json").is_file():
        raise DataError(f"{folder}: no answers found. Run `tinyllava evaluate` without --score-only first.")
    if model:
        _check_model(folder, _read_run(folder), model)
    with held(folder):
        return _score(benchmark, data, output, folder, blind=blind, limit=limit, judge=judge)


def _score(
    benchmark: Benchmark,
    data: Path,
    output: Path,
    folder: Path,
    *,
    blind: bool,
    limit: int,
    judge: Judge | Reviews | None,
) -> Result:
    run = _read_run(folder)
    questions = benchmark.load(data)[: limit or None]
    if benchmark.is_edited:
        check_edited(folder, questions, blind=blind)
    answers = read_answers(folder, questions)
    reviews = judge if benchmark.judging is not None else None
    if isinstance(reviews, Judge):
        reviews = reviews.review(benchmark, questions, answers, data)
        name = re.sub(r"[^\w.-]", "_", reviews.judge)
        save_reviews(reviews, folder / f"reviews-{name}.jsonl")
    judge_name = reviews.judge if reviews else ""
    scored = benchmark.score(questions, answers, reviews.replies if reviews else None, judge_name)
    if reviews is not None:
        reviews.check_answers(benchmark.name, answers)
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
        model=f"{run['model']}{BLANK}" if blind else run["model"],
        dtype=run["dtype"],
        decoding=_name_decoding(run),
        judge=judge_name or None,
        notes=_notes(benchmark, data, run, blind=blind),
    )
    result = _record(replace(result, weights=str(run.get("weights") or "")), output)
    if benchmark.export is not None and not blind:
        benchmark.export(questions, answers, data, folder / "upload")
    return result
