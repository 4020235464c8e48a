"""Records of a table: an image, a question and an answer, each in a field or column of its own.

A caption or a label in place of an answer needs no question: the usual one is asked.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from tinyllava.conversation import Conversation
from tinyllava.data.defects import Defect
from tinyllava.data.readers.column_groups import (
    find_options,
    listed_texts,
    numbered_images,
    option_columns,
    with_options,
)
from tinyllava.data.readers.form import (
    IMAGE_KEYS,
    ImageValue,
    Reading,
    Turn,
    make_conversation,
    note_unknown,
    split_marks,
)
from tinyllava.errors import DataError
from tinyllava.files import is_text

DESCRIBE = "Describe the image."
NAME = "What is in the image?\nAnswer the question using a single word or phrase."

_NAMES: dict[str, tuple[str, ...]] = {
    "image": (
        *IMAGE_KEYS,
        "image_file",
        "image_url",
        "img",
        "img_path",
        "photo",
        "picture",
        "file",
        "filename",
        "file_name",
        "path",
        "url",
    ),
    "question": ("question", "query", "prompt", "instruction", "problem"),
    "answer": ("answer", "response", "output", "completion", "reply", "answers", "solution"),
    "caption": ("caption", "description", "text"),
    "label": ("label", "class", "category"),
}
"""What a column is, by its name in small letters; the first that a table has counts."""


def find_columns(names: Iterable[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """Return which column is image, question, answer, caption or label; empty if it is no such table.

    Args:
        names: of the columns.
        chosen: what the user says of them.

    Raises:
        DataError: a chosen column is not there.
    """
    by_lower = {str(name).strip().lower(): str(name) for name in names}
    found: dict[str, str] = {}
    for kind, column in chosen.items():
        if kind not in _NAMES or column.strip().lower() not in by_lower:
            raise DataError(
                f"--column {kind}={column}: give one of {', '.join(_NAMES)}, and one of the columns "
                f"{', '.join(by_lower.values())}."
            )
        found[kind] = by_lower[column.strip().lower()]
    for kind, known in _NAMES.items():
        name = next((by_lower[name] for name in known if name in by_lower), None)
        if kind not in found and name is not None and name not in found.values():
            found[kind] = name
    kinds = [kind for kind in ("answer", "caption", "label") if kind in found]
    if not kinds or (kinds[0] == "answer" and "question" not in found):
        return {}
    return {kind: name for kind, name in found.items() if kind not in kinds[1:]}


def read_record(raw: Any, at: str, reading: Reading) -> Conversation:
    """Return the conversation of one row.

    Raises:
        Defect: the first thing that is wrong with it.
    """
    where = reading.place(at, raw)
    columns = find_columns(raw, reading.columns)
    if not columns:
        raise Defect("malformed", where, f"no question and answer among {', '.join(map(str, raw))}")
    kind = next(kind for kind in ("answer", "caption", "label") if kind in columns)
    asked = {"caption": DESCRIBE, "label": NAME}.get(kind, "")
    question = _text(raw[columns["question"]], columns["question"], where) if "question" in columns else ""
    answer = _text(raw[columns[kind]], columns[kind], where)
    if question and kind == "answer" and (options := find_options(raw, where)):
        question, answer = with_options(question, raw[columns[kind]], options, where)
    turns = [*_history(raw, where), Turn("user", split_marks(question or asked)), Turn("assistant", [answer])]
    numbered = numbered_images(raw)
    listed = _images(raw.get(columns.get("image", "")), where)
    for name in numbered.values():
        listed += _images(raw[name], where)
    if listed and not any(turn.num_images for turn in turns):
        turns[0].parts[:0] = [ImageValue() for _ in listed]
    known = (*columns.values(), *numbered.values(), *option_columns(raw), "history")
    note_unknown(raw, known, reading)
    return make_conversation(raw, turns, at, reading, listed=listed)


def _images(value: Any, where: str) -> list[Any]:
    if value is None or value in ("", b"", [], {}):
        return []
    value = listed_texts(value)
    values = list(value) if isinstance(value, list) else [value]
    if not all(isinstance(one, str | bytes | dict) and one for one in values):
        raise Defect(
            "malformed", where, f"an image must be a path or a list of paths, found {str(value)[:80]}"
        )
    return values


def _history(raw: Mapping[str, Any], where: str) -> list[Turn]:
    """Return the turns before the question: ``history``, pairs of question and answer."""
    turns: list[Turn] = []
    for pair in raw.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise Defect("malformed", where, f"'history' must hold pairs, found {str(pair)[:80]}")
        turns += [
            Turn("user", split_marks(_text(pair[0], "history", where))),
            Turn("assistant", [_text(pair[1], "history", where)]),
        ]
    return turns


def _text(value: Any, column: str, where: str) -> str:
    """Return a cell as text; a number is what it looks like."""
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if not isinstance(value, str):
        kind = f"a list of {len(value)}" if isinstance(value, list) else str(value)[:80]
        raise Defect("malformed", where, f"{column!r} must be text or a number, found {kind}; write one text")
    if not is_text(value):
        raise Defect("malformed", where, f"{column!r} contains an unpaired surrogate: {value[:80]!a}")
    return value
