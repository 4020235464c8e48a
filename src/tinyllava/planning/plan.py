"""Estimate a run before any download: parameters, tokens, steps, FLOPs, memory, disk space, hours.

Paper: sections 4.1.2 (batches, epochs, data) and Table A1 (sizes). Everything is a closed form of the specs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from tinyllava.config import COMPONENTS, FULL, Component, ModelConfig, Run, Sharding, Stage
from tinyllava.data.mixtures import find_mixture
from tinyllava.data.sources import count_samples, parse_source
from tinyllava.errors import look_up
from tinyllava.parts.resolve import resolve
from tinyllava.planning.forms import Form, Machine, choose_forms
from tinyllava.planning.memory import PlannedParts, count_trained
from tinyllava.planning.rules import sharding_problems
from tinyllava.planning.sizes import connector_size, language_model_size, vision_encoder_size
from tinyllava.planning.speed import (
    GPUS,
    OPTIMIZER_BYTES,
    REACHED,
    Gpu,
    Kind,
    Model,
    Seconds,
    checkpoint_seconds,
    compare_measured,
    copy_seconds,
    count_exchange,
    image_seconds,
    read_measured,
    start_up_seconds,
    utilisation,
)
from tinyllava.recipes.paper import ADAPTERS, ADAPTERS_ON_4_BITS, BASE

FORMS = {"full": FULL, "LoRA, rank 128": ADAPTERS, "QLoRA, rank 128": ADAPTERS_ON_4_BITS}
"""How a stage could train its language model: in full, or with the adapters of recipes lora and qlora."""
SHARDINGS: tuple[Sharding, ...] = ("gradients", "all")
_SHARDED = "sharding "
"""What the label of a divided form begins with."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much one stage reads and computes."""

    num_samples: int
    num_images: float
    """Of all samples, each once."""
    num_images_seen: float
    """Over the whole stage."""
    num_steps: int
    mean_tokens: float
    """Of a sequence: image tokens where there is an image, and text."""
    longest_tokens: int
    """What memory is planned for."""
    flops: float
    """Forward and backward, over the whole stage."""
    recomputed_flops: float
    """Added where the activations of the language model are recomputed."""

    @property
    def num_tokens(self) -> float:
        """Tokens of all samples."""
        return self.num_samples * self.mean_tokens


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The estimated cost of one stage."""

    name: str
    trained: dict[Component, int]
    load: Load | None
    """None if the number of records is not known (files of the user's)."""
    forms: dict[str, Form]
    """The run's own form, and where they differ from it those of ``FORMS``; then divided (FSDP2)."""
    proposed: str
    """The form that the time is estimated for: the run's own, or a divided one if only that fits."""
    utilisation: float
    """Share of the GPUs' peak that is expected while they compute."""
    checkpoint_bytes: int
    """Of one resumable checkpoint: trained weights and both moments in fp32."""
    seconds: Seconds | None
    """None where the load is not known."""

    @property
    def hours(self) -> float:
        """The whole stage; 0 where it is not known."""
        return self.seconds.total / 3600 if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimated cost of a run."""

    parts: PlannedParts
    context_tokens: int
    precision: str
    """fp32, tf32, bf16 or fp16: what the run's comes to on the GPU."""
    stages: list[StagePlan]
    model_bytes: int
    """Size of the finished model's folder, in fp32."""


def plan_parts(run: Run) -> PlannedParts:
    """Return the parts of a run with their sizes.

    Raises:
        UnknownNameError, ConfigError: see ``tinyllava.planning.check.check``, which says it all at once.
    """
    parts = resolve(run.model)
    encoder, language = parts.encoder, parts.language
    return PlannedParts(
        encoder=encoder,
        language=language,
        template=parts.template.name,
        encoder_size=vision_encoder_size(encoder),
        connector_size=connector_size(
            parts.connector, encoder.width, language.width, parts.connector_options, parts.num_patches
        ),
        language_size=language_model_size(language),
        num_patches=parts.num_patches,
        num_image_tokens=parts.num_image_tokens,
    )


def plan_run(
    run: Run, *, gpu: str = "A100-80G", num_gpus: int = 8, reached: Mapping[Kind, float] = REACHED
) -> Plan:
    """Estimate the cost of a run on a number of GPUs of one type.

    Args:
        reached: part of the roofline's speed, see ``measured_speed``.

    Raises:
        UnknownNameError: no such GPU, or see ``plan_parts``.
    """
    chosen, parts = look_up(GPUS, gpu, "GPU"), plan_parts(run)
    stages = [
        _plan_stage(run, name, stage, parts, chosen, num_gpus, reached) for name, stage in run.stages.items()
    ]
    return Plan(
        parts=parts,
        context_tokens=parts.language.context_tokens,
        precision=chosen.precision(run.hardware.precision),
        stages=stages,
        model_bytes=4 * parts.total,
    )


def _plan_stage(
    run: Run,
    name: str,
    stage: Stage,
    parts: PlannedParts,
    gpu: Gpu,
    num_gpus: int,
    reached: Mapping[Kind, float],
) -> StagePlan:
    load = measure_load(stage, parts)
    forms = {"as the recipe": _plan_form(run, stage, stage, parts, load, gpu, num_gpus)}
    others = FORMS if stage.language_model.trains else {}
    for label, tune in others.items():
        if (tune.kind, tune.bits) != (stage.language_model.kind, stage.language_model.bits):
            form = replace(stage, language_model=tune)
            forms[label] = _plan_form(run, stage, form, parts, load, gpu, num_gpus)
    for sharding in SHARDINGS if num_gpus > 1 else ():
        divided = replace(run, hardware=replace(run.hardware, sharding=sharding))
        if sharding != run.hardware.sharding and not list(sharding_problems(stage, divided.hardware)):
            forms[f"{_SHARDED}{sharding}"] = _plan_form(divided, stage, stage, parts, load, gpu, num_gpus)
    label = _proposed(forms)
    for sharding in SHARDINGS:
        if label == f"{_SHARDED}{sharding}":
            run = replace(run, hardware=replace(run.hardware, sharding=sharding))
    precision = gpu.precision(run.hardware.precision)
    share = utilisation(
        parts,
        is_trained=stage.language_model.trains,
        balance=gpu.balance(precision),
        compiled=run.hardware.compile,
        recomputed=forms[label].checkpointing,
        sharded=run.hardware.sharding != "none" and num_gpus > 1,
        reached=reached,
    )
    trained = {c: count_trained(size, stage.tune(c)) for c, size in parts.sizes.items()}
    seconds = _estimate_seconds(run, stage, parts, load, forms[label], gpu, num_gpus, share) if load else None
    return StagePlan(
        name=name,
        trained=trained,
        load=load,
        forms=forms,
        proposed=label,
        checkpoint_bytes=12 * sum(trained.values()),
        utilisation=share,
        seconds=seconds,
    )


def _proposed(forms: Mapping[str, Form]) -> str:
    """Return the label of the run's own form, or of the first divided one if only that fits."""
    (own, form), *others = forms.items()
    divided = (label for label, other in others if other.fits and label.startswith(_SHARDED))
    return own if form.fits else next(divided, own)


def _estimate_seconds(
    run: Run, stage: Stage, parts: PlannedParts, load: Load, form: Form, gpu: Gpu, num_gpus: int, share: float
) -> Seconds:
    """Return the time of a stage in a form, in which a GPU reaches a share of its peak."""
    hardware, precision = run.hardware, gpu.precision(run.hardware.precision)
    num_trained = sum(count_trained(size, stage.tune(c)) for c, size in parts.sizes.items())
    is_divided = hardware.sharding != "none" and num_gpus > 1
    executed = load.flops + load.recomputed_flops * form.checkpointing
    computing = executed / (num_gpus * gpu.flops(precision) * share)
    if is_divided:
        exchange = count_exchange(parts, stage, hardware.sharding, num_gpus, precision in ("bf16", "fp16"))
        num_batches = load.num_steps * form.accumulation
        computing += num_batches * exchange.seconds(gpu, computing / num_batches)
    updated = num_trained / (num_gpus if is_divided else 1)
    computing += load.num_steps * copy_seconds(OPTIMIZER_BYTES * updated, gpu.bandwidth)
    images = image_seconds(load.num_images_seen, num_gpus, hardware.num_workers)
    steps = hardware.save_steps or max(1, load.num_steps // 10)
    return Seconds(
        computing=computing,
        images=max(0.0, images - computing),
        start_up=start_up_seconds(
            4 * parts.total, load.num_samples, load.num_images * hardware.check_images, num_gpus
        ),
        checkpoints=checkpoint_seconds(12 * num_trained, load.num_steps // steps, computing),
    )


def measured_speed(path: Path) -> dict[Kind, float]:
    """Return the part of the roofline's speed that ``benchmarks/gpu.py`` measured, for ``plan_run``.

    Raises:
        ConfigError: see ``read_measured`` and ``compare_measured``.
    """
    found, gpu = read_measured(path)
    expected: dict[tuple[Model, Kind, bool], float] = {}
    names: tuple[Model, Model] = ("C-TL", "Sig-Phi")
    kinds: tuple[Kind, Kind] = ("pretrain", "finetune")
    for name, kind, recomputed in product(names, kinds, (False, True)):
        encoder, language = name.split("-")
        model = ModelConfig(vision_encoder=encoder, language_model=language)
        parts = plan_parts(Run(name=name, model=model, stages={}))
        load = measure_load(BASE.stages[kind], parts)
        assert load is not None  # the mixtures of Table 2
        share = utilisation(
            parts,
            is_trained=kind == "finetune",
            balance=gpu.balance("bf16"),
            recomputed=recomputed,
            reached={"pretrain": 1.0, "finetune": 1.0},
        )
        expected[name, kind, recomputed] = (
            share * load.flops / (load.flops + load.recomputed_flops * recomputed)
        )
    return compare_measured(path, found, expected)


def _plan_form(
    run: Run, stage: Stage, form: Stage, parts: PlannedParts, load: Load | None, gpu: Gpu, num_gpus: int
) -> Form:
    """Choose how a stage runs on so many GPUs, in the longest sequence that is known of its data."""
    longest = load.longest_tokens if load else stage.max_length_tokens
    return choose_forms(
        parts,
        form,
        run.hardware,
        Machine(
            memory_bytes=gpu.memory_bytes,
            is_half=gpu.precision(run.hardware.precision) in ("bf16", "fp16"),
            num_ranks=num_gpus,
        ),
        longest,
        max(1, longest - parts.num_image_tokens),
    )[0]


def measure_load(stage: Stage, parts: PlannedParts) -> Load | None:
    """Return how much a stage reads and computes; None if it reads files of unknown length."""
    mixtures = [find_mixture(record) for record in stage.data.records]
    if not mixtures or None in mixtures:
        return None
    known = [mixture for mixture in mixtures if mixture]
    sources = [parse_source(record) for record in stage.data.records]
    counts = count_samples(sources, [mixture.num_samples for mixture in known])
    num_samples = sum(counts)
    drawn = list(zip(known, counts, strict=True))
    num_images = num_samples - sum(m.num_text_only * count / m.num_samples for m, count in drawn)
    text = sum(m.mean_text_tokens * count for m, count in drawn) / num_samples
    mean = min(stage.max_length_tokens, text + parts.num_image_tokens * num_images / num_samples)
    num_steps = stage.max_steps or round(-(-num_samples // stage.global_batch_size) * stage.num_epochs)
    seen = min(num_steps * stage.global_batch_size, num_samples * stage.num_epochs)
    # The longest record is taken for eight times the mean; fine-tuning reaches the bound that way.
    longest = min(stage.max_length_tokens, parts.num_image_tokens + int(8 * text))
    flops = seen * count_flops(parts, stage, mean, text, num_images / num_samples)
    return Load(
        num_samples=num_samples,
        num_images=num_images,
        num_images_seen=seen * num_images / num_samples,
        num_steps=num_steps,
        mean_tokens=mean,
        longest_tokens=longest,
        flops=flops,
        recomputed_flops=seen * sum(_layer_flops(parts, mean)),
    )


def _layer_flops(parts: PlannedParts, num_tokens: float) -> tuple[float, float]:
    """Operations of the language model's layers over one sequence, forward: weights and attention."""
    language, size = parts.language, parts.language_size
    weights = 2 * (sum(size.layers) - size.idle) * num_tokens
    # Causal: half of scores and of sums.
    return weights, 2 * language.num_queries * num_tokens**2 * language.num_layers


def count_flops(
    parts: PlannedParts, stage: Stage, num_tokens: float, num_supervised: float, num_images: float = 1
) -> float:
    """Return the floating-point operations of one sample, forward and backward.

    A product of a matrix with a vector takes two for each weight. Backward takes as much again for the
    gradient of the input, and once more for that of the weights; a frozen encoder takes none.
    """
    language, encoder = parts.language, parts.encoder
    layers, attention = _layer_flops(parts, num_tokens)
    head = 2 * language.vocab_size * language.width * num_supervised
    passed = any(stage.tune(component).trains for component in COMPONENTS)
    backward = passed + (stage.language_model.kind in ("full", "from_layer"))
    total = (layers + head) * (1 + backward) + attention * (1 + 2 * passed)
    connector = 2 * parts.connector_size.total * parts.num_image_tokens * num_images
    total += connector * (1 + stage.connector.trains + stage.vision_encoder.trains)
    tokens = (parts.num_patches + encoder.num_prefix_tokens) * num_images
    vision = 2 * parts.encoder_size.total * tokens
    vision += sum(4 * e.width * e.num_kept_layers for e in encoder.members or (encoder,)) * tokens**2
    trained = count_trained(parts.encoder_size, stage.vision_encoder) / parts.encoder_size.total
    return total + vision * (1 + 2 * trained)
