"""Digests of records and images: the same data has the same digest in every folder.

Paper: none. An image is read once. Its hash is stored by path, size and times, so that the next run only
compares these.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path

from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.cores import map_parts, num_cores
from tinyllava.data.images import naming_record, open_image, read_image_bytes
from tinyllava.data.store import ROWS
from tinyllava.errors import ImageError

_Stamp = tuple[int, int, int]
"""Size in bytes, time of the last change of the content and of the entry, in nanoseconds."""
_FRESH_NS = 2 * 10**9  # a file written so lately may change again within one tick of its file system's clock
_AT_ONCE = 256
_STAMPED = 32  # files that a thread looks at together: handing one over takes longer than looking at it
_WHOLE = (
    "CREATE TABLE IF NOT EXISTS whole (path TEXT PRIMARY KEY, size INTEGER, modified INTEGER, "
    "changed INTEGER) WITHOUT ROWID"
)
"""Images that were decoded without an error."""


class ImageHashes:
    """SHA-256 of images, kept in a database in a file; without a place to keep them all are read again.

    Args:
        path: the database; made when it is not there, and replaced when it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_read = 0
        """Image files whose content was read."""
        self.num_decoded = 0
        """Images that ``find_broken`` decoded."""

    def find(
        self,
        conversations: Sequence[Conversation],
        progress: Callable[[int], None] = lambda n: None,
        refs: Sequence[ImageRef] | None = None,
    ) -> dict[ImageRef, str]:
        """Return the hash of every image.

        Args:
            refs: the images of the conversations, each once, where that is known.

        Raises:
            ImageError: an image cannot be read; its record is named.
        """
        if refs is None:
            refs = list(dict.fromkeys(ref for talk in conversations for ref in talk.images))
        found: dict[ImageRef, str] = {}
        with closing(_open_database(self.path)) as database, ThreadPoolExecutor(_AT_ONCE // 32) as threads:
            for start in range(0, len(refs), _AT_ONCE):
                part = refs[start : start + _AT_ONCE]
                pieces = [part[n : n + _STAMPED] for n in range(0, len(part), _STAMPED)]
                found_stamps = chain.from_iterable(threads.map(_stamps, pieces))
                stamps = dict(zip(part, found_stamps, strict=True))
                known = {ref: _look_up(database, ref, stamps[ref]) for ref in part}
                unknown = [ref for ref in part if not known[ref]]
                for ref, hashed in zip(unknown, threads.map(_hash, unknown), strict=True):
                    if isinstance(hashed, ImageError):
                        with naming_record(next(talk for talk in conversations if ref in talk.images)):
                            raise hashed
                    known[ref] = hashed
                self.num_read += sum(ref.path is not None for ref in unknown)
                _keep(database, [(ref, stamps[ref], known[ref]) for ref in unknown])
                found |= known
                progress(len(part))
        return found

    def find_broken(
        self, refs: Sequence[ImageRef], progress: Callable[[int], None] = lambda n: None
    ) -> dict[ImageRef, ImageError]:
        """Decode images by all cores, and return those that cannot be decoded, each with the reason.

        What was whole is kept by path, size and times (bytes by their hash), and decoded again only when it
        has changed.
        """
        broken: dict[ImageRef, ImageError] = {}
        with closing(_open_database(self.path)) as database, ThreadPoolExecutor(num_cores()) as threads:
            for start in range(0, len(refs), _AT_ONCE):
                part = refs[start : start + _AT_ONCE]
                known = dict(zip(part, threads.map(_identify, part), strict=True))
                unknown = [ref for ref in part if not _is_whole(database, known[ref])]
                found = dict(zip(unknown, threads.map(_damage, unknown), strict=True))
                broken |= {ref: error for ref, error in found.items() if error is not None}
                _keep_whole(database, [known[ref] for ref, error in found.items() if error is None])
                self.num_decoded += len(unknown)
                progress(len(part))
        return broken


_Identity = tuple[str, _Stamp | None]
"""Name of an image that was decoded, and the stamp under which it counts."""


def _identify(ref: ImageRef) -> _Identity:
    if ref.data is not None:
        return f"sha256 {hashlib.sha256(ref.data).hexdigest()}", (len(ref.data), 0, 0)
    return _key(ref), _stamp(ref)


def _damage(ref: ImageRef) -> ImageError | None:
    try:
        open_image(ref)
    except ImageError as error:
        return error
    return None


def _is_whole(database: sqlite3.Connection, known: _Identity) -> bool:
    name, stamp = known
    query = "SELECT 1 FROM whole WHERE path = ? AND size = ? AND modified = ? AND changed = ?"
    with suppress(sqlite3.DatabaseError, UnicodeEncodeError):
        return stamp is not None and database.execute(query, (name, *stamp)).fetchone() is not None
    return False


def _keep_whole(database: sqlite3.Connection, found: Sequence[_Identity]) -> None:
    now = time.time_ns()
    rows = [(name, *stamp) for name, stamp in found if stamp and max(stamp[1:]) < now - _FRESH_NS]
    with suppress(sqlite3.DatabaseError, UnicodeEncodeError), database:
        database.executemany("INSERT OR REPLACE INTO whole VALUES (?, ?, ?, ?)", rows)


def _stamps(refs: Sequence[ImageRef]) -> list[_Stamp | None]:
    return [_stamp(ref) for ref in refs]


def _stamp(ref: ImageRef) -> _Stamp | None:
    if ref.path is None:
        return None
    try:
        status = ref.path.stat()
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


def _look_up(database: sqlite3.Connection, ref: ImageRef, stamp: _Stamp | None) -> str:
    query = "SELECT sha256 FROM images WHERE path = ? AND size = ? AND modified = ? AND changed = ?"
    with suppress(sqlite3.DatabaseError, UnicodeEncodeError):
        row = database.execute(query, (_key(ref), *stamp)).fetchone() if stamp else None
        return str(row[0]) if row else ""
    return ""


def _keep(database: sqlite3.Connection, hashed: Sequence[tuple[ImageRef, _Stamp | None, str]]) -> None:
    """Save hashes. Those that cannot be saved are computed again next time."""
    now = time.time_ns()
    rows = [
        (_key(ref), *stamp, sha256)
        for ref, stamp, sha256 in hashed
        if stamp is not None and max(stamp[1:]) < now - _FRESH_NS and stamp == _stamp(ref)
    ]
    with suppress(sqlite3.DatabaseError, UnicodeEncodeError), database:
        database.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?)", rows)


def _key(ref: ImageRef) -> str:
    return os.path.abspath(ref.path or ref.name)  # noqa: PTH100 (resolve would ask the disk about each part)


def records_digest(conversations: Sequence[Conversation]) -> str:
    """Return a digest of the content of conversations in order, without ids and places of files."""
    return _digest_each(conversations, lambda talk: [_describe(message) for message in talk.messages])


def images_digest(conversations: Sequence[Conversation], hashes: Mapping[ImageRef, str]) -> str:
    """Return a digest of the images of conversations, in order."""
    return _digest_each(conversations, lambda talk: [hashes[ref] for ref in talk.images])


def _digest_each(conversations: Sequence[Conversation], describe: Callable[[Conversation], object]) -> str:
    """Return the digest of a line of JSON for each conversation; the lines are written by all cores."""

    def lines(start: int) -> bytes:
        some = conversations[start : start + ROWS]
        return b"".join(json.dumps(describe(talk)).encode() + b"\n" for talk in some)

    digest = hashlib.sha256()
    for part in map_parts(lines, range(0, len(conversations), ROWS)):
        digest.update(part)
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
