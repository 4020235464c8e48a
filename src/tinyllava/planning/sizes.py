"""Sizes of the parts: parameters, and the linear layers that can have adapters.

Paper: Table 1 and Table A1 name sizes. Here they follow from the specs, so nothing needs to be downloaded.
Families with a record (``tinyllava.parts.families``) have closed forms. Any other model is built on the meta
device and counted, which takes the seconds of importing torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from tinyllava.parts.connectors import Connector, Options
from tinyllava.parts.families import LANGUAGE_FAMILIES, VISION_FAMILIES, LanguageFamily
from tinyllava.parts.language import LanguageModel
from tinyllava.parts.vision import VisionEncoder


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """Parameters of one component, split as a stage can train them."""

    outer: int
    """Embeddings, outer norms, head: trained by ``full`` only."""
    layers: tuple[int, ...] = ()
    """Parameters of each layer."""
    behind: int = 0
    """Norms behind the features and DINOv2's mask token, which no gradient reaches: never trained."""
    idle: int = 0
    """Of the layers, what an average token does not pass: the experts that are not chosen for it."""
    adapted_widths: int = 0
    """Inputs + outputs over all linear layers: the adapters' parameters per unit of rank; 0 without one."""
    adapted_weights: int = 0
    """Inputs x outputs over the same linear layers: what 4 or 8 bits below adapters hold."""
    members: tuple["PartSize", ...] = ()
    """Of two encoders that are fused: the size of each."""

    @property
    def total(self) -> int:
        """All parameters."""
        own = self.outer + self.behind + sum(self.layers)
        return own + sum(member.total for member in self.members)


def language_model_size(language: LanguageModel) -> PartSize:
    """Return the size of a language model, head included.

    Raises:
        CheckpointError: a family without a record that transformers cannot build.
    """
    family = LANGUAGE_FAMILIES.get(language.family) if language.is_usual else None
    return _closed_form(language, family) if family else _measured_language_model(language)


def _closed_form(language: LanguageModel, family: LanguageFamily) -> PartSize:
    width, mlp = language.width, language.mlp_width
    queries, keys = language.num_queries, language.num_keys
    head_width = queries // language.num_heads
    linears = [(width, queries), (width, keys), (width, keys), (queries, width)]
    linears += [(width, mlp)] * (2 if family.gated else 1) + [(mlp, width)]
    biases = (queries + 2 * keys) * family.qkv_bias + (width + mlp + width) * family.biased
    norms = family.norms * width * family.norm_rows + 2 * head_width * family.qk_norm
    heads = 1 if language.tied else 2
    return PartSize(
        outer=heads * language.vocab_size * width
        + width * family.norm_rows
        + language.vocab_size * family.head_bias,
        layers=(sum(a * b for a, b in linears) + biases + norms,) * language.num_layers,
        **_adapted(linears * language.num_layers),
    )


def _measured_language_model(language: LanguageModel) -> PartSize:
    from tinyllava.model.measure import measure_language_model  # torch, which a family with a record spares

    counted = measure_language_model(language.path)
    return PartSize(
        outer=counted.total - sum(counted.layers),
        layers=counted.layers,
        idle=counted.idle,
        **_adapted(counted.linears),
    )


def vision_encoder_size(encoder: VisionEncoder) -> PartSize:
    """Return the size of an encoder as it is assembled: cut at its feature layer, without a pooling head.

    Raises:
        CheckpointError: see ``language_model_size``.
    """
    if encoder.members:  # without the norms behind their features
        sizes = [(member, vision_encoder_size(member)) for member in encoder.members]
        return PartSize(
            outer=0, members=tuple(replace(s, behind=s.behind - 2 * member.width) for member, s in sizes)
        )
    family = VISION_FAMILIES.get(encoder.family)
    if family is None or not encoder.is_usual:
        return _measured_vision_encoder(encoder)
    if encoder.kind == "cnn":
        blocks = [width for num_blocks, width in encoder.stages for _ in range(num_blocks)]
        behind = 2 * encoder.width if encoder.stages else 0  # ConvNeXt's norm behind its pooling
        return PartSize(
            outer=encoder.num_parameters - behind,
            behind=behind,
            **_adapted([pair for width in blocks for pair in ((width, 4 * width), (4 * width, width))]),
        )
    width, mlp = encoder.width, encoder.mlp_width
    linears = [(width, width)] * 4 + [(width, mlp), (mlp, width)]
    rows = encoder.num_positions or encoder.num_patches() + encoder.num_prefix_tokens
    patches = 3 * encoder.patch_size_px**2 * width + width * family.patch_bias
    tokens = width * encoder.num_prefix_tokens  # beside their positions
    layer = sum(a * b + b for a, b in linears) + 4 * width + 2 * width * family.has_layer_scales
    return PartSize(
        outer=patches + rows * width + tokens + 2 * width * family.num_outer_norms,
        layers=(layer,) * encoder.num_kept_layers,
        behind=2 * width + width * family.has_mask_token,
        **_adapted(linears * encoder.num_kept_layers),
    )


def _measured_vision_encoder(encoder: VisionEncoder) -> PartSize:
    from tinyllava.model.measure import measure_vision_encoder  # torch, which a family with a record spares

    counted = measure_vision_encoder(encoder)
    return PartSize(
        outer=counted.total - counted.behind - sum(counted.layers),
        layers=counted.layers,
        behind=counted.behind,
        **_adapted(counted.linears),
    )


def connector_size(
    connector: Connector, vision_width: int, language_width: int, options: Options, num_patches: int = 1
) -> PartSize:
    """Return the size of a connector with all of its options; ``num_patches`` counts for a user's own."""
    if connector.num_parameters is None or connector.linears is None:
        from tinyllava.model.measure import measure_connector

        counted = measure_connector(connector.name, vision_width, language_width, num_patches, options)
        return PartSize(outer=counted.total, **_adapted(counted.linears))
    return PartSize(
        outer=connector.num_parameters(vision_width, language_width, options),
        **_adapted(connector.linears(vision_width, language_width, options)),
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
