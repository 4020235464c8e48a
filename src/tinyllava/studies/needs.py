"""What a graph still needs: which nodes are done, what is missing on this machine, and what the rest takes.

Paper: sections 4.1.2 and 4.1.3.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from tinyllava.config import ModelConfig
from tinyllava.errors import look_up
from tinyllava.evaluation.read import check_files
from tinyllava.parts.resolve import find_parts
from tinyllava.planning.check import find_problems
from tinyllava.planning.plan import GPUS
from tinyllava.studies.costs import Cost, Machine, correct, duration, expect, learn
from tinyllava.studies.graph import Graph, Node
from tinyllava.studies.grid import Costs
from tinyllava.studies.work import load_state


@dataclass(frozen=True, kw_only=True)
class Need:
    """One node of a plan."""

    node: Node
    cells: tuple[str, ...]
    status: str
    """done, running, failed, to do, or missing: something that it needs is not here."""
    missing: tuple[str, ...] = ()
    cost: Cost = field(default_factory=Cost)
    """By the costs of the grid, or computed for GPUs."""
    seconds: float | None = None
    """Measured where the node is done, otherwise expected; None if nothing is known."""
    basis: str = ""
    """What ``seconds`` rest on: measured, extrapolated (from other nodes), estimated (costs of the
    grid), or computed (for GPUs)."""


def plan_graph(graph: Graph, costs: Costs | None = None, *, machine: Machine | None = None) -> list[Need]:
    """Return what every node needs and takes, in the order in which they run.

    Args:
        costs: what was measured on the machine that the grid is meant for.
        machine: GPUs to estimate for. If omitted, times of finished nodes are used where available.

    Raises:
        UnknownNameError: no such GPU.
    """
    computed_for = machine or Machine()
    look_up(GPUS, computed_for.gpu, "GPU")
    needs: dict[str, Need] = {}
    for id_, node in graph.nodes.items():
        state = load_state(node)
        missing = () if state.status == "done" else tuple(find_missing(node))
        before = needs.get(node.after)
        if not missing and state.status != "done" and before is not None and before.status == "missing":
            missing = (f"what {node.after} needs",)
        status = {"waiting": "to do", "submitted": "running"}.get(state.status, state.status)
        cost = expect(node, costs or Costs(), computed_for)
        is_done = state.status == "done"
        needs[id_] = Need(
            node=node,
            cells=tuple(graph.cells_of(id_)),
            status="missing" if missing else status,
            missing=missing,
            cost=cost,
            seconds=state.seconds if is_done else cost.seconds,
            basis="measured" if is_done else _basis_of(cost),
        )
    return list(needs.values()) if machine else _corrected(list(needs.values()))


def _basis_of(cost: Cost) -> str:
    return "" if cost.seconds is None else "computed" if cost.is_computed else "estimated"


def _corrected(needs: list[Need]) -> list[Need]:
    """Put what finished nodes of the same kind took in the place of what was computed."""
    learned = learn((n.node, n.cost, n.seconds) for n in needs if n.status == "done" and n.seconds)
    changed = []
    for need in needs:
        seconds = None if need.status == "done" else correct(need.node, need.cost, learned)
        changed.append(need if seconds is None else replace(need, seconds=seconds, basis="extrapolated"))
    return changed


def as_fetched(needs: list[Need]) -> list[Need]:
    """Return the plan of a grid that fetches what it needs: nothing of it is missing."""
    return [replace(n, status="to do", missing=()) if n.status == "missing" else n for n in needs]


def find_missing(node: Node) -> list[str]:
    """Return in words what keeps a node from being run on this machine."""
    if node.kind == "evaluation":
        return _missing_benchmark(node)
    problems = find_problems(node.run)
    missing = [problem for problem in problems if problem.startswith((f"stages.{node.name}.", "model."))]
    missing += [problem for problem in problems if not problem.startswith(("stages.", "model."))]
    return missing + (missing_weights(node.run.model.vision_encoder, node.run.model.language_model))


def _missing_benchmark(node: Node) -> list[str]:
    benchmark = node.benchmark
    if not node.data or not Path(node.data).is_dir():
        named = node.code or node.name
        return [f"{node.name}: no folder of the benchmark; `tinyllava data benchmarks {named} DIR`"]
    files = check_files(Path(node.data), benchmark.files)
    lacking = [status for status in files if not status.is_present and not status.needed.is_optional]
    found = [f"{node.name}: {' or '.join(s.needed.names)}, from {s.needed.source}" for s in lacking]
    if benchmark.judging is not None and not node.judge:
        found.append(f"{node.name}: a judge model (--judge-url and --judge-model)")
    return found


def missing_weights(vision_encoder: str, language_model: str) -> list[str]:
    """Return the parts that would have to be fetched from the hub while it is out of reach."""
    import os

    from huggingface_hub import try_to_load_from_cache

    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        return []
    missing = []
    found = find_parts(ModelConfig(vision_encoder=vision_encoder, language_model=language_model))
    for name, part in ((vision_encoder, found.encoder), (language_model, found.language)):
        if part is None or Path(part.path).is_dir():
            continue  # what is not found is said among the problems of the run
        if not isinstance(try_to_load_from_cache(part.path, "config.json"), str):
            missing.append(f"{name}: the weights {part.path} are not cached, and HF_HUB_OFFLINE is set")
    return missing


def plan_rows(needs: Sequence[Need]) -> list[Sequence[object]]:
    """Return the plan as rows, the first being the heads; a model's evaluations of one status are a row."""
    rows: list[Sequence[object]] = [("node", "for models", "status", "steps", "takes", "", "memory")]
    for _, group in groupby(needs, key=_row_key):
        same = list(group)
        first, steps, memory = same[0], same[0].cost.num_steps, same[0].cost.memory_bytes
        name = first.node.id if len(same) == 1 else f"{first.node.after}/{len(same)} benchmarks"
        rows.append(
            (
                name,
                _cells(first.cells),
                first.status,
                "-" if steps is None else f"{steps:,}",
                _sum_up(same),
                first.basis,
                "-" if memory is None else f"{memory / 1e9:.1f} GB",
            )
        )
    return rows


def _row_key(need: Need) -> tuple[str, ...]:
    is_stage = need.node.kind == "stage"
    return (need.node.id,) if is_stage else (need.node.after, need.status, need.basis)


def _sum_up(needs: Iterable[Need]) -> str:
    """Return the time of nodes together; with a plus where some of it is not known."""
    seconds = [need.seconds for need in needs]
    known = [one for one in seconds if one is not None]
    return duration(sum(known)) + (" +" if len(known) < len(seconds) else "") if known else "-"


def cell_rows(needs: Sequence[Need], graph: Graph) -> list[Sequence[object]]:
    """Return what every model takes, by stage and in all, done or not; the last row counts each node once."""
    by_id = {need.node.id: need for need in needs}
    longest_first = sorted(graph.cells, key=lambda cell: -len(cell.stages))
    stages = list(dict.fromkeys(by_id[id_].node.name for cell in longest_first for id_ in cell.stages))
    rows: list[Sequence[object]] = [("model", *stages, "evaluations", "in all")]
    rows += [(cell.id, *_by_stage([by_id[id_] for id_ in cell.nodes], stages)) for cell in graph.cells]
    rows.append(("all, each node once", *_by_stage(needs, stages)))
    return rows


def _by_stage(needs: Sequence[Need], stages: Sequence[str]) -> list[str]:
    found = [_sum_up(n for n in needs if n.node.kind == "stage" and n.node.name == name) for name in stages]
    return [*found, _sum_up(n for n in needs if n.node.kind == "evaluation"), _sum_up(needs)]


def explain_costs(needs: Sequence[Need], machine: Machine) -> list[str]:
    """Return what the words in the plan's column of times mean, those that occur."""
    gpus = f"{machine.num_gpus} x {machine.gpu}"
    seen = {need.basis for need in needs}
    meanings = {
        "measured": "measured: actual times.",
        "extrapolated": "extrapolated: from finished nodes of this grid.",
        "estimated": "estimated: from the grid's seconds per sample and question.",
        "computed": f"computed: for {gpus}, without judges and long answers in evaluations.",
    }
    nothing = ["Times are unknown until the first nodes have finished."]
    return [text for basis, text in meanings.items() if basis in seen] or nothing


def summarise(needs: Sequence[Need], graph: Graph) -> list[str]:
    """Return lines that say how much there is to do, what it takes and what is missing."""
    open_ = [need for need in needs if need.status != "done"]
    stages = sum(need.node.kind == "stage" for need in needs)
    once = sum(len(cell.nodes) for cell in graph.cells)
    known = [need.seconds for need in open_ if need.seconds is not None]
    first = (
        f"{len(graph.cells)} models: {stages} stages and {len(needs) - stages} evaluations "
        f"({once - len(needs)} saved by sharing), {len(needs) - len(open_)} done."
    )
    lines = [first]
    if known:
        unknown = (
            f", plus {len(open_) - len(known)} nodes of unknown duration" if len(known) < len(open_) else ""
        )
        lines.append(f"remaining: {duration(sum(known))}, one node at a time{unknown}")
    missing = dict.fromkeys(line for need in open_ for line in need.missing if not line.startswith("what "))
    if missing:
        lines += ["missing:", *(f"  {line}" for line in missing)]
    return lines


def _cells(cells: tuple[str, ...]) -> str:
    return cells[0] if len(cells) == 1 else f"{cells[0]} and {len(cells) - 1} more"
