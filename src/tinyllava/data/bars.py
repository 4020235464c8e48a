"""Progress bars of long work: drawn by commands, passed to the callback of library calls (``reporting``)."""

import time
from typing import Any

from rich.progress import Progress, ProgressColumn, TaskID

from tinyllava.data.reporting import Listeners, Step

LINE_SECONDS = 60.0
"""Seconds between two lines of progress in a file."""


class Bars(Progress):
    """Bars of several tasks: drawn by a command, passed to the callback, or one line per minute in a file."""

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
    total = f" of {step.total:,}" if step.total else ""
    return f"{step.task}: {step.done:,}{total}{left}{note}"
