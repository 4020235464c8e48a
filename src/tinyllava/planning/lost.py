"""What the processes of a run do if one of them is lost: they find out which one, and one of them tells it.

Paper: none. PyTorch ends a collective call at a time limit, and says neither which process did not come nor
what to do. Those that wait in vain sign in at the store where all have met. The others are named.
"""

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from tinyllava.errors import LostProcessError, TinyLlavaError

T = TypeVar("T")

PATIENCE_SECONDS = 20
"""Time in which all that wait have signed in, or a launcher that knows the reason has ended this process."""
_LATE = "timed out|timeout"
_SOMEONE = "another process of this run"


def is_first_to_tell() -> bool:
    """Whether no other process of this run has told an error; torchrun's store keeps count."""
    return _at_store(lambda store: bool(store.add(_key("told"), 1) == 1), otherwise=True)


def is_of_another_process(error: BaseException) -> bool:
    """Whether an error only says that another process of the run has ended, or does not answer."""
    if _num_processes() == 1 or not isinstance(error, RuntimeError) or isinstance(error, TinyLlavaError):
        return False
    is_torchs = any(kind.__module__ == "torch.distributed" for kind in type(error).__mro__)
    # gloo's errors name its files, but for that of a connection which it gave up at an earlier limit.
    return is_torchs or re.search("gloo|nccl|Application timeout", str(error), re.IGNORECASE) is not None


def lost_process(error: BaseException, limit_seconds: int = 0) -> LostProcessError:
    """Return what to raise instead of an error for which ``is_of_another_process`` is true.

    Args:
        error: what PyTorch raised.
        limit_seconds: how long this process waited at most; 0 if no setting of the user says it.
    """
    again = "Look at the messages there, and run the same command again to resume."
    if not re.search(_LATE, str(error), re.IGNORECASE):
        return LostProcessError(f"{_SOMEONE} ended. {again}")
    limit = f"within {limit_seconds:,} s" if limit_seconds else "in time"
    longer = " If it only needs more time, raise --hardware.timeout-seconds." if limit_seconds else ""
    return LostProcessError(
        f"{_SOMEONE} did not answer {limit}: a process hangs, or a node is lost. {again}{longer}"
    )


def name_lost(error: LostProcessError) -> str:
    """Return the text of an error with the processes that are lost; it takes ``PATIENCE_SECONDS``."""
    own, num_processes = os.environ.get("RANK", "0"), _num_processes()
    _at_store(lambda store: store.set(_key(f"waits/{own}"), ""), otherwise=None)
    time.sleep(PATIENCE_SECONDS)
    others = [str(rank) for rank in range(num_processes) if str(rank) != own]
    nobody: list[str] = []
    lost = _at_store(
        lambda store: [rank for rank in others if not store.check([_key(f"waits/{rank}")])], otherwise=nobody
    )
    if not lost:
        return str(error)
    noun = "process" if len(lost) == 1 else "processes"
    return str(error).replace(_SOMEONE, f"{noun} {', '.join(lost)} of {num_processes}")


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _key(name: str) -> str:
    return f"tinyllava/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _at_store(action: Callable[[Any], T], otherwise: T) -> T:
    """Do an action with the store where the processes met, or return another value if there is none."""
    if _num_processes() == 1 or "MASTER_ADDR" not in os.environ:
        return otherwise
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return action(TCPStore(*place, wait_for_workers=False, timeout=timedelta(seconds=5)))
    except DistError:
        return otherwise
