"""Closed forms of the sizes of the parts: parameters, and the linear layers that adapters are put on.

Paper: Table 1 and Table A1 name sizes; here they follow from the specs, so that nothing need be downloaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TypedDict

from tinyllava.parts.connectors import CONNECTORS, resolve_options
from tinyllava.parts.language import LanguageModel
from tinyllava.parts.vision import VisionEncoder


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """Parameters of one component, split as a stage can train them."""

    outer: int
    """Embeddings, outer norms, head: trained by ``full`` only."""
    per_layer: int = 0
    idle_per_layer: int = 0
    """Of a mixture of experts, the parameters of a layer that a token does not pass."""
    num_layers: int = 0
    behind: int = 0
    """Norms behind the features and DINOv2's mask token, which no gradient reaches: never trained."""
    adapted_widths: int = 0
    """Inputs + outputs over all linear layers: the adapters' parameters per unit of rank; 0 without one."""
    adapted_weights: int = 0
    """Inputs x outputs over the same linear layers: what 4 or 8 bits below adapters hold."""
    members: tuple["PartSize", ...] = ()
    """Of two encoders that are fused: the size of each."""

    @property
    def total(self) -> int:
        """All parameters."""
        own = self.outer + self.behind + self.per_layer * self.num_layers
        return own + sum(member.total for member in self.members)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How the layers of one architecture differ from Llama's."""

    gated: bool = True
    """Three matrices in the feed-forward block, or two."""
    qkv_bias: bool = False
    biased: bool = False
    """Biases in every other linear layer too."""
    norms: int = 2
    norm_rows: int = 1
    """1: a weight (RMSNorm); 2: weight and bias (LayerNorm)."""
    qk_norm: bool = False
    head_bias: bool = False


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm=True),
    "gemma": _Family(),
    "stablelm": _Family(qkv_bias=True, norm_rows=2),
    "phi": _Family(gated=False, qkv_bias=True, biased=True, norms=1, norm_rows=2, head_bias=True),
}


def language_model_size(language: LanguageModel) -> PartSize:
    """Return the size of a language model, head included.

    Raises:
        CheckpointError: a family without a closed form here that transformers cannot build.
    """
    if language.family not in _FAMILIES:
        return _measured(language)
    family = _FAMILIES[language.family]
    width, mlp = language.width, language.mlp_width
    head_width = language.head_width or width // language.num_heads
    queries, keys = language.num_heads * head_width, language.num_kv_heads * head_width
    linears = [(width, queries), (width, keys), (width, keys), (queries, width)]
    linears += [(width, mlp)] * (2 if family.gated else 1) + [(mlp, width)]
    biases = (queries + 2 * keys) * family.qkv_bias + (width + mlp + width) * family.biased
    norms = family.norms * width * family.norm_rows + 2 * head_width * family.qk_norm
    heads = 1 if language.tied else 2
    return PartSize(
        outer=heads * language.vocab_size * width
        + width * family.norm_rows
        + language.vocab_size * family.head_bias,
        per_layer=sum(a * b for a, b in linears) + biases + norms,
        num_layers=language.num_layers,
        **_adapted(linears * language.num_layers),
    )


def _measured(language: LanguageModel) -> PartSize:
    """Count a family that is not known here; torch is imported for nothing else in a plan."""
    size = import_module("tinyllava.model.measured").measure_language_model(Path(language.path))
    return PartSize(
        outer=size.total - size.per_layer * size.num_layers,
        per_layer=size.per_layer,
        idle_per_layer=size.idle_per_layer,
        num_layers=size.num_layers,
        **_adapted(size.linears),
    )


def vision_encoder_size(encoder: VisionEncoder) -> PartSize:
    """Return the size of an encoder as it is assembled: cut at its feature layer, without a pooling head."""
    if encoder.members:  # without the norms behind their features
        sizes = [(member, vision_encoder_size(member)) for member in encoder.members]
        return PartSize(
            outer=0, members=tuple(replace(s, behind=s.behind - 2 * member.width) for member, s in sizes)
        )
    if encoder.kind == "cnn":
        blocks = [width for num_blocks, width in encoder.stages for _ in range(num_blocks)]
        behind = 2 * encoder.width if encoder.stages else 0  # ConvNeXt's norm behind its pooling
        return PartSize(
            outer=encoder.num_parameters - behind,
            behind=behind,
            **_adapted([pair for width in blocks for pair in ((width, 4 * width), (4 * width, width))]),
        )
    width, mlp = encoder.width, encoder.mlp_width
    is_clip, is_dino = encoder.family.startswith("clip"), encoder.family.startswith("dinov2")
    linears = [(width, width)] * 4 + [(width, mlp), (mlp, width)]
    rows = encoder.num_positions or encoder.num_patches() + encoder.num_prefix_tokens
    patches = 3 * encoder.patch_size_px**2 * width + (0 if is_clip else width)
    # CLIP and DINOv2 have a CLS vector beside its position; CLIP an outer norm, DINOv2 a mask token too.
    tokens = width * encoder.num_prefix_tokens + (2 * width if is_clip else 0)
    scales = 2 * width if is_dino else 0
    return PartSize(
        outer=patches + rows * width + tokens,
        per_layer=sum(a * b + b for a, b in linears) + 4 * width + scales,
        num_layers=encoder.num_kept_layers,
        behind=2 * width + (width if is_dino else 0),
        **_adapted(linears * encoder.num_kept_layers),
    )


def connector_size(name: str, vision_width: int, language_width: int, options: dict[str, int]) -> PartSize:
    """Return the size of a connector.

    Raises:
        UnknownNameError, ConfigError: see ``resolve_options``.
    """
    resolved = resolve_options(name, options)
    connector = CONNECTORS[name]
    return PartSize(
        outer=connector.num_parameters(vision_width, language_width, resolved),
        **_adapted(connector.linears(vision_width, language_width, resolved)),
    )


class _Adapted(TypedDict):
    adapted_widths: int
    adapted_weights: int


def _adapted(linears: Sequence[tuple[int, int]]) -> _Adapted:
    """Sum up (inputs, outputs) of linear layers as adapters need them."""
    return {
        "adapted_widths": sum(a + b for a, b in linears),
        "adapted_weights": sum(a * b for a, b in linears),
    }
