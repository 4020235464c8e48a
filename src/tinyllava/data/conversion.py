"""Convert a record file to Arrow, with all checks in one pass. A repeated run converts only what changed.

Paper: none.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial as partial_of
from itertools import chain, islice
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from tinyllava.config import DataConfig
from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.cores import map_parts
from tinyllava.data.findings import Findings, Part
from tinyllava.data.hashes import known_sha256
from tinyllava.data.readers import json_slices
from tinyllava.data.readers.containers import RowGroup, is_text, row_groups
from tinyllava.data.readers.form import Reading
from tinyllava.data.records import Form, Records, convert_each, fallback_form, open_readings, read_raw
from tinyllava.data.sources import mix
from tinyllava.data.store import BEFORE, ROLES, ROWS, SCHEMA, StoredConversations, StoreFile
from tinyllava.errors import DataError
from tinyllava.files import CACHE_VARIABLE, files_below, read_object, sha256_of, whole_file, write_json

FORMAT = 2
"""Of the files; records in another one are converted again."""
_LOOKED = "looked.json"
"""Beside a converted file: when its images were last looked for."""
_AT_ONCE = 256
"""Records that are converted together; some bring the bytes of their images."""


def _open_store(reading: Reading, reader: str, folder: Path, asked: int) -> StoreFile:
    """Return a converted record file, after converting it if needed.

    Of several processes one converts and the others wait. It is converted again where the file, the folder of
    images or a setting has changed, an image is gone, or one that was missing is there. Processes that wait
    together take what one of them found of the images after all of these had come.

    Args:
        folder: where converted files of any run may be kept.
        asked: when this process began to open files, in nanoseconds.

    Raises:
        DataError: see ``read_records``; a file that is read is removed meanwhile; or the disk is full.
    """
    with naming_place(reading.path, folder):
        place = folder / _key(reading, reader, folder / "files.sqlite")
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock"):
            return _find(place, reading, asked) or _convert(place, reading, reader)


@contextmanager
def naming_place(path: Path, folder: Path) -> Iterator[None]:
    """Raise an error that names what cannot be read of a record file, or written into a folder.

    Raises:
        DataError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename)) if error.filename else folder
        is_of_disk = not isinstance(error, FileNotFoundError | PermissionError)
        if not is_of_disk and not place.is_relative_to(folder):
            raise DataError(
                f"{place}: cannot be read ({error.strerror}). Make sure that nothing changes {path}, and run "
                "the same command again."
            ) from error
        raise DataError(
            f"{place}: converted records cannot be written ({error.strerror or error}). Free some disk "
            f"space, or choose a folder that can be written with --output, or {CACHE_VARIABLE} for a check."
        ) from error


def _find(place: Path, reading: Reading, asked: int) -> StoreFile | None:
    """Return the converted file if it is still right; its images need not be looked for again since then."""
    known = read_object(place / "about.json")
    if known is None or not (place / "records.arrow").is_file():
        return None
    file, begun = _open(place, reading, known), time.time_ns()
    if (read_object(place / _LOOKED) or {}).get("begun", 0) >= asked:
        return file
    if any(os.path.exists(path) for path in known["missing"]) or file.find_gone():  # noqa: PTH110 (Paths cost)
        return None
    _note_look(place, begun)
    return file


def _note_look(place: Path, begun: int) -> None:
    """Write down when all images of a converted file were last looked for, in nanoseconds."""
    with suppress(OSError):  # then each process looks for them
        write_json(place / _LOOKED, {"begun": begun})


def _open(place: Path, reading: Reading, about: dict[str, Any]) -> StoreFile:
    missing = "\n".join(sorted(about["missing"]))
    return StoreFile(
        place,
        str(reading.path),
        reading.images,
        about["skipped"],
        about["ignored"],
        hashlib.sha256(missing.encode()).hexdigest()[:16] if missing else "",
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Give an empty folder that is removed at the end; what a killed process left in it is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_store(place: Path, reading: Reading, reader: str, done: Findings) -> None:
    """Convert a record file to ``records.arrow`` in a folder.

    Args:
        done: takes what is found; where it counts a defect, only its report is of use.
    """
    with (
        _scratch(place / "parts") as parts,
        whole_file(place / "records.arrow") as partial,
        pa.OSFile(str(partial), "wb") as sink,
    ):
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in _refilled(map(done.take, _parts(reading, reader, parts))):
                if not done.counts:  # of a file with defects only their report is left
                    writer.write_batch(batch)
        done.check()


def _convert(place: Path, reading: Reading, reader: str) -> StoreFile:
    done, begun = Findings(reading), time.time_ns()
    write_store(place, reading, reader, done)
    skipped = dict(done.skipped)
    about = {"skipped": skipped, "ignored": dict(done.ignored), "missing": done.missing}
    write_json(place / "about.json", about)
    _note_look(place, begun)
    return _open(place, reading, about)


def _parts(reading: Reading, reader: str, folder: Path) -> Iterator[Part]:
    """Yield a file's records, converted by all cores where they can be divided.

    Slices of JSON and row groups of Parquet are read by the process that converts them. Rows of other text
    are read here, which takes little of the time. Other rows may hold the bytes of images and are converted
    here, because handing them over would cost what it saves.

    Args:
        folder: for parts of the result that hold images.
    """
    slices = [] if reader else json_slices.split(reading.path)
    counts = list(map_parts(json_slices.Slice.count, slices))
    if slices and None not in counts:  # otherwise a cut was inside a record, or the file is damaged
        numbered = json_slices.number(slices, [count or 0 for count in counts])
        yield from map_parts(partial_of(_convert_slice, reading, fallback_form(reading)), numbered)
        return
    groups = [] if reader else row_groups(reading.path)
    if len(groups) > 1:
        work = partial_of(_convert_group, reading, fallback_form(reading), folder)
        for path, some in map_parts(work, groups):
            yield from _opened(path, some)
        return
    rows = read_raw(reading.path, reading.images, reader)
    first = list(islice(rows, _AT_ONCE))  # what is wrong with the whole file is told first
    chunks = chain([first], iter(lambda: list(islice(rows, _AT_ONCE)), []))
    work_on_rows = partial_of(_convert_rows, reading, fallback_form(reading, reader))
    is_divided = not reader and is_text(reading.path)
    yield from map_parts(work_on_rows, chunks) if is_divided else map(work_on_rows, chunks)


def _convert_slice(reading: Reading, fallback: Form, one: json_slices.Slice) -> Part:
    rows = one.read()
    if rows is None:
        raise DataError(f"{one.path}: it changed while it was read. Run the same command again.")
    return _convert_rows(reading, fallback, rows)


def _convert_group(
    reading: Reading, fallback: Form, folder: Path, group: RowGroup
) -> tuple[Path, list[Part]]:
    """Convert a row group into a file, by which the bytes of its images come to another process."""
    rows, parts = group.read(), []
    path = folder / f"{group.number}.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        while some := list(islice(rows, _AT_ONCE)):
            part = _convert_rows(reading, fallback, some)
            writer.write_batch(part.batch)
            parts.append(replace(part, batch=None))
    return path, parts


def _opened(path: Path, parts: Sequence[Part]) -> Iterator[Part]:
    """Yield the parts of a converted row group, whose file is not needed afterwards."""
    with pa.memory_map(str(path)) as mapped:
        file = pa.ipc.open_file(mapped)
        for number, part in enumerate(parts):
            yield replace(part, batch=file.get_batch(number))
    path.unlink()


def _convert_rows(reading: Reading, fallback: Form, rows: Sequence[tuple[str, Any]]) -> Part:
    own = replace(reading, skipped=Counter(), ignored=Counter())
    good: list[Conversation] = []
    found = Part(
        batch=None, rows=[], keys=[], defects=[], num_read=len(rows), skipped=own.skipped, ignored=own.ignored
    )
    for place, (one, key) in enumerate(convert_each(rows, own, fallback)):
        if isinstance(one, Conversation):
            good.append(one)
            found.rows.append(place)
            found.keys.append(key)
        else:
            found.defects.append((place, one))
    found.batch = _to_batch(good, reading.images)
    return found


def _refilled(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows of record batches in batches of ``ROWS``, of which the last may have fewer."""
    waiting: list[Any] = []
    for batch in batches:
        waiting.append(batch)
        if sum(one.num_rows for one in waiting) >= ROWS:
            filled = pa.Table.from_batches(waiting).combine_chunks().to_batches(ROWS)
            waiting = [filled.pop()] if filled[-1].num_rows < ROWS else []
            yield from filled
    yield from pa.Table.from_batches(waiting, SCHEMA).combine_chunks().to_batches(ROWS)


def _to_batch(conversations: list[Conversation], images: Path) -> Any:
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    numbers = {role: number for number, role in enumerate(ROLES)}
    for conversation in conversations:
        messages, refs = conversation.messages, conversation.images
        counts = [len(message.images) for message in messages]
        columns["id"].append(conversation.id)
        columns["at"].append(conversation.at)
        columns["roles"].append([numbers[message.role] for message in messages])
        columns["texts"].append([message.text for message in messages])
        columns["trained"].append([message.is_trained for message in messages])
        columns["image_counts"].append(counts)
        places = [m.places or (BEFORE,) * n for m, n in zip(messages, counts, strict=True) if n]
        columns["image_places"].append([place for of_message in places for place in of_message])
        columns["image_names"].append([ref.name for ref in refs])
        columns["image_paths"].append([_path(ref, images) for ref in refs])
        columns["image_data"].append([ref.data for ref in refs])
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def _path(ref: ImageRef, images: Path) -> str | None:
    usual = os.path.join(images, ref.name)  # noqa: PTH118 (comparing Paths costs ten times as much)
    if ref.path is None or str(ref.path) == usual or ref.path == images / ref.name:
        return None
    return str(ref.path)


def _key(reading: Reading, reader: str, known_files: Path) -> str:
    """Return a key of everything that determines the converted file."""
    decisive = [
        FORMAT,
        _fingerprint(reading.path, known_files),
        str(reading.path.suffix),
        str(reading.images.resolve()),
        sorted(set(reading.skip)),
        dict(reading.columns),
        reading.allow_urls,
        _code(reader),
        *(["places"] if reading.keep_places else []),
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]


def _fingerprint(path: Path, known_files: Path) -> str:
    """Return a digest of a file; of a folder, of the names, sizes and times of its files."""
    if path.is_file():
        return known_sha256(path, known_files)
    listed = []
    for file in sorted(files_below(path, links=True)):
        with suppress(FileNotFoundError):  # removed meanwhile
            status = file.stat()
            if S_ISREG(status.st_mode):
                listed.append([str(file.relative_to(path)), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _code(reader: str) -> str:
    place = Path(reader.rpartition(":")[0])
    return f"{reader} {sha256_of(place)}" if place.is_file() else reader


def read_stored(data: DataConfig, data_root: str, folder: Path) -> Records:
    """Return the samples of a stage, out of converted files.

    Args:
        folder: where converted files of any run may be kept.

    Raises:
        ConfigError, DataError: see ``open_readings`` and ``_open_store``.
    """
    found = open_readings(data, data_root)
    opened = iter(_open_all([one for _, readings in found for one in readings], data.reader, folder))
    parts = [list(islice(opened, len(readings))) for _, readings in found]
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


def _open_all(readings: Sequence[Reading], reader: str, folder: Path) -> list[StoreFile]:
    """Open files, several at a time where a file by itself is converted by one core."""
    alone = [place for place, one in enumerate(readings) if reader or not _is_divided(one.path)]
    asked = time.time_ns()
    opened = map_parts(lambda place: _open_store(readings[place], reader, folder, asked), alone)
    found = dict(zip(alone, opened, strict=True))
    return [
        found[place] if place in found else _open_store(one, reader, folder, asked)
        for place, one in enumerate(readings)
    ]


def _is_divided(path: Path) -> bool:
    """Whether all cores convert a file; see ``_parts``."""
    if is_text(path):
        return path.stat().st_size >= 2 * json_slices.SLICE_BYTES
    return len(row_groups(path)) > 1
