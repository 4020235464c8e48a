"""JSON and JSON lines, distinguished by their content. Errors name the place and the fix.

Paper: none.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllava.errors import DataError
from tinyllava.files import parse_json

SUFFIXES = (".json", ".jsonl", ".ndjson")
_OF_RECORDS = (
    "conversations",
    "conversation",
    "messages",
    "texts",
    "prompt",
    "query",
    "question",
    "instruction",
    "prefix",
    "caption",
    "label",
)
"""Fields of which a record has one."""


def read_json(path: Path, text: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (place in the file, record) of an array, of JSON lines, or of one record alone.

    Args:
        name: of the file, in small letters and without ``.gz``.

    Raises:
        DataError: neither of them.
    """
    start = text.lstrip()[:1]
    if not start:
        raise DataError(f"{path}: an empty file. Write the records again.")
    if start not in "[{" and not name.endswith(SUFFIXES):
        raise DataError(
            f"{path}: not a known file type. Rename it to end with .json, .jsonl, .csv or .tsv, "
            "or read it with --reader FILE.py:NAME."
        )
    if start != "{":
        yield from ((f"record {index}", raw) for index, raw in enumerate(_list(path, text)))
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) == 1 or not _is_json(lines[0][1]):  # one object; splitlines would also cut inside strings
        raw = _parse(text, path)
        _refuse_wrapped(path, raw)
        yield (f"line {lines[0][0]}" if len(lines) == 1 else "record 0"), raw
        return
    for number, line in lines:
        yield f"line {number}", _parse(line, path, number)


def _list(path: Path, text: str) -> list[Any]:
    records = _parse(text, path)
    assert isinstance(records, list) or not text.lstrip().startswith("[")
    if not isinstance(records, list):
        kind = type(records).__name__
        raise DataError(f"{path}: expected a JSON array of records, found {kind}. Write one.")
    return records


def _is_json(line: str) -> bool:
    """Whether a line is a record, or begins with one and continues with something else."""
    try:
        parse_json(line)
    except json.JSONDecodeError as error:
        return error.msg == "Extra data"
    return True


def _refuse_wrapped(path: Path, raw: Any) -> None:
    """Raise DataError for an object that holds records, or names other files, and is none itself."""
    if not isinstance(raw, dict) or any(key in raw for key in _OF_RECORDS):
        return
    if any(isinstance(value, dict) or (isinstance(value, list) and value) for value in raw.values()):
        keys = ", ".join(map(str, list(raw)[:8]))
        raise DataError(
            f"{path}: expected a list of records, found an object with the key{'s' * (len(raw) > 1)} {keys}. "
            "Write only the list of records into the file."
        )


def _parse(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        what, fix, place = _explain(text, error)
        line = first_line + text.count("\n", 0, place)
        column = place - (text.rfind("\n", 0, place) + 1) + 1
        raise DataError(f"{path}: not JSON: {what} at line {line} column {column}. {fix}") from error


def _explain(text: str, error: json.JSONDecodeError) -> tuple[str, str, int]:
    """Return the problem, its fix, and its place."""
    place, rest = error.pos, text[error.pos :].lstrip()
    if "trailing comma" in error.msg:  # Python 3.13 gives the place of the comma
        place += 1 + len(text[place + 1 :]) - len(text[place + 1 :].lstrip())
        rest = text[place:]
    if error.msg == "nested too deeply":
        return error.msg, "This is not a record file.", place
    if "trailing comma" in error.msg or (rest[:1] in ("]", "}") and text[:place].rstrip().endswith(",")):
        return "a comma without a value after it", "Remove the comma.", place
    if error.msg == "Extra data" and rest.startswith(","):
        return "a comma after a record", "Remove the commas at the ends of the lines.", place
    if error.msg == "Extra data":
        return error.msg, "Write one record on each line, or one array with all of them.", place
    if rest.startswith("'"):
        return "single quotes", "Write the file with json.dump, not with print.", place
    if rest.startswith(("//", "/*", "#")):
        return "a comment", "JSON has no comments. Remove it.", place
    if not rest or (error.msg.startswith("Unterminated") and '"' not in text[place + 1 :]):
        return f"it ends in the middle of a record ({error.msg})", "Write or download it again.", place
    return error.msg, "Fix the file.", place
