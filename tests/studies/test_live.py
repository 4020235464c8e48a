"""The table of a running grid, drawn from the files that nodes leave."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from grid_toys import write_grid
from tinyllava.studies import live
from tinyllava.studies.graph import Graph, Node, Places, expand
from tinyllava.studies.live import LiveView
from tinyllava.studies.needs import plan_graph
from tinyllava.studies.paper import find_grid
from tinyllava.studies.work import State, save_state

NOW = 1_000_000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "now", lambda: NOW)


@pytest.fixture
def graph(tmp_path, parts, records) -> Graph:
    """Two connectors times two rates: ten nodes; each stage is one epoch of 12 records, 3 steps of 4."""
    return expand(find_grid(str(write_grid(tmp_path, parts, records))), Places(runs=tmp_path / "runs"))


def view(graph: Graph, height: int = 40, *, runs_all: bool = True) -> str:
    """Return what the terminal shows."""
    console = Console(file=io.StringIO(), width=110, height=height, force_terminal=True, color_system=None)
    needs = plan_graph(graph)
    if runs_all:  # the benchmark's folder is not given
        needs = [type(need)(**{**vars(need), "status": "to do"}) for need in needs]
    console.print(LiveView(graph, needs, "A toy", console).draw())
    return console.file.getvalue()


def begin(node: Node, step: int, seconds_ago: float) -> None:
    save_state(node, State(status="running", started=NOW - seconds_ago))
    path: Path = node.folder / node.name / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")


def test_a_stage_under_way_shows_its_steps_and_the_time_left(graph):
    first = graph.nodes[graph.cells[0].stages[0]]
    begin(first, 1, 20.0)
    text = view(graph)
    assert "pretrain step 1 of 3, 40 s left" in text
    # The other connector takes as long: 40 s and 60 s of work. Eight nodes have no fellow yet.
    assert "0 of 10 nodes done, about 2 min left, 8 of unknown duration" in text


def test_what_finished_nodes_took_is_expected_of_the_rest(graph):
    for cell in graph.cells[:2]:
        for id_ in cell.nodes:
            save_state(graph.nodes[id_], State(status="done", seconds=30.0))
    text = view(graph)
    assert "5 of 10 nodes done, about 2 min left" in text  # five nodes of 30 s
    assert text.count("done") == 3  # two models, and the sum


def test_a_failure_says_which_stage_and_why_and_stops_only_its_model(graph):
    broken = graph.nodes[graph.cells[0].stages[1]]
    save_state(broken, State(status="failed", error="loss is not a number\nmore"))
    text = view(graph)
    assert "finetune failed: loss is not a number" in text
    assert "0 of 10 nodes done, 1 failed" in text


def test_what_cannot_be_run_is_not_waited_for(graph):
    text = view(graph, runs_all=False)
    assert text.count("cannot be run here") == 5  # four models, and the sum
    assert "4 cannot be run here" in text


def test_a_table_longer_than_the_terminal_keeps_what_runs_and_the_sum(graph):
    begin(graph.nodes[graph.cells[3].stages[1]], 2, 10.0)
    text = view(graph, height=11)
    assert "Linear, high" in text
    assert "finetune step 2 of 3, 5 s left" in text
    assert "and 1 more" in text
    assert "0 of 10 nodes done" in text
    assert len(text.splitlines()) <= 11
