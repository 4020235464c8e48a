"""The needs of a graph: files, and the steps, seconds and memory of its nodes.

Paper: sections 4.1.2 and 4.1.3. Estimated seconds follow from the plan of a run on GPUs. Measured times of
finished nodes of the same graph correct them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from tinyllava.config import FROZEN, ModelConfig
from tinyllava.data.mixtures import find_mixture, resolve
from tinyllava.data.sources import count_samples as count_mixed
from tinyllava.data.sources import parse_source
from tinyllava.errors import TinyLlavaError, look_up
from tinyllava.evaluation.read import check_files
from tinyllava.parts.resolve import find_parts
from tinyllava.planning.check import find_problems
from tinyllava.planning.plan import count_flops, plan_parts, plan_run
from tinyllava.planning.speed import GPUS, utilisation
from tinyllava.studies.graph import Graph, Node, read_once
from tinyllava.studies.grid import Costs
from tinyllava.studies.work import load_state

Kind = tuple[str, str]
"""Stage or benchmark, and the unit that its work is weighed in."""
PROMPT_TOKENS = 64
"""Text of a question and its answer, for which an evaluation is computed."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs that a graph is computed for."""

    gpu: str = "A100-80G"
    num_gpus: int = 8


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one node; None for unknown values."""

    num_steps: int | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    """Peak of one GPU."""
    is_computed: bool = False
    """Whether the seconds are those of GPUs on paper."""


def expect(node: Node, costs: Costs, machine: Machine) -> Cost:
    """Return the cost of a node from measured costs if given, or else computed for GPUs."""
    return (
        _of_evaluation(node, costs, machine) if node.kind == "evaluation" else _of_stage(node, costs, machine)
    )


def _of_stage(node: Node, costs: Costs, machine: Machine) -> Cost:
    stage, num_steps = node.run.stages[node.name], None
    num_samples = count_samples(node) or sum(costs.num_records.get(name, 0) for name in stage.data.records)
    if num_samples:
        steps = round(-(-num_samples // stage.global_batch_size) * stage.num_epochs)
        num_steps = stage.max_steps or max(1, steps)
    if node.name in costs.seconds_per_sample and num_samples and num_steps:
        seen = min(num_steps * stage.global_batch_size, num_samples * stage.num_epochs)
        seconds = seen * costs.seconds_per_sample[node.name] + costs.seconds_per_node
        return Cost(num_steps=num_steps, seconds=seconds)
    try:
        plan = plan_run(node.run, gpu=machine.gpu, num_gpus=machine.num_gpus)
        found = next(p for p in plan.stages if p.name == node.name)
    except (TinyLlavaError, AttributeError, ZeroDivisionError):  # no plan of these parts: told elsewhere
        return Cost(num_steps=num_steps)
    return Cost(
        num_steps=found.load.num_steps if found.load else num_steps,
        seconds=found.hours * 3600 or None,
        is_computed=True,
        memory_bytes=next(iter(found.forms.values())).memory.peak,
    )


def _of_evaluation(node: Node, costs: Costs, machine: Machine) -> Cost:
    """Estimate a pass over image and text for each question, without the judge and without long answers."""
    num_questions = node.benchmark.num_questions
    count = node.limit or num_questions
    seconds = count * costs.seconds_per_question + costs.seconds_per_node
    if seconds or not count:
        return Cost(seconds=seconds or None)
    if node.limit and num_questions:
        count = min(node.limit, num_questions)
    try:
        parts = plan_parts(node.run)
    except (TinyLlavaError, AttributeError):
        return Cost()
    stage = list(node.run.stages.values())[-1]
    tokens = parts.num_image_tokens + PROMPT_TOKENS
    untrained = replace(stage, vision_encoder=FROZEN, connector=FROZEN, language_model=FROZEN)
    flops = count * count_flops(parts, untrained, tokens, PROMPT_TOKENS)
    gpu = GPUS[machine.gpu]
    precision = gpu.precision("auto")
    share = utilisation(parts, is_trained=False, balance=gpu.balance(precision))
    return Cost(seconds=flops / (machine.num_gpus * gpu.flops(precision) * share), is_computed=True)


def count_samples(node: Node) -> int | None:
    """Return the number of samples of a stage from the existing files; None if unknown."""
    data = node.run.stages[node.name].data
    sources = [parse_source(record) for record in data.records]
    mixtures = [find_mixture(record) for record in data.records]
    if mixtures and all(mixtures):
        return sum(count_mixed(sources, [mixture.num_samples for mixture in mixtures if mixture]))
    try:
        found = resolve(data, node.run.data_root)
        return sum(count_mixed(sources, [sum(_count_records(p) for p, _ in places) for _, places in found]))
    except (TinyLlavaError, OSError, ValueError):
        return None


@read_once
def _count_records(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return sum(bool(line.strip()) for line in text.splitlines())
    return len(json.loads(text))


def learn(finished: Iterable[tuple[Node, Cost, float]]) -> dict[Kind, float]:
    """Return how the seconds that finished nodes took go with their weights, by kind of work."""
    sums: dict[Kind, tuple[float, float]] = {}
    for node, cost, seconds in finished:
        kind, weight = _weigh(node, cost)
        total, weights = sums.get(kind, (0.0, 0.0))
        sums[kind] = (total + seconds, weights + weight)
    return {kind: total / weights for kind, (total, weights) in sums.items()}


def correct(node: Node, cost: Cost, learned: Mapping[Kind, float]) -> float | None:
    """Return the seconds of a node from finished nodes of its kind; None if none has finished."""
    kind, weight = _weigh(node, cost)
    return learned[kind] * weight if kind in learned else None


def _weigh(node: Node, cost: Cost) -> tuple[Kind, float]:
    """Return the kind of work, and how much of it a node is: computed seconds, or samples, or one piece."""
    if cost.seconds:
        return (node.name, "computed"), cost.seconds
    if node.kind == "evaluation" or not (num_samples := count_samples(node)):
        return (node.name, "piece"), 1.0
    stage = node.run.stages[node.name]
    seen = num_samples * stage.num_epochs
    return (node.name, "sample"), min(stage.max_steps * stage.global_batch_size or seen, seen)


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


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
    """Return the needs and costs of every node, in the order in which they run.

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
    """Replace computed times by those of finished nodes of the same kind."""
    learned = learn((n.node, n.cost, n.seconds) for n in needs if n.status == "done" and n.seconds)
    changed = []
    for need in needs:
        seconds = None if need.status == "done" else correct(need.node, need.cost, learned)
        changed.append(need if seconds is None else replace(need, seconds=seconds, basis="extrapolated"))
    return changed


def as_fetched(needs: list[Need]) -> list[Need]:
    """Return the plan of a grid that downloads its files, so that nothing counts as missing."""
    return [replace(n, status="to do", missing=()) if n.status == "missing" else n for n in needs]


def find_missing(node: Node) -> list[str]:
    """Return what keeps a node from running on this machine, in words."""
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
    """Return the cost of every model, by stage and in total. The last row counts each node once."""
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
    """Return the meaning of the words that occur in the plan's column of times."""
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
    """Return lines with the amount of work, its cost, and what is missing."""
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
