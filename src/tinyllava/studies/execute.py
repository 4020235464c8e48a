"""Run what is missing of a graph, each node after the one it needs; a failure stops only what rests on it.

Paper: none. All knowledge is in the nodes' state files: killed and started again, a grid resumes.
"""

import time
from collections.abc import Callable
from typing import Protocol

from tinyllava.planning.launch import fitting_processes
from tinyllava.studies.graph import Graph, Node
from tinyllava.studies.jobs import do_in_processes, is_alive
from tinyllava.studies.work import State, load_state, save_state

States = dict[str, State]


class Launcher(Protocol):
    """What starts a node; it returns when the node is done or has been handed over."""

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
