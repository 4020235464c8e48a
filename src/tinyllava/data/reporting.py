"""Progress of long work: library calls are silent, and commands show bars and lines.

A caller of a library function may pass a callback, which is called with every step. A command draws bars in a
terminal. If its output goes to a file, it writes one line per minute.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Progress of one task."""

    task: str
    """Name of the task, such as ``pretrain`` or ``counting tokens``."""
    done: int
    total: int
    note: str = ""
    """Loss and rates, as the bar shows them."""


Callback = Callable[[Step], None]


class Listeners:
    """The callbacks that receive progress."""

    is_shown = False
    callback: Callback | None = None


@contextmanager
def reporting(callback: Callback | None = None, *, is_shown: bool | None = None) -> Iterator[None]:
    """Show progress of the work inside, or pass it to a callback. Without arguments, outer settings stay."""
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
    """Print a line in a command, and nothing in a library call."""
    if Listeners.is_shown:
        from rich.console import Console  # here: quick commands start faster without it

        Console(highlight=False, markup=False, soft_wrap=True).print(text)
