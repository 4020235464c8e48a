"""Progress of a stage during training: a bar with rates for people, and metrics.jsonl for programs."""

import json
import time
from collections.abc import Mapping
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

from tinyllava.config import COMPONENTS, Stage
from tinyllava.data.bars import Bars
from tinyllava.data.reporting import Listeners, say
from tinyllava.files import append_lines, whole_objects, write_text
from tinyllava.model.tuning import Ledger
from tinyllava.training.validation import best_step, read_curve

if TYPE_CHECKING:
    from tinyllava.training.prepare import Prepared
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


def rates_note(
    console: Console,
    loss: float,
    samples_per_second: float,
    tokens_per_second: float,
    held_out_loss: float | None = None,
) -> str:
    """Return the note next to the bar of a stage, short in a narrow terminal."""
    held = "" if held_out_loss is None else f"  held-out {held_out_loss:.3f}"
    if held and console.width < _WIDE:
        return f"loss {loss:.3f}{held}"
    note = f"loss {loss:.3f}{held}  {samples_per_second:.1f} samples/s"
    return f"{note} {tokens_per_second:,.0f} tokens/s" if console.width >= _WIDE else note


class StageProgress(TrainerCallback):
    """Draws the bar and appends every logged step to metrics.jsonl with rates."""

    def __init__(self, name: str, metrics: Path) -> None:
        self.name, self.metrics = name, metrics
        self.trainer: StageTrainer | None = None
        self.progress, self.task = make_progress(), TaskID(0)
        self.start = self.last = 0.0
        self.held_out_loss: float | None = None
        self.shown = (0.0, 0.0, 0.0)
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
        if not state.is_world_process_zero or not logs or self.trainer is None:
            return
        if "eval_loss" in logs:
            self._log_validation(state, logs)
        if "loss" not in logs:
            return
        now = time.monotonic() - self.trainer.seconds_validating  # the rates are those of the steps
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
        self.shown = (logs["loss"], done[0] / elapsed, done[1] / elapsed)
        self._move_bar(state.global_step)

    def _move_bar(self, step: int) -> None:
        note = rates_note(self.progress.console, *self.shown, self.held_out_loss)
        self.progress.update(self.task, completed=step, note=note)

    def _log_validation(self, state: TrainerState, logs: Mapping[str, float]) -> None:
        """Write the line of a validation; its time is not the steps'."""
        self.held_out_loss = logs["eval_loss"]
        line = {
            "step": state.global_step,
            "epoch": logs.get("epoch"),
            "validation_loss": logs["eval_loss"],
            "validation_seconds": logs["eval_seconds"],
        }
        append_lines(self.metrics, [json.dumps(line)])
        if state.global_step:
            self._move_bar(state.global_step)
        if Listeners.is_shown:
            curve = read_curve(state.log_history)
            best = ", best so far" if best_step(curve) == state.global_step else ""
            self.progress.console.print(
                f"{self.name}: step {state.global_step:,}, held-out loss {self.held_out_loss:.4f}{best}",
                highlight=False,
            )

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
                if isinstance(line.get("step"), int) and line["step"] <= step and step > 0
            ]
            write_text(self.metrics, "".join(kept))


def announce(name: str, stage: Stage, ledger: Ledger, prepared: "Prepared") -> None:
    """Say what is about to be trained on what; the first process does."""
    if not PartialState().is_main_process:
        return
    data = prepared.summary()
    say(f"\n{name}: {data['num_samples']:,} samples, {data['num_tokens']:,} tokens")
    for share in prepared.mixture:
        say(f"  {share}")
    for component in COMPONENTS:
        trained = ledger.num_parameters(component, trained_only=True)
        rate = f" at {stage.learning_rate_of(component):g}" if trained else ""
        say(f"  {component:<15} {trained:>13,} of {ledger.num_parameters(component):>13,} trained{rate}")
    if prepared.held_out:
        held = prepared.held_out.summary()
        say(f"  held out: {held['num_samples']:,} samples, {held['num_supervised_tokens']:,} answer tokens")
        if prepared.held_out.num_seen:
            say(
                f"  {prepared.held_out.num_seen:,} of them show an image that is also trained on, so their "
                "loss also measures memorisation. `--held-out 10%` separates by image."
            )
    if prepared.examples.num_truncated:
        cut = f"{prepared.examples.num_truncated:,} records end after an earlier answer"
        say(f"  truncated: {cut}, to fit {stage.max_length_tokens:,} tokens")
    if prepared.skipped:
        say("  skipped: " + ", ".join(f"{count} {defect}" for defect, count in prepared.skipped.items()))
