"""What a person sees while a grid runs: a table of cells with their stages, progress and remaining time.

Paper: none.
"""

import json
import sys
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tinyllava.grid.graph import Graph, Node
from tinyllava.grid.needs import Need, duration
from tinyllava.grid.state import State, now

_STYLES = {"done": "green", "failed": "red", "running": "yellow", "submitted": "cyan"}


class LiveView:
    """Draws the table on a terminal; elsewhere it prints a line for every node that ends.

    Args:
        needs: the plan, for the expected seconds and steps.
    """

    def __init__(self, graph: Graph, needs: list[Need], title: str) -> None:
        self.graph, self.title = graph, title
        self.needs = {need.node.id: need for need in needs}
        self.states: Mapping[str, State] = {id_: State() for id_ in graph.nodes}
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)  # the nodes redirect stdout
        self.live = Live(
            get_renderable=self._draw, console=self.console, refresh_per_second=1, redirect_stdout=False,
            redirect_stderr=False,
        )  # fmt: skip

    def __enter__(self) -> "LiveView":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def update(self, states: Mapping[str, State]) -> None:
        """Take over new states."""
        if not self.console.is_terminal:
            for id_, state in states.items():
                if state.status in ("done", "failed") and self.states[id_].status != state.status:
                    text = f"in {duration(state.seconds)}" if state.status == "done" else state.error
                    self.console.print(f"{state.status} {id_} {text}", markup=False)
        self.states = dict(states)

    def _draw(self) -> Group:
        table = Table(title=self.title, expand=False)
        for head in ("cell", "stages", "evaluations", "now"):
            table.add_column(head, overflow="fold")
        for cell in self.graph.cells:
            stages = Text(" ").join(self._mark(id_, self.graph.nodes[id_].name) for id_ in cell.stages)
            table.add_row(cell.id, stages, self._evaluations(cell.evaluations), self._now(cell.nodes))
        return Group(table, Text(self._remaining()))

    def _mark(self, id_: str, name: str) -> Text:
        return Text(name, style=_STYLES.get(self.states[id_].status, "dim"))

    def _evaluations(self, ids: tuple[str, ...]) -> Text:
        if len(ids) <= 2:
            return Text(" ").join(self._mark(id_, self.graph.nodes[id_].name) for id_ in ids)
        done = sum(self.states[id_].status == "done" for id_ in ids)
        return Text(f"{done} of {len(ids)}", style="green" if done == len(ids) else "")

    def _now(self, ids: tuple[str, ...]) -> str:
        for id_ in ids:
            state = self.states[id_]
            if state.status == "failed":
                return f"failed: {state.error.splitlines()[0][:60]}" if state.error else "failed"
            if state.status in ("running", "submitted"):
                return f"{state.status} {self._progress(self.graph.nodes[id_])}".strip()
        return ""

    def _progress(self, node: Node) -> str:
        if node.kind == "evaluation":
            answers = node.folder.glob("*/answers-*.jsonl")
            return f"{sum(path.read_bytes().count(10) for path in answers):,} answers"
        step = last_step(node)
        total = self.needs[node.id].num_steps
        return "" if step is None else f"step {step}" + (f" of {total:,}" if total else "")

    def _remaining(self) -> str:
        """Sum up what is expected of the nodes that are not done, less what running ones have taken."""
        seconds, unknown = 0.0, 0
        for id_, state in self.states.items():
            if state.status in ("done", "failed"):
                continue
            expected = self.needs[id_].seconds
            if expected is None:
                unknown += 1
                continue
            elapsed = now() - state.started if state.status == "running" else 0.0
            seconds += max(0.0, expected - elapsed)
        done = sum(state.status == "done" for state in self.states.values())
        rest = f"about {duration(seconds)} of work left" if seconds else ""
        rest += f" and {unknown} nodes of unknown length" if unknown else ""
        return f"{done} of {len(self.states)} done  {rest}"


def last_step(node: Node) -> int | None:
    """Return the last optimizer step that a stage has logged."""
    path = node.folder / node.name / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else None
    except (ValueError, KeyError):
        return None  # the line is being written
