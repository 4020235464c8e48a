"""What the nodes of a graph take: steps, seconds and memory, measured where it can be, computed elsewhere.

Paper: sections 4.1.2 and 4.1.3. Estimated seconds follow from the plan of a run on GPUs; what nodes of the
same graph took on this machine corrects them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tinyllava.config import FROZEN
from tinyllava.data.mixtures import find_mixture, resolve
from tinyllava.errors import TinyLlavaError
from tinyllava.planning.plan import GPUS, count_flops, plan_parts, plan_run, utilisation
from tinyllava.studies.graph import Node, read_once
from tinyllava.studies.grid import Costs

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
    """What one node takes; None for what is not known."""

    num_steps: int | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    """Peak of one GPU."""
    is_computed: bool = False
    """Whether the seconds are those of GPUs on paper."""


def expect(node: Node, costs: Costs, machine: Machine) -> Cost:
    """Return what a node takes by measured costs where they are given, and as computed for GPUs elsewhere."""
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
        memory_bytes=min(form.memory.peak for name, form in found.forms.items() if "LoRA" not in name),
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
    speed = machine.num_gpus * gpu.flops(gpu.precision("auto")) * utilisation(parts, False)
    return Cost(seconds=flops / speed, is_computed=True)


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
    """Return the seconds of a node by what others of its kind took; None where none has finished."""
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
