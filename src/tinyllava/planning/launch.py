"""How many processes a command uses on this machine, one per GPU, and how it starts them.

Paper: section 4.1.2; the processes share the batch of an optimizer step.
"""

import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tinyllava.config import Run
from tinyllava.data.cores import num_cores
from tinyllava.errors import ConfigError, TrainingError
from tinyllava.planning.rules import batch_problems

GRACE_SECONDS = 120
"""Time that the processes have to save a checkpoint after a signal, or after one of them has failed."""
_REASONS = {
    signal.SIGKILL: ", possibly because memory ran out",
    signal.SIGABRT: ", as NCCL does if another process hangs for longer than --hardware.timeout-seconds",
}
_SHOWN_BYTES = 8000
"""Last part of the messages of a process that failed."""


def choose_processes(gpus: int, run: Run | None = None) -> int:
    """Return the number of processes that a command starts; 1 means that it works in its own.

    Under torchrun, accelerate launch and mpirun the processes are there already. By default there is one for
    each GPU, or as many as the batches of the run divide by.

    Args:
        gpus: number of GPUs that was asked for; 0 means all of this machine. Without a GPU any number of CPU
            processes may be asked for.
        run: what they train, if they train.

    Raises:
        ConfigError: a number of GPUs that is not here, or another one than a launcher has started.
    """
    if gpus < 0:
        raise ConfigError(f"--gpus {gpus}: must be 1 or more, or left out for all GPUs.")
    here = _num_launched(os.environ)
    if here:
        if gpus not in (0, here):
            raise ConfigError(
                f"--gpus {gpus}: the launcher has already started {here} process(es) on this machine. "
                "Remove --gpus."
            )
        return 1
    visible = visible_gpus()
    if visible and gpus > visible:
        raise ConfigError(f"--gpus {gpus}: this machine has {visible} GPU(s). Give at most {visible}.")
    return gpus or fitting_processes(run, max(1, visible))


def fitting_processes(run: Run | None, most: int) -> int:
    """Return the largest number of processes, at most ``most``, that the batches of a run divide by."""
    if run is None:
        return most
    num_processes = most
    while num_processes > 1 and any(
        list(batch_problems(stage, run.hardware, num_processes)) for stage in run.stages.values()
    ):
        num_processes -= 1
    return num_processes


def visible_gpus() -> int:
    """Return the number of CUDA devices that this process can see."""
    import torch

    return torch.cuda.device_count()


def _num_launched(environment: Mapping[str, str]) -> int:
    """Return the processes that a launcher has started on this machine; 0 without one.

    Raises:
        ConfigError: srun has started several tasks without telling them of each other, or accelerate launch
            one process in place of several.
    """
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if name in environment:
            return int(environment[name])
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks > 1:
        raise ConfigError(
            f"srun has started {num_tasks} independent tasks. Start one task per node that runs torchrun: "
            "srun --ntasks-per-node=1 torchrun --nproc-per-node 8 -m tinyllava ..."
        )
    is_accelerates = "ACCELERATE_MIXED_PRECISION" in environment  # a single process
    if is_accelerates and "MASTER_ADDR" in environment:
        raise ConfigError(
            "accelerate launch has started one process instead of several: on a CPU it needs mpirun. Use "
            "torchrun --nproc-per-node 2 -m tinyllava ..., or tinyllava ... --gpus 2."
        )
    return int(is_accelerates)


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run ``tinyllava ARGUMENTS`` in several processes of this machine and return the exit status.

    PyTorch's elastic agent starts them, as torchrun does. The first one speaks. Of an error that another
    one has, its messages are shown.

    Raises:
        TrainingError: a process was killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    is_module = sys.path[0] in ("", str(Path.cwd()))  # started as `python -m tinyllava`, or in an interpreter
    program = [*([] if is_module else ["-P"]), "-m", "tinyllava", *arguments]
    with tempfile.TemporaryDirectory(prefix="tinyllava-") as logs, _as_an_agent(num_processes):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=Path(logs).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=GRACE_SECONDS,
            logs_specs=DefaultLogsSpecs(
                log_dir=logs, redirects=dict.fromkeys(range(1, num_processes), Std.ERR)
            ),
        )
        try:
            elastic_launch(config, sys.executable)(*program)
        except SignalException as stop:
            return 128 + stop.sigval
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            _show_messages(Path(logs))
            if failure.exitcode < 0:
                number = signal.Signals(-failure.exitcode)
                why = _REASONS.get(number, "")
                raise TrainingError(
                    f"process {rank} of {num_processes} was killed by {number.name}{why}. Run the same "
                    "command again to resume."
                ) from error
            return failure.exitcode
    return 0


def _show_messages(logs: Path) -> None:
    """Show the error that another process than the first has told; one tells it, see ``tinyllava.cli``."""
    for path in logs.rglob("stderr.log"):
        text = path.read_bytes()[-_SHOWN_BYTES:].decode(errors="replace")
        if re.search("^(error: |Traceback )", text, re.MULTILINE):
            print(f"process {path.parent.name}:\n{text}".rstrip(), file=sys.stderr)


@contextmanager
def _as_an_agent(num_processes: int) -> Iterator[None]:
    """Share the cores among the processes and keep the agent quiet; afterwards all is as it was before."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}  # the agent takes these
    environment, disabled = dict(os.environ), logging.root.manager.disable
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
