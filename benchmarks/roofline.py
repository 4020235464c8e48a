"""Time of a training step on an H100 by a roofline over every operator of our own step; nothing is computed.

    python benchmarks/roofline.py --json-file src/tinyllava/planning/rooflines.json
    python benchmarks/roofline.py --tiny          a toy model, in seconds

It prints the largest costs of both models and stages in all forms. The plan estimates hours from the file.

Paper: section 4.1.2, both stages of the base recipe, at one GPU's share of an eight-GPU batch.

One micro-batch runs forward and backward on tensors without content (``FakeTensorMode``). Each operator takes
the longer of two times: its operations at the speed that a product of its size reaches, and its bytes at the
speed of a copy. ``eager`` counts every operator by itself. ``compiled`` counts what lies between two matrix
products of a layer as one kernel, as a layer under ``torch.compile`` does: it reads what products made and
writes what products need, and makes again in the backward pass what is cheaper to make than to keep.
``sharded`` divides gradients and optimizer among eight GPUs (``hardware.sharding gradients``). Host time and
loading are left out, and the exchange between GPUs, which is printed beside: it goes on while they compute.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from math import ceil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers.initialization import no_init_weights

from gpu_training import LAYOUTS, SUPERVISED, build
from roofline_costs import Roofline, exchange_seconds, optimizer_seconds
from tinyllava.config import Hardware, ModelConfig, Run, Stage
from tinyllava.model import compat, modeling
from tinyllava.model.compat import (
    causal_without_looking,
    decoder_layers,
    encoder_layers,
    packed_mask,
    set_checkpointing,
)
from tinyllava.model.tuning import apply_tuning
from tinyllava.planning.forms import Machine, choose_forms
from tinyllava.planning.plan import count_flops, plan_parts
from tinyllava.planning.speed import GPUS, ROOFLINE_GPU
from tinyllava.recipes.paper import BASE
from tinyllava.training.precision import hold_frozen_in_half

GPU = GPUS[ROOFLINE_GPU]
NUM_GPUS = 8


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a stage is run."""

    packs: bool
    compiled: bool
    recomputed: bool
    sharded: bool = False

    def __str__(self) -> str:
        words = ("packed" if self.packs else "padded", "compiled" if self.compiled else "eager")
        return " ".join(words) + ", recomputed" * self.recomputed + ", sharded" * self.sharded


FORMS = [
    Form(packs=False, compiled=False, recomputed=False),
    *(Form(packs=True, compiled=c, recomputed=r) for c, r in product((False, True), (False, True))),
    Form(packs=True, compiled=True, recomputed=False, sharded=True),
]


def draw_lengths(stage: str, number: int, longest: int) -> list[int]:
    """Text tokens of samples, drawn as long as those of the published sets."""
    draw, (mean, deviation) = random.Random(0), SUPERVISED[stage]
    return [min(longest, max(3, round(draw.gauss(mean, deviation)))) for _ in range(number)]


def make_batch(layout: Any, texts: list[int], packs: bool) -> dict[str, Any]:
    """A micro-batch without content; all text is supervised, as in ``gpu_training``."""
    patches, side = layout.num_patches, layout.side_px
    lengths = [patches + text for text in texts]
    rows, width = (1, sum(lengths)) if packs else (len(texts), max(lengths))
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(rows, width, dtype=torch.long),
        "labels": torch.zeros(rows, width, dtype=torch.long),
        "pixel_values": torch.zeros(len(texts), 3, side, side),
        "image_positions": torch.zeros(len(texts) * patches, dtype=torch.long),
        "supervised_positions": torch.zeros(sum(texts), dtype=torch.long),
        "num_items_in_batch": 1,
    }
    if packs:
        kept = sum(lengths) - len(lengths)
        batch["segments"] = {
            "lengths": [n - 1 for n in lengths],
            "kept": torch.zeros(kept, dtype=torch.long),
            "positions": torch.zeros(1, kept, dtype=torch.long),
        }
    return batch


@contextmanager
def one_kernel(lengths: list[int]) -> Iterator[None]:
    """Let the samples of a packed row attend in one kernel, as on a GPU, and their mask have content."""
    mask = packed_mask(lengths)

    def attend(inputs: list[Tensor], *_: Any) -> Tensor:
        output = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2)

    with ExitStack() as patches:
        for module, name, value in (
            (modeling, "packed_mask", lambda _: mask),
            (compat, "_has_packed_kernel", lambda *_: True),
            (compat, "_attend_packed", attend),
        ):
            patches.enter_context(patch.object(module, name, value))
        yield


@dataclass(kw_only=True)
class Found:
    """What the roofline says of one stage of a model in one form."""

    samples: int
    """Of the micro-batch."""
    model_flops: float
    """What the stage needs for them, without what is computed again."""
    roofline: Roofline
    other_seconds: dict[str, float] = field(default_factory=dict)
    """Micro-batch's share of the optimizer step, and of adding up gradients."""
    exchange_seconds: float = 0.0
    """Beside the computation."""

    @property
    def seconds(self) -> float:
        """Of the micro-batch."""
        return self.roofline.seconds + sum(self.other_seconds.values())

    @property
    def mfu(self) -> float:
        """Share of the peak, by the operations that the model needs."""
        return self.model_flops / self.seconds / GPU.half_flops

    def summary(self) -> dict[str, Any]:
        """Return the numbers as JSON has them."""
        product_seconds, other = self.roofline.split()
        return {
            "samples": self.samples,
            "samples_per_second": self.samples / self.seconds,
            "mfu": self.mfu,
            "executed_flops": self.roofline.flops,
            "product_seconds": product_seconds,
            "memory_seconds": other,
            "kernels": self.roofline.num_kernels,
            **self.other_seconds,
            **({"exchange": self.exchange_seconds} if self.exchange_seconds else {}),
        }


def measure_stage(name: str, stage_name: str, form: Form, device_batch: int = 0) -> Found:
    """Roofline of the micro-batch that the plan chooses for an H100 with 80 GB, or of a given one."""
    layout, stage = LAYOUTS[name], BASE.stages[stage_name]
    num_samples, num_ranks = stage.global_batch_size // NUM_GPUS, NUM_GPUS if form.sharded else 1
    stage = replace(stage, global_batch_size=num_samples * num_ranks)
    texts = draw_lengths(stage_name, num_samples, stage.max_length_tokens - layout.num_patches)
    taken, flops = texts[:4], 0.0
    if layout.parts[0]:
        run = Run(
            name="",
            model=ModelConfig(vision_encoder=layout.parts[0], language_model=layout.parts[1]),
            stages={},
            hardware=Hardware(
                gradient_checkpointing=form.recomputed,
                compile=form.compiled,
                sharding="gradients" if form.sharded else "none",
            ),
        )
        parts, longest = plan_parts(run), layout.num_patches + max(texts)
        machine = Machine(memory_bytes=GPU.memory_bytes, is_half=True, num_ranks=num_ranks)
        chosen = choose_forms(parts, stage, run.hardware, machine, longest, max(texts))[0]
        size = device_batch or chosen.device_batch_size
        taken = _fill(texts, layout.num_patches, size * longest) if form.packs else texts[:size]
        mean = sum(taken) / len(taken)
        flops = len(taken) * count_flops(parts, stage, layout.num_patches + mean, mean)
    found = _run(layout, stage, taken, form, len(taken) / num_samples)
    found.model_flops = flops or found.roofline.flops
    return found


def _fill(texts: list[int], patches: int, budget: int) -> list[int]:
    """Samples of one packed micro-batch: an even share for as few as the budget of tokens allows."""
    sums = accumulate(patches + text for text in texts)
    number = max(1, sum(total <= budget for total in sums))
    return texts[: ceil(len(texts) / ceil(len(texts) / number))]


def _run(layout: Any, stage: Stage, texts: list[int], form: Form, share: float) -> Found:
    lengths = [layout.num_patches + text - 1 for text in texts]
    with one_kernel(lengths), FakeTensorMode(allow_non_fake_inputs=True):
        with no_init_weights():  # looks at what it has drawn
            model, _ = build(layout)
        apply_tuning(model, stage)
        if form.recomputed:
            set_checkpointing(model, True)
        with patch.object(torch, "equal", lambda *_: True):  # there is nothing to compare
            hold_frozen_in_half(model, "bf16")
        batch = make_batch(layout, texts, form.packs)
        roofline = Roofline(GPU, compiled=form.compiled, lengths=lengths if form.packs else [])
        _watch(model, roofline)
        with causal_without_looking(model.language_model), roofline:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            roofline.is_backward = True
            loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        roofline.finish(p.grad for p in trained)
        num_trained = sum(p.numel() for p in trained)
    found = Found(samples=len(texts), model_flops=0.0, roofline=roofline)
    num_shards = NUM_GPUS if form.sharded else 1
    found.other_seconds = optimizer_seconds(GPU, num_trained, share, num_shards)
    found.exchange_seconds = exchange_seconds(num_trained, num_shards) if form.sharded else 0.0
    return found


def _watch(model: Any, roofline: Roofline) -> None:
    """Tell the roofline which part is being computed: its layers are compiled one by one."""
    parts: dict[str, Iterator[nn.Module]] = {
        "encoder layer": iter(encoder_layers(model.vision_encoder)),
        "decoder layer": iter(decoder_layers(model.language_model)),
    }
    for part, layers in parts.items():
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_, part=part: roofline.enter(part))
            layer.register_forward_hook(lambda _, __, output: roofline.leave(output))
            layer.register_full_backward_pre_hook(lambda *_, part=part: roofline.enter(part))
            layer.register_full_backward_hook(lambda _, gradients, __: roofline.leave(gradients))


def largest(found: Found, number: int) -> list[str]:
    """Return the largest costs as lines, the largest first."""
    costs = [(name, c.seconds, c.calls, c.flops, c.bytes) for name, c in found.roofline.costs.items()]
    costs += [(("", "", name), s, 1, 0.0, 0.0) for name, s in found.other_seconds.items()]
    lines = [f"  {'ms':>8}{'share':>7}{'calls':>7}{'TFLOP':>8}{'GB':>8}  operator"]
    for name, seconds, calls, flops, moved in sorted(costs, key=lambda cost: -cost[1])[:number]:
        numbers = f"{seconds * 1e3:>8.1f}{seconds / found.seconds:>7.0%}{calls:>7}"
        lines.append(f"  {numbers}{flops / 1e12:>8.2f}{moved / 1e9:>8.1f}  {' '.join(filter(None, name))}")
    return lines


def main(
    models: tuple[str, ...] = ("C-TL", "Sig-Phi"),
    stages: tuple[str, ...] = tuple(BASE.stages),
    tiny: bool = False,
    costs: int = 8,
    device_batch: int = 0,
    only: str = "",
    json_file: Path | None = None,
) -> None:
    """Print the share of an H100's peak of each stage and form.

    Args:
        models: names of ``gpu_training.LAYOUTS``.
        stages: of the base recipe.
        tiny: a toy model in place of them.
        costs: how many of the largest costs to print of each.
        device_batch: samples of the longest length in a micro-batch, in place of the plan's choice.
        only: measure the forms whose name holds this, such as ``compiled``.
        json_file: where the numbers are written too, in the place of those of the same stage and form.
    """
    result: dict[str, Any] = {}
    show: Callable[..., None] = print
    for name, stage in product(("tiny",) if tiny else models, stages):
        for form in (form for form in FORMS if only in str(form)):
            found = measure_stage(name, stage, form, device_batch)
            numbers = found.summary()
            label = f"{name} {stage} {form}"
            result[label] = numbers
            show(
                f"{label}: {numbers['samples_per_second']:.0f} samples/s, {found.mfu:.1%} of the peak, "
                f"{found.samples} samples, {found.roofline.num_kernels:,} kernels"
                + f", {found.exchange_seconds / found.seconds:.0%} as long for the exchange beside"
                * form.sharded,
                *largest(found, costs),
                sep="\n",
                flush=True,
            )
    if json_file:
        before = json.loads(json_file.read_text(encoding="utf-8")) if json_file.exists() else {}
        json_file.write_text(json.dumps(before | result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
