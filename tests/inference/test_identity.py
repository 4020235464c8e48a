"""Answers of two runs are never mixed: what is written down, and what is said when it does not fit."""

import json
from pathlib import Path

import pytest

from tinyllava.errors import ConfigError
from tinyllava.inference.file import claim_answers

RUN = {"model": "a", "weights": "1", "blind": False}


def claim(folder: Path, run: dict[str, object], **options: object) -> None:
    claim_answers(folder, folder / "run.json", run, fix="Choose another.", **options)


def test_the_same_run_goes_on_and_another_is_named(tmp_path: Path) -> None:
    claim(tmp_path, RUN)
    assert json.loads((tmp_path / "run.json").read_text()) == RUN
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    claim(tmp_path, RUN)
    with pytest.raises(ConfigError, match=r"blind = False, but this run has True\. Choose another\."):
        claim(tmp_path, RUN | {"blind": True})
    with pytest.raises(ConfigError, match="limit = None, but this run has 3"):
        claim(tmp_path, RUN | {"limit": 3})


def test_a_folder_may_move_only_where_its_weights_are_the_same(tmp_path: Path) -> None:
    claim(tmp_path, RUN)
    with pytest.raises(ConfigError, match="model = 'a', but this run has 'b'"):
        claim(tmp_path, RUN | {"model": "b"})
    claim(tmp_path, RUN | {"model": "b"}, told_by={"model": "weights"})
    with pytest.raises(ConfigError, match="model = 'a', but this run has 'b'"):
        claim(tmp_path, RUN | {"model": "b", "weights": "2"}, told_by={"model": "weights"})


def test_without_weights_it_is_the_name_that_tells(tmp_path: Path) -> None:
    claim(tmp_path, {"model": "a", "weights": ""}, told_by={"model": "weights"})
    with pytest.raises(ConfigError, match="model = 'a', but this run has 'b'"):
        claim(tmp_path, {"model": "b", "weights": ""}, told_by={"model": "weights"})


def test_what_is_noted_is_replaced_and_not_compared(tmp_path: Path) -> None:
    claim(tmp_path, RUN, noted={"images": ["x"]})
    claim(tmp_path, RUN, noted={"images": ["x", "y"]})
    assert json.loads((tmp_path / "run.json").read_text()) == RUN | {"images": ["x", "y"]}


@pytest.mark.parametrize("damaged", ['{"model"', "[]", ""])
def test_a_damaged_identity_is_told(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "run.json").write_text(damaged)
    with pytest.raises(ConfigError, match=r"has answers, but .*run\.json does not name their run"):
        claim(tmp_path, RUN)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.json: cannot be written \(No such file"):
        claim(tmp_path / "nowhere", RUN)
