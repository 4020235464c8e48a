"""Open record files by their content: JSON, JSON lines, CSV, TSV, XLSX, Parquet and Arrow, also gzipped.

Each yields (place in the file, record). The readers of the forms interpret the records.
"""

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from tinyllava.conversation import IMAGE_SUFFIXES
from tinyllava.data.readers import json_text
from tinyllava.data.readers.archives import (
    is_datasets_folder,
    label_names,
    name_labels,
    read_datasets_folder,
    read_tar,
)
from tinyllava.data.readers.folder import read_folder
from tinyllava.errors import DataError, require

TABLES = (".csv", ".tsv")
SUFFIXES = (*json_text.SUFFIXES, *TABLES, ".xlsx", ".parquet", ".arrow", ".tar", ".tgz")
"""Names that record files end with; ``.gz`` may follow."""
_SEPARATORS = (",", ";", "\t", "|")
_ROWS_AT_ONCE = 64
_ARROW = (b"ARROW1", b"\xff\xff\xff\xff")
_NO_RECORDS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"\xff\xd8\xff", b"\x89PNG", b"GIF8"), "an image. Give its folder, or a record file."),
    ((b"\xd0\xcf\x11\xe0",), "an old Excel file. Save it as .xlsx or .csv."),
    (
        (b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a pickle, which can run code and is never opened. Write the records as JSON or Parquet.",
    ),
    (
        (b"(\xb5/\xfd", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ", b"Rar!"),
        "a compressed file. Unpack it, and give the record file.",
    ),
    ((b"%PDF",), "a PDF file. Give a record file."),
    ((b"version https://git-lfs",), "a Git LFS pointer. Run `git lfs pull` in its folder."),
    ((b"<!doctype html", b"<!DOCTYPE html", b"<html"), "a web page. Download the file itself."),
)
"""What is often found in place of records, by its first bytes."""

Raw = Iterator[tuple[str, Any]]
"""(place in the file, record)"""


def is_record_file(name: str) -> bool:
    """Whether a name is that of a record file, by its end."""
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def is_text(path: Path) -> bool:
    """Whether the records of a file are text: JSON, CSV or TSV, also gzipped."""
    return path.is_file() and _name(path).endswith((*json_text.SUFFIXES, *TABLES))


def is_table(path: Path) -> bool:
    """Whether a file has named columns, which its first row defines."""
    return path.is_file() and (
        _name(path).endswith(TABLES) or _head(path).startswith((b"PAR1", b"PK\x03\x04", *_ARROW))
    )


def read_raw(path: Path) -> Raw:
    """Yield (place in the file, value) for each record.

    Raises:
        DataError: the file is missing, cannot be read, or is of no known kind.
    """
    if path.is_dir():
        yield from read_datasets_folder(path) if is_datasets_folder(path) else read_folder(path)
        return
    head, name = _head(path), _name(path)
    if name.endswith((".tar", ".tgz")):
        yield from read_tar(path)
    elif head.startswith(b"PAR1"):
        yield from _parquet(path)
    elif head.startswith(b"PK\x03\x04"):
        yield from _xlsx(path)
    elif head.startswith(_ARROW):
        yield from _arrow(path, head.startswith(_ARROW[0]))
    elif kind := next((kind for starts, kind in _NO_RECORDS if head.lstrip().startswith(starts)), ""):
        raise DataError(f"{path}: {kind}")
    elif name.endswith((".xlsx", ".parquet", ".arrow")):
        kind = "not a workbook" if name.endswith(".xlsx") else "its content does not match its name"
        raise DataError(f"{path}: {kind}. If it is CSV, rename it to .csv.")
    elif name.endswith(TABLES):
        yield from _csv(path, _read_text(path))
    else:
        yield from json_text.read_json(path, _read_text(path), name)


def _name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")


def _head(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path}: not a regular file. Save the records to a file, and give its path.")
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
        if data[:2].count(0) == 1:
            raise DataError(f"{path}: UTF-16 without a byte order mark. Save it as UTF-8.")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not {said} ({error.reason} at byte {error.start}, line {line}). Save it as UTF-8."
        ) from error


def _csv(path: Path, text: str) -> Raw:
    """Read comma-, semicolon- or tab-separated values with a first line of names."""
    first = text.lstrip("\r\n").partition("\n")[0]
    if first.startswith("sep=") and len(first.rstrip()) == 5:  # Excel's own line
        text = text.lstrip("\r\n").replace(first, "", 1)
        first = first[4]
    separator = "\t" if _name(path).endswith(".tsv") else max(_SEPARATORS, key=first.count)
    limit = csv.field_size_limit(2**31 - 1)  # a data URL is longer than Python's own limit
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        start, names = 1, _names(next((row for row in rows if row), []), path)
        while True:
            start = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if any(cell.strip() for cell in row):
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
        raise DataError(f"{path}: an empty file. Write the column names into its first line.")
    twice = next((name for name in names if name and names.count(name) > 1), "")
    if twice:
        raise DataError(
            f"{path}: two columns are named {twice!r}. Rename one of them. The first row must contain the "
            "column names, with nothing above it."
        )
    return names


def _cells(names: list[str], row: list[Any], where: str) -> dict[str, Any]:
    if len(row) > len(names) and any(cell not in (None, "") for cell in row[len(names) :]):
        raise DataError(
            f"{where}: {len(row)} values for {len(names)} columns ({', '.join(names)}). Put "
            "values that contain the separator between quotes."
        )
    return {name: cell for name, cell in zip_longest(names, row[: len(names)], fillvalue="") if name}


def _xlsx(path: Path) -> Raw:
    """Read the first sheet of a workbook that has cells; numbers stay numbers, formulas are their last value.

    A cell that is merged over rows has its value in each of them.
    """
    require("openpyxl", "tables", "reads .xlsx files")
    from openpyxl import load_workbook

    try:
        with path.open("rb") as file:  # a path must end with .xlsx
            book = load_workbook(file, data_only=True)
            has_pictures = any(name.startswith("xl/media/") for name in zipfile.ZipFile(file).namelist())
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: a ZIP archive, not a workbook. Unpack it, and give the record file in it."
        ) from error
    page = next((one for one in book.worksheets if any(one.iter_rows(values_only=True))), book.worksheets[0])
    merged = _merged_values(page)
    rows = (
        [merged.get((number, column), cell) for column, cell in enumerate(row, 1)]
        for number, row in enumerate(page.iter_rows(values_only=True), 1)
    )
    names = _names(next(rows, []), path)
    for number, row in enumerate(rows, 2):
        if not any(cell not in (None, "") for cell in row):
            continue
        if has_pictures and not any(str(cell).lower().endswith(IMAGE_SUFFIXES) for cell in row):
            raise DataError(
                f"{path}: row {number}: names no image, but the workbook has images in its cells. Save "
                "them as files, and write their names into a column."
            )
        yield f"row {number}", _cells(names, row, f"{path}: row {number}")


def _merged_values(page: Any) -> dict[tuple[int, int], Any]:
    """Return the values of merged cells by (row, column): down the rows, those of the names also sideways."""
    found: dict[tuple[int, int], Any] = {}
    for area in page.merged_cells.ranges:
        value = page.cell(area.min_row, area.min_col).value
        for row in range(area.min_row, min(area.max_row, page.max_row) + 1):
            for column in range(area.min_col, area.max_col + 1 if row == 1 else area.min_col + 1):
                found[row, column] = value
    return found


def _arrow(path: Path, is_file: bool) -> Raw:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped:
            if is_file:
                reader = pa.ipc.open_file(mapped)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                batches = reader = pa.ipc.open_stream(mapped)
            names, index = label_names(reader.schema), 0
            for batch in batches:
                for row in batch.to_pylist():
                    yield f"record {index}", name_labels(row, names)
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Arrow ({error}). Write or download it again.") from error


class RowGroup(NamedTuple):
    """Records of a Parquet file that can be read by themselves."""

    path: Path
    number: int
    first: int
    """Number of its first record."""

    def read(self) -> Raw:
        """Yield its records; see ``read_raw``."""
        return _parquet(self.path, self)


def row_groups(path: Path) -> list[RowGroup]:
    """Return the row groups of a Parquet file; empty for any other file.

    Raises:
        DataError: it is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if not path.is_file() or not _head(path).startswith(b"PAR1"):
        return []
    try:
        about = parquet.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged_parquet(path, error) from error
    counts = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
    return [RowGroup(path, *found) for found in enumerate(accumulate(counts[:-1], initial=0))]


def _parquet(path: Path, group: RowGroup | None = None) -> Raw:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            index = group.first if group else 0
            names = label_names(file.schema_arrow)
            for batch in file.iter_batches(_ROWS_AT_ONCE, [group.number] if group else None):
                for row in batch.to_pylist():
                    yield f"record {index}", name_labels(row, names)
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise _damaged_parquet(path, error) from error


def _damaged_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read as Parquet ({error}). Download it again.")
