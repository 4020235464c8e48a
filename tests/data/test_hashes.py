"""Digests of records and images: content counts, places do not, and an image is read only once."""

import dataclasses
import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
from PIL import Image

from tinyllava.conversation import Conversation, ImageRef, ask
from tinyllava.data.distinct_images import DistinctImages
from tinyllava.data.hashes import ImageHashes, images_digest, records_digest
from tinyllava.errors import ImageError


def make_images(folder: Path, colours: str = "abc") -> list[Conversation]:
    """Uncompressed images, each of the same size in bytes, that were written some time ago."""
    folder.mkdir(exist_ok=True)
    for number, colour in enumerate(colours):
        path = folder / f"{number}.bmp"
        Image.new("RGB", (8, 8), (ord(colour), 0, 0)).save(path)
    return [ask(f"What is {n}?", folder / f"{n}.bmp", id=str(n)) for n in range(len(colours))]


def digest(conversations: list[Conversation], database: Path) -> tuple[str, int]:
    hashes = ImageHashes(database)
    return images_digest(hashes.find(DistinctImages(conversations))), hashes.num_read


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock an hour on: what was just written is no longer fresh."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)


@pytest.mark.usefixtures("later")
def test_an_image_is_read_once_and_again_when_it_changed_under_its_name_and_size(tmp_path: Path) -> None:
    shown, database = make_images(tmp_path / "a"), tmp_path / "hashes.sqlite"
    first, num_read = digest(shown, database)
    assert (num_read, digest(shown, database)) == (3, (first, 0))
    path = tmp_path / "a/1.bmp"
    before, first_written = path.stat(), (tmp_path / "a/0.bmp").stat().st_ctime_ns
    while (tmp_path / "a/0.bmp").stat().st_ctime_ns == first_written:  # within one tick of the clock
        make_images(tmp_path / "a", "aXc")
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times leaves it
    changed, num_read = digest(shown, database)
    assert changed != first
    assert num_read == 3  # all three were written anew
    assert digest(make_images(tmp_path / "b"), database)[0] == first  # the same images elsewhere


def test_an_image_that_was_just_written_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    shown = make_images(tmp_path / "a")
    assert [digest(shown, tmp_path / "hashes.sqlite")[1] for _ in range(2)] == [3, 3]


@pytest.mark.usefixtures("later")
def test_without_a_place_for_them_hashes_are_the_same(tmp_path: Path) -> None:
    shown = make_images(tmp_path / "a")
    expected = digest(shown, tmp_path / "hashes.sqlite")[0]
    (tmp_path / "file").write_text("")
    assert digest(shown, tmp_path / "file" / "hashes.sqlite") == (expected, 3)
    for damage in (b"no database at all, of some length" * 100, b""):
        (tmp_path / "damaged").write_bytes(damage)
        assert digest(shown, tmp_path / "damaged") == (expected, 3)
        assert digest(shown, tmp_path / "damaged") == (expected, 0)  # it was made anew
    with sqlite3.connect(tmp_path / "other") as database:
        database.execute("CREATE TABLE images (name TEXT)")
    assert digest(shown, tmp_path / "other") == (expected, 3)


def test_images_in_memory_and_images_that_are_gone(tmp_path: Path) -> None:
    [shown] = make_images(tmp_path / "a", "a")
    data = (tmp_path / "a/0.bmp").read_bytes()
    inside = ask("What is 0?", ImageRef(data=data, name="cell"))
    assert digest([inside], tmp_path / "hashes")[0] == digest([shown], tmp_path / "hashes")[0]
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ImageError, match=r"record 0: .*0\.bmp: no such image"):
        digest([shown], tmp_path / "hashes")


def test_records_count_by_what_they_say(tmp_path: Path) -> None:
    first, second = ask("What is it?", "a.png", id="1"), ask("Is it red?", id="2")
    expected = records_digest([first, second])
    moved = ask("What is it?", "elsewhere/a.png", id="other")
    assert records_digest([dataclasses.replace(moved, source="b.json"), second]) == expected
    for others in ([second, first], [first], [ask("What is it?", id="1"), second]):
        assert records_digest(others) != expected


@pytest.mark.usefixtures("later")
def test_an_image_is_decoded_once_and_again_when_it_changed(tmp_path: Path) -> None:
    refs = [ref for talk in make_images(tmp_path / "a") for ref in talk.images]
    refs.append(ImageRef(data=(tmp_path / "a/0.bmp").read_bytes()))
    refs.append(ImageRef(data=b"BM and nothing"))
    cut = tmp_path / "a/cut.bmp"
    cut.write_bytes((tmp_path / "a/0.bmp").read_bytes()[:-40])
    refs += [ImageRef(path=cut), ImageRef(path=tmp_path / "none.bmp")]

    def look() -> tuple[list[int], int]:
        images, seen = ImageHashes(tmp_path / "images.sqlite"), []
        broken = images.find_broken(DistinctImages([ask("Q", *refs)]), seen.append)
        assert sum(seen) == len(refs)
        return list(broken), images.num_decoded

    assert look() == ([4, 5, 6], 7)
    assert look() == ([4, 5, 6], 3)  # only what was broken
    shutil.copy(tmp_path / "a/1.bmp", cut)
    assert look() == ([4, 6], 3)
    assert look() == ([4, 6], 2)
    (tmp_path / "a/2.bmp").write_bytes(b"BM")
    assert look() == ([2, 4, 6], 3)
