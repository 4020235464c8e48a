"""Large JSON files in slices: each is read by itself, so no process holds all records of the file.

An array is cut where a record begins with the same characters as its second one. The elements of all slices
in order are those of the file if each slice is JSON: ``[`` + the slice + ``]``. If one is not, the cut was
inside a record or the file is damaged, and the file is read whole.
"""

import json
import mmap
import re
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from tinyllava.data.readers import json_text
from tinyllava.files import parse_json

SLICE_BYTES = 4 * 2**20
_HEAD_BYTES = 2**20
_BLANKS = b" \t\r\n"
_NEXT = re.compile(r'\s*,\s*\{\s*"[^"\\]*"')
_BOM = b"\xef\xbb\xbf"

Rows = list[tuple[str, Any]]
"""(place in the file, record)"""


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes [start, end) of a file: records of an array with commas between them, or lines."""

    path: Path
    start: int
    end: int
    is_array: bool
    first: int = 0
    """Number of its first record or line."""

    def _text(self) -> str:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start).decode()

    def read(self) -> Rows | None:
        """Return the records with their places; None if it is not JSON by itself."""
        try:
            text = self._text()
            if self.is_array:
                raws = parse_json(f"[{text}]")
                return [(f"record {number}", raw) for number, raw in enumerate(raws, self.first)] or None
            lines = enumerate(text.split("\n"), self.first)
            return [(f"line {number}", parse_json(line)) for number, line in lines if line.strip()]
        except (UnicodeDecodeError, json.JSONDecodeError):
            return None

    def count(self) -> int | None:
        """Return how many records or lines it has; None if it is not JSON by itself."""
        found = self.read()
        if found is None:
            return None
        return len(found) if self.is_array else self._text().count("\n")


def split(path: Path) -> list[Slice]:
    """Return a file of JSON in slices that are not numbered; empty if it is small, or better read whole."""
    if not path.is_file() or not path.name.lower().endswith(json_text.SUFFIXES):
        return []
    if path.stat().st_size < 2 * SLICE_BYTES:
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        head = mapped[:_HEAD_BYTES]
        begin = len(_BOM) if head.startswith(_BOM) else 0
        start = len(head) - len(head[begin:].lstrip(_BLANKS))
        if mapped[start : start + 1] == b"{":
            line, newline, _ = head[start:].partition(b"\n")
            cuts = _cut_lines(mapped, begin) if newline and _is_object(line) else []
            return [Slice(path, *cut, is_array=False) for cut in cuts]
        last = len(mapped)
        while last and mapped[last - 1] in _BLANKS:
            last -= 1
        if mapped[start : start + 1] != b"[" or mapped[last - 1 : last] != b"]":
            return []
        cuts = _cut_array(mapped, head, start + 1, last - 1)
        return [Slice(path, *cut, is_array=True) for cut in cuts]


def number(slices: list[Slice], counts: list[int]) -> list[Slice]:
    """Return slices with the number of their first record, or line, which count from 0 and from 1."""
    firsts = accumulate(counts, initial=0 if slices[0].is_array else 1)
    return [replace(one, first=first) for one, first in zip(slices, firsts, strict=False)]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line.decode()), dict)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False


def _cut_lines(mapped: mmap.mmap, start: int) -> list[tuple[int, int]]:
    before, cuts = start, []
    while (found := mapped.find(b"\n", before + SLICE_BYTES)) >= 0:
        cuts.append((before, found + 1))
        before = found + 1
    return [*cuts, (before, len(mapped))]


def _cut_array(mapped: mmap.mmap, head: bytes, start: int, end: int) -> list[tuple[int, int]]:
    text = head[start:].decode(errors="ignore")
    try:
        _, first_end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError):  # ValueError: also too long for the head
        return []
    found = _NEXT.match(text, first_end)
    if found is None or text[first_end - 1] != "}":
        return []
    mark = f"}}{found[0]}".encode()
    before, cuts = start, []
    while (place := mapped.find(mark, before + SLICE_BYTES, end)) >= 0:
        cuts.append((before, place + 1))  # the comma is in no slice
        before = place + mark.index(b"{")
    return [*cuts, (before, end)]
