"""The loop over a graph, with work that only writes down that it was done."""

from dataclasses import replace
from pathlib import Path

import pytest

from grid_toys import write_grid
from tinyllava.config import DataConfig
from tinyllava.studies import execute as execution
from tinyllava.studies import work
from tinyllava.studies.execute import InProcess, execute
from tinyllava.studies.graph import Graph, Node, Places, expand
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


def test_a_node_is_done_by_as_many_processes_as_its_batches_divide_by(graph, records, monkeypatch):
    """The batch is 4: of three processes two are taken. They are real, and train."""
    started = []
    popen = execution.subprocess.Popen

    def noting(command, **options):
        started.append(command)
        return popen(command, **options)

    monkeypatch.setattr(execution.subprocess, "Popen", noting)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    node = next(node for node in graph.nodes.values() if not node.after)
    (name,) = node.run.stages
    data = DataConfig(records=(str(make_captions(records)),), images=str(records.parent / "images"))
    stages = {name: replace(node.run.stages[name], data=data)}
    node = replace(node, run=replace(node.run, stages=stages))
    InProcess(3).start(node)
    log = (node.folder / "log.txt").read_text()
    assert load_state(node).status == "done", log[-3000:]
    assert [word for word in started[0] if "nproc" in word] == ["--nproc-per-node=2"]
    assert (node.folder / node.name / "trained.safetensors").is_file()
