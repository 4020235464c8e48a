"""The settings of a run: the model's parts, the stages of training, their data, and the hardware.

Paper: section 4.1. The values are only data. Nothing in this file builds or trains anything.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinyllava.errors import ConfigError
from tinyllava.files import parse_json

Aspect = Literal["pad", "square"]
Transparency = Literal["blend", "drop"]
Sharding = Literal["none", "gradients", "all"]
Component = Literal["vision_encoder", "connector", "language_model"]
LOSS_POSITIONS = 1024
"""Supervised positions whose logits a training step holds at one time."""
COMPONENTS: tuple[Component, ...] = ("vision_encoder", "connector", "language_model")


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Which parameters of one component a stage trains (section 3.2's theta' and phi')."""

    kind: Literal["frozen", "full", "from_layer", "lora"]
    """frozen: none; full: all; from_layer: layers first_layer.. only; lora: adapters on the linear layers."""
    first_layer: int = 0
    """First trained layer, counted from 0; embeddings and outer norms stay frozen (from_layer)."""
    rank: int = 0
    """Rank of the adapters (lora)."""
    alpha: int = 0
    """Scale of the adapters, applied as alpha / rank (lora)."""
    dropout: float = 0.0
    """Dropout before the adapters (lora)."""
    bits: Literal[4, 8, 16] = 16
    """Bits of the frozen weights below the adapters; 4 is QLoRA. Fewer than 16 need bitsandbytes."""
    layers: tuple[int, ...] = ()
    """Layers that get adapters, counted from 0; empty means all (lora)."""
    modules: tuple[str, ...] = ()
    """Linear layers that get adapters, by the end of their names, such as q_proj; empty means all (lora)."""

    @property
    def trains(self) -> bool:
        """Whether any parameter of the component is trained."""
        return self.kind != "frozen"


FROZEN = Tune(kind="frozen")
FULL = Tune(kind="full")


def from_layer(first_layer: int) -> Tune:
    """Train layers ``first_layer``, ``first_layer + 1``, ... of a component and nothing else of it."""
    return Tune(kind="from_layer", first_layer=first_layer)


def lora(
    rank: int,
    alpha: int = 0,
    dropout: float = 0.0,
    bits: Literal[4, 8, 16] = 16,
    *,
    layers: tuple[int, ...] = (),
    modules: tuple[str, ...] = (),
) -> Tune:
    """Train low-rank adapters on the linear layers of a component; ``alpha`` defaults to twice the rank.

    Args:
        layers: numbers of the layers that get adapters; empty means all.
        modules: ends of the names of the linear layers that get adapters, such as ``q_proj``; empty: all.
    """
    return Tune(
        kind="lora",
        rank=rank,
        alpha=alpha or 2 * rank,
        dropout=dropout,
        bits=bits,
        layers=layers,
        modules=modules,
    )


SCHEDULES = (
    "cosine",
    "linear",
    "constant",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
)
"""Schedules of the rate, by transformers' names; all of them warm up as ``warmup_ratio`` says."""
OPTIMIZERS: dict[str, tuple[str, float]] = {
    "adamw": ("", 8),
    "adafactor": ("", 0),
    "sgd": ("", 0),
    "adagrad": ("", 4),
    "rmsprop": ("", 4),
    "adamw_8bit": ("bitsandbytes", 2),
    "paged_adamw_8bit": ("bitsandbytes", 2),
    "paged_adamw_32bit": ("bitsandbytes", 8),
    "ademamix_8bit": ("bitsandbytes", 3),
    "lion_32bit": ("bitsandbytes", 4),
    "lion_8bit": ("bitsandbytes", 1),
}
"""Optimizers by transformers' names (adamw is its default one): the package that one needs, and the bytes
that it keeps of a trained parameter."""
Code = Literal["", "bench", "factory", "llava"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The three parts of a model (Figure 2)."""

    vision_encoder: str
    """A name from the table of vision encoders, or a local Hugging Face folder."""
    language_model: str
    """A name from the table of language models, or a local Hugging Face folder."""
    connector: str = "mlp"
    """A name from the table of connectors."""
    connector_options: dict[str, int] = field(default_factory=dict)
    """Options of the connector, such as num_queries of the resampler."""
    image_aspect: Aspect = "pad"
    """pad: centre the image on a square of the mean colour; square: the default of the image processor."""
    transparency: Transparency = "blend"
    """blend: transparent parts show the mean colour; drop: the colours stored below them, as the published
    code does."""
    image_size_px: int = 0
    """Side of the image that the encoder sees; 0 means the encoder's own."""
    template: str = ""
    """Prompt template; empty means the language model's own."""
    add_tokens: tuple[str, ...] = ()
    """Tokens that the task needs, such as <loc_0>; questions and answers may contain them, even if they were
    special tokens."""
    code: Code = ""
    """Published code (`tinyllava train --code`) to match in turns, token ids, image tokens and head; empty
    means none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The records of one stage and where their images are."""

    records: tuple[str, ...] = ()
    """Mixtures of Table 2 by name, your own files or folders, or data sets of the hub (``hf:owner/name``);
    options such as ``,repeat=2`` may follow (see the data guide)."""
    images: str = ""
    """Base folder of image paths; empty means the mixture's own, or the file's folder."""
    columns: tuple[str, ...] = ()
    """Columns of a table by kind, such as question=Frage (image, question, answer, caption, label)."""
    reader: str = ""
    """FILE.py:NAME of your own function (path, images) that yields records."""
    keep_image_places: bool = False
    """Images stay where LLaVA's records and tables have <image>; otherwise they come before the text of their
    turn, as published. In messages they always stay."""
    allow_urls: bool = False
    """Download images at http(s) addresses, once, into a cache."""
    skip: tuple[str, ...] = ()
    """Defects whose records are skipped and counted instead of stopping the run (see the data guide)."""


_LATER: dict[str, Any] = {
    "schedule": "cosine",
    "schedule_options": {},
    "optimizer": "adamw",
    "truncate": False,
}
"""Settings of a stage that came after others were on disk, and their defaults."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Held-out records that measure a stage during training, and early stopping by their loss."""

    held_out: str = ""
    """A record file, or the share of the stage's records to hold out, such as 10%; empty: no validation."""
    every_steps: int = 0
    """Optimizer steps between validations; 0 means ten per stage. The last step always has one."""
    num_answers: int = 0
    """Held-out records that are answered at each validation and shown in held-out.html."""
    patience: int = 0
    """Early stopping: the stage ends after this many validations without a lower loss; 0 means never."""
    result: Literal["last", "best"] = "last"
    """The stage's result: the weights of its last step, or those with the lowest held-out loss."""

    @property
    def share(self) -> float | None:
        """The share of the records that is held out, such as 0.1; None for a file or no validation."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", self.held_out)
        return float(found[1]) / 100 if found else None

    @property
    def decides(self) -> bool:
        """Whether the held-out loss decides which weights a stage ends with."""
        return bool(self.held_out) and (self.patience > 0 or self.result == "best")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training: what is trained, on what, how (section 3.2)."""

    data: DataConfig = field(default_factory=DataConfig)
    template: str = ""
    """Prompt template of the stage; empty means the model's. Pre-training uses 'caption'."""
    vision_encoder: Tune = FROZEN
    connector: Tune = FULL
    language_model: Tune = FROZEN
    learning_rate: float
    """Peak learning rate of every trained component without its own rate."""
    vision_encoder_learning_rate: float | None = None
    connector_learning_rate: float | None = None
    language_model_learning_rate: float | None = None
    global_batch_size: int
    """Samples per optimizer step over all ranks."""
    num_epochs: float = 1.0
    max_steps: int = 0
    """Number of optimizer steps; 0 means num_epochs."""
    schedule: str = "cosine"
    """How the rate falls after the warm-up: cosine, linear, constant, or another of ``SCHEDULES``."""
    schedule_options: dict[str, float] = field(default_factory=dict)
    """Options of the schedule, such as num_cycles of cosine_with_restarts."""
    optimizer: str = "adamw"
    """adamw, or another of ``OPTIMIZERS``, such as adamw_8bit."""
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length_tokens: int = 2048
    """Max length in tokens, with image tokens; a longer record is an error, or skipped with 'too_long'."""
    truncate: bool = False
    """A longer record ends after the last answer that fits. Such records are counted."""
    group_by: Literal["none", "length", "modality_length", "length_windows"] = "none"
    """none: steps are random, and so is the order inside a step; length: the same, sorted by length inside a
    step for less padding; modality_length: steps have only images or only text too, as in LLaVA-1.5;
    length_windows: 50 steps are sorted by length together: the least padding, steps of similar length."""
    separate_questions: bool = False
    """Train each question of a conversation as if it were asked alone: questions share the image in one row
    but do not see each other. For questions that do not refer to each other."""
    loss_norm: Literal["global", "micro"] = "global"
    """global: mean over the supervised tokens of the whole optimizer step; micro: mean of the micro-batches'
    means, as the published code of 2023 did."""
    validation: Validation = field(default_factory=Validation)

    @property
    def length(self) -> str:
        """Length of the training in words."""
        if self.max_steps:
            return f"{self.max_steps:,} steps"
        return "1 epoch" if self.num_epochs == 1 else f"{self.num_epochs:g} epochs"

    def decisive(self) -> dict[str, Any]:
        """Return the settings that change what the stage computes, by name.

        Settings that were added later are omitted at their defaults, so that older stages are still found.
        """
        values = dataclasses.asdict(self)
        for name, default in _LATER.items():
            if values[name] == default:
                del values[name]
        for component in COMPONENTS:
            for name in ("layers", "modules"):
                if not values[component][name]:
                    del values[component][name]
        if not self.validation.decides:
            del values["validation"]
        else:  # which records are held out counts by its content, and answers change nothing
            del values["validation"]["held_out"], values["validation"]["num_answers"]
        return values

    def tune(self, component: Component) -> Tune:
        """What the stage trains of one component."""
        value: Tune = getattr(self, component)
        return value

    def learning_rate_of(self, component: Component) -> float:
        """The peak learning rate of one component."""
        own: float | None = getattr(self, f"{component}_learning_rate")
        return self.learning_rate if own is None else own


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """How a run uses the machine. These settings change the result only by rounding."""

    device_batch_size: int = 0
    """Samples per forward pass and rank; 0 means the largest divisor of the rank's share of a batch that fits
    the device by the estimate of `tinyllava show` (at most 16 on a CPU and with loss_norm micro)."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 if the hardware supports it, otherwise fp32. tf32: fp32, but matrix products round their
    inputs to 10 bits behind the point, on NVIDIA GPUs since Ampere; fp32 never does."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more time. None: only where
    fewer than two samples fit the device without it."""
    sharding: Sharding = "none"
    """What is sharded over processes (FSDP2). none: every process holds everything; gradients: gradients and
    optimizer state; all: weights too."""
    packing: bool = False
    """Pack the samples of a micro-batch into one row without padding, in which none sees another. A
    micro-batch holds as many tokens as device_batch_size of the longest samples. False: padded rows."""
    compile: bool = False
    """Compile the layers of language model and encoder (torch.compile): faster steps that keep less, after a
    minute of compiling. Needs a C++ compiler, on a GPU Triton."""
    num_workers: int = 2
    """Background processes that load images."""
    check_images: bool = True
    """Decode every image of every stage once, before the first stage trains. Without it, a broken image stops
    the run when it is trained on."""
    cache_features: bool = False
    """Compute the features of a frozen encoder once per image and cache them on disk, in half precision where
    the connector sees them so."""
    save_steps: int = 0
    """Optimizer steps between checkpoints; 0 means ten per stage."""
    keep_checkpoints: int = 0
    """Number of newest checkpoints that each stage keeps when it is done, in addition to the one with the
    lowest held-out loss."""
    timeout_seconds: int = 3600
    """How long a process waits for another one, or for an image, while a stage trains; then all end."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One complete training run. It is saved with its result and can be repeated from that file."""

    name: str
    model: ModelConfig
    stages: dict[str, Stage]
    """Stages by name, in order of execution."""
    recipe: str = ""
    """Name of the recipe of the stages."""
    data_root: str = ""
    """Folder with the mixtures of Table 2 in their published layout."""
    output: str = ""
    """Run folder; empty means runs/<name>."""
    start_from: str = ""
    """Checkpoint folder to start from (weights and processor); empty means the parts' own weights."""
    seed: int = 42
    report_to: tuple[str, ...] = ()
    """Trackers of the transformers Trainer: tensorboard, wandb, mlflow, ..."""
    hardware: Hardware = field(default_factory=Hardware)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output or f"runs/{self.name}")


def to_json(value: Any) -> str:
    """Return a config dataclass as indented JSON."""
    return json.dumps(dataclasses.asdict(value), indent=2) + "\n"


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dicts with its dotted name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def run_from_json(text: str, source: str = "config") -> Run:
    """Read a saved run (the text of a run.json).

    Raises:
        ConfigError: not JSON, unknown fields, or values of the wrong type; the error lists all of them.
    """
    from pydantic import TypeAdapter, ValidationError  # a tenth of a second that --help need not pay

    try:
        raw = parse_json(text, whole_characters=True)
        _refuse_unknown_fields(raw, Run, source)
        return TypeAdapter(Run).validate_python(raw)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}: not JSON: {error}") from error
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{source}: wrong values:\n" + "\n".join(lines)) from error


def _refuse_unknown_fields(raw: Any, kind: type, where: str) -> None:
    """Raise for the first key that is no field: a misspelt setting must not be ignored."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected an object, found {type(raw).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in raw.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown field {key!r}; known: {', '.join(fields)}.")
        inner = fields[key].type
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            _refuse_unknown_fields(value, inner, f"{where}.{key}")
        elif key == "stages" and isinstance(value, Mapping):
            for name, stage in value.items():
                _refuse_unknown_fields(stage, Stage, f"{where}.stages.{name}")
