"""What a person sees of a stage while it trains (a bar with rates) and a program reads (metrics.jsonl)."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich
from accelerate import PartialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinyllava.data.bars import Bars
from tinyllava.files import append_lines, whole_objects, write_text

if TYPE_CHECKING:
    from tinyllava.training.trainer import StageTrainer


_WIDE = 128
"""Columns that the full form takes; a terminal has 80, and so has a file."""


def make_progress(console: Console | None = None) -> Bars:
    """Return a progress bar with count, free text and remaining time, shown by the first rank alone.

    In fewer than 128 columns the bar is short and the elapsed time left out: with ``note`` it fits 80.
    """
    console = console or rich.get_console()
    is_wide = console.width >= _WIDE
    elapsed = [TimeElapsedColumn()] if is_wide else []
    return Bars(
        TextColumn("{task.description:<22}" if is_wide else "{task.description}"),
        BarColumn(bar_width=28 if is_wide else 10),
        MofNCompleteColumn(),
        *elapsed,
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not PartialState().is_main_process,
        console=console,
    )


def rates_note(console: Console, loss: float, samples_per_second: float, tokens_per_second: float) -> str:
    """Return what stands beside the bar of a stage, short in a narrow terminal."""
    note = f"loss {loss:.3f}  {samples_per_second:.1f} samples/s"
    return f"{note} {tokens_per_second:,.0f} tokens/s" if console.width >= _WIDE else note


class StageProgress(TrainerCallback):
    """Draws the bar and appends every logged step to metrics.jsonl with rates."""

    def __init__(self, name: str, metrics: Path) -> None:
        self.name, self.metrics = name, metrics
        self.trainer: StageTrainer | None = None
        self.progress, self.task = make_progress(), TaskID(0)
        self.start = self.last = 0.0
        self.seen = (0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the bar at the step that the run resumes from."""
        if not state.is_world_process_zero:
            return
        self.start = self.last = time.monotonic()
        self._drop_steps_after(state.global_step)
        self.progress.start()
        self.task = self.progress.add_task(
            self.name, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write one line of metrics and move the bar."""
        if not state.is_world_process_zero or not logs or "loss" not in logs or self.trainer is None:
            return
        now = time.monotonic()
        seconds = max(now - self.last, 1e-9)
        samples, tokens = self.trainer.num_samples - self.seen[0], self.trainer.num_tokens - self.seen[1]
        self.seen, self.last = (self.trainer.num_samples, self.trainer.num_tokens), now
        line = {
            "step": state.global_step,
            **logs,
            "samples_per_second": round(samples * args.world_size / seconds, 3),
            "tokens_per_second": round(tokens * args.world_size / seconds, 1),
            "seconds": round(now - self.start, 2),
        }
        append_lines(self.metrics, [json.dumps(line)])
        elapsed = max(now - self.start, 1e-9)
        done = (self.trainer.num_samples * args.world_size, self.trainer.num_tokens * args.world_size)
        rates = (done[0] / elapsed, done[1] / elapsed)
        note = rates_note(self.progress.console, logs["loss"], *rates)
        self.progress.update(self.task, completed=state.global_step, note=note)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the finished bar on the screen."""
        self.progress.stop()

    def _drop_steps_after(self, step: int) -> None:
        """Take out lines of steps that a killed run did after its last checkpoint and that are done again.

        So are lines that a kill cut short or that were damaged: they only tell what happened.
        """
        if self.metrics.exists():
            kept = [
                json.dumps(line) + "\n"
                for line in whole_objects(self.metrics)
                if isinstance(line.get("step"), int) and line["step"] <= step
            ]
            write_text(self.metrics, "".join(kept))
