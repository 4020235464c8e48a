"""What a graph still needs: which nodes are done, what is missing on this machine, and what the rest takes.

Paper: sections 4.1.2 and 4.1.3. Hours follow from the plan of a run on GPUs, or from measured seconds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tinyllava.check import find_problems
from tinyllava.data.mixtures import find_mixture, resolve
from tinyllava.errors import TinyLlavaError
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.files import check_files
from tinyllava.grid.graph import Graph, Node
from tinyllava.grid.grid import Costs
from tinyllava.grid.state import load_state
from tinyllava.language_models import find_language_model
from tinyllava.plan import plan_run
from tinyllava.vision_encoders import find_vision_encoder


@dataclass(frozen=True, kw_only=True)
class Need:
    """One node of a plan."""

    node: Node
    cells: tuple[str, ...]
    status: str
    """done, running, failed, to do, or missing: something that it needs is not here."""
    missing: tuple[str, ...] = ()
    num_steps: int | None = None
    seconds: float | None = None
    """Expected, or measured where it is done; None if nothing is known."""
    memory_bytes: int | None = None
    """Peak of one GPU."""


def plan_graph(
    graph: Graph, costs: Costs | None = None, *, gpu: str = "A100-80G", num_gpus: int = 8
) -> list[Need]:
    """Return what every node needs and takes, in the order in which they run."""
    needs: dict[str, Need] = {}
    for id_, node in graph.nodes.items():
        state = load_state(node)
        missing = () if state.status == "done" else tuple(find_missing(node))
        before = needs.get(node.after)
        if not missing and state.status != "done" and before is not None and before.status == "missing":
            missing = (f"what {node.after} needs",)
        status = {"waiting": "to do", "submitted": "running"}.get(state.status, state.status)
        need = Need(
            node=node, cells=tuple(graph.cells_of(id_)), status="missing" if missing else status,
            missing=missing, seconds=state.seconds if state.status == "done" else None,
        )  # fmt: skip
        needs[id_] = need if state.status == "done" else _with_costs(need, costs or Costs(), gpu, num_gpus)
    return list(needs.values())


def find_missing(node: Node) -> list[str]:
    """Return in words what keeps a node from being run on this machine."""
    if node.kind == "evaluation":
        return _missing_benchmark(node)
    problems = find_problems(node.run)
    missing = [problem for problem in problems if problem.startswith((f"stages.{node.name}.", "model."))]
    missing += [problem for problem in problems if not problem.startswith(("stages.", "model."))]
    return missing + (missing_weights(node.run.model.vision_encoder, node.run.model.language_model))


def _missing_benchmark(node: Node) -> list[str]:
    benchmark = BENCHMARKS[node.name]
    if not node.data or not Path(node.data).is_dir():
        return [f"{node.name}: no folder of the benchmark; `tinyllava data benchmarks {node.name} DIR`"]
    files = check_files(Path(node.data), benchmark.files)
    lacking = [status for status in files if not status.is_present and not status.needed.is_optional]
    found = [f"{node.name}: {' or '.join(s.needed.names)}, from {s.needed.source}" for s in lacking]
    if benchmark.judging is not None and not node.judge:
        found.append(f"{node.name}: a judge model (--judge-url and --judge-model)")
    return found


@cache
def missing_weights(vision_encoder: str, language_model: str) -> list[str]:
    """Return the parts that would have to be fetched from the hub while it is out of reach."""
    import os

    from huggingface_hub import try_to_load_from_cache

    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        return []
    missing = []
    for find, name in ((find_vision_encoder, vision_encoder), (find_language_model, language_model)):
        try:
            path = find(name).path
        except TinyLlavaError:
            continue  # said among the problems of the run
        if not Path(path).is_dir() and not isinstance(try_to_load_from_cache(path, "config.json"), str):
            missing.append(f"{name}: the weights {path} are not in the cache, and HF_HUB_OFFLINE is set")
    return missing


def _with_costs(need: Need, costs: Costs, gpu: str, num_gpus: int) -> Need:
    node = need.node
    if node.kind == "evaluation":
        count = node.limit or BENCHMARKS[node.name].num_questions
        seconds = count * costs.seconds_per_question + costs.seconds_per_node
        return replace(need, seconds=seconds or None)
    stage = node.run.stages[node.name]
    num_samples = count_samples(node)
    num_steps = None
    if num_samples:
        num_steps = stage.max_steps or max(
            1, round(-(-num_samples // stage.global_batch_size) * stage.num_epochs)
        )
    if node.name in costs.seconds_per_sample and num_samples:
        seconds = num_samples * stage.num_epochs * costs.seconds_per_sample[node.name]
        return replace(need, num_steps=num_steps, seconds=seconds + costs.seconds_per_node)
    try:
        plan = next(p for p in plan_run(node.run, gpu=gpu, num_gpus=num_gpus).stages if p.name == node.name)
    except (TinyLlavaError, AttributeError, ZeroDivisionError):  # parts that cannot be planned: told above
        return replace(need, num_steps=num_steps)
    return replace(
        need, num_steps=plan.load.num_steps if plan.load else num_steps,
        seconds=plan.hours * 3600 or None,
        memory_bytes=min(form.memory.peak for name, form in plan.forms.items() if "LoRA" not in name),
    )  # fmt: skip


def count_samples(node: Node) -> int | None:
    """Return the number of records of a stage, of files as they are here; None where that is not known."""
    data = node.run.stages[node.name].data
    mixtures = [find_mixture(record) for record in data.records]
    if mixtures and all(mixtures):
        return sum(mixture.num_samples for mixture in mixtures if mixture)
    try:
        return sum(_count_records(path) for path, _ in resolve(data, node.run.data_root))
    except (TinyLlavaError, OSError, ValueError):
        return None


@cache
def _count_records(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return sum(bool(line.strip()) for line in text.splitlines())
    return len(json.loads(text))


def plan_rows(needs: list[Need]) -> list[Sequence[object]]:
    """Return the plan as rows, the first being the heads."""
    rows: list[Sequence[object]] = [("node", "for cells", "status", "steps", "takes", "memory")]
    rows += [
        (
            need.node.id, _cells(need.cells), need.status,
            "-" if need.num_steps is None else f"{need.num_steps:,}",
            "-" if need.seconds is None else duration(need.seconds),
            "-" if need.memory_bytes is None else f"{need.memory_bytes / 1e9:.0f} GB",
        )
        for need in needs
    ]  # fmt: skip
    return rows


def summarise(needs: list[Need], graph: Graph) -> list[str]:
    """Return lines that say how much there is to do, what it takes and what is missing."""
    open_ = [need for need in needs if need.status != "done"]
    stages = sum(need.node.kind == "stage" for need in needs)
    once = sum(len(cell.nodes) for cell in graph.cells)
    known = [need.seconds for need in open_ if need.seconds is not None]
    first = (
        f"{len(graph.cells)} models: {stages} stages and {len(needs) - stages} evaluations, "
        f"{once - len(needs)} fewer than one by one; {len(needs) - len(open_)} are done."
    )
    lines = [first]
    if known:
        unknown = f", and {len(open_) - len(known)} nodes not known" if len(known) < len(open_) else ""
        lines.append(f"still to do: {duration(sum(known))}{unknown}")
    missing = dict.fromkeys(line for need in open_ for line in need.missing if not line.startswith("what "))
    if missing:
        lines += ["missing:", *(f"  {line}" for line in missing)]
    return lines


def _cells(cells: tuple[str, ...]) -> str:
    return cells[0] if len(cells) == 1 else f"{cells[0]} and {len(cells) - 1} more"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def costs_so_far(graph: Graph, seconds: Mapping[str, float]) -> Costs:
    """Return costs per sample by stage, from the nodes of this graph that are done (id -> seconds)."""
    sums: dict[str, tuple[float, float]] = {}
    for id_, taken in seconds.items():
        node = graph.nodes[id_]
        if node.kind == "stage" and (count := count_samples(node)):
            total, samples = sums.get(node.name, (0.0, 0.0))
            sums[node.name] = (total + taken, samples + count * node.run.stages[node.name].num_epochs)
    return Costs(seconds_per_sample={name: total / count for name, (total, count) in sums.items()})
