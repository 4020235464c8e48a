"""The properties of each architecture: one record per family of encoders and language models.

Paper: section 3.1 and Table 1 name the models; their families are transformers' ``model_type``.
A family without a record is built on the meta device and counted (``tinyllava.model.measure``). It is never
treated as another family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """How the encoders of one architecture are built and used."""

    kind: Literal["transformer", "cnn"] = "transformer"
    """transformer: the output of the feature layer; cnn: the last grid, flattened row by row."""
    num_prefix_tokens: int = 0
    """Leading outputs that are no patches (CLS, registers) and are dropped."""
    any_size: bool = False
    """Whether it takes images of any side: a CNN, or a transformer that interpolates its positions."""
    rounds_up: bool = False
    """Whether a partial cell at the border counts as one (convolutions padded as SAME) or is dropped."""
    layers: str = ""
    """Where the model keeps its list of layers; empty for a CNN, whose stages are not counted."""
    has_linears: bool = True
    """Whether there is a linear layer to put adapters on."""
    patch_bias: bool = True
    """Whether the layer that embeds patches has a bias."""
    num_outer_norms: int = 0
    """LayerNorms in front of the layers."""
    has_mask_token: bool = False
    has_layer_scales: bool = False
    """Whether each of a layer's two branches is multiplied by a trained vector."""
    mlp_values: int = 2
    """Tensors of the inner width that a layer keeps for its backward pass; approximate GELUs keep more."""
    values_per_pixel: int = 0
    """What training keeps of a CNN for each pixel of an image, as counted in one model of the family."""
    block_values: int = 0
    """Of a ConvNeXt's block, what training keeps for each cell, in widths of the block."""
    usual: Mapping[str, Any] = field(default_factory=dict)
    """Settings of config.json on which the sizes rely; with others a model is counted like an unknown one."""
    image_processor: Literal["", "clip", "siglip"] = ""
    """How images are prepared where a checkpoint lacks its preprocessor_config.json."""
    in_vllm: bool = False
    """Whether vLLM's LLaVA has it; it reads the tensors under a leading ``vision_model.``."""


_CNN_PIXELS = {"efficientnet_lite": 540, "resnet": 430}  # counted in EfficientNet-Lite2 and ResNet-50
_DINOV2 = VisionFamily(
    num_prefix_tokens=1,
    any_size=True,
    layers="encoder.layer",
    has_mask_token=True,
    has_layer_scales=True,
    usual={"use_swiglu_ffn": False, "qkv_bias": True},
)
_SIGLIP = VisionFamily(layers="encoder.layers", image_processor="siglip")

VISION_FAMILIES: dict[str, VisionFamily] = {
    "clip_vision_model": VisionFamily(
        num_prefix_tokens=1,
        layers="encoder.layers",
        patch_bias=False,
        num_outer_norms=1,
        mlp_values=4,
        image_processor="clip",
        in_vllm=True,
    ),
    "siglip_vision_model": VisionFamily(**{**vars(_SIGLIP), "in_vllm": True}),
    "siglip2_vision_model": _SIGLIP,
    "dinov2": _DINOV2,
    "dinov2_with_registers": VisionFamily(**{**vars(_DINOV2), "num_prefix_tokens": 5}),
    "efficientnet_lite": VisionFamily(
        kind="cnn",
        any_size=True,
        rounds_up=True,
        has_linears=False,
        values_per_pixel=_CNN_PIXELS["efficientnet_lite"],
    ),
    "convnext": VisionFamily(kind="cnn", any_size=True, block_values=12),
    "convnextv2": VisionFamily(kind="cnn", any_size=True, block_values=20),
    "resnet": VisionFamily(
        kind="cnn", any_size=True, rounds_up=True, has_linears=False, values_per_pixel=_CNN_PIXELS["resnet"]
    ),
    "fused_vision": VisionFamily(kind="cnn"),
}
"""By ``model_type``; ``clip``, ``siglip`` and ``siglip2`` name the folder that also holds a text half."""


@dataclass(frozen=True, kw_only=True)
class LanguageFamily:
    """How the layers of one architecture differ from Llama's, and its names in other programs."""

    gated: bool = True
    """Three matrices in the feed-forward block and SiLU, or two and an approximate GELU."""
    qkv_bias: bool = False
    biased: bool = False
    """Biases in every other linear layer too."""
    norms: int = 2
    """Norms of a layer: 1 where attention and feed-forward block read the same one."""
    norm_rows: Literal[1, 2] = 1
    """1: a weight (RMSNorm); 2: weight and bias (LayerNorm)."""
    qk_norm: bool = False
    head_bias: bool = False
    scales_embeddings: bool = False
    """Whether embeddings are multiplied by sqrt(D)."""
    layers: str = "layers"
    """Where the model without its head keeps its list of layers."""
    usual: Mapping[str, Any] = field(default_factory=dict)
    """Settings of config.json on which the sizes rely; with others a model is counted like an unknown one."""
    published_template: str = ""
    """The prompt that the published code trained the family with; empty where it has none."""
    llama_cpp: str = ""
    """What llama.cpp calls the architecture."""
    rotary_in_llama_cpp: Literal["halves", "pairs"] = "halves"
    """Which columns of a head llama.cpp rotates together. transformers rotates halves; where llama.cpp
    rotates neighbours, the rows of the query and key matrices have to be put in that order."""

    @property
    def has_llama_layers(self) -> bool:
        """Whether a layer computes what Llama's does, with or without biases and norms of each head."""
        is_plain = self.gated and self.norms == 2 and self.norm_rows == 1
        return is_plain and not self.scales_embeddings  # Gemma's norms multiply by one plus their weight


LANGUAGE_FAMILIES: dict[str, LanguageFamily] = {
    "llama": LanguageFamily(
        usual={"attention_bias": False, "mlp_bias": False},
        published_template="llama",
        llama_cpp="llama",
        rotary_in_llama_cpp="pairs",
    ),
    "mistral": LanguageFamily(llama_cpp="llama", rotary_in_llama_cpp="pairs"),
    "qwen2": LanguageFamily(qkv_bias=True, published_template="phi", llama_cpp="qwen2"),
    "qwen3": LanguageFamily(qk_norm=True, usual={"attention_bias": False}, llama_cpp="qwen3"),
    "gemma": LanguageFamily(
        scales_embeddings=True, usual={"attention_bias": False}, published_template="gemma", llama_cpp="gemma"
    ),
    "gemma2": LanguageFamily(
        norms=4, scales_embeddings=True, usual={"attention_bias": False}, llama_cpp="gemma2"
    ),
    "stablelm": LanguageFamily(
        qkv_bias=True,
        norm_rows=2,
        usual={"use_qkv_bias": True, "qk_layernorm": False, "use_parallel_residual": False},
        published_template="phi",
        llama_cpp="stablelm",
    ),
    "phi": LanguageFamily(
        gated=False,
        qkv_bias=True,
        biased=True,
        norms=1,
        norm_rows=2,
        head_bias=True,
        usual={"qk_layernorm": False},
        published_template="phi",
        llama_cpp="phi2",
    ),
}
"""By ``model_type``."""


def has_usual_settings(family: VisionFamily | LanguageFamily | None, config: Mapping[str, Any]) -> bool:
    """Whether a config's sizes follow from its family's record.

    A setting that config.json leaves out has the usual value, except StableLM's ``use_qkv_bias``: False there
    is transformers' default, and published folders name it.
    """
    if family is None:
        return False
    defaults = {**family.usual, **({"use_qkv_bias": False} if "use_qkv_bias" in family.usual else {})}
    return all(config.get(name, defaults[name]) == value for name, value in family.usual.items())
