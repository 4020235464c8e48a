"""Predictions on disk."""

import json
from pathlib import Path

import pytest

from evaluation import benchmark_files as files
from tinyllava.errors import DataError
from tinyllava.evaluation.answers import read_predictions, write_predictions
from tinyllava.evaluation.benchmarks import BENCHMARKS


def predicted(folder: Path, name: str = "gqa") -> Path:
    benchmark = BENCHMARKS[name]
    questions = benchmark.load({"gqa": files.gqa, "mmvet": files.mmvet}[name](folder / "data"))
    scored = benchmark.score(questions, {q.id: f'été {q.id}\n\t"日"' for q in questions[:-1]})
    write_predictions(scored.predictions, folder / f"{name}.jsonl")
    assert read_predictions(folder / f"{name}.jsonl") == list(scored.predictions)
    return folder / f"{name}.jsonl"


@pytest.mark.parametrize("name", ["gqa", "mmvet"])
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    lines = predicted(tmp_path, name).read_text(encoding="utf-8").splitlines()
    assert len(lines) == {"gqa": 4, "mmvet": 3}[name]
    assert json.loads(lines[0]).keys() == {
        "benchmark",
        "question_id",
        "image",
        "prompt",
        "answer",
        "parsed",
        "score",
        "category",
        "groups",
        "judge",
        "is_clear",
        "is_cut",
        "target",
    }


def test_scoring_again_needs_no_model(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["pope"]
    questions = benchmark.load(files.pope(tmp_path))
    first = benchmark.score(questions, {q.id: "No, it is not." for q in questions})
    write_predictions(first.predictions, tmp_path / "p.jsonl")
    answers = {one.question_id: one.answer for one in read_predictions(tmp_path / "p.jsonl")}
    assert benchmark.score(questions, answers) == first


@pytest.mark.parametrize(
    ("old", "new", "line", "gist"),
    [
        ('"score": 0.0', '"score": "0"', 1, "field 'score' is '0'; it must be a number or null"),
        ('"score": 0.0', '"score": true', 1, "field 'score' is True"),
        ('"parsed"', '"parse"', 1, "unknown field 'parse'"),
        ('"image": "n161313.jpg", ', "", 1, "no field 'image'"),
        ('"question_id": "201640614"', '"question_id": "201307251"', 2, "was already answered on line 1"),
        (
            '"benchmark": "gqa", "question_id": "203"',
            '"benchmark": "pope", "question_id": "203"',
            4,
            "are of 'gqa'",
        ),
        ('"groups": []}', '"groups": ', 4, "not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, old: str, new: str, line: int, gist: str) -> None:
    path = predicted(tmp_path)
    text = path.read_text(encoding="utf-8")
    if old == '"groups": []}':
        text = text[:-30]
    else:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert f"{path}:{line}: " in str(caught.value)
    assert gist in str(caught.value)
