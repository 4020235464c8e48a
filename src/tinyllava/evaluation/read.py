"""The files of benchmarks: which are needed, and how they are read. Each record knows its place.

Every fault becomes a DataError that names the file, the line, the field, the allowed values and the fix.
"""

import ast
import base64
import binascii
import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from tinyllava.conversation import ImageRef
from tinyllava.errors import DataError
from tinyllava.files import files_below, parse_json

FIX = "Download the file again; `tinyllava data benchmarks` lists the sources."


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of a data file; its methods return a field in the asked type, or fail with the place."""

    values: Mapping[str, Any]
    path: Path
    line: int | None = None
    entry: str = ""

    @property
    def place(self) -> str:
        """File, line and entry, as a user finds them."""
        line = self.line or _find_line(self.path, self.entry)
        return f"{self.path}:{line}" + (f", entry {self.entry!r}" if self.entry else "")

    def fail(self, problem: str, fix: str = FIX) -> NoReturn:
        """Raise a DataError about this record."""
        raise DataError(f"{self.place}: {problem} {fix}")

    def field(self, name: str) -> Any:
        """Return a field of any type; it must be there."""
        if name not in self.values:
            fields = ", ".join(map(str, self.values)) or "none"
            self.fail(f"no field {name!r}; the record has: {fields}.")
        return self.values[name]

    def text(self, name: str) -> str:
        """Return a field that is text, or an integer that serves as an id, as text."""
        value = self.field(name)
        if isinstance(value, bool) or not isinstance(value, str | int):
            self.fail(f"field {name!r} is {_show(value)}; it must be text.")
        return str(value)

    def texts(self, name: str, *, num: int | None = None) -> list[str]:
        """Return a field that is a list of texts, ``num`` of them if given."""
        value = self.field(name)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self.fail(f"field {name!r} is {_show(value)}; it must be a list of texts.")
        if num is not None and len(value) != num:
            self.fail(f"field {name!r} has {len(value)} entries; it must have {num}.")
        return value

    def integer(self, name: str) -> int:
        """Return a field that is an integer, or text that spells one."""
        value = self.field(name)
        if isinstance(value, bool) or not re.fullmatch(r"\s*-?\d+(\.0)?\s*", str(value)):
            self.fail(f"field {name!r} is {_show(value)}; it must be an integer.")
        return int(float(value))

    def one_of(self, name: str, *allowed: str) -> str:
        """Return a field that is one of a few words, whatever its case."""
        value = self.text(name).strip().lower()
        if value not in allowed:
            self.fail(f"field {name!r} is {_show(self.values[name])}; it must be {' or '.join(allowed)}.")
        return value

    def part(self, name: str) -> "Record":
        """Return a field that is a record itself."""
        value = self.field(name)
        if not isinstance(value, dict):
            self.fail(f"field {name!r} is {_show(value)}; it must be a record.")
        return Record(values=value, path=self.path, line=self.line, entry=self.entry)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _find_line(path: Path, entry: str) -> int:
    """Return the line on which an entry of a JSON document begins (needed only for an error message)."""
    if not entry or path.suffix != ".json":
        return 1
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.search(rf"{re.escape(json.dumps(entry))}|[:\s]{re.escape(entry)}\s*[,}}]", text)
    return text.count("\n", 0, match.start()) + 1 if match else 1


def read_text(path: Path) -> str:
    """Return the text of a file; it has to exist and to be UTF-8 (a byte order mark is passed over)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. {FIX}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start:,} is not UTF-8 text. {FIX}") from None
    if not text.strip():
        raise DataError(f"{path}:1: the file is empty. {FIX}")
    return text


def read_python(path: Path, source: str) -> ast.Module:
    """Parse a Python file, to read texts out of it; it is never run. ``source`` is where to get it."""
    try:
        return ast.parse(read_text(path))
    except SyntaxError as error:
        problem = f"{path}:{error.lineno}: not a Python file ({error.msg})."
        raise DataError(f"{problem} Take it from {source}.") from None


def _parse(text: str, path: Path, line: int = 0, fix: str = FIX) -> Any:
    try:
        return parse_json(text, whole_characters=True)
    except json.JSONDecodeError as error:
        where = f"{path}:{line or error.lineno}"
        raise DataError(f"{where}: not JSON at column {error.colno} ({error.msg}). {fix}") from None


def read_json(path: Path) -> Record:
    """Read a JSON document that is a record."""
    values = _parse(read_text(path), path)
    if not isinstance(values, dict):
        raise DataError(f"{path}:1: the document is {_show(values)}; it must be a record. {FIX}")
    return Record(values=values, path=path, line=1)


def read_entries(path: Path) -> dict[str, Record]:
    """Read a JSON document that is a record of records, by id."""
    document = read_json(path)
    return {
        name: Record(values=document.part(name).values, path=path, entry=name) for name in document.values
    }


def read_list(record: Record, name: str, id_field: str) -> Iterator[Record]:
    """Yield the records of a list in a field of a document."""
    entries = record.field(name)
    if not isinstance(entries, list):
        record.fail(f"field {name!r} is {_show(entries)}; it must be a list of records.")
    for number, values in enumerate(entries):
        if not isinstance(values, dict):
            record.fail(f"entry {number} of {name!r} is {_show(values)}; it must be a record.")
        yield Record(values=values, path=record.path, entry=str(values.get(id_field, number)))


def read_lines(path: Path) -> Iterator[Record]:
    """Yield the records of a file of JSON lines, one of them in memory at a time; empty lines are skipped."""
    num_records = 0
    for number, line in _lines(path):
        num_records += 1
        yield parse_line(line, path, number)
    if not num_records:
        raise DataError(f"{path}:1: the file is empty. {FIX}")


def parse_line(line: str, path: Path, number: int, fix: str = FIX) -> Record:
    """Return the record that a line of a file is, the first line being number 1."""
    values = _parse(line, path, number, fix)
    if not isinstance(values, dict):
        raise DataError(f"{path}:{number}: the line is {_show(values)}; it must be a record. {fix}")
    return Record(values=values, path=path, line=number)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. {FIX}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: byte {error.start:,} of the line is not UTF-8 text. {FIX}"
        ) from None


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """Let a cell hold a whole image while a row is read; the limit is one for the whole process."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def read_table(path: Path, *columns: str) -> Iterator[Record]:
    """Yield the rows of a table: tabs between cells, quotes around them where needed, as pandas has it.

    Where lines end as on Windows, line breaks inside cells are read as they were before the conversion.
    """
    read_text(path)
    with path.open("rb") as raw:
        is_converted = raw.readline().endswith(b"\r\n")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        with _cells_of_any_size():
            header = rows.fieldnames or ()
        missing = [column for column in columns if column not in header]
        if missing:
            raise DataError(f"{path}:1: no column {missing[0]!r}; needed: {', '.join(columns)}. {FIX}")
        while True:
            line = rows.line_num + 1
            with _cells_of_any_size():
                row = next(rows, None)
            if row is None:
                return
            record = Record(values=row, path=path, line=line)
            if None in row or None in row.values():
                record.fail(f"the row does not have the {len(header)} cells of the header.")
            if is_converted:
                row |= {name: cell.replace("\r\n", "\n") for name, cell in row.items()}
            yield record


def find_parquet(folder: Path, split: str) -> list[Path]:
    """Return the parquet shards of a split (``testdev-00000-of-00004.parquet``), of any if it is ""."""
    return sorted(
        path
        for path in files_below(folder, links=True)
        if path.suffix == ".parquet" and path.name.startswith(split)
    )


def read_parquet(paths: list[Path], columns: list[str] | None = None) -> Iterator[Record]:
    """Yield the rows of parquet shards, a few at a time, of all columns if none are named.

    ``line`` counts the rows of a file from 1.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        try:
            file = pq.ParquetFile(path)
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(values=values, path=path, line=number)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not a complete parquet file ({error}). {FIX}") from None


def unpack_image(record: Record, field: str, folder: Path, name: str) -> ImageRef:
    """Return the image of a cell (parquet's ``bytes``, or base64 text).

    It is written to ``folder/images``, so that memory does not grow with the benchmark, unless the same bytes
    are there: another release may have other images under the same names.
    """
    cell = record.field(field)
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            record.fail(f"field {field!r} is {_show(cell)}; it must be an image in base64.")
    if not isinstance(data, bytes) or not data:
        record.fail(f"field {field!r} has no image.")
    path = folder / "images" / name
    if not _holds(path, data):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid4().hex}")  # processes of a run unpack side by side
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # as on a full disk
    return ImageRef(path=path, name=name)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


class ImageFiles:
    """The images of a folder, one reference each, however many questions ask about it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[str, ImageRef] = {}

    def __getitem__(self, name: str) -> ImageRef:
        """Return the reference of an image; whether the file is there is seen when it is opened."""
        if name not in self._references:
            self._references[name] = ImageRef(path=self.folder / name, name=name)
        return self._references[name]


@dataclass(frozen=True, kw_only=True)
class NeededFile:
    """A file or folder of a benchmark, by one or several names (the first that is found serves)."""

    names: tuple[str, ...]
    """Paths or glob patterns relative to the benchmark's folder."""
    purpose: str
    source: str
    """Where it is to be had."""
    size: str = "size not known"
    licence: str = "not stated"
    num_files: int | None = None
    """How much a complete folder holds (nothing is counted where a file serves in its place)."""
    known_md5: Mapping[str, str] = field(default_factory=dict)
    """MD5 of known releases -> the release's name."""
    is_optional: bool = False


@dataclass(frozen=True, kw_only=True)
class FileStatus:
    """The state of a needed file: its paths, and what is wrong with them."""

    needed: NeededFile
    found: tuple[Path, ...]
    problem: str = ""
    release: str = ""
    """Which known release it is, told by its MD5."""

    @property
    def is_present(self) -> bool:
        """Whether the file exists and looks complete."""
        return bool(self.found) and not self.problem

    def __str__(self) -> str:
        needed = self.needed
        state = "present" if self.is_present else "missing" if not self.found else "doubtful"
        extra = "".join(f" ({remark})" for remark in (self.problem, self.release) if remark)
        optional = ", optional" if needed.is_optional else ""
        return (
            f"{state}{extra}{optional}: {' or '.join(needed.names)}: {needed.purpose}; "
            f"from {needed.source}; {needed.size}; licence: {needed.licence}"
        )


def find_files(folder: Path, needed: NeededFile) -> FileStatus:
    """Look for one needed file below ``folder``."""
    for name in needed.names:
        found = tuple(sorted(folder.glob(name)))
        if found:
            problem, release = _count(found, needed), _name_release(found[0], needed)
            return FileStatus(needed=needed, found=found, problem=problem, release=release)
    return FileStatus(needed=needed, found=())


def check_files(folder: Path, needed: Sequence[NeededFile]) -> tuple[FileStatus, ...]:
    """Look for all the needed files below ``folder``."""
    return tuple(find_files(folder, one) for one in needed)


def _count(found: tuple[Path, ...], needed: NeededFile) -> str:
    if needed.num_files is None or not found[0].is_dir():
        return ""
    inside = sum(1 for _ in found[0].iterdir())
    return f"{inside:,} of {needed.num_files:,} files" if inside < needed.num_files else ""


def _name_release(path: Path, needed: NeededFile) -> str:
    if not needed.known_md5 or not path.is_file():
        return ""
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return f"{needed.known_md5.get(md5, 'unknown release')}, md5 {md5}"
