"""What long work says while it runs: a library call is silent, a command shows bars and lines.

A caller of a library function may pass a callback, which is called with every step. In a terminal a
command draws bars; where its output goes to a file, it writes a line a minute.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """How far one task of long work is."""

    task: str
    """What is done, such as ``pretrain`` or ``reading records``."""
    done: int
    total: int
    note: str = ""
    """Loss and rates, as the bar shows them."""


Callback = Callable[[Step], None]


class Listeners:
    """The callbacks that are told of progress."""

    is_shown = False
    callback: Callback | None = None


@contextmanager
def reporting(callback: Callback | None = None, *, is_shown: bool | None = None) -> Iterator[None]:
    """Show the work inside, or tell a callback of it; what was set outside holds where nothing is given."""
    before = (Listeners.is_shown, Listeners.callback)
    if is_shown is not None:
        Listeners.is_shown = is_shown
    if callback is not None:
        Listeners.callback = callback
    try:
        yield
    finally:
        Listeners.is_shown, Listeners.callback = before


def say(text: str) -> None:
    """Print a line of a command; nothing in a library call."""
    if Listeners.is_shown:
        from rich.console import Console  # here: quick commands start faster without it

        Console(highlight=False, markup=False, soft_wrap=True).print(text)
