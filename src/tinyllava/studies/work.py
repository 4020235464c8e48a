"""Run one node: train the stage, or ask and score the benchmark, and write the result.

Paper: sections 3.2 and 4.1.3. A job runs ``python -m tinyllava.studies.work NODE.json``, under torchrun if it
has several devices.
"""

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from tinyllava.errors import TinyLlavaError
from tinyllava.files import read_object
from tinyllava.parts.user_code import run_value
from tinyllava.recipes.variants import code_of
from tinyllava.studies.graph import Node, load_node

FAILURES = (
    TinyLlavaError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What makes a node fail and leaves the others alone; an interrupt ends the grid."""
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
    """Return the state of a node. A node without a file, or with a damaged one, is waiting."""
    try:
        return State(**(read_object(_path(node)) or {}))
    except TypeError:  # fields of another program
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


def do_node(node: Node, *, job: str = "", log: Path | None = None) -> State:
    """Do a node unless it is done, and return its state; whatever it prints goes to the log.

    A failure is written down, not raised.
    """
    with claim(node):
        state = load_state(node)
        if state.status == "done":
            return state
        start, started = time.monotonic(), now()
        save_state(node, State(status="running", started=started, job=job))
        try:
            result = _logged(node, log)
        except FAILURES as error:
            text = str(error) if isinstance(error, TinyLlavaError) else f"{type(error).__name__}: {error}"
            state = State(status="failed", error=text, started=started, job=job)
        else:
            seconds = round(time.monotonic() - start, 1)
            state = State(status="done", started=started, seconds=seconds, job=job, result=result)
        save_state(node, state)
        return state


def _logged(node: Node, log: Path | None) -> str:
    """Do the work with its output in a file; the traceback of a failure goes there too."""
    with ExitStack() as stack:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(log.open("a", encoding="utf-8"))
            stack.enter_context(redirect_stdout(file))
            stack.enter_context(redirect_stderr(file))
        try:
            return work(node)
        except FAILURES:
            traceback.print_exc()
            raise


def work(node: Node) -> str:
    """Train or measure, in every process of a job; the first returns the folder of a finished stage.

    The user's own code that the run names is run first: this process may be another than the one that read
    the grid.
    """
    for reference in code_of(node.run):
        run_value(reference)
    if node.kind == "evaluation":
        _measure(node)
        return ""
    return _train(node)


def _train(node: Node) -> str:
    from tinyllava.training.run import train

    model = train(node.run, wait=True)
    if os.environ.get("RANK", "0") != "0":  # the first, which writes the state, may remove the model by now
        return ""
    metadata = json.loads((model / "provenance.json").read_text(encoding="utf-8"))["stages"][node.name]
    folder = _stage_folder(node, metadata["key"])
    if not node.keep_model:
        shutil.rmtree(model)
    return os.path.relpath(folder, node.folder)


def _stage_folder(node: Node, key: str) -> Path:
    """Return where the stage was trained: here, or in a run that had done it before."""
    from tinyllava.training.checkpoints import find_stage

    found = find_stage(node.folder / node.name, key)
    assert found is not None, "train has just used it"
    return found


def _measure(node: Node) -> None:
    from tinyllava.evaluation.run import Settings, evaluate, processes
    from tinyllava.inference.chat import Chat
    from tinyllava.training.run import train

    model = node.run.folder / "model"
    if not model.is_dir():
        train(node.run, wait=True)  # all its stages are done: this puts them together again
    judge = None
    if node.judge:
        from tinyllava.evaluation.judge import Endpoint, Judge, ReplyCache

        endpoint = Endpoint(
            url=node.judge["url"], model=node.judge["model"], api_key=os.environ.get(node.judge["key"], "")
        )
        judge = Judge(endpoint=endpoint, cache=ReplyCache(node.folder / "judge_replies.jsonl"))
    device = str(processes().device) if processes().num_processes > 1 else ""
    evaluate(
        Chat.open(model, device=device),
        node.benchmark,
        Path(node.data),
        node.folder,
        model=str(model),
        settings=Settings(limit=node.limit, num_workers=node.run.hardware.num_workers),
        judge=judge,
    )
    if not node.keep_model and os.environ.get("RANK", "0") == "0":
        shutil.rmtree(model)


def main() -> None:
    """Run the node of a task file, as one rank of a distributed job. The first rank writes the state."""
    node = load_node(Path(sys.argv[1]))
    job = sys.argv[2] if len(sys.argv) > 2 else ""
    if os.environ.get("RANK", "0") == "0":
        sys.exit(0 if do_node(node, job=job).status == "done" else 1)
    work(node)


if __name__ == "__main__":
    main()
