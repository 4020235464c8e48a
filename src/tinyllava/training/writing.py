"""Write a checkpoint while the next steps are computed.

Paper: none; the published code waits for each checkpoint.

Right after its step, all that later steps change is copied to main memory. A thread writes the copy, has it
reach the disk, and writes the manifest last. The next checkpoint, and the end of the stage, wait for it.
There is one copy at a time. Where main memory is short there is none, and training waits.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup, new_group
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from tinyllava.config import Sharding
from tinyllava.data.reporting import say
from tinyllava.errors import TrainingError
from tinyllava.files import is_full_disk
from tinyllava.model.rebuild import RESUMED_TENSORS
from tinyllava.training.sharding import MOMENTS, divided_moments, local_part, save_moments, without_moments

OPTIMIZER_STATE = "optimizer.pt"
"""File of a checkpoint in which the Trainer looks for the optimizer's state."""
MEMORY_SHARE = 0.5
"""Of the free main memory; a copy that needs more is not made."""


class CheckpointWriter:
    """Writes what is large of a stage's checkpoints; the Trainer itself writes the rest, a few kB.

    For each checkpoint ``take`` comes first, then ``take_state`` where this process writes the optimizer's
    state, then ``write``. Every process of a run calls the first and the last.

    Args:
        sharding: what the processes divide among them; then each writes its share of the moments.
        limit: how long one waits for another in the writing.
    """

    def __init__(self, sharding: Sharding = "none", limit: timedelta = timedelta(hours=1)) -> None:
        # Of its own: the training's collective calls must not meet those of the thread.
        divides = sharding != "none"
        self._group: ProcessGroup | None = new_group(backend="gloo", timeout=limit) if divides else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._jobs: list[Callable[[], object]] = []
        self._folder = Path()
        self._future: Future[None] | None = None
        self._copies = self._is_taking = self._is_given_up = self._has_said = False

    def take(self, folder: Path, tensors: dict[str, Tensor], twin: nn.Module, optimizer: Optimizer) -> None:
        """Take what a checkpoint holds, as it is now.

        Args:
            folder: of the checkpoint.
            tensors: trained ones to write, by name; none in processes that write none.
            twin: the model that is trained, divided or not.
            optimizer: its own.
        """
        divided = divided_moments(twin, optimizer)
        writes_state = bool(tensors) and self._group is None
        state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        num_bytes = sum(
            map(_num_bytes, [*tensors.values(), *divided.values(), *(state if writes_state else [])])
        )
        self._copies = self._has_memory(num_bytes)
        self._folder, self._jobs, self._is_taking = folder, [], writes_state and self._copies
        if tensors:
            kept = to_host(tensors) if self._copies else tensors
            self._jobs.append(partial(save_file, kept, folder / RESUMED_TENSORS, metadata={"format": "pt"}))
        if self._group is not None:
            self._jobs.append(save_moments(folder / MOMENTS, divided, self._group, copies=self._copies))

    def take_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take an optimizer's state and return what the Trainer writes of it.

        A post-hook of ``Optimizer.state_dict``.
        """
        lean = without_moments(state_dict)
        if not self._is_taking:
            return lean
        self._is_taking = False
        self._jobs.append(partial(_save_state, to_host(lean), self._folder / OPTIMIZER_STATE))
        return {**lean, "state": {}}

    def write(self, finish: Callable[[Path], None]) -> None:
        """Write what was taken; every process has written its small files.

        Args:
            finish: called with the folder once all is written; in one process only.
        """
        jobs: list[Callable[[], object]] = [*self._jobs, partial(finish, self._folder)]
        self._jobs = []
        if not self._copies:
            self._run(jobs)
            return
        self._future = self._thread.submit(self._run, jobs)

    def check(self) -> None:
        """Raise what has gone wrong in the writing so far."""
        if self._future is not None and self._future.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            OSError, SafetensorError, RuntimeError: the disk is full.
            TrainingError: it could not be written for another reason.
        """
        future, self._future = self._future, None
        if future is not None:
            future.result()

    def close(self, *, gives_up: bool = False) -> None:
        """End the thread; what it fails in is told by ``wait`` alone.

        Args:
            gives_up: write no more than the file that is being written; the checkpoint stays incomplete.
        """
        self._is_given_up = gives_up
        self._thread.shutdown()

    def _run(self, jobs: list[Callable[[], object]]) -> None:
        try:
            while jobs and not self._is_given_up:
                jobs.pop(0)()  # each lets go of its copy
        except (OSError, SafetensorError, CheckpointException) as error:
            if is_full_disk(error):
                raise OSError(28, "No space left on device", str(self._folder)) from error
            raise TrainingError(
                f"{self._folder}: cannot be written ({error}). Make the folder writable and run the same "
                "command again; it resumes from the checkpoint before."
            ) from error

    def _has_memory(self, num_bytes: int) -> bool:
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self._group is not None else 1
        free = free_memory() // num_local
        if num_bytes <= MEMORY_SHARE * free:
            return True
        if not self._has_said and PartialState().is_main_process:
            say(
                f"training waits for each checkpoint: a copy of its {num_bytes / 1e9:.1f} GB is not made in "
                f"{free / 1e9:.1f} GB of free main memory"
            )
        self._has_said = True
        return False


def _num_bytes(tensor: Tensor) -> int:
    local = local_part(tensor)
    return local.numel() * local.element_size()


def to_host(value: Any) -> Any:
    """Return a copy of nested dicts and lists whose tensors are in main memory and nobody else's."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(inner) for key, inner in value.items()}
    return [to_host(inner) for inner in value] if isinstance(value, list) else value


def _save_state(state: dict[str, Any], path: Path) -> None:
    assert path.is_file(), "where the Trainer has just written the rest, and looks for it"
    torch.save(state, path)


def free_memory() -> int:
    """Return the bytes of main memory that this process can still take, also within a container's limit."""
    free = int(psutil.virtual_memory().available)
    for folder in _control_groups():
        try:
            limit = int((folder / "memory.max").read_text())  # "max": no limit
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(stat["inactive_file"])
        except (OSError, ValueError, KeyError):
            continue
        free = min(free, max(0, limit - used))
    return free


def main_memory() -> int:
    """Return the bytes of main memory that this machine has, or as many as a container may take."""
    most = int(psutil.virtual_memory().total)
    for folder in _control_groups():
        with suppress(OSError, ValueError):  # "max": no limit
            most = min(most, int((folder / "memory.max").read_text()))
    return most


def _control_groups() -> list[Path]:
    """Return this process's control group and those that it is in; Linux alone has them."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    root = Path("/sys/fs/cgroup")
    inner = root / own
    return [inner, *(folder for folder in inner.parents if folder.is_relative_to(root))]
