"""What long work says while it runs: a library call is silent, a command shows bars and lines.

Whoever calls a function of the library may pass a callback, which is told of every step. In a terminal a
command draws bars; where its output goes to a file, it writes a line a minute.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress, ProgressColumn, TaskID


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
    """Who is told of long work."""

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


LINE_SECONDS = 60.0
"""Seconds between two lines of progress in a file."""


class Bars(Progress):
    """Bars of several tasks: shown in a command, told to the callback, a line a minute in a file."""

    def __init__(self, *columns: str | ProgressColumn, disable: bool = False, **options: Any) -> None:
        self._is_told = not disable
        super().__init__(*columns, disable=disable or not Listeners.is_shown, **options)
        self._last_line = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Move a task; see rich's Progress."""
        super().update(task_id, **changes)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a task forward; see rich's Progress."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if not self._is_told:
            return
        task = next(task for task in self.tasks if task.id == task_id)
        step = Step(
            task=task.description,
            done=int(task.completed),
            total=int(task.total or 0),
            note=str(task.fields.get("note", "")),
        )
        if Listeners.callback is not None:
            Listeners.callback(step)
        if self.disable or self.console.is_terminal:
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self.console.print(describe(step, task.time_remaining))


def describe(step: Step, seconds_left: float | None) -> str:
    """Return a step as a line of a log."""
    left = f", {seconds_left / 60:.0f} min left" if seconds_left is not None else ""
    note = f", {step.note}" if step.note else ""
    return f"{step.task}: {step.done:,} of {step.total:,}{left}{note}"
