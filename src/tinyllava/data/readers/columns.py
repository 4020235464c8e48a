"""Records of a table: image, question and answer in separate fields or columns.

A caption or a label instead of an answer needs no question. The usual question is asked.

Differs: published multiple-choice sets keep options apart from the question. Here the options become lines of
the question, as LLaVA asks ScienceQA, so that training and evaluation ask in the same way.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tinyllava.conversation import IMAGE_SUFFIXES, Conversation
from tinyllava.data.defects import Defect
from tinyllava.data.readers.form import (
    IMAGE_KEYS,
    ImageValue,
    Reading,
    Turn,
    as_text,
    find_foreign_mark,
    make_conversation,
    note_unknown,
    split_marks,
)
from tinyllava.errors import DataError

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
    "question": ("question", "query", "prompt", "instruction", "problem", "prefix"),
    "answer": ("answer", "response", "output", "completion", "reply", "answers", "solution", "suffix"),
    "caption": ("caption", "description", "text"),
    "label": ("label", "class", "category"),
}
"""What a column is, by its name in small letters; the first that a table has counts."""
_NO_VALUES = ("NaN", "nan", "#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!")
"""What pandas and Excel write in place of a cell without a value."""


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
                f"--column {kind}={column}: unknown. Give KIND=NAME, with KIND one of {', '.join(_NAMES)}, "
                f"and NAME one of the columns {', '.join(by_lower.values())}."
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
    question = _text(raw, columns["question"], where) if "question" in columns else ""
    if columns.get("question", "").lower() == "instruction" and raw.get("input"):  # Alpaca
        question = "\n".join(filter(None, (question, _text(raw, "input", where))))
    references = reference_answers(raw, reading.columns) if kind == "answer" else ()
    given = Counter(references).most_common(1)[0][0] if references else raw[columns[kind]]  # first of equals
    answer = _text({**raw, columns[kind]: given}, columns[kind], where)
    if kind == "label" and not answer and at.startswith("file "):
        detail = "no label; put it into a folder named by its label, or name it by that (beetle_1.jpg)"
        raise Defect("empty_answer", where, detail)
    if question and kind == "answer" and (options := find_options(raw, where)):
        question, answer = with_options(question, given, options, where)
    turns = [*_history(raw, where), Turn("user", split_marks(question or asked)), Turn("assistant", [answer])]
    numbered = numbered_images(raw)
    listed = _images(raw.get(columns.get("image", "")), where)
    for name in numbered.values():
        listed += _images(raw[name], where)
    if not listed:
        _refuse_unnamed_image(raw, columns, where)
    if listed and not any(turn.num_images for turn in turns) and not find_foreign_mark(turns):
        turns[0].parts[:0] = [ImageValue() for _ in listed]
    known = (*columns.values(), *numbered.values(), *option_columns(raw), "history", "input")
    note_unknown(raw, known, reading)
    return make_conversation(raw, turns, at, reading, listed=listed)


def reference_answers(raw: Mapping[str, Any], chosen: Mapping[str, str]) -> tuple[str, ...]:
    """Return all right answers of a row with a column ``answers``: a list of texts, or of VQA's objects.

    In other columns a list is no such list: it may be a box, or several labels.

    Returns:
        Their texts; empty where the row has one answer, or none that can be read as a list.
    """
    column = find_columns(raw, chosen).get("answer", "")
    value = listed_texts(raw.get(column))
    if column.strip().lower() != "answers" or not isinstance(value, list):
        return ()
    values = [one.get("answer") if isinstance(one, Mapping) else one for one in value]
    if not all(isinstance(one, str | int | float) and str(one).strip() for one in values):
        return ()
    return tuple(as_text(one, repr(column), "").strip() for one in values)


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
            Turn("user", split_marks(as_text(pair[0], "'history'", where))),
            Turn("assistant", [as_text(pair[1], "'history'", where)]),
        ]
    return turns


def _text(raw: Mapping[str, Any], column: str, where: str) -> str:
    """Return a cell as text, unless its text marks an empty or failed cell."""
    text = as_text(raw[column], repr(column), where)
    if text.strip() in _NO_VALUES:
        detail = f"{column!r} is {text.strip()}, which marks an empty or failed cell; write the text"
        raise Defect("malformed", where, detail)
    return text


def _refuse_unnamed_image(raw: Mapping[str, Any], columns: Mapping[str, str], where: str) -> None:
    """Name a column that looks like the image of a row without one: its question would be asked blindly."""
    if "image" in columns:
        return
    for name, value in raw.items():
        if (
            isinstance(value, str)
            and name not in columns.values()
            and value.strip().lower().endswith(IMAGE_SUFFIXES)
        ):
            detail = (
                f"{name!r} = {value[:80]} looks like an image; name the column with --column image={name}"
            )
            raise Defect("malformed", where, detail)


LETTER = "Answer with the option's letter from the given choices directly."
_LISTS = ("choices", "options")
_NUMBERED_IMAGE = re.compile(r"(?i)(?:image|img|photo|picture)[ _-]?(?:path)?[ _-]?(\d+)")
_OPTION = re.compile(r"(?i)(?:(?:option|choice)[ _-]?)?([A-Z])|(?:option|choice)[ _-]?(\d{1,2})")


def numbered_images(raw: Mapping[str, Any]) -> dict[int, str]:
    """Return the columns ``image_1``, ``image2`` and so on by their numbers, in their order."""
    found = {int(match[1]): name for name in raw if (match := _NUMBERED_IMAGE.fullmatch(str(name).strip()))}
    return dict(sorted(found.items()))


def listed_texts(value: Any) -> Any:
    """Return the list that a cell spells as JSON, such as ``["a.png", "b.png"]``; others as they are."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            listed = json.loads(value)
        except ValueError:
            return value
        return listed if isinstance(listed, list) else value
    return value


def option_columns(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of options in order: ``A``, ``B``, ...; ``option_a``; ``choice 1``; or a list."""
    for name in raw:
        if str(name).strip().lower() in _LISTS:
            return (str(name),)
    found: dict[int, str] = {}
    for name in raw:
        if match := _OPTION.fullmatch(str(name).strip()):
            found[ord(match[1].upper()) - ord("A") if match[1] else int(match[2]) - 1] = str(name)
    order = sorted(found)
    starts = (0,) if any(len(name.strip()) == 1 for name in found.values()) else (0, -1)  # option 0, option 1
    is_row = len(order) > 1 and order[0] in starts and order == list(range(order[0], order[-1] + 1))
    return tuple(found[number] for number in order) if is_row else ()


def find_options(raw: Mapping[str, Any], where: str) -> list[str]:
    """Return the texts of a row's options; empty if it has none.

    Raises:
        Defect: options that are no texts.
    """
    columns = option_columns(raw)
    values = listed_texts(raw[columns[0]]) if len(columns) == 1 else [raw[name] for name in columns]
    if isinstance(values, Mapping):
        values = list(values.values())
    if not isinstance(values, list):
        if columns and values not in (None, ""):
            raise Defect(
                "malformed", where, f"{columns[0]!r} must be a list of texts, found {str(values)[:80]}"
            )
        return []
    while values and values[-1] in (None, ""):  # a question with fewer options than others
        values = values[:-1]
    wrong = next((one for one in values if not isinstance(one, str | int | float) or one == ""), None)
    if wrong is not None or None in values:
        raise Defect("malformed", where, f"the option {wrong!r} must be text or a number")
    return [" ".join(str(one).split()) for one in values]


def with_options(question: str, answer: Any, options: list[str], where: str) -> tuple[str, str]:
    """Return a question with its options below it, and the letter of the right one.

    Args:
        question: the text in the row; options that it has already are not added again.
        answer: a letter, the text of an option, or the index of one in a list (a number, from 0).
        options: their texts.
        where: place of the row.

    Raises:
        Defect: the answer is none of the options.
    """
    letters = [chr(ord("A") + number) for number in range(len(options))]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    letter = _letter_of(answer, letters, options)
    if not letter:
        raise Defect(
            "malformed",
            where,
            f"the answer {str(answer)[:80]!r} is not one of the options {', '.join(lines)}, or "
            "could be two of "
            "them; give its letter",
        )
    if all(line in question for line in lines):
        return question, letter
    return "\n".join([question.strip(), *lines, LETTER]), letter


def _letter_of(answer: Any, letters: list[str], options: list[str]) -> str:
    """Return the option that an answer means; empty for none, or if its text and its index differ."""
    text = str(answer).strip()
    same = [letter for letter, option in zip(letters, options, strict=True) if option.lower() == text.lower()]
    is_index = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options)
    meant = {*same, *([letters[answer]] if is_index else [])}
    if not meant and text.upper().strip("().") in letters:
        meant = {text.upper().strip("().")}
    return meant.pop() if len(meant) == 1 else ""
