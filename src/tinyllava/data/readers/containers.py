"""Files that hold records, opened by their content: JSON, JSON lines, CSV, TSV, XLSX, Parquet; also gzipped.

Each yields (place in the file, record). What a record says is read by its own form.
"""

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tinyllava.data.readers.archives import (
    is_datasets_folder,
    label_names,
    name_labels,
    read_datasets_folder,
    read_tar,
)
from tinyllava.data.readers.folder import read_folder
from tinyllava.errors import DataError, require
from tinyllava.files import parse_json

TABLES = (".csv", ".tsv")
SUFFIXES = (".json", ".jsonl", ".ndjson", *TABLES, ".xlsx", ".parquet", ".tar")
"""Names that record files end with; ``.gz`` may follow."""
_SEPARATORS = (",", ";", "\t", "|")
_ROWS_AT_ONCE = 64

Raw = Iterator[tuple[str, Any]]
"""(place in the file, record)"""


def is_record_file(name: str) -> bool:
    """Whether a name is that of a record file, by its end."""
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def is_table(path: Path) -> bool:
    """Whether a file has columns with names: what they are is known from its first row."""
    return path.is_file() and (
        _name(path).endswith(TABLES) or _head(path).startswith((b"PAR1", b"PK\x03\x04"))
    )


def read_raw(path: Path) -> Raw:
    """Yield (place in the file, value) for each record.

    Raises:
        DataError: the file is missing, cannot be read, or is of no known kind.
    """
    if path.is_dir():
        yield from read_datasets_folder(path) if is_datasets_folder(path) else read_folder(path)
        return
    if _name(path).endswith(".tar"):
        yield from read_tar(path)
        return
    head = _head(path)
    if head.startswith(b"PAR1"):
        yield from _parquet(path)
    elif head.startswith(b"PK\x03\x04"):
        yield from _xlsx(path)
    elif _name(path).endswith(TABLES):
        yield from _csv(path, _read_text(path))
    elif _name(path).endswith((".jsonl", ".ndjson")):
        yield from _json_lines(path, _read_text(path))
    else:
        yield from _json_array(path, _read_text(path))


def _name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")


def _head(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path}: not a regular file. Save the records in one, and give its path.")
    try:
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such record file. Check the path.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a record file ({error.strerror}).") from error


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a record file ({error}).") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding, said = "utf-16", "UTF-16"
    else:
        encoding, said = "utf-8-sig", "UTF-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not {said} ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error


def _json_lines(path: Path, text: str) -> Raw:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut inside strings
        if line.strip():
            raw = _parse(line, str(path), number)
            if isinstance(raw, list):
                raise DataError(
                    f"{path}:{number}: a JSON array. Rename a file with one array of records to .json."
                )
            yield f"line {number}", raw


def _json_array(path: Path, text: str) -> Raw:
    records = _parse(text, str(path))
    if not isinstance(records, list):
        raise DataError(
            f"{path}: expected a JSON array, found {type(records).__name__}. Or rename it to .jsonl."
        )
    for index, raw in enumerate(records):
        yield f"record {index}", raw


def _parse(text: str, where: str, first_line: int = 1) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = " If it has one record per line, rename it to .jsonl." if error.msg == "Extra data" else ""
        fix = " This is not a record file." if error.msg == "nested too deeply" else " Fix the file."
        raise DataError(
            f"{where}: not JSON: {error.msg} at line {line} column {error.colno}.{hint or fix}"
        ) from error


def _csv(path: Path, text: str) -> Raw:
    """Read comma-, semicolon- or tab-separated values with a first line of names."""
    first = text.lstrip("\r\n").partition("\n")[0]
    separator = "\t" if _name(path).endswith(".tsv") else max(_SEPARATORS, key=first.count)
    limit = csv.field_size_limit(2**31 - 1)  # a data URL is longer than Python's own limit
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        start, names = 1, _names(next(rows, []), path)
        while True:
            start = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if row:
                yield f"line {start}", _cells(names, row, f"{path}: line {start}")
    except csv.Error as error:
        raise DataError(f"{path}: line {start}: not CSV ({error}). Fix the quotes of this line.") from error
    finally:
        csv.field_size_limit(limit)


def _names(row: list[Any], path: Path) -> list[str]:
    names = ["" if name is None else str(name).strip() for name in row]
    while names and not names[-1]:
        names.pop()
    if not any(names):
        raise DataError(f"{path}: empty. Write the names of the columns into its first line.")
    twice = next((name for name in names if name and names.count(name) > 1), "")
    if twice:
        raise DataError(f"{path}: two columns are named {twice!r}. Rename one of them.")
    return names


def _cells(names: list[str], row: list[Any], where: str) -> dict[str, Any]:
    if len(row) > len(names) and any(cell not in (None, "") for cell in row[len(names) :]):
        raise DataError(
            f"{where}: {len(row)} values for {len(names)} columns ({', '.join(names)}). Put a value "
            "that holds the separator between quotes."
        )
    return {name: cell for name, cell in zip_longest(names, row[: len(names)], fillvalue="") if name}


def _xlsx(path: Path) -> Raw:
    """Read the first sheet of a workbook; numbers stay numbers, formulas are their last value."""
    require("openpyxl", "tables", "reads .xlsx files")
    from openpyxl import load_workbook

    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: a ZIP archive, but no workbook. Give the record file in it.") from error
    try:
        rows = book.worksheets[0].iter_rows(values_only=True)
        names = _names(list(next(rows, ())), path)
        for number, row in enumerate(rows, 2):
            if any(cell not in (None, "") for cell in row):
                yield f"row {number}", _cells(names, list(row), f"{path}: row {number}")
    finally:
        book.close()


def _parquet(path: Path) -> Raw:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            index = 0
            names = label_names(file.schema_arrow)
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    yield f"record {index}", name_labels(row, names)
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Download it again.") from error
