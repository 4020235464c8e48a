"""The live view of a running grid: a table of cells with their stages, progress and remaining time.

Paper: none. The table reads the nodes' files itself, because a node may run in this very process.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinyllava.files import found_below
from tinyllava.studies.graph import Graph, Node, SeededCell
from tinyllava.studies.needs import Need, correct, duration, learn
from tinyllava.studies.work import State, load_state, now

_STYLES = {"done": "green", "failed": "red", "running": "yellow", "submitted": "cyan"}
_ORDER = ("running", "failed", "submitted", "waiting", "missing", "done")
_LINES_AROUND = 8
"""Lines of the terminal that are not cells: title, heads, borders, sums."""


class LiveView:
    """Draws the table on a terminal, or prints a line for every finished node.

    Args:
        needs: the plan, for the expected seconds and steps.
    """

    def __init__(
        self, graph: Graph, needs: Sequence[Need], title: str, console: Console | None = None
    ) -> None:
        self.graph, self.title = graph, title
        self.needs = {need.node.id: need for need in needs}
        self.states: Mapping[str, State] = {id_: State() for id_ in graph.nodes}
        # The nodes redirect stdout, so the console has to hold on to the one of now.
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.live = Live(
            get_renderable=self.draw,
            console=self.console,
            refresh_per_second=1,
            redirect_stdout=False,
            redirect_stderr=False,
        )

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

    def draw(self) -> Group:
        """Return the table as things are now."""
        self.states = {
            id_: state if state.status in ("done", "failed") else load_state(self.graph.nodes[id_])
            for id_, state in self.states.items()
        }
        seconds = self._expected()
        table = Table(title=self.title, expand=False)
        for head in ("model", "stages", "evaluations", "now"):
            table.add_column(head, overflow="fold")
        shown = self._choose(max(3, self.console.height - _LINES_AROUND))
        for cell in shown:
            stages = Text(" ").join(self._mark(id_, self.graph.nodes[id_].name) for id_ in cell.stages)
            table.add_row(
                cell.id, stages, self._evaluations(cell.evaluations), self._now(cell.nodes, seconds)
            )
        hidden = len(self.graph.cells) - len(shown)
        more = [Text(f"and {hidden} more (the terminal is too small for the table)", "dim")] if hidden else []
        foot = Table.grid(padding=(0, 1))
        foot.add_row(self._bar(), Text(self._remaining(seconds)))
        return Group(table, *more, foot)

    def _choose(self, room: int) -> list[SeededCell]:
        """Return as many cells as there is room for: running and failed ones first, finished ones last."""
        cells = list(self.graph.cells)
        if len(cells) <= room:
            return cells
        chosen = sorted(cells, key=lambda cell: _ORDER.index(self._status(cell)))[:room]
        return [cell for cell in cells if cell in chosen]

    def _status(self, cell: SeededCell) -> str:
        found = {self._status_of(id_) for id_ in cell.nodes}
        return next(status for status in _ORDER if status in found)

    def _status_of(self, id_: str) -> str:
        status = self.states[id_].status
        return "missing" if status == "waiting" and self.needs[id_].status == "missing" else status

    def _mark(self, id_: str, name: str) -> Text:
        return Text(name, style=_STYLES.get(self.states[id_].status, "dim"))

    def _evaluations(self, ids: tuple[str, ...]) -> Text:
        if len(ids) <= 2:
            return Text(" ").join(self._mark(id_, self.graph.nodes[id_].name) for id_ in ids)
        done = sum(self.states[id_].status == "done" for id_ in ids)
        return Text(f"{done} of {len(ids)}", style="green" if done == len(ids) else "")

    def _now(self, ids: tuple[str, ...], seconds: Mapping[str, float]) -> str:
        statuses = {id_: self._status_of(id_) for id_ in ids}
        for id_, status in statuses.items():
            node, state = self.graph.nodes[id_], self.states[id_]
            if status == "failed":
                return f"{node.name} failed: {(state.error or 'no message').splitlines()[0][:60]}"
            if status == "submitted":
                return f"{node.name} submitted"
            if status == "running":
                left = f", {duration(seconds[id_])} left" if seconds.get(id_) else ""
                return f"{node.name} {self._progress(node)}{left}".strip()
        if set(statuses.values()) == {"done"}:
            return "done"
        return "cannot be run here" if "missing" in statuses.values() else ""

    def _progress(self, node: Node) -> str:
        if node.kind == "evaluation":
            count = 0
            for path in found_below(node.folder, "*/answers-*.jsonl"):
                with suppress(FileNotFoundError):  # another process starts over
                    count += path.read_bytes().count(10)
            return f"{count:,} answers"
        step, total = last_step(node), self.needs[node.id].cost.num_steps
        return "begins" if step is None else f"step {step:,}" + (f" of {total:,}" if total else "")

    def _expected(self) -> dict[str, float]:
        """Return the seconds that each open node still takes, as far as anything is known of it.

        A stage under way is taken on from its own steps; the others from what nodes of their kind take, and
        before one has begun from the plan, unless that is for GPUs on paper.
        """
        whole = {id_: self._whole(id_) for id_ in self.states}
        learned = learn(
            (self.graph.nodes[id_], self.needs[id_].cost, seconds)
            for id_, seconds in whole.items()
            if seconds
        )
        left = {}
        for id_, state in self.states.items():
            if self._status_of(id_) in ("done", "failed", "missing"):
                continue
            need = self.needs[id_]
            planned = None if need.basis == "computed" else need.seconds
            seconds = whole[id_] or correct(need.node, need.cost, learned) or planned
            if seconds is not None:
                elapsed = now() - state.started if state.status == "running" else 0.0
                left[id_] = max(0.0, seconds - elapsed)
        return left

    def _whole(self, id_: str) -> float | None:
        """Return the seconds that a node took, or takes by the steps that it has done; None before those."""
        state, total = self.states[id_], self.needs[id_].cost.num_steps
        if state.status != "running":
            return state.seconds if state.status == "done" else None
        step = last_step(self.graph.nodes[id_])
        return (now() - state.started) * total / min(step, total) if step and total else None

    def _bar(self) -> ProgressBar:
        done = sum(state.status == "done" for state in self.states.values())
        return ProgressBar(total=len(self.states), completed=done, width=20)

    def _remaining(self, seconds: Mapping[str, float]) -> str:
        """Say how many nodes are done, how many cannot be, and how much work is left."""
        statuses = [self._status_of(id_) for id_ in self.states]
        parts = [f"{statuses.count('done')} of {len(statuses)} nodes done"]
        for status, words in (("failed", "failed"), ("missing", "cannot be run here")):
            parts += [f"{statuses.count(status)} {words}"] if status in statuses else []
        if total := sum(seconds.values()):
            parts.append(f"about {duration(total)} left")
        unknown = sum(status in ("waiting", "submitted", "running") for status in statuses) - len(seconds)
        parts += [f"{unknown} of unknown duration"] if unknown else []
        return ", ".join(parts)


def last_step(node: Node) -> int | None:
    """Return the last optimizer step that a stage has logged."""
    path = node.folder / node.name / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else None
    except (ValueError, KeyError):
        return None  # the line is being written
