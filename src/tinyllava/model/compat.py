"""Every use of a name of transformers or torch that is private or differs between releases.

Each has a test in ``tests/model/test_compat.py``, which runs with the lowest, pinned and newest releases.
"""

from dataclasses import fields
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.chat_template_utils import render_jinja_template

_FIELDS = {field.name for field in fields(BaseModelOutputWithPast)}

CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"
"""Name of the cache of keys and values in this release of transformers, as argument and as output."""


class ComposedModel(PreTrainedModel):
    """A model whose attention is all in the models that it is made of.

    The flags say that it sets no limits of its own: each part checks for itself which attention it can run.
    transformers documents them for authors of models but has no public way to set them.

    Args:
        tied: of a subclass: the tensors that are one with another tensor if the config ties them, and that.
    """

    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement: ClassVar[Any] = [CACHE_NAME]

    def __init_subclass__(cls, tied: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._tied_weights_keys = tied


def attention_of(model: Any) -> str:
    """Return the name of the attention that a model of transformers computes with, such as ``sdpa``."""
    return str(model.config._attn_implementation)


def render_template(
    messages: list[dict[str, object]], template: str, **variables: object
) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat template.

    Args:
        variables: of the template, such as ``add_generation_prompt`` and ``bos_token``.

    Returns:
        The text, and the spans [start, end) of it that stand between ``{% generation %}`` and
        ``{% endgeneration %}``. The public functions of transformers return masks of tokens instead.
    """
    texts, spans = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    return texts[0], [(start, end) for start, end in spans[0]]


def forget_preparation(model: nn.Module) -> None:
    """Let accelerate prepare a model again; it skips a model that bears its mark, which it never removes.

    Without this, the Trainer of the next stage would run without autocast.
    """
    model._is_accelerate_prepared = False  # type: ignore[assignment]
