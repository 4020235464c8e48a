"""What is known of a node on disk: done, failed, running or submitted; written whole or not at all.

Paper: none. The file outlives every process, so that a grid that is started again knows what is done.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from tinyllava.studies.graph import Node

Status = Literal["waiting", "submitted", "running", "done", "failed"]


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of one node."""

    status: Status = "waiting"
    error: str = ""
    seconds: float = 0.0
    """Of the work, when it is done; waiting for a machine does not count."""
    started: float = 0.0
    """Unix time."""
    job: str = ""
    """``slurm:123`` or ``local:123`` for a node that was submitted."""
    result: str = ""
    """Folder of the finished stage, relative to the node's: another run's where that one was reused."""


def load_state(node: Node) -> State:
    """Return the state of a node; one that was never begun is waiting."""
    try:
        return State(**json.loads(_path(node).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return State()


def save_state(node: Node, state: State) -> None:
    """Write the state of a node."""
    path = _path(node)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _path(node: Node) -> Path:
    return node.folder / "node.json"


@contextmanager
def claim(node: Node) -> Iterator[None]:
    """Hold a node while it is worked on; the system lets go of it when the process ends, however it ends."""
    node.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(node.folder / "node.lock"):
        yield


def is_claimed(node: Node) -> bool:
    """Whether some process of this machine works on a node."""
    path = node.folder / "node.lock"
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def now() -> float:
    """Return Unix time in seconds."""
    return round(time.time(), 1)
