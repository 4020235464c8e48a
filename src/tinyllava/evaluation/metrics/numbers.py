"""The number that an answer names, and how far it may be off."""

import math
import re

from tinyllava.evaluation.metrics.words import words_of

_NUMBER = re.compile(
    r"(?<![\w.,])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:[.,]\d+)?)(?:[eE][-+]?\d+)?(?![.,]?\d)"
)
_NAMES_IN_ORDER = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_NAMES = _NAMES_IN_ORDER.split()


def find_numbers(text: str) -> list[float]:
    """Return the numbers in a text; words up to twenty where it has no digits.

    ``1,234`` is a thousand, ``3,5`` three and a half; a unit may follow a number, no letter may precede it.
    """
    found = []
    for match in _NUMBER.finditer(text):
        digits = match[0].replace("\u2212", "-")
        is_thousands = re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", digits) is not None
        found.append(float(digits.replace(",", "" if is_thousands else ".")))
    if found or re.search(r"\d", text):
        return found
    return [float(_NAMES.index(word)) for word in words_of(text) if word in _NAMES]


def parse_tolerance(tolerance: str) -> tuple[float, bool]:
    """Return a tolerance as a number and whether it is a share; ValueError for what is none."""
    is_share = tolerance.strip().endswith("%")
    value = float(tolerance.strip().removesuffix("%"))
    if not 0 <= value < math.inf:
        raise ValueError(tolerance)
    return (value / 100 if is_share else value), is_share
