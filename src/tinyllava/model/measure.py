"""Sizes of models whose family has no record, counted on the meta device, where weights take no memory.

Paper: none; Table 1's models have closed forms (``tinyllava.planning.sizes``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tinyllava.errors import CheckpointError
from tinyllava.model.compat import decoder_layers, encoder_layers, last_layer_output
from tinyllava.model.connectors import build_connector
from tinyllava.parts.connectors import Options
from tinyllava.parts.vision import VisionEncoder


@dataclass(frozen=True, kw_only=True)
class Counted:
    """The counts of one component."""

    total: int
    layers: tuple[int, ...]
    """Parameters of each layer."""
    linears: tuple[tuple[int, int], ...]
    """(Inputs, outputs) of each linear layer that adapters are put on."""
    behind: int = 0
    """Parameters that no gradient reaches from the features."""
    idle: int = 0
    """Parameters of experts that an average token does not pass."""


@lru_cache(maxsize=16)
def measure_language_model(path: str) -> Counted:
    """Count a language model, head included, by the config.json of its folder or hub path.

    Raises:
        CheckpointError: transformers has no such family, or cannot build it.
    """
    config = _config(path)
    llm = _build(path, config, AutoModelForCausalLM)
    return Counted(
        total=_count(llm),
        layers=tuple(_count(layer) for layer in decoder_layers(llm.base_model)),
        linears=_linears(llm.base_model),
        idle=_idle(llm, config),
    )


def measure_vision_encoder(encoder: VisionEncoder) -> Counted:
    """Count an encoder, cut at its feature layer, by the config.json of its folder or hub path.

    Raises:
        CheckpointError: transformers has no such family, or cannot build it.
    """
    config = _config(encoder.path)
    config = getattr(config, "vision_config", None) or config
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    if encoder.kind == "transformer":
        config.num_hidden_layers = encoder.num_kept_layers
    tower = _build(encoder.path, config, AutoModel)
    names = unreached_parameters(tower, encoder.kind, encoder.image_size_px)
    layers = encoder_layers(tower) if encoder.kind == "transformer" else nn.ModuleList()
    return Counted(
        total=_count(tower),
        layers=tuple(_count(layer) for layer in layers),
        linears=_linears(tower),
        behind=sum(p.numel() for name, p in tower.named_parameters() if name in names),
    )


def measure_connector(
    name: str, vision_width: int, language_width: int, num_patches: int, options: Options
) -> Counted:
    """Count a connector of a user's code.

    Raises:
        ConfigError: its class cannot be built.
    """
    with torch.device("meta"):
        module = build_connector(
            name,
            vision_width=vision_width,
            language_width=language_width,
            num_patches=num_patches,
            options=options,
        )
    return Counted(total=_count(module), layers=(), linears=_linears(module))


def unreached_parameters(tower: nn.Module, kind: str, image_size_px: int) -> set[str]:
    """Return the names of an encoder's parameters that no gradient reaches from its features.

    Args:
        tower: on the meta device, where a pass forward and back takes no time.
        kind: transformer or cnn, which says what the features are.
    """
    pixels = torch.zeros(1, 3, image_size_px, image_size_px, device="meta")
    is_cnn = kind == "cnn"
    features: torch.Tensor = tower(pixels).last_hidden_state if is_cnn else last_layer_output(tower, pixels)
    features.sum().backward()
    return {name for name, parameter in tower.named_parameters() if parameter.grad is None}


def _config(path: str) -> Any:
    with _refusing(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _build(path: str, config: Any, auto_class: Any) -> Any:
    with _refusing(path), torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=False)


@contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Turn what transformers raises over a config into one error."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}/config.json: transformers cannot build a model of it ({error}); choose one of a family "
            "that it has."
        ) from error


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linears(module: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple((m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear))


def _idle(llm: nn.Module, config: Any) -> int:
    """Count what a token does not pass of a mixture of experts: those that its router does not choose."""
    num_chosen = int(getattr(config, "num_experts_per_tok", None) or 0)
    sizes = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    num_experts = next((int(size) for size in sizes if size), 0)
    if not num_chosen or not num_experts:
        return 0
    experts = sum(p.numel() for name, p in llm.named_parameters() if ".experts." in name)
    return experts - experts * num_chosen // num_experts
