"""Exact look-up in a table of names, with a suggestion when the name is not there."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from tinyllava.errors import UnknownNameError

T = TypeVar("T")


def look_up(table: Mapping[str, T], name: str, noun: str) -> T:
    """Return ``table[name]``.

    Raises:
        UnknownNameError: no such name; the message lists the known ones and the closest.
    """
    if name in table:
        return table[name]
    message = f"unknown {noun} {name!r}; known: {', '.join(table)}."
    by_lower = {known.lower(): known for known in table}
    close = get_close_matches(name.lower(), by_lower, n=1)
    if close:
        message += f" Did you mean {by_lower[close[0]]!r}?"
    raise UnknownNameError(message)
