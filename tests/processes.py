"""Processes forked from the test's: all is imported there, which costs a fresh one seconds of a core."""

import multiprocessing
import os
import runpy
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed.launcher.api
from accelerate import PartialState
from torch.distributed import TCPStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from tinyllava.cli import main

FORK = multiprocessing.get_context("fork")


def start(action: Callable[[], object], said: Path | None = None, *, group: bool = True) -> BaseProcess:
    """Start an action in a process; an integer that it returns is the exit status.

    Args:
        action: what the process does.
        said: file that gets what it prints; none for where the test's own words go.
        group: in a process group of its own, to be killed with all that it starts.
    """

    def run() -> None:
        if group:
            os.setpgid(0, 0)
        if said:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        tqdm.set_lock(threading.RLock())  # its own is shared with others, which may be killed holding it
        result = action()
        if isinstance(result, int):
            sys.exit(result)

    process = FORK.Process(target=run)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        process.start()
    if group and process.pid and process.exitcode is None:
        # Here as well: whoever kills the group may do so before the process's first line, and the process may
        # start others before this one.
        os.setpgid(process.pid, process.pid)
    return process


def run_script(script: Path, *options: str, said: Path) -> str:
    """Run a script to its end as ``python SCRIPT`` does, and return what it printed."""

    def run() -> None:
        sys.path.insert(0, str(script.parent))
        sys.argv = [str(script), *options]
        runpy.run_path(str(script), run_name="__main__")

    process = start(run, said)
    process.join()
    assert process.exitcode == 0, said.read_text()
    return said.read_text()


def in_ranks(
    num_ranks: int, action: Callable[[int], object], said: Path | None = None, hung: Sequence[int] = ()
) -> list[int | None]:
    """Do an action in so many ranks of one job, given its rank, and return their exit statuses.

    They meet at a store of this process, on a port that nobody else has: a free port that is only named can
    be taken before the first rank opens it.

    Args:
        num_ranks: 1 starts a process as no launcher does.
        action: what each rank does.
        said: the start of the names of the files that get what each prints: ``said-0``, ``said-1``.
        hung: ranks that are killed when the others have ended, as a launcher does.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(rank: int) -> object:
        if num_ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        PartialState._reset_state()  # of the test's process, which may have trained alone
        return action(rank)

    ranks = [
        start(lambda rank=rank: run(rank), said and said.with_name(f"{said.name}-{rank}"), group=False)
        for rank in range(num_ranks)
    ]
    try:
        for rank in sorted(range(num_ranks), key=lambda rank: rank in hung):
            if rank in hung:
                ranks[rank].kill()
            ranks[rank].join()
    finally:  # the test's own time limit, for one
        for process in ranks:
            process.kill()
    return [process.exitcode for process in ranks]


def start_command(arguments: Sequence[str], said: Path, prepare: Callable[[], object] = int) -> BaseProcess:
    """Start ``tinyllava ARGUMENTS`` without a launcher of its own; processes that it launches are forked too.

    Args:
        arguments: of the command.
        said: file that gets what it prints.
        prepare: done in the process first, for one.
    """

    def forking(config: LaunchConfig, executable: str) -> Callable[..., object]:
        config.start_method = "fork"
        return lambda *program: elastic_launch(config, work)(program[program.index("tinyllava") + 1 :])

    def work(command: Sequence[str]) -> None:
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        PartialState._reset_state()
        if status := main(command):  # the agent waits for a value of one that ends well
            sys.exit(status)

    def run() -> int:
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
            os.environ.pop(name, None)
        torch.distributed.launcher.api.elastic_launch = forking
        prepare()
        return main(arguments)

    return start(run, said)
