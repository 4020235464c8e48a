"""Apply a stage's plan of trained parts, and keep the ledger that proves it.

Paper: sections 3.2 (theta' and phi') and 4.1.2, Figure 3.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyllava.config import COMPONENTS, Component, Stage, Tune
from tinyllava.errors import CheckpointError, ConfigError, TrainingError
from tinyllava.model.compat import decoder_layers, encoder_layers
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.quantised import QuantisedLinear, quantise, quantised_layers
from tinyllava.model.quiet import quiet_bitsandbytes_import
from tinyllava.model.token_rows import merge_added_rows, train_added_rows


def component_of(name: str) -> Component:
    """Return the component that a parameter of the model belongs to, by its name."""
    if ".vision_tower." in f".{name}":
        return "vision_encoder"
    return "connector" if ".multi_modal_projector." in f".{name}" else "language_model"


def apply_tuning(model: TinyLlavaForConditionalGeneration, stage: Stage) -> None:
    """Set which parameters require gradients; add adapters where the stage asks for LoRA.

    Where it asks for 4 or 8 bits, the linear layers below the adapters are quantised, and their weights gone.

    Raises:
        ConfigError: a plan that does not fit the component.
    """
    model.requires_grad_(False)
    for component in COMPONENTS:
        tune = stage.tune(component)
        if tune.kind == "full":
            _train_all(model, component)
        elif tune.kind == "from_layer":
            _train_from_layer(model, component, tune)
        elif tune.kind == "lora":
            _add_adapters(model, component, tune)
    if stage.language_model.trains:
        train_added_rows(model)
    model.train()


def _train_all(model: TinyLlavaForConditionalGeneration, component: Component) -> None:
    reached = reached_by_features(model) if component == "vision_encoder" else None
    for name, parameter in model.named_parameters():
        if component_of(name) == component and (reached is None or name in reached):
            parameter.requires_grad_(True)


def reached_by_features(model: TinyLlavaForConditionalGeneration) -> set[str]:
    """Return the names of the encoder's parameters that the patch features depend on.

    No other ever gets a gradient: norms and poolers after the features, DINOv2's stand-in for a masked
    patch. With several processes a parameter without one stops the run. A twin without weights is run on one
    image, and its graph followed back, so that an unfamiliar encoder needs no list of names.
    """
    with torch.device("meta"):
        twin = type(model)(model.config)
        features = twin.model.encode_images(twin.model.blank_image())
    found: set[int] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [features.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return {name for name, parameter in twin.named_parameters() if id(parameter) in found}


def _train_from_layer(model: TinyLlavaForConditionalGeneration, component: Component, tune: Tune) -> None:
    """Train only ``layers.N``, N >= first_layer; embeddings and outer norms stay frozen (ShareGPT4V)."""
    if component == "connector":
        raise ConfigError("connector: from_layer does not apply to connectors; choose full or frozen.")
    if component == "vision_encoder" and model.config.encoder_kind == "cnn":
        raise ConfigError(
            "vision_encoder: from_layer needs one transformer encoder; a CNN or two fused encoders can be "
            "full, frozen or lora."
        )
    layers = (
        encoder_layers(model.vision_encoder)
        if component == "vision_encoder"
        else decoder_layers(model.language_model)
    )
    if not 0 <= tune.first_layer < len(layers):
        raise ConfigError(
            f"{component}: from_layer {tune.first_layer} is beyond its {len(layers)} layers "
            f"(0 to {len(layers) - 1})."
        )
    for layer in layers[tune.first_layer :]:
        layer.requires_grad_(True)


def _add_adapters(model: TinyLlavaForConditionalGeneration, component: Component, tune: Tune) -> None:
    """Put adapters on the linear layers of a component, in place (peft); quantise what is below them.

    With ``tune.layers`` or ``tune.modules`` only those get adapters; in 4 or 8 bits the others are quantised
    too.
    """
    with quiet_bitsandbytes_import():
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

    if tune.rank < 1:
        raise ConfigError(f"{component}: lora needs a rank of at least 1, found {tune.rank}.")
    reached = reached_by_features(model) if component == "vision_encoder" else None
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and component_of(name) == component
        and name != "lm_head"
        and (reached is None or f"{name}.weight" in reached)
    ]
    if not targets:
        raise ConfigError(
            f"{component}: lora needs a linear layer, but this component has none; choose full or frozen."
        )
    if tune.bits < 16:
        quantise(model, targets, tune.bits)
    targets = _choose_targets(model, component, tune, targets)
    already = {n for n, p in model.named_parameters() if p.requires_grad}
    config = LoraConfig(r=tune.rank, lora_alpha=tune.alpha, lora_dropout=tune.dropout, target_modules=targets)
    inject_adapter_in_model(config, model, adapter_name=component)
    for name, module in model.named_modules():  # peft switches off those of the component before
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(component_of(name))
    for name, parameter in model.named_parameters():  # peft freezes everything else: give the others back
        parameter.requires_grad_(name in already or (f".{component}." in name and "lora_" in name))


def _choose_targets(
    model: TinyLlavaForConditionalGeneration, component: Component, tune: Tune, targets: list[str]
) -> list[str]:
    """Return those of a component's linear layers that the plan puts adapters on.

    Raises:
        ConfigError: a name that is the end of no linear layer's name, or nothing is left.
    """
    inside = set(targets)
    if tune.layers:
        layers = (
            encoder_layers(model.vision_encoder)
            if component == "vision_encoder"
            else decoder_layers(model.language_model)
        )
        chosen = {id(module) for number in tune.layers for module in layers[number].modules()}
        inside = {name for name in targets if id(model.get_submodule(name)) in chosen}
    for end in tune.modules:
        if not any(f".{name}".endswith(f".{end}") for name in inside):
            known = sorted({name.rpartition(".")[2] for name in targets})
            raise ConfigError(
                f"{component}.modules = {end!r}: no linear layer's name ends with it; known: "
                f"{', '.join(known)}."
            )
    return [
        name
        for name in targets
        if name in inside
        and (not tune.modules or any(f".{name}".endswith(f".{end}") for end in tune.modules))
    ]


def merge_adapters(model: nn.Module) -> None:
    """Fold every adapter, and rows of added tokens, into the layer below and take it out.

    A quantised layer becomes an ordinary one with the weights that the adapters were trained on.
    """
    with quiet_bitsandbytes_import():
        from peft.tuners.tuners_utils import BaseTunerLayer

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in found:
        below = module.get_base_layer()
        if isinstance(below, QuantisedLinear):
            module.base_layer = below.to_linear()
        module.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    merge_added_rows(model)


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One tensor of the model in one stage."""

    name: str
    component: Component
    shape: tuple[int, ...]
    trained: bool
    before: str
    """Digest of its bytes before the stage."""
    after: str = ""

    @property
    def moved(self) -> bool:
        """Whether the stage changed it."""
        return self.after != self.before


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """For every tensor of the model: whether it should be trained, and whether it changed."""

    rows: tuple[LedgerRow, ...]

    def num_parameters(self, component: Component | None = None, *, trained_only: bool = False) -> int:
        """Count parameters, of one component or of all."""
        return sum(
            torch.Size(row.shape).numel()
            for row in self.rows
            if component in (None, row.component) and (row.trained or not trained_only)
        )

    def unmoved(self) -> list[Component]:
        """Return the components that were to be trained and of which no tensor moved."""
        trained = {row.component for row in self.rows if row.trained}
        moved = {row.component for row in self.rows if row.moved}
        return [component for component in COMPONENTS if component in trained - moved]

    def require_movement(self) -> None:
        """Refuse a stage that changed nothing.

        Raises:
            TrainingError: no tensor moved.
        """
        if not any(row.moved for row in self.rows):
            raise TrainingError(
                "nothing was trained: no tensor of the trained parts changed in this stage. Check "
                "the learning rates in metrics.jsonl, whether the records have images, and whether fp16 "
                "skipped every step."
            )

    def save(self, path: Path) -> None:
        """Write the ledger as JSON, a row for each tensor."""
        rows = [{**asdict(row), "moved": row.moved} for row in self.rows]
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def load_trained(path: Path, model: TinyLlavaForConditionalGeneration) -> None:
    """Load tensors that a stage trained into a model with the same plan.

    Raises:
        CheckpointError: see ``check_trained``.
    """
    check_trained(path, model)
    model.load_state_dict(load_file(path), strict=False)


def check_trained(path: Path, model: TinyLlavaForConditionalGeneration) -> None:
    """Compare names and shapes in a file with the tensors that a model trains.

    Raises:
        CheckpointError: some are missing, unknown or of another shape, or the file is damaged.
    """
    delete = f"Delete {path.parent} and run the command again."
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). {delete}") from error
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if wrong:
        raise CheckpointError(
            f"{path}: does not match the stage's plan: {', '.join(wrong[:5])} ({len(wrong)} tensors). "
            f"{delete}"
        )


def weights_digest(ledger: Ledger, model: nn.Module) -> str:
    """Return a digest of all tensors that a stage begins with, and of which of them it trains."""
    held = dict(model.named_parameters())
    tensors = [(row.name, row.trained, row.before) for row in ledger.rows]
    tensors += [(n, False, tensors_digest([t])) for n, t in model.state_dict().items() if n not in held]
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()[:24]


def open_ledger(model: nn.Module) -> Ledger:
    """Record which tensors should be trained, and a digest of each.

    A quantised layer counts with the shape of its weights; the digest is of its codes and their scales.
    """
    held = quantised_layers(model)
    return Ledger(
        rows=tuple(
            LedgerRow(
                name=name,
                component=component_of(name),
                trained=p.requires_grad,
                shape=held[name].shape if name in held else tuple(p.shape),
                before=digest,
            )
            for (name, p), digest in zip(model.named_parameters(), _digests(model).values(), strict=True)
        )
    )


def close_ledger(ledger: Ledger, model: nn.Module) -> Ledger:
    """Record the hash of every tensor now.

    Raises:
        TrainingError: a frozen tensor moved.
    """
    now = _digests(model)
    closed = Ledger(rows=tuple(LedgerRow(**{**asdict(row), "after": now[row.name]}) for row in ledger.rows))
    moved = [row.name for row in closed.rows if row.moved and not row.trained]
    if moved:
        raise TrainingError(
            f"frozen tensors changed: {', '.join(moved[:5])} ({len(moved)} in all); do not use this run."
        )
    return closed


def _digests(model: nn.Module) -> dict[str, str]:
    held = quantised_layers(model)
    return {
        name: tensors_digest(held[name].stored() if name in held else [parameter])
        for name, parameter in model.named_parameters()
    }


def tensors_digest(tensors: Sequence[Tensor]) -> str:
    """Return a digest of the bytes of tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
