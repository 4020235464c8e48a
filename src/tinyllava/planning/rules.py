"""The rules about one stage of a run: what it trains, sequence lengths, batch sizes.

Paper: section 3.2 (which parts a stage may train) and section 4.1.2.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from tinyllava.config import COMPONENTS, OPTIMIZERS, SCHEDULES, Component, Hardware, Stage, Tune
from tinyllava.parts.templates import template_names
from tinyllava.parts.user_code import is_reference

MIN_TEXT_TOKENS = 64
"""What question and answer need at the least beside an image: the system sentence alone is half of it."""


_SCHEDULE_NEEDS = {
    "warmup_stable_decay": ("num_decay_steps",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
}
"""Schedules that need one of these options."""


DIVIDED_OPTIMIZERS = ("adamw", "sgd", "adagrad", "rmsprop")
"""Optimizers that work on a share of a tensor; Adafactor and those of bitsandbytes look at whole ones."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a model's parts, as far as names or a checkpoint tell them."""

    num_layers: Mapping[Component, int | None]
    """Layers that a stage can count in a component; 0 if there are none to count."""
    language: str
    """Name of the language model, for messages."""
    context_tokens: int | None
    num_image_tokens: int | None
    without_linears: tuple[Component, ...] = ()
    """Components that have no layer to put adapters on."""


def literal_tokens(template: str) -> set[str]:
    """Return the end-of-turn marks that a template writes itself, such as ``<|im_end|>``."""
    return {mark for mark in re.findall(r"<\|\w+\|>", template) if "end" in mark or "eot" in mark} - {
        "<|end_header_id|>"
    }


def value_problems(stage: Stage, limits: Limits) -> Iterator[str]:
    """Numbers out of their range."""
    if not stage.data.records:
        yield "data.records: empty; name a mixture of Table 2, or LLaVA-format files."
    if stage.template and stage.template not in template_names() and not is_reference(stage.template):
        yield f"template = {stage.template!r}: unknown template; known: {', '.join(template_names())}."
    for field, low, high in (
        ("learning_rate", 0.0, 1.0),
        ("num_epochs", 0.0, 1e6),
        ("global_batch_size", 0, 1e9),
        ("max_length_tokens", 0, 1e9),
    ):
        value = getattr(stage, field)
        if not low < value <= high:
            yield f"{field} = {value}: must be above {low} and at most {high:g}."
    for field in ("weight_decay", "max_grad_norm", "max_steps"):
        value = getattr(stage, field)
        if value < 0:
            yield f"{field} = {value}: must not be negative."
    yield from _validation_problems(stage)
    if stage.schedule not in SCHEDULES:
        yield f"schedule = {stage.schedule!r}: unknown; known: {', '.join(SCHEDULES)}."
    needed = _SCHEDULE_NEEDS.get(stage.schedule, ())
    if needed and not any(name in stage.schedule_options for name in needed):
        yield f"schedule_options = {stage.schedule_options}: {stage.schedule} needs {' or '.join(needed)}."
    if stage.optimizer not in OPTIMIZERS:
        yield f"optimizer = {stage.optimizer!r}: unknown; known: {', '.join(OPTIMIZERS)}."
    if not 0 <= stage.warmup_ratio < 1:
        yield f"warmup_ratio = {stage.warmup_ratio}: must be at least 0 and below 1, such as 0.03."


def _validation_problems(stage: Stage) -> Iterator[str]:
    """Validation that cannot be, or that nothing would follow from."""
    wanted = stage.validation
    for field in ("every_steps", "num_answers", "patience"):
        if getattr(wanted, field) < 0:
            yield f"validation.{field} = {getattr(wanted, field)}: must not be negative."
    if wanted.share is not None and not 0 < wanted.share <= 0.5:
        yield f"validation.held_out = {wanted.held_out!r}: must be above 0% and at most 50%, such as 10%."
    if not wanted.held_out and (wanted.patience or wanted.result == "best" or wanted.num_answers):
        yield (
            "validation.held_out: empty, so there is no loss to stop or choose by and nothing to answer; "
            "name a record file or a share, such as 10% (--held-out 10%)."
        )
    if wanted.num_answers and stage.template:
        yield (
            f"validation.num_answers = {wanted.num_answers}: template {stage.template!r} is only for "
            "training, and the model answers with its own; set it to 0 in this stage."
        )


def length_problems(stage: Stage, limits: Limits) -> Iterator[str]:
    """Sequences longer than the language model's positions, or filled by the image alone."""
    length, context = stage.max_length_tokens, limits.context_tokens
    if context is not None and length > context:
        yield (
            f"max_length_tokens = {length}: {limits.language} has {context} positions "
            f"(published configs say 3072 with 2048 positions); set at most {context}."
        )
    if limits.num_image_tokens is not None and limits.num_image_tokens + MIN_TEXT_TOKENS > length:
        yield (
            f"max_length_tokens = {length}: one image takes {limits.num_image_tokens} tokens and the text "
            f"needs {MIN_TEXT_TOKENS} or more; raise it to {limits.num_image_tokens + MIN_TEXT_TOKENS}, "
            "or choose a connector with fewer tokens (resampler, pixel_shuffle)."
        )


def tuning_problems(stage: Stage, limits: Limits) -> Iterator[str]:
    """Check that a tuning plan fits its component."""
    if not any(stage.tune(component).trains for component in COMPONENTS):
        yield "connector: frozen like all other components; train at least one component."
    for component in COMPONENTS:
        tune, rate = stage.tune(component), getattr(stage, f"{component}_learning_rate")
        yield from (f"{component}.{problem}" for problem in _tune_problems(tune, component, limits))
        if rate is not None and not tune.trains:
            yield f"{component}_learning_rate = {rate}: the component is frozen; train it or remove the rate."
        if rate is not None and not 0 < rate <= 1:
            yield f"{component}_learning_rate = {rate}: must be above 0 and at most 1."


def _tune_problems(tune: Tune, component: Component, limits: Limits) -> Iterator[str]:
    num_layers = limits.num_layers.get(component)
    if tune.kind == "lora":
        if component in limits.without_linears:
            yield "kind = 'lora': this component has no linear layers for adapters; choose full or frozen."
        if tune.rank < 1:
            yield f"rank = {tune.rank}: lora needs a rank of at least 1, such as 128 (LLaVA-1.5's)."
        if tune.alpha < 1:
            yield f"alpha = {tune.alpha}: lora needs an alpha of at least 1; use for example twice the rank."
        if not 0 <= tune.dropout < 1:
            yield f"dropout = {tune.dropout}: must be at least 0 and below 1."
        if tune.bits != 16 and component == "connector":
            yield f"bits = {tune.bits}: a connector cannot be quantised; set bits to 16."
        yield from _layer_problems(tune, component, num_layers)
    elif tune.rank or tune.bits != 16:
        yield f"rank = {tune.rank}, bits = {tune.bits}: only valid for lora; set kind to 'lora'."
    elif tune.layers or tune.modules:
        yield f"layers = {tune.layers}, modules = {tune.modules}: only valid for lora; set kind to 'lora'."
    if tune.kind == "from_layer":
        if num_layers == 0:
            yield "kind = 'from_layer': this component has no numbered layers; choose full or frozen."
        elif num_layers and not 0 <= tune.first_layer < num_layers:
            yield f"first_layer = {tune.first_layer}: must be from 0 to {num_layers - 1}; share uses 12."
    elif tune.first_layer:
        yield f"first_layer = {tune.first_layer}: only valid for from_layer; set kind to 'from_layer'."


RULES: tuple[Callable[[Stage, Limits], Iterator[str]], ...] = (
    value_problems,
    length_problems,
    tuning_problems,
)


def _layer_problems(tune: Tune, component: Component, num_layers: int | None) -> Iterator[str]:
    """Adapters on layers that are not there."""
    if tune.layers and num_layers == 0:
        yield f"layers = {tune.layers}: this component has no numbered layers; leave it empty."
    elif num_layers is not None and (
        wrong := [number for number in tune.layers if not 0 <= number < num_layers]
    ):
        yield f"layers = {wrong}: must be from 0 to {num_layers - 1}."


def source_problems(stage: Stage, connector_is_trained: bool) -> Iterator[str]:
    """Pre-training more than the connector, and adapters on it, need a connector that was trained."""
    opened = stage.vision_encoder.trains or stage.language_model.trains
    if connector_is_trained:
        return
    if stage.template == "caption" and opened:
        yield (
            "connector: pre-training of encoder or language model needs a trained connector to start from; "
            "add the base recipe's 'pretrain' stage before it, like share, or set start_from to a checkpoint."
        )
    if not stage.connector.trains:
        yield "connector: new and frozen; train it here or in an earlier stage, or set start_from."
    if stage.connector.kind == "lora":
        yield "connector.kind = 'lora': a new connector has no trained weights to adapt; choose full."


def hardware_problems(stage: Stage, hardware: Hardware) -> Iterator[str]:
    """Settings of the machine that contradict the stage, whatever the machine."""
    if hardware.device_batch_size > stage.global_batch_size:
        yield (
            f"global_batch_size = {stage.global_batch_size}: smaller than hardware.device_batch_size = "
            f"{hardware.device_batch_size}; lower the device batch size."
        )
    bits = min(stage.tune(component).bits for component in COMPONENTS)
    if hardware.compile and bits < 16:
        yield (
            f"hardware.compile: not with weights in {bits} bits, which cannot be compiled; set "
            "hardware.compile False."
        )
    if hardware.cache_features and stage.vision_encoder.trains:
        yield "vision_encoder: trained, so its features cannot be cached; set hardware.cache_features False."
    if hardware.packing and stage.loss_norm == "micro":
        yield (
            "loss_norm = 'micro': a mean of means depends on which samples share a micro-batch; set "
            "hardware.packing False, or loss_norm global."
        )
    yield from sharding_problems(stage, hardware)


def sharding_problems(stage: Stage, hardware: Hardware) -> Iterator[str]:
    """Check the settings that sharding does not support."""
    if hardware.sharding == "none":
        return
    asked = f"hardware.sharding = {hardware.sharding!r}"
    if stage.optimizer in OPTIMIZERS and stage.optimizer not in DIVIDED_OPTIMIZERS:
        yield (
            f"optimizer = {stage.optimizer!r}: {asked} cannot shard its state; choose "
            f"{', '.join(DIVIDED_OPTIMIZERS)}, or set hardware.sharding none."
        )
    if stage.validation.num_answers:
        yield (
            f"validation.num_answers = {stage.validation.num_answers}: with {asked} no process has the whole "
            "model to answer with; set it to 0, or hardware.sharding to none."
        )


def batch_problems(stage: Stage, hardware: Hardware, num_ranks: int) -> Iterator[str]:
    """A global batch that does not divide into ranks and device batches."""
    size, per_pass = stage.global_batch_size, hardware.device_batch_size
    if size < 1 or per_pass > size:
        return
    if size % num_ranks:
        yield (
            f"global_batch_size = {size}: not divisible by {num_ranks} ranks; start a number of ranks that "
            "divides it."
        )
    elif per_pass > 0 and size % (per_pass * num_ranks):
        fits = [d for d in range(1, size // num_ranks + 1) if size // num_ranks % d == 0]
        yield (
            f"global_batch_size = {size}: not divisible by {num_ranks} rank(s) x "
            f"hardware.device_batch_size = {per_pass}; device batches that fit: {', '.join(map(str, fits))}."
        )


def bits_problems(stage: Stage) -> Iterator[str]:
    """Weights in 4 or 8 bits, and some optimizers, need a package that not every machine has."""
    package, _ = OPTIMIZERS.get(stage.optimizer, ("", 0))
    if package and find_spec(package) is None:
        yield (
            f"optimizer = {stage.optimizer!r}: needs {package}, which is not installed; run "
            "pip install 'tinyllava[quantized]', or choose adamw."
        )
    for component in COMPONENTS:
        bits = stage.tune(component).bits
        if bits != 16 and find_spec("bitsandbytes") is None:
            yield (
                f"{component}.bits = {bits}: needs bitsandbytes, which is not installed; run "
                "pip install 'tinyllava[quantized]', or set bits to 16 (recipe 'lora')."
            )
