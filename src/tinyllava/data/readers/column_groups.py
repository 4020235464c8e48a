"""What a row holds in several columns: numbered images, and the options of a question with choices.

Differs: published multiple-choice sets keep options apart from the question; here they become lines of it, as
LLaVA asks ScienceQA, so that training and evaluation ask the same.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from tinyllava.data.defects import Defect

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
    """Return the texts of a row's options; empty where it has none.

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
        question: as it stands in the row; options that it has already are not added again.
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
            f"the answer {str(answer)[:80]!r} is none of the options {', '.join(lines)}, or could be two of "
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
