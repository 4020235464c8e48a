"""Background processes that open images: how many of them shared memory allows, and what happens if one dies.

Paper: none. Workers pass tensors in shared memory. If it is full, they wait forever. (A Docker container has
64 MB of it by default.)
"""

import gc
import multiprocessing
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tinyllava.errors import DataError

SHARED_MEMORY = Path("/dev/shm")
PAGES_BYTES = 16 * 4096
"""Of a batch beside its contents: each of its tensors takes whole pages."""
PREFETCHED = 2
"""Batches that each worker prepares ahead at least: PyTorch's default."""


class Loading(NamedTuple):
    """How batches are prepared in the background."""

    num_workers: int
    prefetch_factor: int
    """Batches that each worker prepares ahead."""
    why: str
    """What the shared memory does not allow; empty if nothing."""


def usable_workers(
    wanted: int, batch_bytes: int, num_held: int = 1, num_processes: int = 1, ahead: int = 0
) -> Loading:
    """Return how many workers the shared memory can serve, at most ``wanted``, and why if they are fewer.

    All of them together prepare ``ahead`` batches while the receiver computes. Where that many do not fit,
    they prepare fewer, and only then are there fewer workers.

    Args:
        wanted: number of workers that was asked for.
        batch_bytes: bytes of the largest batch that a worker hands over.
        num_held: batches that the receiver holds at a time.
        num_processes: receivers on this machine that have workers of their own.
        ahead: batches that the receiver takes at a time; 0 for one after the other.
    """
    each = max(PREFETCHED, -(-ahead // max(1, wanted)))
    if not wanted or not SHARED_MEMORY.is_dir():
        return Loading(wanted, each, "")
    free = shutil.disk_usage(SHARED_MEMORY).free // max(1, num_processes)
    room = max(0, free // max(1, batch_bytes) - num_held)
    if room >= wanted * each:
        return Loading(wanted, each, "")
    needed = (wanted * each + num_held) * batch_bytes * num_processes
    usable, each = min(wanted, room // PREFETCHED), max(PREFETCHED, room // wanted)
    used = f"{usable or 'no'} workers are used" if usable < wanted else f"each prepares {each} batches ahead"
    why = (
        f"{SHARED_MEMORY} has {free * num_processes / 1e6:,.0f} MB of shared memory free, {wanted} workers "
        f"need {needed / 1e6:,.0f} MB: {used}. Start the container with "
        f"--shm-size={max(1, -(-needed // 10**9))}g for more speed."
    )
    return Loading(usable, each, why)


def begin_worker(number: int = 0) -> None:
    """Begin a worker that was forked; PyTorch calls it with the worker's number.

    Collecting garbage writes to every object that the parent had made, so that each worker would get a copy
    of them. What was there at the fork is left out of it.
    """
    gc.freeze()


def out_of_shared_memory(batch: Any) -> Any:
    """Return a batch without tensors in shared memory; on a GPU none is there any more."""
    if isinstance(batch, dict):
        return {name: out_of_shared_memory(value) for name, value in batch.items()}
    is_there = isinstance(batch, Tensor) and batch.is_shared() and not batch.is_cuda
    return batch.clone() if is_there else batch


@contextmanager
def naming_dead_workers(option: str) -> Iterator[None]:
    """Say in one line that a worker started inside died, as PyTorch notices within seconds, or hangs.

    Raises:
        DataError: with the option that asks for fewer of them.
    """
    before = multiprocessing.active_children()
    try:
        yield
    except RuntimeError as error:
        if found := re.match(r"DataLoader timed out after (\d+)", str(error)):
            _end_children_except(before)
            raise DataError(
                f"the processes that load images delivered none within {int(found[1]):,} s: the disk or "
                "network folder of the images may hang. Check it, and run the same command again to resume. "
                "If loading only needs more time, raise --hardware.timeout-seconds."
            ) from error
        if "DataLoader worker (pid" not in str(error):  # what one raises is handed over, and is no death
            raise
        first = str(error).partition("\n")[0]
        _end_children_except(before)
        raise DataError(
            f"a process that loads images died, possibly because memory ran out ({first}). Run the same "
            f"command again to resume. {option} 0 loads images without such processes."
        ) from error


def _end_children_except(others: list[BaseProcess]) -> None:
    """Kill the workers and wait for their ends.

    They would go with their loader, but nobody can say when that is: frames of the error hold it, and of the
    errors that this one interrupted. Until the dead one has been waited for, PyTorch raises the same error
    again wherever the program is when another process ends.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one is interrupted so
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()
                child.join()
    finally:
        signal.signal(signal.SIGCHLD, before)
