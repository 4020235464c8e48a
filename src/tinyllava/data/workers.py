"""Background processes that open images: how many the shared memory can serve, and what if one dies.

Paper: none. Workers hand tensors over in shared memory; where it is full they wait without an end (a Docker
container has 64 MB of it by default).
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyllava.errors import DataError

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2
"""Batches that each worker prepares ahead: PyTorch's default."""


def usable_workers(
    wanted: int, batch_bytes: int, num_held: int = 1, num_processes: int = 1
) -> tuple[int, str]:
    """Return how many workers the shared memory can serve, at most ``wanted``, and why if they are fewer.

    Args:
        wanted: number of workers that was asked for.
        batch_bytes: bytes of the largest batch that a worker hands over.
        num_held: batches that the receiver holds at a time.
        num_processes: receivers on this machine that have workers of their own.
    """
    if not wanted or not SHARED_MEMORY.is_dir():
        return wanted, ""
    free = shutil.disk_usage(SHARED_MEMORY).free // max(1, num_processes)
    usable = max(0, (free // max(1, batch_bytes) - num_held) // PREFETCHED)
    if usable >= wanted:
        return wanted, ""
    needed = (wanted * PREFETCHED + num_held) * batch_bytes * num_processes
    return usable, (
        f"{SHARED_MEMORY} has {free * num_processes / 1e6:,.0f} MB of shared memory free, {wanted} workers "
        f"need {needed / 1e6:,.0f} MB: {usable or 'no'} workers are used. Start the container with "
        f"--shm-size={max(1, -(-needed // 10**9))}g for more speed."
    )


@contextmanager
def naming_dead_workers(option: str) -> Iterator[None]:
    """Say in one line that a worker died, which PyTorch notices within seconds.

    Raises:
        DataError: with the option that asks for fewer of them.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # what one raises is handed over, and is no death
            raise
        first = str(error).partition("\n")[0]
        raise DataError(
            f"a process that loads images died, possibly because memory ran out ({first}). Run the same "
            f"command again to resume. {option} 0 loads images without such processes."
        ) from error
