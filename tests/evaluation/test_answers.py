"""Answers on disk: damaged lines of ours, and the answer files of LLaVA's scripts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation import benchmark_files as files
from tinyllava.errors import DataError
from tinyllava.evaluation.answers import AnswerFile, read_answers, read_llava_answers, write_llava_answers
from tinyllava.evaluation.benchmarks import BENCHMARKS


@pytest.mark.parametrize(
    ("damage", "gist"),
    [(b"\0" * 20 + b"\n", "not JSON"), (b"7\n", "it must be a record"), (b'{"text": ""}\n', "no field")],
)
def test_a_damaged_line_is_named(damage: bytes, gist: str, tmp_path: Path) -> None:
    questions = BENCHMARKS["pope"].load(files.pope(tmp_path))
    with AnswerFile(tmp_path) as file:
        file.append([(questions[0], "yes")])
    path = tmp_path / "answers-000.jsonl"
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(DataError, match=rf"answers-000.jsonl:2: .*{gist}"):
        read_answers(tmp_path, questions)


def test_an_answer_about_another_image_is_refused(tmp_path: Path) -> None:
    """POPE asks the same about many images: a question keeps id and prompt in another release."""
    questions = BENCHMARKS["pope"].load(files.pope(tmp_path))
    with AnswerFile(tmp_path) as file:
        file.append([(questions[0], "yes")])
    now = [replace(questions[0], image="another.jpg"), *questions[1:]]
    with pytest.raises(DataError, match=r"'1' was about the image 'COCO_\w+.jpg', but is now 'another.jpg'"):
        read_answers(tmp_path, now)
    path = tmp_path / "answers-000.jsonl"
    line = json.loads(path.read_text())
    del line["image"]  # as earlier versions wrote it
    path.write_text(json.dumps(line) + "\n")
    assert read_answers(tmp_path, now) == {questions[0].id: "yes"}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("textvqa", files.textvqa),
        ("mme", files.mme),
        ("pope", files.pope),
        ("mmbench", files.mmbench),
        ("scienceqa", files.scienceqa),
        ("mmvet", files.mmvet),
        ("gqa", files.gqa),
        ("vqav2", files.vqav2_test),
    ],
)
def test_answers_of_llavas_scripts_find_their_questions(name: str, write, tmp_path: Path) -> None:
    """TextVQA's and MME's ids stand for several questions there: the prompt tells them apart."""
    questions = BENCHMARKS[name].load(write(tmp_path))
    answers = {question.id: f"answer {number}" for number, question in enumerate(questions)}
    path = tmp_path / "answers" / "merge.jsonl"
    number_ids = BENCHMARKS[name].has_number_ids
    write_llava_answers(questions, answers, path, model="m", number_ids=number_ids)
    assert read_llava_answers(path, questions) == answers
    first = json.loads(path.read_text().splitlines()[0])
    assert first.keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    # The types of the ids in LLaVA's question files: its tools look them up as they stand.
    expected = {
        "textvqa": "003a8ae2ef43b901",
        "mme": "existence/0001.jpg",
        "pope": 1,
        "mmbench": 241,
        "scienceqa": "11",
        "mmvet": 0,
        "gqa": "201307251",
        "vqav2": 1000,
    }
    assert first["question_id"] == expected[name]
    assert ("<image>\n" in first["prompt"]) == (name == "scienceqa")


def test_an_answer_of_llavas_scripts_to_another_prompt_is_refused(tmp_path: Path) -> None:
    questions = BENCHMARKS["pope"].load(files.pope(tmp_path))
    files.write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "prompt": "Another?", "text": "yes"}])
    with pytest.raises(DataError, match=r"a.jsonl:1: no question with id '1' and this prompt"):
        read_llava_answers(tmp_path / "a.jsonl", questions)
