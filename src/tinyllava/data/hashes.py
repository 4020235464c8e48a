"""Digests of records and images: the same data has the same digest in every folder.

Paper: none. An image is read once. Its hash is stored by path, size and times, so that the next run only
compares these.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.cores import map_parts, map_waiting
from tinyllava.data.distinct_images import Cells, DistinctImages, Part, Paths, Source
from tinyllava.data.images import naming_record, open_image, read_image_bytes
from tinyllava.data.store import ROWS
from tinyllava.errors import ImageError
from tinyllava.files import sha256_of

_Stamp = tuple[int, int, int]
"""Size in bytes, time of the last change of the content and of the entry, in nanoseconds."""
_FRESH_NS = 2 * 10**9  # a file written so lately may change again within one tick of its file system's clock
_AT_ONCE = 512
"""Images that a process looks at together."""
_DIGEST_BYTES = 32
_NONE = "0" * 2 * _DIGEST_BYTES
_WHOLE = (
    "CREATE TABLE IF NOT EXISTS whole (path TEXT PRIMARY KEY, size INTEGER, modified INTEGER, "
    "changed INTEGER) WITHOUT ROWID"
)
"""Images that were decoded without an error."""


class ImageDigests(Mapping[ImageRef, str]):
    """SHA-256 of each image of some conversations.

    Args:
        images: the images.
        found: [K, 32], of each in their order.
    """

    def __init__(self, images: DistinctImages, found: NDArray[np.uint8]) -> None:
        self.images, self.found = images, found

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Images that are files by their paths; made where single ones are asked for."""
        refs = ((number, self.images.ref(number)) for number in range(len(self.images)))
        return {str(ref.path): number for number, ref in refs if ref.path is not None}

    def __getitem__(self, ref: ImageRef) -> str:
        if ref.data is not None:
            return sha256_of_image(ref)
        number = self._numbers.get(str(ref.path))
        if number is None:
            raise KeyError(ref)
        return self._hex(number)

    def _hex(self, number: int) -> str:
        digest: bytes = self.found[number].tobytes()
        return digest.hex()

    def __iter__(self) -> Iterator[ImageRef]:
        return map(self.images.ref, range(len(self.images)))

    def __len__(self) -> int:
        return len(self.images)

    def of_each(self) -> Iterator[list[str]]:
        """Yield the digests of the images of each conversation, in order."""
        for numbers in self.images.of_each():
            yield list(map(self._hex, numbers))

    @property
    def digest(self) -> str:
        """A digest of all images in their order."""
        return hashlib.sha256(self.found.tobytes()).hexdigest()


@dataclass(kw_only=True)
class _Seen:
    """What was found of a part of the images."""

    num_read: int = 0
    """Images that were read, or decoded, now."""
    digests: NDArray[np.uint8] | None = None
    """[n, 32], if all were asked for."""
    broken: dict[int, ImageError] = field(default_factory=dict)
    """Images that cannot be read, or decoded, by their place in the part."""
    hashed: list[tuple[str, _Stamp, str]] = field(default_factory=list)
    """Hashes to keep: name, stamp and hash."""
    whole: list[tuple[str, _Stamp]] = field(default_factory=list)
    """Images to keep that were decoded."""

    def note(self, known: "_Identity", digest: str, *, is_whole: bool = False) -> None:
        """Keep the hash of an image, unless its file may have changed while it was read."""
        stamp = known.stamp
        is_fresh = stamp is not None and max(stamp[1:]) > time.time_ns() - _FRESH_NS
        if stamp is None or is_fresh or (known.path and stamp != _stamp(known.path)):
            return
        if is_whole:
            self.whole.append((known.name, stamp))
        if not known.digest:
            self.hashed.append((known.name, stamp, digest))


class ImageHashes:
    """SHA-256 of images, kept in a database in a file; without a place to keep them all are read again.

    Args:
        path: the database; made when it is not there, and replaced when it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_read = 0
        """Image files whose content was read by ``find``."""
        self.num_decoded = 0
        """Images that ``find_broken`` decoded."""

    def find(self, images: DistinctImages, progress: Callable[[int], None] = lambda n: None) -> ImageDigests:
        """Return the hash of every image.

        Raises:
            ImageError: an image cannot be read; its record is named.
        """
        found = np.zeros((len(images), _DIGEST_BYTES), dtype=np.uint8)
        for part, seen in self._look(images, _hash_part, progress):
            for place, error in seen.broken.items():
                shown_by, _ = next(images.showing({images.place(part).start + place}))
                with naming_record(images.conversations[shown_by]):
                    raise error
            found[images.place(part)] = 0 if seen.digests is None else seen.digests
            self.num_read += seen.num_read
        return ImageDigests(images, found)

    def find_broken(
        self, images: DistinctImages, progress: Callable[[int], None] = lambda n: None
    ) -> dict[int, ImageError]:
        """Decode images by all cores, and return those that cannot be decoded, each with the reason.

        What was whole is kept by path, size and times (bytes by their hash), and decoded again only when it
        has changed. The bytes are hashed at the same time, so that ``find`` need not read them again.
        """
        broken: dict[int, ImageError] = {}
        for part, seen in self._look(images, _decode_part, progress):
            first = images.place(part).start
            broken |= {first + place: error for place, error in seen.broken.items()}
            self.num_decoded += seen.num_read
        return broken

    def _look(
        self,
        images: DistinctImages,
        look: Callable[[sqlite3.Connection, Source, Part], _Seen],
        progress: Callable[[int], None],
    ) -> Iterator[tuple[Part, _Seen]]:
        """Yield what is found of each part of the images, by all cores, and keep it."""

        def look_at(part: Part) -> _Seen:  # a process opens the database for itself
            with closing(_open_database(self.path)) as database:
                return look(database, images.sources[part.source], part)

        parts = images.parts(_AT_ONCE)
        with closing(_open_database(self.path)) as database:
            for part, seen in zip(parts, map_parts(look_at, parts), strict=True):
                _keep(database, seen)
                yield part, seen
                progress(part.end - part.start)


def _hash_part(database: sqlite3.Connection, source: Source, part: Part) -> _Seen:
    """Return the hashes of some images; those of unchanged files are known."""
    named = _identify(source, part)
    with database:
        database.execute("BEGIN")  # otherwise each look locks the file
        found = [one.digest or _look_up(database, one) for one in named]
    unknown = [place for place, digest in enumerate(found) if not digest]
    seen = _Seen(num_read=len(unknown))
    for place, hashed in zip(unknown, _open_each(_hash, source, part, unknown), strict=True):
        if isinstance(hashed, ImageError):
            seen.broken[place] = hashed
        else:
            seen.note(named[place], hashed)
        found[place] = _NONE if isinstance(hashed, ImageError) else hashed
    seen.digests = np.frombuffer(bytes.fromhex("".join(found)), dtype=np.uint8).reshape(-1, _DIGEST_BYTES)
    return seen


def _decode_part(database: sqlite3.Connection, source: Source, part: Part) -> _Seen:
    """Decode some images; those of unchanged files that were whole are whole."""
    named = _identify(source, part)
    with database:
        database.execute("BEGIN")  # otherwise each look locks the file
        unknown = [place for place, one in enumerate(named) if not _is_whole(database, one)]
    seen = _Seen(num_read=len(unknown))
    for place, found in zip(unknown, _open_each(_decode, source, part, unknown), strict=True):
        if isinstance(found, ImageError):
            seen.broken[place] = found
        else:
            seen.note(named[place], found, is_whole=True)
    return seen


def _open_each(
    work: Callable[[ImageRef], str | ImageError], source: Source, part: Part, places: Sequence[int]
) -> list[str | ImageError]:
    """Return what is found of some images of a part; the bytes of few are held at a time."""

    def open_one(place: int) -> str | ImageError:
        [ref] = source.refs(part.start + place, part.start + place + 1)
        return work(ref)

    return map_waiting(open_one, places)


class _Identity(NamedTuple):
    """Under which name and stamp an image is kept."""

    name: str
    stamp: _Stamp | None
    """None: it cannot be looked at, or there is none."""
    path: str = ""
    """Of its file; empty for bytes."""
    digest: str = ""
    """SHA-256 of its bytes, where these are in memory."""


def _identify(source: Source, part: Part) -> list[_Identity]:
    if isinstance(source, Paths):
        paths = source.paths(part.start, part.end)
        return list(map(_Identity, map(_absolute, paths), map_waiting(_stamp, paths), paths))
    if isinstance(source, Cells):
        records = str(source.file.folder / "records.arrow")
        name, stamp = _absolute(records), _stamp(records)
        return [_Identity(f"{name} {place}", stamp) for place in source.places[part.start : part.end]]
    return [_identify_ref(ref) for ref in source.refs(part.start, part.end)]


def _identify_ref(ref: ImageRef) -> _Identity:
    if ref.data is None:
        path = str(ref.path or ref.name)
        return _Identity(_absolute(path), _stamp(path), path)
    digest = hashlib.sha256(ref.data).hexdigest()
    return _Identity(f"sha256 {digest}", (len(ref.data), 0, 0), digest=digest)


def _decode(ref: ImageRef) -> str | ImageError:
    """Return the hash of an image that can be decoded."""
    try:
        data = read_image_bytes(ref)
        open_image(ImageRef(data=data, name=str(ref)))
    except ImageError as error:
        return error
    return hashlib.sha256(data).hexdigest()


def _stamp(path: str) -> _Stamp | None:
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path costs more than the look)
    except (OSError, ValueError):
        return None  # told when it is read
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sha256_of_image(ref: ImageRef) -> str:
    """Return the SHA-256 of the encoded bytes of an image.

    Raises:
        ImageError: it cannot be read.
    """
    return hashlib.sha256(read_image_bytes(ref)).hexdigest()


def _hash(ref: ImageRef) -> str | ImageError:
    try:
        return sha256_of_image(ref)
    except ImageError as error:
        return error  # raised by the caller, which knows the record


def known_sha256(path: Path, kept: Path) -> str:
    """Return the SHA-256 of a file, which is read again only if its size or a time has changed.

    Args:
        kept: a database, as of ``ImageHashes``.
    """
    named = _identify_ref(ImageRef(path=path))
    with closing(_open_database(kept)) as database:
        if found := _look_up(database, named):
            return found
        found, seen = sha256_of(path), _Seen()
        seen.note(named, found)
        _keep(database, seen)
    return found


def _open_database(path: Path) -> sqlite3.Connection:
    """Open the database at a path, or one in memory if that is not possible."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            database = sqlite3.connect(path, timeout=30)
            database.execute(
                "CREATE TABLE IF NOT EXISTS images (path TEXT PRIMARY KEY, size INTEGER, modified INTEGER, "
                "changed INTEGER, sha256 TEXT) WITHOUT ROWID"
            )
            database.execute(_WHOLE)
            database.execute("SELECT path, size, modified, changed, sha256 FROM images LIMIT 1").fetchall()
            return database
        except sqlite3.OperationalError:  # read-only, full, or locked by a file system that cannot share it
            break
        except sqlite3.DatabaseError:
            with suppress(OSError):
                path.unlink()
    database = sqlite3.connect(":memory:")
    database.execute(
        "CREATE TABLE images (path TEXT, size INTEGER, modified INTEGER, changed INTEGER, sha256 TEXT)"
    )
    database.execute(_WHOLE)
    return database


def _look_up(database: sqlite3.Connection, known: _Identity) -> str:
    query = "SELECT size, modified, changed, sha256 FROM images WHERE path = ?"
    with suppress(sqlite3.DatabaseError, UnicodeEncodeError):
        for *stamp, digest in database.execute(query, (known.name,)).fetchall():
            if tuple(stamp) == known.stamp and len(digest) == 2 * _DIGEST_BYTES:
                return str(digest)
    return ""


def _is_whole(database: sqlite3.Connection, known: _Identity) -> bool:
    query = "SELECT size, modified, changed FROM whole WHERE path = ?"
    with suppress(sqlite3.DatabaseError, UnicodeEncodeError):
        return known.stamp in database.execute(query, (known.name,)).fetchall()
    return False


def _keep(database: sqlite3.Connection, seen: _Seen) -> None:
    """Save what was found. What cannot be saved is found again next time."""
    hashed = [(name, *stamp, digest) for name, stamp, digest in seen.hashed]
    whole = [(name, *stamp) for name, stamp in seen.whole]
    if not hashed and not whole:
        return
    with suppress(sqlite3.DatabaseError, UnicodeEncodeError), database:
        database.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?)", hashed)
        database.executemany("INSERT OR REPLACE INTO whole VALUES (?, ?, ?, ?)", whole)


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 (resolve would ask the disk about each part)


def records_digest(conversations: Sequence[Conversation]) -> str:
    """Return a digest of the content of conversations in order, without ids and places of files.

    A line of JSON for each conversation is digested; the lines are written by all cores.
    """

    def lines(start: int) -> bytes:
        some = conversations[start : start + ROWS]
        talks = ([_describe(message) for message in talk.messages] for talk in some)
        return b"".join(json.dumps(talk).encode() + b"\n" for talk in talks)

    digest = hashlib.sha256()
    for part in map_parts(lines, range(0, len(conversations), ROWS)):
        digest.update(part)
    return digest.hexdigest()


def images_digest(hashes: ImageDigests) -> str:
    """Return a digest of the images of conversations, in order."""
    digest = hashlib.sha256()
    for found in hashes.of_each():
        digest.update(json.dumps(found).encode() + b"\n")
    return digest.hexdigest()


def _describe(message: Message) -> list[object]:
    """Return the content of a turn. Rare fields are omitted at their defaults, which keeps old digests."""
    places = [list(message.places)] if message.places else []
    return [
        message.role,
        message.text,
        len(message.images),
        *places,
        *([] if message.is_trained else ["no loss"]),
    ]
