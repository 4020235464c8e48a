"""The files of a study: read back as written, and refused by name where they cannot be right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from studies.studies import FOLDER, make_study, write_study
from tinyllava.errors import DataError
from tinyllava.studies.study import load_examples, load_scores, load_study, pack_predictions, save_study


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    study, answers = make_study()
    write_study(tmp_path)
    assert load_study(tmp_path) == study
    scores = load_scores(tmp_path)
    assert list(scores) == ["pope", "gqa"]
    cell = "share-C-Phi-2-seed1"
    read, written = scores["pope"].predictions("pope", cell), answers["pope"][cell]
    assert read == [replace(one, answer="") for one in written]
    assert [one.question_id for one in load_examples(tmp_path)] == ["0000", "0011", "0022"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_without_scores_and_examples_has_none(tmp_path: Path) -> None:
    assert load_scores(tmp_path) == {}
    assert load_examples(tmp_path) == []
    with pytest.raises(DataError, match=r"study.json: no such file. Run `tinyllava reproduce` to write it"):
        load_study(tmp_path)


def test_the_committed_study_is_the_one_of_the_tests(tmp_path: Path) -> None:
    write_study(tmp_path)
    for name in ("study.json", "scores.json", "examples.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "gist"),
    [
        ({"status": "done?"}, "field 'status' is 'done\\?'; known: done, failed, missing"),
        ({"panel": "Gemma"}, "panel 'Gemma' is not in"),
        ({"labels": {"recipe": "base"}}, "give one label per axis"),
        ({"labels": {"recipe": "lora", "language_model": "Phi-2"}}, "label 'lora' is not on axis 'recipe'"),
        ({"id": "base-C-TinyLlama-seed1"}, "has a result of 'base-C-TinyLlama-seed0'"),
        ({"id": "base-C-TinyLlama-seed1", "results": ()}, "two cells have the id 'base-C-TinyLlama-seed1'"),
    ],
)
def test_cells_that_cannot_be_right_are_refused(change: dict[str, object], gist: str) -> None:
    study, _ = make_study()
    wrong = replace(study.cells[0], **change)
    with pytest.raises(DataError, match=gist):
        replace(study, cells=(wrong, *study.cells[1:]))


def test_protocols_are_never_mixed_in_a_column() -> None:
    study, _ = make_study()
    pooled = replace(study.cells[0].results[0], protocol="pope/pooled-exact/lmms-eval")
    wrong = replace(study.cells[0], results=(pooled,))
    with pytest.raises(DataError, match="column 'pope' would mix two values of protocol"):
        replace(study, cells=(wrong, *study.cells[1:]))


def test_cells_that_answered_other_questions_are_not_packed() -> None:
    _, answers = make_study()
    a, b = list(answers["pope"].values())[:2]
    with pytest.raises(DataError, match="cells 'a' and 'b' answered different questions of pope"):
        pack_predictions({"a": a, "b": b[:-1]})


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        ("{", "not JSON"),
        ("[]", "format version None"),
        ('{"version": 9}', "format version 9; this program reads version 1"),
        ('{"version": 1, "name": "x"}', "does not follow the format of a study"),
    ],
)
def test_a_file_that_is_no_study_is_refused(text: str, gist: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(DataError, match=gist):
        load_study(tmp_path)


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    save_study(make_study()[0], tmp_path)
    values = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    values["cells"][0]["colour"] = "red"
    (tmp_path / "study.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="colour"):
        load_study(tmp_path)
