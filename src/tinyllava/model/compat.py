"""Access to private or changing details of transformers and torch, such as the place of layers in a class.

Each has a test in ``tests/model/test_compat.py``, which runs with the lowest, pinned and newest releases.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from importlib import import_module
from itertools import accumulate, pairwise
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, destroy_process_group, is_initialized, new_group
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.chat_template_utils import render_jinja_template

from tinyllava.parts.families import LANGUAGE_FAMILIES, VISION_FAMILIES

_FIELDS = {field.name for field in fields(BaseModelOutputWithPast)}

CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"
"""Name of the cache of keys and values in this release of transformers, as argument and as output."""


class ComposedModel(PreTrainedModel):
    """A model whose attention is only in its submodels.

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


CAUSAL = "tinyllava_causal"
"""Attention of training: ``sdpa`` without looking at the batch for a mask, for which the host would wait."""


def packed_mask(lengths: Sequence[int]) -> Tensor:
    """Return the mask for a row that holds samples of these lengths one after another.

    Every architecture hands a mask of four dimensions to its attention as it is, also where layers are
    computed again in the backward pass; not every one hands on other arguments. It stays on the host, which
    would wait for a device: [1, 1, 1, S + 1], where each sample begins, and where the last ends.
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).view(1, 1, 1, -1)


def _causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend causally: as a mask [B, 1, N, N] says that was made beforehand, or within ``packed_mask``."""
    inputs = (query, key, value)
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return _attend(module, inputs, attention_mask, kwargs), None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    if _has_packed_kernel(query, dtype) and not kwargs.get("dropout"):
        return _attend_packed([t.to(dtype) for t in inputs], attention_mask, kwargs.get("scaling")), None
    return _attend_each(module, inputs, attention_mask, kwargs), None


@torch.compiler.disable(reason="lengths differ in each row")  # type: ignore[untyped-decorator]
def _attend_each(
    module: nn.Module, inputs: Sequence[Tensor], attention_mask: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    lengths = [end - start for start, end in pairwise(attention_mask.tolist()[0][0][0])]
    output = _attend_by_kernel(module, inputs, lengths, kwargs)
    if output is not None:
        return output
    samples = zip(*(t.split(lengths, dim=2) for t in inputs), strict=True)
    return torch.cat([_attend(module, sample, None, kwargs) for sample in samples], dim=1)


def _attend(
    module: nn.Module, inputs: Sequence[Tensor], mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """Attend by the module's own kernel, if it has one that takes the inputs, or as ``sdpa`` does."""
    attend: Any = AttentionInterface()["sdpa"]
    output = None if mask is not None else _attend_by_kernel(module, inputs, None, kwargs)
    return attend(module, *inputs, mask, **kwargs)[0] if output is None else output


def _attend_by_kernel(
    module: nn.Module, inputs: Sequence[Tensor], lengths: Sequence[int] | None, kwargs: dict[str, Any]
) -> Tensor | None:
    kernel: CausalKernel | None = getattr(module, _KERNEL, None)
    is_causal = kwargs.get("is_causal") is not False and not kwargs.get("dropout")
    if kernel is None or not is_causal or any(kwargs.get(name) is not None for name in _OTHER_KINDS):
        return None
    query, key, value = inputs
    return kernel(query, key, value, kwargs.get("scaling"), lengths)


CausalKernel = Callable[[Tensor, Tensor, Tensor, float | None, Sequence[int] | None], Tensor | None]
"""Of query [B, H, N, E], key, value [B, G, N, E], scale, lengths of packed samples: [B, N, H, E] or None."""

_KERNEL = "_tinyllava_kernel"
_OTHER_KINDS = ("softcap", "position_bias", "cache", "sliding_window", "s_aux")


def give_kernel(language_model: nn.Module, kernel: CausalKernel) -> Callable[[], None]:
    """Let layers attend by a kernel in ``causal_without_looking`` if it takes their inputs; return the undo.

    Layers with dropout or with a mask of their own attend as ever.
    """
    layers = [m for m in language_model.modules() if getattr(m, "is_causal", False) is True]
    for layer in layers:
        setattr(layer, _KERNEL, kernel)

    def undo() -> None:
        for layer in layers:
            delattr(layer, _KERNEL)

    return undo


def _has_packed_kernel(query: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch attends within several samples in one kernel here: FlashAttention's, in half precision.

    Elsewhere each sample is a call of its own, which a CPU does not notice.
    """
    if not query.is_cuda or dtype not in (torch.float16, torch.bfloat16):
        return False
    width = query.shape[-1]
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


@torch.compiler.disable(reason="lengths differ in each row")  # type: ignore[untyped-decorator]
def _attend_packed(inputs: Sequence[Tensor], mask: Tensor, scale: float | None) -> Tensor:
    """Attend causally within samples: query, key and value [1, H or G, N, E] -> [1, N, H, E]."""
    query, key, value = (t[0].transpose(0, 1) for t in inputs)
    longest = int(mask.diff().max())  # a tensor of the host: nothing is waited for
    offsets = mask.flatten().to(query.device, non_blocking=True)
    output = varlen_attn(
        query,
        key,
        value,
        offsets,
        offsets,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(CAUSAL, _causal_attention)


@contextmanager
def causal_without_looking(language_model: PreTrainedModel) -> Iterator[None]:
    """Let a language model attend causally whatever a batch holds; padding must be on the right.

    transformers makes no mask for an attention that it has none for. Otherwise it looks whether the positions
    are those of several sequences in a row. A model with windows of attention needs its masks and keeps them.
    """
    config: Any = language_model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_windows = kinds != {"full_attention"} or getattr(config, "sliding_window", None)
    if attention_of(language_model) != "sdpa" or has_windows:
        yield
        return
    language_model.set_attn_implementation(CAUSAL)
    try:
        yield
    finally:
        language_model.set_attn_implementation("sdpa")


def set_attention(model: Any, name: str) -> None:
    """Let a model of transformers compute with another attention, such as ``sdpa``."""
    model.set_attn_implementation(name)


def set_checkpointing(model: Any, is_on: bool) -> None:
    """Recompute a model's activations in the backward pass, or keep them; newer releases say activation."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if is_on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


@contextmanager
def looking_at_padding(language_model: PreTrainedModel) -> Iterator[None]:
    """Within ``causal_without_looking``: attend as a mask says, for prompts with padding on the left."""
    if attention_of(language_model) != CAUSAL:
        yield
        return
    language_model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        language_model.set_attn_implementation(CAUSAL)


def render_template(
    messages: list[dict[str, object]], template: str, **variables: object
) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat template.

    Args:
        variables: of the template, such as ``add_generation_prompt`` and ``bos_token``.

    Returns:
        The text, and the spans [start, end) of it that are between ``{% generation %}`` and
        ``{% endgeneration %}``. The public functions of transformers return masks of tokens instead.
    """
    texts, spans = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    return texts[0], [(start, end) for start, end in spans[0]]


def forget_preparation(model: nn.Module) -> None:
    """Let accelerate prepare a model again; it skips a model that has its mark, which it never removes.

    Without this, the Trainer of the next stage would run without autocast.
    """
    model._is_accelerate_prepared = False  # type: ignore[assignment]


@contextmanager
def lonely_group() -> Iterator[ProcessGroup]:
    """Make a group of all processes in which none waits for another; all enter and leave it together.

    Its collective calls take the memory of real ones and return at once, with meaningless values. PyTorch has
    it for its own tests.
    """
    import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
    group = new_group(backend="fake")
    try:
        yield group
    finally:
        destroy_process_group(group)


@contextmanager
def waiting_at_most(limit: timedelta, otherwise: timedelta) -> Iterator[None]:
    """Raise RuntimeError in a process that waits longer than the limit for another one in a collective call.

    Args:
        limit: within this context.
        otherwise: afterwards.
    """
    if not is_initialized():
        yield
        return
    _set_pg_timeout(limit)
    try:
        yield
    finally:
        _set_pg_timeout(otherwise)


def encoder_layers(vision_tower: nn.Module) -> nn.ModuleList:
    """Return the layers of a transformer encoder."""
    family = VISION_FAMILIES.get(_model_type(vision_tower))
    return _layers(vision_tower, family.layers if family else "")


def decoder_layers(language_model: nn.Module) -> nn.ModuleList:
    """Return the layers of a language model without its head."""
    family = LANGUAGE_FAMILIES.get(_model_type(language_model))
    return _layers(language_model, family.layers if family else "")


_AROUND_LAYERS = ("transformers.modeling_layers", "transformers.utils.deprecation")


def own_forward(layer: nn.Module) -> Callable[..., Any]:
    """Return a layer's forward pass without the functions that recompute activations or rename arguments.

    transformers puts such around the layers of all architectures. What is compiled is kept by function, so
    all of them would share one limit. transformers itself calls its layers by the new names.
    """
    forward = type(layer).forward
    while hasattr(forward, "__wrapped__") and forward.__globals__["__name__"] in _AROUND_LAYERS:
        forward = forward.__wrapped__
    return MethodType(forward, layer)


def _model_type(model: nn.Module) -> str:
    config: Any = model.config
    return str(config.model_type)


def _layers(model: nn.Module, place: str) -> nn.ModuleList:
    """Return the list at the place that the family's record names, or the first one of the right length."""
    config: Any = model.config
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and (not place or f".{name}".endswith(f".{place}"))
    ]
    assert found, f"{type(model).__name__} has no list of {config.num_hidden_layers} layers"
    return found[0]


def last_layer_output(vision_tower: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return the output of the last layer, before the norm that some encoders apply after it.

    ``output_hidden_states=True`` would give the same and keep every other layer's output in memory too.
    """
    caught: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = encoder_layers(vision_tower)[-1].register_forward_hook(keep)
    try:
        vision_tower(pixel_values)
    finally:
        handle.remove()
    return caught[0]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's table of the parameters that are its own, by name; changes to it count."""
    return module._parameters


def lay_out_weight(weight: Tensor) -> Tensor:
    """Return a weight [out, in] in the layout of oneDNN's kernels; ``to_dense`` gives it back.

    The layout depends on the expected number of rows a little: 32 is good from 1 to 600.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    return packed


_HUGE_PAGE_BYTES = 2**21
_MADV_COLLAPSE = 25  # Linux 6.1


def hold_in_huge_pages(weights: Iterable[Tensor]) -> None:
    """Move weights on a CPU, laid out or not, into pages of 2 MiB where the system can; values stay.

    A pass over one token reads each weight once, and with pages of 4 KiB it waits for their addresses.
    PyTorch asks for large pages only if an environment variable is set before it starts.
    """
    if sys.platform != "linux":
        return
    advise: Any = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for weight in weights:
        ops = torch.ops.mkldnn
        start = ops.data_ptr(weight) if weight.is_mkldnn else weight.data_ptr()
        end = start + (ops._nbytes(weight) if weight.is_mkldnn else weight.nbytes)
        begin = start // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        # Refused where a page lies in a file or in another mapping: it then stays as it is.
        for address in range(begin, end, _HUGE_PAGE_BYTES):
            advise(address, _HUGE_PAGE_BYTES, _MADV_COLLAPSE)


def multiply_by_onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map [..., in] to [..., out] by a weight [out, in], laid out or not, without a backward pass.

    ``weight`` and ``inputs`` may be transposed views.
    """
    outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return outputs
