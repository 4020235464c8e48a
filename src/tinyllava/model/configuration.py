"""The configuration in a checkpoint: the parts, the connector, and how features are taken.

Differs: has the fields of transformers' LlavaConfig under the same names, and also a named connector, a head
bias (Phi-2) and the encoder's number of prefix tokens, which that class cannot express.
"""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from tinyllava.parts.connectors import find_connector, num_tokens

# The default values of a part are not written into config.json, so they have to be known.
_DEFAULT_PARTS = {"vision_config": "clip_vision_model", "text_config": "llama"}


@strict
class TinyLlavaConfig(PreTrainedConfig):
    """Configuration of ``TinyLlavaForConditionalGeneration``.

    The encoder is stored cut at its feature layer (``vision_config.num_hidden_layers`` counts what is left),
    so ``vision_feature_layer`` is -1: the output of the last layer that is there.
    """

    model_type: ClassVar[str] = "tinyllava"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None
    """Config of the encoder, or its values with their ``model_type``; CLIP's by default."""
    text_config: Any = None
    """Config of the language model, or its values with their ``model_type``; Llama's by default."""
    image_token_index: int = 32000
    """Id of ``<image>``."""
    image_seq_length: int = 576
    """T, as transformers' LLaVA names it."""
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    vision_feature_layer: int | list[int] = -1
    tie_word_embeddings: bool = False
    """Whether the head is the table of token embeddings; always so if ``text_config`` says it."""

    connector: str = "mlp"
    """Name in the table of connectors."""
    connector_options: dict[str, Any] | None = None
    """Every option of the connector."""
    num_patches: int = 576
    """M: patch features of one image, after the prefix tokens are dropped."""
    num_prefix_tokens: int = 1
    """Leading encoder outputs to drop: 1 for CLIP's CLS, 0 for SigLIP (1 reproduces Factory's 728 tokens)."""
    encoder_kind: Literal["transformer", "cnn"] = "transformer"
    """transformer: the last layer's output; cnn: the last grid, flattened."""
    vision_width: int = 1024
    """X: width of a patch feature."""
    num_language_rows: int = 0
    """Rows of embedding and head that the language model came with; those behind make room for ``<image>``,
    and the loss leaves them out of the softmax. 0 means all."""
    image_scale: float = 1.0
    """Factor of image tokens in front of the language model: sqrt(D) for a Gemma of the published code, which
    multiplied them as it does the embeddings of text."""
    leaves_out_image: bool = False
    """Whether the loss leaves ``<image>`` out of the softmax though rows of added tokens are behind it."""
    added_token_ids: list[int] | None = None
    """Ids of tokens that were added for a task, ascending; their rows are trained beside adapters too."""
    lm_head_bias: bool = False
    """Whether the head has a bias (Phi-2's has)."""

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            values = getattr(self, name) or {}
            if isinstance(values, dict):
                values = {"model_type": _DEFAULT_PARTS[name], **values}
                setattr(self, name, AutoConfig.for_model(**values))
        self.tie_word_embeddings |= bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the content of ``config.json``: the parts with their names, without default values."""
        values: dict[str, Any] = super().to_diff_dict()
        for name in self.sub_configs:
            config = getattr(self, name)
            part = {**config.to_diff_dict(), "_name_or_path": config.name_or_path}
            values[name] = {k: v for k, v in part.items() if k != "transformers_version" and v != ""}
        return values

    @property
    def num_image_tokens(self) -> int:
        """T: tokens that one image takes in the sequence."""
        return num_tokens(find_connector(self.connector), self.num_patches, self.connector_options or {})
