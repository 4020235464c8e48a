"""The loop over a graph, with work that only writes down that it was done."""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from grid_toys import write_grid
from processes import start
from tinyllava.config import DataConfig
from tinyllava.studies import execute as execution
from tinyllava.studies import work
from tinyllava.studies.execute import InProcess, execute, run_task
from tinyllava.studies.graph import Graph, Node, Places, expand, save_node
from tinyllava.studies.paper import find_grid
from tinyllava.studies.work import State, claim, is_claimed, load_state, save_state
from training_toys import make_captions


@pytest.fixture
def graph(tmp_path, parts, records) -> Graph:
    """Two connectors times two rates: ten nodes."""
    return expand(find_grid(str(write_grid(tmp_path, parts, records))), Places(runs=tmp_path / "runs"))


class Recorded:
    """Stands in for the work of a node: keeps the order, and fails so many times where it is told to."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failures: dict[str, int] = {}

    def __call__(self, node: Node) -> str:
        self.done.append(node.id)
        if self.failures.get(node.id, 0):
            self.failures[node.id] -= 1
            raise RuntimeError("out of luck")
        print(f"worked on {node.id}")
        return ""


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    """Put the recorder in the place of the work."""
    stand_in = Recorded()
    monkeypatch.setattr(work, "work", stand_in)
    return stand_in


def run(graph: Graph, **options: object) -> dict[str, State]:
    return execute(graph, InProcess(), pause_seconds=0.01, **options)


def test_every_node_is_done_once_and_after_the_one_it_needs(graph, recorded):
    states = run(graph)
    assert {state.status for state in states.values()} == {"done"}
    assert sorted(recorded.done) == sorted(graph.nodes)
    position = {id_: number for number, id_ in enumerate(recorded.done)}
    assert all(position[node.after] < position[id_] for id_, node in graph.nodes.items() if node.after)
    log = graph.nodes[recorded.done[0]].folder / "log.txt"
    assert log.read_text() == f"worked on {recorded.done[0]}\n"
    run(graph)
    assert len(recorded.done) == len(graph.nodes)  # nothing was done again


def test_a_failure_stops_only_what_rests_on_it(graph, recorded):
    broken = graph.cells[0].stages[1]
    recorded.failures[broken] = 1
    states = run(graph)
    assert states[broken].status == "failed"
    assert states[broken].error == "RuntimeError: out of luck"
    assert "Traceback" in (graph.nodes[broken].folder / "log.txt").read_text()
    waiting = {id_ for id_, state in states.items() if state.status == "waiting"}
    assert waiting == {graph.cells[0].evaluations[0]}
    assert recorded.done.count(broken) == 1
    assert {state.status for state in run(graph).values()} == {"done"}  # tried again when called again
    assert recorded.done.count(broken) == 2
    assert len(recorded.done) == len(graph.nodes) + 1


@pytest.mark.parametrize(("retry", "status"), [(1, "failed"), (2, "done")])
def test_what_fails_is_tried_again_as_often_as_asked(graph, recorded, retry, status):
    broken = graph.cells[0].stages[0]
    recorded.failures[broken] = 2
    states = run(graph, retry=retry)
    assert states[broken].status == status
    assert recorded.done.count(broken) == retry + 1
    assert states[graph.cells[2].stages[1]].status == "done"  # the other connector's


def test_what_cannot_be_run_here_is_left_out(graph, recorded):
    states = run(graph, skip=frozenset({graph.cells[0].stages[0]}))
    assert [id_ for id_, state in states.items() if state.status != "done"] == [
        graph.cells[0].stages[0],
        graph.cells[0].stages[1],
        graph.cells[0].evaluations[0],
        graph.cells[1].stages[1],
        graph.cells[1].evaluations[0],
    ]


def test_a_node_whose_process_is_gone_is_done_again(graph, recorded):
    first = next(iter(graph.nodes.values()))
    save_state(first, State(status="running", started=1.0))
    assert run(graph)[first.id].status == "done"
    assert recorded.done[0] == first.id


def test_a_node_that_another_process_holds_is_waited_for(graph, recorded, monkeypatch):
    first = next(iter(graph.nodes.values()))
    save_state(first, State(status="running", started=1.0))
    looks = []

    def look(states: dict[str, State]) -> None:
        looks.append(states[first.id].status)
        if len(looks) == 3:
            held.__exit__(None, None, None)
            save_state(first, State(status="done"))

    held = claim(first)
    held.__enter__()
    assert is_claimed(first)
    states = run(graph, report=look)
    assert looks[:3] == ["running"] * 3
    assert first.id not in recorded.done
    assert {state.status for state in states.values()} == {"done"}


def test_an_interrupt_leaves_the_grid_at_once(graph, recorded, monkeypatch):
    def stop(node: Node) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "work", stop)
    with pytest.raises(KeyboardInterrupt):
        run(graph)
    monkeypatch.setattr(work, "work", recorded)
    assert {state.status for state in run(graph).values()} == {"done"}


def test_a_state_is_read_back_and_an_unknown_node_waits(graph, tmp_path):
    node = replace(next(iter(graph.nodes.values())))
    assert load_state(node) == State()
    state = State(status="failed", error="é", seconds=2.5, started=3.0, job="slurm:4", result="../x")
    save_state(node, state)
    assert load_state(node) == state
    assert [path.name for path in Path(node.folder).iterdir()] == ["node.json"]


@pytest.fixture
def trainable(graph, records) -> Node:
    """The first stage, on captions."""
    node = next(node for node in graph.nodes.values() if not node.after)
    (name,) = node.run.stages
    data = DataConfig(records=(str(make_captions(records)),), images=str(records.parent / "images"))
    stages = {name: replace(node.run.stages[name], data=data)}
    return replace(node, run=replace(node.run, stages=stages))


class Started:
    """Stands in for a process: keeps its command, and ends well."""

    commands: ClassVar[list[list[str]]] = []

    def __init__(self, command: list[str], **options: object) -> None:
        self.commands.append(command)

    def wait(self) -> int:
        return 0


def test_a_node_is_done_by_as_many_processes_as_its_batches_divide_by(trainable, monkeypatch):
    """The batch is 4: of three processes two are taken."""
    monkeypatch.setattr(execution.subprocess, "Popen", Started)
    InProcess(3).start(trainable)
    assert Started.commands[-1][:5] == [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    ]


def set_job(monkeypatch, number: str, node: int = 0) -> None:
    """Be one of two machines of a job, whose first is this one."""
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": str(node),
        "SLURM_JOB_NODELIST": "localhost,second",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)


def test_on_two_machines_with_eight_gpus_each_starts_eight_that_meet_at_the_first(trainable, monkeypatch):
    monkeypatch.setattr(execution.subprocess, "Popen", Started)
    save_node(trainable, trainable.folder / "task.json")
    for node in (0, 1):
        set_job(monkeypatch, "12345", node)
        run_task(str(trainable.folder / "task.json"), "slurm", 8)
        assert Started.commands[-1][1:] == [
            *("-m", "torch.distributed.run", "--nproc-per-node=8", "--nnodes=2", "--rdzv-backend=c10d"),
            *("--rdzv-id=slurm:12345", "--rdzv-endpoint=localhost:31845", f"--rdzv-conf=is_host={1 - node}"),
            *("-m", "tinyllava.studies.work", str(trainable.folder / "task.json"), "slurm:12345"),
        ]


def test_only_the_first_process_of_a_node_looks_at_the_model_that_it_may_remove(
    trainable, tmp_path, monkeypatch
):
    monkeypatch.setattr("tinyllava.training.run.train", lambda run, wait: tmp_path / "removed")
    monkeypatch.setenv("RANK", "1")
    assert work.work(trainable) == ""


def test_a_job_whose_number_another_users_process_has_by_now_is_gone(trainable, monkeypatch):
    trainable.folder.mkdir(parents=True, exist_ok=True)
    (trainable.folder / "job.txt").write_text("12345")
    state = State(status="submitted", job="local")

    def of_another_user(pid, number):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(execution.os, "kill", of_another_user)
    assert not execution.is_alive(trainable, state)


def test_a_job_on_two_machines_trains_in_processes_of_both(trainable, tmp_path, monkeypatch):
    """They are real, and train: torchrun lets none begin before the other machine is there."""
    save_node(trainable, trainable.folder / "task.json")

    def work_on(machine: int) -> None:
        set_job(monkeypatch, str(os.getppid()), machine)
        run_task(str(trainable.folder / "task.json"), "slurm", 1)

    machines = [start(partial(work_on, number), tmp_path / f"said-{number}") for number in (0, 1)]
    for process in machines:
        process.join()
    log = (trainable.folder / "log.txt").read_text()
    state = load_state(trainable)
    assert (state.status, state.job) == ("done", f"slurm:{os.getpid()}"), log[-3000:]
    assert (trainable.folder / trainable.name / "trained.safetensors").is_file()
    steps = (trainable.folder / trainable.name / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 3  # twelve samples, four a step
