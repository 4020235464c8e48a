"""Convert a record file to Arrow, with all checks in one pass. A repeated run converts only what changed.

Paper: none.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from tinyllava.config import DataConfig
from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.defects import Defect, raise_defects
from tinyllava.data.readers.form import Reading
from tinyllava.data.records import Records, iter_conversations, open_readings
from tinyllava.data.sources import mix
from tinyllava.data.store import BEFORE, ROLES, ROWS, SCHEMA, StoredConversations, StoreFile
from tinyllava.errors import DataError
from tinyllava.files import read_object, sha256_of, whole_file, write_json

FORMAT = 2
"""Of the files; records in another one are converted again."""


def open_store(reading: Reading, reader: str, folder: Path) -> StoreFile:
    """Return a converted record file, after converting it if needed.

    Of several processes one converts and the others wait. It is converted again where the file, the folder of
    images or a setting has changed, an image is gone, or one that was missing is there.

    Args:
        folder: where converted files of any run may be kept.

    Raises:
        DataError: see ``read_records``; or the disk is full.
    """
    place = folder / _key(reading, reader)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock"):
            return _find(place, reading) or _convert(place, reading, reader)
    except OSError as error:
        raise DataError(
            f"{place}: converted records cannot be written ({error.strerror or error}). Free some disk space."
        ) from error


def _find(place: Path, reading: Reading) -> StoreFile | None:
    known = read_object(place / "about.json")
    if known is None or not (place / "records.arrow").is_file():
        return None
    if any(Path(path).exists() for path in known.get("missing", ())):
        return None
    file = StoreFile(place, str(reading.path), reading.images, known["skipped"], known["ignored"])
    return None if file.find_gone() else file


def _convert(place: Path, reading: Reading, reader: str) -> StoreFile:
    defects: list[Defect] = []
    missing: list[str] = []
    num_rows = 0

    def good() -> Iterator[Conversation]:
        nonlocal num_rows
        for found in iter_conversations(reading, reader):
            if isinstance(found, Conversation):
                num_rows += 1
                yield found
            elif found.name in reading.skip:
                reading.skipped[found.name] += 1
                missing.extend([found.path] if found.path else [])
            else:
                defects.append(found)

    with whole_file(place / "records.arrow") as partial, pa.OSFile(str(partial), "wb") as sink:
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in _batched(good()):
                if not defects:  # of a file with defects only their report is left
                    writer.write_batch(_to_batch(batch, reading.images))
        raise_defects(reading.path, defects)
        skipped = dict(reading.skipped)
        if not num_rows:
            raise DataError(
                f"{reading.path}: no records left" + (f" after skips {skipped}." if skipped else ".")
            )
    about = {"skipped": skipped, "ignored": dict(reading.ignored), "missing": missing}
    write_json(place / "about.json", about)
    return StoreFile(place, str(reading.path), reading.images, skipped, dict(reading.ignored))


def _batched(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    for conversation in conversations:
        batch.append(conversation)
        if len(batch) == ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _to_batch(conversations: list[Conversation], images: Path) -> Any:
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for conversation in conversations:
        messages, refs = conversation.messages, conversation.images
        columns["id"].append(conversation.id)
        columns["at"].append(conversation.at)
        columns["roles"].append([ROLES.index(message.role) for message in messages])
        columns["texts"].append([message.text for message in messages])
        columns["trained"].append([message.is_trained for message in messages])
        columns["image_counts"].append([len(message.images) for message in messages])
        places = [message.places or (BEFORE,) * len(message.images) for message in messages]
        columns["image_places"].append([place for of_message in places for place in of_message])
        columns["image_names"].append([ref.name for ref in refs])
        columns["image_paths"].append([_path(ref, images) for ref in refs])
        columns["image_data"].append([ref.data for ref in refs])
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def _path(ref: ImageRef, images: Path) -> str | None:
    return None if ref.path is None or ref.path == images / ref.name else str(ref.path)


def _key(reading: Reading, reader: str) -> str:
    """Return a key of everything that determines the converted file."""
    decisive = [
        FORMAT,
        _fingerprint(reading.path),
        str(reading.path.suffix),
        str(reading.images.resolve()),
        sorted(set(reading.skip)),
        dict(reading.columns),
        reading.allow_urls,
        _code(reader),
        *(["places"] if reading.keep_places else []),
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]


def _fingerprint(path: Path) -> str:
    """Return a digest of a file; of a folder, of the names, sizes and times of its files."""
    if path.is_file():
        return sha256_of(path)
    entries = [(str(p.relative_to(path)), p.stat()) for p in sorted(path.rglob("*")) if p.is_file()]
    listed = [[name, status.st_size, status.st_mtime_ns] for name, status in entries]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _code(reader: str) -> str:
    place = Path(reader.rpartition(":")[0])
    return f"{reader} {sha256_of(place)}" if place.is_file() else reader


def read_stored(data: DataConfig, data_root: str, folder: Path) -> Records:
    """Return the samples of a stage, out of converted files.

    Args:
        folder: see ``open_store``.

    Raises:
        ConfigError, DataError: see ``open_readings`` and ``open_store``.
    """
    found = open_readings(data, data_root)
    parts = [[open_store(one, data.reader, folder) for one in readings] for _, readings in found]
    files = [file for part in parts for file in part]
    shares, rows = mix([source for source, _ in found], [sum(map(len, part)) for part in parts])
    skipped: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for file in files:
        skipped.update(file.skipped)
        ignored.update(file.ignored)
    return Records(
        conversations=StoredConversations(files, rows, None if rows is None else np.unique(rows)),
        skipped=dict(skipped),
        ignored=dict(ignored),
        mixture=() if rows is None else shares,
    )
