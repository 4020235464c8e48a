"""The configuration that a checkpoint carries: the parts, the connector, and how features are taken.

Differs: extends transformers' LlavaConfig with a named connector, a head bias (Phi-2) and the number of
prefix tokens of the encoder, none of which the stock class can express.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from tinyllava.connectors import num_tokens


@strict
class TinyLlavaConfig(LlavaConfig):
    """Configuration of ``TinyLlavaForConditionalGeneration``.

    The encoder is stored cut at its feature layer (``vision_config.num_hidden_layers`` counts what is left),
    so ``vision_feature_layer`` is -1: the output of the last layer that is there.
    """

    model_type = "tinyllava"

    connector: str = "mlp"
    """Name in the table of connectors."""
    connector_options: dict[str, Any] | None = None
    """Every option of the connector."""
    num_patches: int = 576
    """M: patch features of one picture, after the prefix tokens are dropped."""
    num_prefix_tokens: int = 1
    """Leading encoder outputs to drop: 1 for CLIP's CLS, 0 for SigLIP (1 reproduces Factory's 728 tokens)."""
    encoder_kind: Literal["transformer", "cnn"] = "transformer"
    """transformer: the last layer's output; cnn: the last grid, flattened."""
    vision_width: int = 1024
    """X: width of a patch feature."""
    lm_head_bias: bool = False
    """Whether the head has a bias (Phi-2's has)."""
    vision_feature_layer: int | list[int] = -1

    @property
    def num_image_tokens(self) -> int:
        """T: tokens that one picture takes in the sequence."""
        return num_tokens(self.connector, self.num_patches, self.connector_options or {})
