"""Scored answers on disk, one line of JSON each, read strictly; and the answer files of LLaVA's scripts.

Paper: section 4.1.3. Scoring again, comparing and judging start from these files and need no model.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.read import Record, read_lines

_TEXTS = ("benchmark", "question_id", "picture", "prompt", "answer", "parsed", "category")
_FIX = "Delete the line, or the file, and evaluate again."


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    """Write a file anew, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in predictions)
    temporary.replace(path)


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file of predictions of one benchmark.

    Raises:
        DataError: a line that does not follow the format, a question twice, or two benchmarks in the file.
    """
    if path.exists() and path.stat().st_size == 0:
        return []
    predictions: list[Prediction] = []
    lines: dict[str, int | None] = {}
    for record in read_lines(path):
        prediction = _parse(record)
        if prediction.question_id in lines:
            first = lines[prediction.question_id]
            record.fail(f"question {prediction.question_id!r} was already answered on line {first}.", _FIX)
        if predictions and prediction.benchmark != predictions[0].benchmark:
            record.fail(
                f"field 'benchmark' is {prediction.benchmark!r}, but the lines before are of "
                f"{predictions[0].benchmark!r}.",
                _FIX,
            )
        lines[prediction.question_id] = record.line
        predictions.append(prediction)
    return predictions


def _parse(record: Record) -> Prediction:
    score = record.field("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        record.fail(f"field 'score' is {score!r}; it has to be a number or null.", _FIX)
    unknown = set(record.values) - {*_TEXTS, "score", "groups"}
    if unknown:
        record.fail(f"unknown field {min(unknown)!r}.", _FIX)
    texts = {name: record.text(name) for name in _TEXTS}
    return Prediction(**texts, score=score, groups=tuple(record.texts("groups")))


def answers_of(predictions: Iterable[Prediction]) -> dict[str, str]:
    """Return the raw answers by question id: what ``Benchmark.score`` takes."""
    return {prediction.question_id: prediction.answer for prediction in predictions}


def write_llava_answers(
    questions: Sequence[Question], answers: Mapping[str, str], path: Path, *, model: str
) -> None:
    """Write the answers in the form of LLaVA's scripts, for its own scoring tools."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for question in questions:
            if question.id not in answers:
                continue
            given_id = question.meta.get("llava_id", question.id)
            entry: dict[str, object] = {
                "question_id": int(given_id) if given_id.isdigit() else given_id,
                "prompt": question.prompt,
                "text": answers[question.id],
                "answer_id": question.id,
                "model_id": model,
                "metadata": {},
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_llava_answers(path: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Return the answers of a file of LLaVA's scripts by our question ids, joined by id and prompt.

    Raises:
        DataError: a line that belongs to no question, or to one that was answered before.
    """
    by_key = {(q.meta.get("llava_id", q.id), _words(q.prompt)): q.id for q in questions}
    answers: dict[str, str] = {}
    for record in read_lines(path):
        key = (record.text("question_id"), _words(record.text("prompt").removeprefix("<image>\n")))
        if key not in by_key:
            record.fail(
                f"no question with id {key[0]!r} and this prompt; the answers are of other data.", _FIX
            )
        if by_key[key] in answers:
            record.fail(f"question {key[0]!r} is answered a second time.", _FIX)
        answers[by_key[key]] = record.text("text")
    return answers


def _words(prompt: str) -> str:
    return " ".join(prompt.split())
