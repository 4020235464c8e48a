"""One forward pass over new tokens of several sequences, each with its own keys and values.

Paper: none. The linear layers see the new tokens of all sequences as one long row. Attention is computed for
each sequence with its own past. Nothing is padded, and a sequence joins or leaves without a copy.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tinyllava.errors import ConfigError
from tinyllava.model import TinyLlavaForConditionalGeneration
from tinyllava.model.compat import attention_of, set_attention

_NAME = "tinyllava_ragged"
_BLOCK = 128  # tokens by which the buffers grow


class KeysValues:
    """Keys and values of one sequence in every layer; the first ``length`` tokens are computed.

    Args:
        room: tokens that are expected, for which the buffers are made at once.
    """

    def __init__(self, room: int = 0) -> None:
        self.length, self.room = 0, room
        self._layers: dict[int, list[Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        return sum(t.numel() * t.element_size() for layer in self._layers.values() for t in layer)

    @property
    def num_layers(self) -> int:
        """Layers that were written."""
        return len(self._layers)

    def write(self, layer: int, new: Sequence[Tensor]) -> list[Tensor]:
        """Put keys and values [G, N, E] of new tokens after the computed ones.

        Returns:
            Those of all tokens [G, length + N, E].
        """
        end = self.length + new[0].shape[1]
        held = self._layers.get(layer)
        if held is None or held[0].shape[1] < end:
            size = -(-max(end, self.room) // _BLOCK) * _BLOCK
            grown = [t.new_empty(t.shape[0], size, t.shape[2]) for t in new]
            for old, buffer in zip(held or (), grown, strict=False):
                buffer[:, : self.length] = old[:, : self.length]
            held = self._layers[layer] = grown
        for buffer, tensor in zip(held, new, strict=True):
            buffer[:, self.length : end] = tensor
        return [buffer[:, :end] for buffer in held]

    def trim(self) -> None:
        """Free the space after the computed tokens."""
        for layer, held in self._layers.items():
            if held[0].shape[1] > self.length:
                self._layers[layer] = [t[:, : self.length].clone() for t in held]

    def copy(self, length: int, room: int) -> "KeysValues":
        """Return a copy of the first tokens with room for more."""
        copied = KeysValues(room)
        for layer, held in self._layers.items():
            copied.write(layer, [t[:, :length] for t in held])
        copied.length = length
        return copied


@dataclass(frozen=True, slots=False)
class _Part:
    """New tokens [start, end) of the row, which belong to one sequence."""

    past: KeysValues
    start: int
    end: int
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    @cached_property
    def num_keys(self) -> int:
        return self.past.length + self.end - self.start

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Which keys each new token sees [N, K]; None if it sees all of them."""
        if window is not None and window >= self.num_keys:
            window = None
        if window not in self._masks:
            num_new = self.end - self.start
            mask = None
            if num_new > 1 or window is not None:
                keys = torch.arange(self.num_keys, device=device)
                own = keys[self.past.length :, None]
                mask = keys <= own
                if window is not None:
                    mask &= keys > own - window
            self._masks[window] = mask
        return self._masks[window]


_PARTS: ContextVar[Sequence[_Part]] = ContextVar("parts of the row that is computed", default=())
"""Not every architecture of transformers passes unknown arguments on to its attention."""


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attend within each sequence: query [1, H, N, E], key and value [1, G, N, E] -> [1, N, H, E]."""
    output = []
    if not (parts := _PARTS.get()):
        raise RuntimeError("this model decodes many sequences together; close the ContinuousDecoder first.")
    for part in parts:
        here = slice(part.start, part.end)
        keys, values = part.past.write(module.layer_idx, (key[0, :, here], value[0, :, here]))
        mask = part.mask(sliding_window, query.device)
        own = query[:, :, here]
        num_groups, is_single = len(keys), own.shape[2] == 1 and mask is None
        if softcap is not None:
            output.append(_attend_capped(own[0], keys, values, mask, scaling, softcap))
            continue
        if is_single:  # the heads that share keys are like several tokens that see all of them
            own = own.view(1, num_groups, -1, own.shape[3])
        attended = scaled_dot_product_attention(
            own,
            keys[None],
            values[None],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=own.shape[1] != num_groups,
        )
        output.append(attended.view(1, -1, values.shape[2]) if is_single else attended[0].transpose(0, 1))
    return torch.cat(output)[None], None


def _attend_capped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, cap: float
) -> Tensor:
    """Attend with scores below a soft limit, as Gemma 2 does: query [H, N, E] -> [N, H, E]."""
    num_repeats = len(query) // len(keys)
    keys, values = (t.repeat_interleave(num_repeats, 0) for t in (keys, values))
    scores = query @ keys.transpose(1, 2) * (query.shape[2] ** -0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(-1).to(query.dtype)
    return (weights @ values).transpose(0, 1)


AttentionInterface.register(_NAME, _attend)


class RaggedModel:
    """The language model of a model, with this attention until it is closed.

    Raises:
        ConfigError: an architecture that keeps more than keys and values, or keeps them otherwise.
    """

    def __init__(self, model: TinyLlavaForConditionalGeneration) -> None:
        self.model = model
        self._language_model: Any = model.language_model
        self._before = attention_of(self._language_model)
        set_attention(self._language_model, _NAME)
        self.token_bytes = self._probe()
        """Memory of one token's keys and values."""

    def _probe(self) -> int:
        weight = self.model.get_input_embeddings().weight
        tried = KeysValues()
        with torch.inference_mode():
            self.forward([(tried, weight[:1])])
        config = self.model.config.text_config
        if tried.num_layers != config.num_hidden_layers:
            self.close()
            raise ConfigError(
                f"language model {config.model_type!r}: only {tried.num_layers} of "
                f"{config.num_hidden_layers} layers use plain key-value attention; a server can batch only "
                "models in which all layers do. Answer with `tinyllava chat` or `Chat` instead."
            )
        return tried.num_bytes // _BLOCK

    def close(self) -> None:
        """Give the model its own attention back."""
        set_attention(self._language_model, self._before)

    def forward(self, new: Sequence[tuple[KeysValues, Tensor]]) -> Tensor:
        """Compute new tokens, embedded [N, D], of some sequences.

        Returns:
            The hidden state [S, D] of the last token of each sequence.
        """
        parts, at, positions = [], 0, []
        for past, embeds in new:
            parts.append(_Part(past, at, at + len(embeds)))
            positions.append(torch.arange(past.length, past.length + len(embeds)))
            at += len(embeds)
        device = new[0][1].device
        _PARTS.set(parts)
        output = self._language_model(
            inputs_embeds=torch.cat([embeds for _, embeds in new])[None],
            position_ids=torch.cat(positions).to(device)[None],
            use_cache=False,
        )
        _PARTS.set(())
        for past, embeds in new:
            past.length += len(embeds)
        ends = torch.tensor([part.end - 1 for part in parts], device=device)
        hidden: Tensor = output.last_hidden_state[0, ends]
        return hidden
