"""Scored answers on disk, one line of JSON each, read strictly.

Paper: section 4.1.3. Comparing starts from these files; the raw answers are in ``answers``.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.read import Record, read_lines
from tinyllava.files import write_text

_TEXTS = ("benchmark", "question_id", "image", "prompt", "answer", "parsed", "category")
_MARKS = ("is_clear", "is_cut")
_FIX = "Delete the line, or the file, and evaluate again."


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    """Write a file of predictions, whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in predictions))


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
                f"field 'benchmark' is {prediction.benchmark!r}, but the previous lines are of "
                f"{predictions[0].benchmark!r}.",
                _FIX,
            )
        lines[prediction.question_id] = record.line
        predictions.append(prediction)
    return predictions


def _parse(record: Record) -> Prediction:
    score = record.field("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        record.fail(f"field 'score' is {score!r}; it must be a number or null.", _FIX)
    marks: dict[str, Any] = {name: record.values[name] for name in _MARKS if name in record.values}
    for name, value in marks.items():
        if not isinstance(value, bool):
            record.fail(f"field {name!r} is {value!r}; it must be true or false.", _FIX)
    unknown = set(record.values) - {*_TEXTS, *_MARKS, "score", "groups", "judge"}
    if unknown:
        record.fail(f"unknown field {min(unknown)!r}.", _FIX)
    texts: dict[str, Any] = {name: record.text(name) for name in _TEXTS}
    judge = record.text("judge") if "judge" in record.values else ""
    return Prediction(**texts, **marks, score=score, groups=tuple(record.texts("groups")), judge=judge)
