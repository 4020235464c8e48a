"""Work on many records by all cores, in forked processes that find everything in the memory of their parent.

Paper: none.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from tinyllava.errors import DataError

Part = TypeVar("Part")
Result = TypeVar("Result")

_FEW = 2
"""Parts for which other processes would cost more than they save."""
_TRIED = 8
_WAITED_SECONDS = 1e-4
"""For an item: above it several are waited for together."""
_WAITING = 16
"""Threads of a process that wait."""
_WORK: list[Callable[[Any], Any]] = []
"""Of a forked process: what it does with a part."""


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_waiting(work: Callable[[Part], Result], items: Sequence[Part]) -> list[Result]:
    """Return the result of each item, in order; where the work waits for a slow disk, by threads.

    Whether it does is seen by the first items. Otherwise threads would only cost time.
    """
    first = items[:_TRIED]
    start = time.perf_counter() - time.thread_time()
    found = [work(item) for item in first]
    waited = time.perf_counter() - time.thread_time() - start
    if waited < _WAITED_SECONDS * len(first):
        return found + [work(item) for item in items[_TRIED:]]
    with ThreadPoolExecutor(_WAITING) as threads:
        return [*found, *threads.map(work, items[_TRIED:])]


def map_parts(
    work: Callable[[Part], Result], parts: Iterable[Part], at_most: int | None = None
) -> Iterator[Result]:
    """Yield the result of each part, in order; a few parts ahead are worked on, ``at_most`` at the same time.

    Nothing but parts and results travels between processes. Without a second core, for a few parts, within
    such a process, or on a system that does not fork safely beside the threads of libraries (macOS), the work
    is done here.

    Args:
        parts: are made as they are needed.

    Raises:
        DataError: a process died; and what ``work`` raises.
    """
    rest = iter(parts)
    first = list(islice(rest, _FEW + 1))
    number = num_cores() if len(first) > _FEW and not _WORK else 1  # a forked process has one core
    limits = (at_most, len(parts) if isinstance(parts, Sequence) else None)
    number = min([number, *(limit for limit in limits if limit)])
    if number < 2 or sys.platform != "linux":
        yield from map(work, chain(first, rest))
        return
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("fork"), _begin, (work,))
    waiting: deque[Future[Result]] = deque()
    try:
        for part in chain(first, rest):
            waiting.append(pool.submit(_do, part))
            if len(waiting) > 2 * number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "one of several processes died, possibly because memory ran out. Run the same command again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    """Begin a forked process. The parent answers Ctrl-C, and none outlives it.

    SIGTERM, by which the pool ends the others when one has died, ends it at once: Python calls no handler of
    the parent's in a process that waits for a lock which the dead one holds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # a collection would look at all that was imported, which takes time and copies it
    _WORK[:] = [work]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _do(part: Any) -> Any:
    return _WORK[0](part)
