"""Every use of a name of transformers or torch that is private or differs between releases.

Each has a test in ``tests/test_compat.py``, which runs with the lowest, the pinned and the newest releases.
"""

from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

_FIELDS = {field.name for field in fields(BaseModelOutputWithPast)}

CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"
"""Name of the cache of keys and values in this release of transformers, as argument and as output."""


class ComposedModel(PreTrainedModel):
    """A model whose attention is all in the models that it is made of.

    The flags say that it sets no limits of its own: each part checks for itself which attention it can run.
    transformers documents them for authors of models but has no public way to set them.
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
