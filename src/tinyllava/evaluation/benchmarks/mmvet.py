"""MM-Vet: 218 open questions that combine six capabilities, graded by a judge model from 0 to 1.

Paper: appendix A; the column MM-Vet of Tables 3 and A1, judged by GPT-4.
Differs: ``mmvet-own-prompt`` uses this project's own judge prompt, for users without the official evaluator.
"""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

from tinyllava.conversation import ImageRef
from tinyllava.errors import DataError
from tinyllava.evaluation.benchmark import Benchmark, Grade, Prediction, write_export
from tinyllava.evaluation.question import JudgeRequest, Judging, Question, QuestionList, Wording, no_source
from tinyllava.evaluation.read import (
    ImageFiles,
    NeededFile,
    Record,
    find_parquet,
    read_entries,
    read_parquet,
    read_python,
    unpack_image,
)
from tinyllava.evaluation.results import Metric

GOLD = "mm-vet.json"
EVALUATOR = "mm-vet_evaluator.py"
SITE = "https://github.com/yuweihao/MM-Vet"
LICENCE = "CC BY-NC 4.0"
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def load(folder: Path) -> list[Question]:
    """Read mm-vet.json (in the folder or in ``mm-vet/``), or a parquet mirror."""
    questions = QuestionList()
    for question_id, record, image in _read_records(folder):
        has = record.field("capability")
        names = has.split(",") if isinstance(has, str) else record.texts("capability")
        if not names or not set(names) <= set(CAPABILITIES):
            record.fail(f"field 'capability' is {names}; it must list some of {', '.join(CAPABILITIES)}.")
        in_order = [name for name in CAPABILITIES if name in names]
        groups = (*(f"capability={name}" for name in in_order), f"set={'+'.join(in_order)}")
        text, target = record.text("question"), record.text("answer")
        meta = {"llava_id": question_id.removeprefix("v1_")}
        questions.add(record, id=question_id, text=text, image=image, target=target, groups=groups, meta=meta)
    return questions.finish(folder)


def _read_records(folder: Path) -> Iterator[tuple[str, Record, ImageRef]]:
    root = folder / "mm-vet" if (folder / "mm-vet" / GOLD).exists() else folder
    if (root / GOLD).exists():
        images = ImageFiles(root / "images")
        for question_id, record in read_entries(root / GOLD).items():
            yield question_id, record, images[record.text("imagename")]
        return
    shards = find_parquet(folder, "")
    if not shards:
        raise no_source(folder, "mmvet", GOLD, "parquet shards")
    for record in read_parquet(shards):
        question_id = record.text("question_id")
        yield question_id, record, unpack_image(record, "image", folder, f"{question_id}.png")


def read_official_wording(folder: Path) -> Wording:
    """Return the prompt and the line of the second try out of the user's copy of the official evaluator."""
    path = folder / EVALUATOR
    if not path.exists():
        raise DataError(
            f"{path}: no such file; it contains the official judge prompt. Download it from {SITE}, or "
            "evaluate mmvet-own-prompt, whose scores have their own column."
        )
    tree = read_python(path, SITE)
    prompts = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and any(isinstance(target, ast.Name) and target.id == "prompt" for target in node.targets)
    ]
    again = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "(digit)" in node.value
    ]
    if not prompts or not again:
        raise DataError(f"{path}:1: no judge prompt of MM-Vet. Download the file from {SITE}.")
    return {"prompt": prompts[0], "again": again[0]}


_OWN_WORDING = {
    "prompt": (
        "Grade a reply to a question about an image against the truth, from 0.0 (wrong) to 1.0 (right) in "
        "steps of 0.1. Where the truth joins parts by <AND>, each part counts its share; where it joins them "
        "by <OR>, one part is enough. Fill in the last cell with the grade alone.\n\n"
        "Question | Truth | Reply | Grade\n--- | --- | --- | ---\n"
        "Which fruits are there? | pear <AND> plum | A pear. | 0.5\n"
        "Which fruits are there? | pear <AND> plum | Plums and a pear. | 1.0\n"
        "What is the sum? | 12 <OR> twelve | It is 11. | 0.0\n"
        "What is the sum? | 12 <OR> twelve | Twelve | 1.0\n"
    ),
    "again": "\nGrade (a number): ",
}


def _ask(wording: Wording, question: Question, answer: str, num_tries: int) -> JudgeRequest:
    """Make the table's open row; later tries ask for a digit, warmer by 0.5 each after the second."""
    truth = question.target.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    content = f"{wording['prompt']}\n{question.prompt} | {truth} | {answer} | "
    if num_tries:
        content += wording["again"]
    temperature = 0.5 * max(0, num_tries - 1)
    return JudgeRequest(
        messages=({"role": "user", "content": content},), temperature=temperature, max_tokens=3
    )


def _read_score(reply: str) -> float | None:
    try:
        score = float(reply.split(" ", maxsplit=1)[0].strip())
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def _grade_reply(question: Question, reply: str) -> tuple[str, float]:
    score = _read_score(reply)
    return ("", 0.0) if score is None else (str(score), score)


def measure_runs(questions: Sequence[Question], predictions: Sequence[Prediction]) -> tuple[Metric, ...]:
    """Return the score of each run of the judge and their standard deviation, as the official tool prints.

    Nothing is returned for a single run.
    """
    grades = [[float(one or 0) for one in p.parsed.split(" ")] for p in predictions]
    totals = [100 * fmean(run) for run in zip(*grades, strict=True)]
    if len(totals) < 2:
        return ()
    named = {f"run {number}": total for number, total in enumerate(totals, start=1)}
    named["std of runs"] = pstdev(totals)
    return tuple(
        Metric(name=name, value=value, num_questions=len(questions)) for name, value in named.items()
    )


def export_answers(
    questions: Sequence[Question], answers: Mapping[str, str], folder: Path, out: Path
) -> Sequence[Path]:
    """Write the JSON that the hosted evaluator reads: question id -> answer."""
    entries = {question.id: answers.get(question.id, "") for question in questions}
    return write_export(out / "mm-vet_answers.json", json.dumps(entries, indent=2, ensure_ascii=False))


_FILES = (
    NeededFile(
        names=("mm-vet/mm-vet.json", GOLD, "**/*.parquet"),
        purpose="218 questions with answers and capabilities",
        source=f"mm-vet.zip of {SITE}",
        licence=LICENCE,
    ),
    NeededFile(
        names=("mm-vet/images", "images", "**/*.parquet"),
        purpose="200 images",
        num_files=200,
        source=f"mm-vet.zip of {SITE}",
        licence=LICENCE,
    ),
)

BENCHMARK = Benchmark(
    name="mmvet",
    title="MM-Vet",
    protocol="mmvet/official-prompt",
    split="v1",
    metric="accuracy",
    num_questions=218,
    prompt="{question}",
    has_number_ids=True,
    load=load,
    grade=lambda *_: Grade("", None),
    unclear="empty, or no score in the judge's reply",
    max_new_tokens=1024,
    judging=Judging(
        official_judge="gpt-4-0613",
        wording=read_official_wording,
        ask=_ask,
        is_valid=lambda _, reply: _read_score(reply) is not None,
        grade=_grade_reply,
        max_tries=5,
        has_runs=True,
    ),
    details=measure_runs,
    export=export_answers,
    folders=("mm-vet",),
    files=(
        *_FILES,
        NeededFile(
            names=(EVALUATOR,), purpose="the official judge prompt", source=SITE, licence="Apache-2.0"
        ),
    ),
)

OWN_PROMPT = replace(
    BENCHMARK,
    name="mmvet-own-prompt",
    title="MM-Vet (own prompt)",
    protocol="mmvet/own-prompt",
    judging=replace(BENCHMARK.judging, wording=lambda _: _OWN_WORDING) if BENCHMARK.judging else None,
    files=_FILES,
    notes=("judged with our own prompt; not comparable with MM-Vet",),
)
