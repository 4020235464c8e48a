"""SIGTERM and Ctrl-C during training: finish the step, write a checkpoint, then end the run."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinyllava.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_listening = threading.Event()


@cache
def _protect_workers() -> None:
    """Have SIGTERM end a process that opens images only if its parent, this process, sends it.

    Schedulers, containers and ``timeout`` send it to every process of a run. A worker that ended then would
    interrupt its parent in the writing of the checkpoint: PyTorch raises an error there as soon as one dies.
    PyTorch replaces the handler of SIGTERM in its workers, so the signal is blocked and taken by a thread.
    """
    if sys.platform == "linux":  # elsewhere nobody can tell who sent a signal
        os.register_at_fork(after_in_child=_begin_worker)


def _begin_worker() -> None:
    if _listening.is_set():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    if sys.platform == "linux":
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)


class StopRequests(TrainerCallback):
    """Listens for the two signals during training, and ends the stage after the current step.

    Every process of a run learns of it at the same step: they save together.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal; 0 for none."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside; afterwards restore the old handlers and act on a received signal.

        Raises:
            Stopped: a signal came.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may take signals
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        owner = os.getpid()

        def take(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:
                return  # a process that opens images: it ends with this one
            is_alone = PartialState().num_processes == 1
            if self.received:  # launchers signal twice; the others wait for this process's share
                if is_alone and number == signal.SIGINT:
                    raise Stopped(number)
                return
            self.received = number
            if PartialState().is_main_process:
                again = "; Ctrl-C again stops at once" if is_alone and number == signal.SIGINT else ""
                print(f"\nstopping: saving after this step{again}.", file=sys.stderr, flush=True)

        for number in _SIGNALS:
            signal.signal(number, take)
        _protect_workers()
        _listening.set()
        try:
            yield
        finally:
            _listening.clear()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received:
            raise Stopped(self.received)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save and end if any process was asked to."""
        if args.world_size > 1:
            flag = torch.tensor(float(self.received), device=PartialState().device)
            total = int(reduce(flag, reduction="sum").item())
            self.received = self.received or (signal.SIGTERM if total else 0)
        if self.received:
            control.should_save = control.should_training_stop = True
