"""JSON with every oddity: one kind of error, with the place."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllava.config import run_from_json
from tinyllava.data.conversion import _fingerprint
from tinyllava.data.readers.folder import read_folder
from tinyllava.errors import CheckpointError, ConfigError, DataError
from tinyllava.evaluation.read import find_parquet, read_json
from tinyllava.evaluation.results import load_results
from tinyllava.files import bytes_below, describe_files, found_below, parse_json
from tinyllava.parts import folders
from tinyllava.studies.graph import _part_digest
from tinyllava.training.checkpoints import find_stage

ODD = {
    "digits": ('{"a":\n ' + "7" * 5000 + "}", "an integer with 5,000 digits", (2, 2)),
    "lists": ("[[\n" + "[" * 100_000, "nested too deeply", (2, 100_000)),
    "objects": ('{"a":' * 100_000, "nested too deeply", (1, 499_996)),
    "cut": ('{"a": [1, 2', "Expecting ',' delimiter", (1, 12)),
}


@pytest.mark.parametrize("case", ODD)
def test_every_oddity_is_a_json_error_with_its_place(case):
    text, message, place = ODD[case]
    with pytest.raises(json.JSONDecodeError) as caught:
        parse_json(text)
    assert caught.value.msg == message
    assert (caught.value.lineno, caught.value.colno) == place


def test_half_a_character_is_refused_where_it_is_asked_for():
    text = '{"a": "\\ud83d\\ude00", "b": ["x \\ud83d"]}'
    assert parse_json(text)["b"] == ["x \ud83d"]
    with pytest.raises(json.JSONDecodeError, match="an unpaired surrogate: line 1"):
        parse_json(text, whole_characters=True)
    assert parse_json('{"a": "\\ud83d\\ude00"}', whole_characters=True) == {"a": "\U0001f600"}


@pytest.mark.parametrize("text", ['{"seed": ' + "1" * 5000 + "}", '{"name": "\\ud800"}', "[" * 100_000])
def test_configs_results_and_benchmarks_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    for read, error in (
        (lambda: run_from_json(text, str(path)), ConfigError),
        (lambda: read_json(path), DataError),
        (lambda: load_results(path), DataError),
    ):
        with pytest.raises(error) as caught:
            read()
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


class Listing(Iterator[os.DirEntry]):
    """What a folder had in it; whatever is called gone is removed as soon as it is listed."""

    def __init__(self, entries: list[os.DirEntry]) -> None:
        self.entries = iter(entries)
        for entry in entries:
            if entry.name.startswith("gone"):
                shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir() else Path(entry.path).unlink()

    def __next__(self) -> os.DirEntry:
        return next(self.entries)

    def __enter__(self) -> "Listing":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    close = __exit__


def find_shared_stage(folder: Path) -> str:
    return find_stage(folder / "run/pretrain", "key").name


WALKS = {
    "bytes": (bytes_below, "run/pretrain/a.png", "gone/a.png", "run/gone.png"),
    "flat": (lambda folder: found_below(folder, "*/*.png"), "run/a.png", "gone/a.png"),
    "records": (lambda folder: _fingerprint(folder, folder), "run/a.png", "gone/a.png", "run/gone.png"),
    "images": (lambda folder: list(read_folder(folder)), "run/a.png", "gone/a.png"),
    "part": (_part_digest, "a.safetensors", "gone.incomplete"),
    "shards": (lambda folder: find_parquet(folder, "test"), "run/test-0.parquet", "gone/test-0.parquet"),
    "stage": (find_shared_stage, "other/pretrain/stage.json", "gone/pretrain/stage.json"),
}


@pytest.mark.parametrize("num_listed", [1, 2])
@pytest.mark.parametrize("case", WALKS)
def test_what_vanishes_from_a_folder_is_passed_over(case, num_listed, tmp_path, monkeypatch):
    """It vanishes as the folder is listed, or listed a second time: ``rglob`` lists each folder twice."""
    walk, kept, *gone = WALKS[case]
    (tmp_path / "a").write_text("a")
    content = json.dumps({"key": "key", "files": describe_files(tmp_path, ["a"])})
    for name in (kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        (tmp_path / name).with_name("a").write_text("a")
    listed, seen = os.scandir, Counter[str]()

    def scandir(place: str | Path = ".") -> os.DirEntry | Listing:
        seen[str(place)] += 1
        return Listing(list(listed(place))) if seen[str(place)] >= num_listed else listed(place)

    monkeypatch.setattr(os, "scandir", scandir)
    found = walk(tmp_path)
    for name in gone:
        (tmp_path / name).unlink(missing_ok=True)
    if num_listed == 1:
        assert found == walk(tmp_path)  # nothing vanishes any more
    assert found


def test_a_checkpoint_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    for name in ("a.safetensors", "gone.safetensors"):
        (tmp_path / name).write_text("weights")
    hashed = folders.sha256_of

    def vanish(path: Path) -> str:
        (tmp_path / "gone.safetensors").unlink(missing_ok=True)
        return hashed(path)

    monkeypatch.setattr(folders, "sha256_of", vanish)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: was removed while it was read"):
        folders.fingerprint(tmp_path)
