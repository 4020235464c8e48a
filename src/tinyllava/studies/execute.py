"""Run the missing nodes of a graph in order of their dependencies, locally or as jobs of a scheduler.

Paper: none. The whole state is in the nodes' state files, so a killed grid resumes. A job runs one node. With
several devices, it starts one process for each through torchrun.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tinyllava.data.cores import num_cores
from tinyllava.errors import ConfigError, require
from tinyllava.planning.launch import GRACE_SECONDS, fitting_processes
from tinyllava.studies.graph import Graph, Node, load_node, save_node
from tinyllava.studies.work import State, do_node, is_claimed, load_state, now, save_state

States = dict[str, State]


class Launcher(Protocol):
    """Starts a node, and returns when it is done or submitted."""

    num_at_once: int

    def start(self, node: Node) -> None:
        """Begin a node."""


class InProcess:
    """Does nodes one after the other on this machine; their output goes to ``log.txt`` in their folder.

    Args:
        num_processes: of a node, at most: as many as its batches divide by, see ``fitting_processes``.
    """

    num_at_once = 1

    def __init__(self, num_processes: int = 1) -> None:
        self.num_processes = num_processes

    def start(self, node: Node) -> None:
        """Do the node; its state says how it ended."""
        do_in_processes(node, fitting_processes(node.run, self.num_processes))


def execute(
    graph: Graph,
    launcher: Launcher,
    *,
    retry: int = 0,
    skip: frozenset[str] = frozenset(),
    report: Callable[[States], None] = lambda states: None,
    pause_seconds: float = 1.0,
) -> States:
    """Run the graph and return the state of every node.

    Nodes that another process or job works on are waited for, not begun again. What failed in an earlier call
    is tried again.

    Args:
        retry: how often a node that fails is tried again in this call.
        skip: nodes that cannot be run here.
        report: called whenever a state may have changed.
    """
    attempts = dict.fromkeys(graph.nodes, 0)
    states = {id_: load_state(node) for id_, node in graph.nodes.items()}
    while True:
        num_running = 0
        for id_, node in graph.nodes.items():
            states[id_] = _look(node, attempts[id_] > retry)
            num_running += states[id_].status in ("submitted", "running")
        for id_, node in graph.nodes.items():
            if num_running >= launcher.num_at_once:
                break
            needed = not node.after or states[node.after].status == "done"
            if states[id_].status == "waiting" and needed and id_ not in skip:
                attempts[id_] += 1
                launcher.start(node)
                states[id_] = load_state(node)
                num_running += states[id_].status in ("submitted", "running")
                report(states)
                if states[id_].status == "failed" and attempts[id_] <= retry:
                    states[id_] = State()
        report(states)
        if num_running == 0 and not _is_startable(graph, states, attempts, retry, skip):
            return states
        if num_running:
            time.sleep(pause_seconds)


def _look(node: Node, is_final: bool) -> State:
    """Return the state of a node as far as this call is concerned.

    A node whose process is gone was cut short, and is waiting again; so is one that failed and may be tried
    again.
    """
    state = load_state(node)
    if state.status in ("submitted", "running") and not is_alive(node, state):
        state = load_state(node)  # it may have ended between the two looks
        if state.status in ("submitted", "running"):
            lost = State(status="failed", error=f"the job {state.job or 'process'} ended without a result")
            save_state(node, lost if is_final else State())
            state = load_state(node)
    return State() if state.status == "failed" and not is_final else state


def _is_startable(
    graph: Graph, states: States, attempts: dict[str, int], retry: int, skip: frozenset[str]
) -> bool:
    return any(
        states[id_].status == "waiting"
        and id_ not in skip
        and (not node.after or states[node.after].status == "done")
        and attempts[id_] <= retry
        for id_, node in graph.nodes.items()
    )


Cluster = Literal["slurm", "local"]
_GONE = ("CANCELLED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "COMPLETED")
QUEUE_SECONDS = 30.0
"""After a submission: accounting and queue may not know of it yet."""


class Jobs:
    """Submits nodes as jobs; their state files tell how they end.

    Args:
        cluster: ``slurm``, or ``local`` for processes of this machine.
        num_at_once: most jobs that are handed over at a time.
        num_devices: processes of a job on each of its machines, started with torchrun.
        options: submitit's parameters, such as ``timeout_min``, ``nodes``, ``gpus_per_node``,
            ``slurm_partition``.

    Raises:
        ConfigError: submitit is not installed, there is no Slurm here, or an option is unknown or cannot be.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        num_at_once: int,
        num_devices: int = 1,
        options: Mapping[str, int | str] | None = None,
    ) -> None:
        self.cluster: Cluster = cluster
        self.num_at_once = num_at_once
        self.num_devices = num_devices
        self.options = {"timeout_min": 60 * 24, **(options or {})}
        for name, value in self.options.items():
            if name.endswith("tasks_per_node") and value != 1:
                raise ConfigError(
                    f"--job {name}={value}: one task per machine starts its processes. Give --gpus {value} "
                    "instead."
                )
        _import_submitit()

    def start(self, node: Node) -> None:
        """Submit a node, unless a job of its name is in the queue already.

        Raises:
            ConfigError: the scheduler refuses the job.
        """
        submitit = _import_submitit()
        save_node(node, node.folder / "task.json")
        _job_file(node).unlink(missing_ok=True)
        # Written first, so that nothing of the submitter's can overwrite what the job writes.
        save_state(node, State(status="submitted", started=now(), job=self.cluster))
        job = _find_in_queue(_name_of(node)) if self.cluster == "slurm" else ""
        if not job:
            try:
                executor = submitit.AutoExecutor(folder=node.folder / "jobs", cluster=self.cluster)
                executor.update_parameters(name=_name_of(node), **self.options)
                task = str(node.folder / "task.json")
                num_others = self.num_at_once if self.cluster == "local" else 1
                job = executor.submit(run_task, task, self.cluster, self.num_devices, num_others).job_id
            except (RuntimeError, NameError, TypeError, ValueError, subprocess.SubprocessError) as error:
                save_state(node, State(status="failed", error=f"not submitted: {error}"))
                raise ConfigError(f"--jobs {self.cluster}: {error}") from error
        _job_file(node).write_text(job, encoding="utf-8")


def _job_file(node: Node) -> Path:
    return node.folder / "job.txt"


def run_task(path: str, cluster: str, num_devices: int, num_at_once: int = 1) -> None:
    """Run the node of a task file, inside a job; on several machines, every one of them calls this.

    Args:
        num_at_once: jobs that share this machine's cores.
    """
    if num_at_once > 1:  # read when PyTorch is imported, which it is not yet
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_at_once)))
    variable = "SLURM_JOB_ID" if cluster == "slurm" else "SUBMITIT_LOCAL_JOB_ID"
    number = os.environ.get(variable, "")
    here = _import_submitit().JobEnvironment() if cluster == "slurm" else None
    machines = Machines()
    if here is not None and here.num_nodes > 1:
        # The number of the job keeps two jobs that share their first machine apart.
        endpoint = f"{here.hostnames[0]}:{29_500 + int(number) % 10_000}"
        machines = Machines(count=here.num_nodes, this=here.node, endpoint=endpoint)
    do_in_processes(load_node(Path(path)), num_devices, job=f"{cluster}:{number}", machines=machines)


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of a job, whose processes work together."""

    count: int = 1
    this: int = 0
    """Number of this one, from 0."""
    endpoint: str = ""
    """HOST:PORT of the first, where they meet."""

    def torchrun(self, num_processes: int, job: str) -> list[str]:
        """Return the arguments of Python that start this machine's processes."""
        command = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"]
        if self.count == 1:
            return [*command, "--standalone"]
        return [
            *command,
            f"--nnodes={self.count}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={job}",
            f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-conf=is_host={int(self.this == 0)}",
        ]


def do_in_processes(
    node: Node, num_processes: int, *, job: str = "", machines: Machines | None = None
) -> None:
    """Do a node in this process, or in several that torchrun starts; its state says how it ended.

    Args:
        num_processes: on this machine, and on each of the others.
        job: see ``State``.
        machines: of the job; None for this one alone. The first writes the state and ``log.txt``.
    """
    machines = machines or Machines()
    if num_processes * machines.count == 1:
        do_node(node, job=job, log=node.folder / "log.txt")
        return
    path = node.folder / "task.json"
    if machines.this == 0:
        save_node(node, path)
    name = f"log-{machines.this}.txt" if machines.this else "log.txt"
    with (node.folder / name).open("a", encoding="utf-8") as log:
        # In a session of its own: a Ctrl-C reaches it once, through us, and it ends its processes.
        running = subprocess.Popen(
            [
                sys.executable,
                *machines.torchrun(num_processes, job),
                "-m",
                "tinyllava.studies.work",
                str(path),
                job,
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_SECONDS)},
        )
        try:
            code = running.wait()
        except BaseException:
            running.terminate()
            running.wait()
            raise
    if code and machines.this == 0 and load_state(node).status != "failed":
        save_state(node, State(status="failed", error=f"torchrun ended with status {code}", job=job))


def is_alive(node: Node, state: State) -> bool:
    """Whether the process or job that a state speaks of is still there."""
    if is_claimed(node):
        return True
    job = _job_file(node).read_text(encoding="utf-8") if _job_file(node).exists() else ""
    if state.job.startswith("slurm"):
        if state.status == "submitted" and now() - state.started < QUEUE_SECONDS:
            return True
        if not job:
            return bool(_find_in_queue(_name_of(node)))
        slurm_state = _slurm_state(job)
        return not any(slurm_state.startswith(word) for word in _GONE)
    return bool(state.status == "submitted" and job) and _is_process(int(job))


def _is_process(pid: int) -> bool:
    """Whether a process is there and not only waits for its end to be noticed."""
    with contextlib.suppress(ChildProcessError):  # of an earlier call, so not a child of this one
        os.waitpid(pid, os.WNOHANG)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # gone, or its number is another user's process by now
        return False
    return True


def _slurm_state(job: str) -> str:
    """Ask the accounting, and where that is not kept the queue; a job in neither has ended."""
    for command in (
        ["sacct", "-X", "-n", "-P", "-o", "State", "-j", job],
        ["squeue", "-h", "-o", "%T", "-j", job],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return "COMPLETED"


def _find_in_queue(name: str) -> str:
    """Return the id of a queued or running job of that name: one whose submitter was killed meanwhile."""
    command = ["squeue", "-h", "--me", "-o", "%A", "--name", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _name_of(node: Node) -> str:
    return f"tinyllava-{node.id.replace('/', '-')}"


def _import_submitit() -> Any:
    require("submitit", "jobs", "hands --jobs to a scheduler")
    import submitit

    return submitit
