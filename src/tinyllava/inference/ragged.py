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
from tinyllava.inference.lean import LeanModel
from tinyllava.model import TinyLlavaForConditionalGeneration
from tinyllava.model.compat import attention_of, set_attention

_NAME = "tinyllava_ragged"
_BLOCK = 128  # tokens by which the buffers grow
_FEW_SCORES = 2**16  # up to which attention in three operations is faster than in one


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

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """What is added to the scores [N, K]: minus infinity hides a key; None if all are seen."""
        if window is not None and window >= self.num_keys:
            window = None
        if window not in self._masks:
            num_new = self.end - self.start
            mask = None
            if num_new > 1 or window is not None:
                keys = torch.arange(self.num_keys, device=like.device)
                own = keys[self.past.length :, None]
                hidden = keys > own
                if window is not None:
                    hidden |= keys <= own - window
                mask = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            self._masks[window] = mask
        return self._masks[window]


@dataclass(frozen=True, slots=True)
class _Row:
    """The new tokens of all sequences, one after another."""

    parts: Sequence[_Part]
    asked: dict[int, dict[str, Any]]
    """How each layer attends: the settings with which ``_attend_each`` was called."""


_ROW: ContextVar[_Row | None] = ContextVar("the row that is computed", default=None)
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
    if (row := _ROW.get()) is None:
        raise RuntimeError("this model decodes many sequences together; close the ContinuousDecoder first.")
    asked = {"layer": module.layer_idx, "scaling": scaling, "window": sliding_window, "softcap": softcap}
    row.asked[module.layer_idx] = asked
    return _attend_each(query[0], key[0], value[0], parts=row.parts, **asked)[None], None


def _attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    parts: Sequence[_Part],
    layer: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend within each sequence: query [H, N, E], key and value [G, N, E] -> [N, H, E]."""
    output = []
    for part in parts:
        here = slice(part.start, part.end)
        keys, values = part.past.write(layer, (key[:, here], value[:, here]))
        mask, own = part.mask(window, query), query[:, here]
        if softcap is not None or _is_plain_faster(own, keys):
            output.append(_attend_plainly(own, keys, values, mask, scaling, softcap))
            continue
        if mask is None:  # one token: the heads that share keys are like several tokens
            own = own.reshape(len(keys), -1, own.shape[2])
        attended = scaled_dot_product_attention(
            own[None],
            keys[None],
            values[None],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=len(own) != len(keys),
        )
        output.append(attended.reshape(len(query), -1, values.shape[2]).transpose(0, 1))
    return output[0] if len(output) == 1 else torch.cat(output)


def _is_plain_faster(query: Tensor, keys: Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[0] * query.shape[1] * keys.shape[1] <= _FEW_SCORES


def _attend_plainly(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, cap: float | None
) -> Tensor:
    """Attend, all scores at once: query [H, N, E] -> [N, H, E].

    Args:
        cap: a soft limit of the scores, as Gemma 2 has it.
    """
    scale = query.shape[2] ** -0.5 if scale is None else scale
    rows = query.reshape(len(keys), -1, query.shape[2])  # the heads that share keys one after another
    scores = (rows @ keys.transpose(1, 2)).mul_(scale)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores.view(len(query), *mask.shape).add_(mask)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ values).view(query.shape).transpose(0, 1)


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
        self._asked: dict[int, dict[str, Any]] = {}
        self._lean: LeanModel | None = None
        self.token_bytes = self._probe()
        """Memory of one token's keys and values."""
        if all(asked["softcap"] is None for asked in self._asked.values()):
            self._lean = LeanModel.of(self._language_model)

    @property
    def is_lean(self) -> bool:
        """Whether the layers are computed by ``LeanModel``, not by transformers."""
        return self._lean is not None

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
        """Give the model its own attention and weights back."""
        if self._lean is not None:
            self._lean.close()
            self._lean = None
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
        rows = torch.cat([embeds for _, embeds in new])
        placed = torch.cat(positions).to(rows.device)
        ends = torch.tensor([part.end - 1 for part in parts], device=rows.device)
        if self._lean is None:
            hidden = self._compute_stock(rows, placed, ends, parts)
        else:

            def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return _attend_each(query, key, value, parts=parts, **self._asked[layer])

            hidden = self._lean.forward(rows, placed, ends, attend)
        for past, embeds in new:
            past.length += len(embeds)
        return hidden

    def _compute_stock(self, rows: Tensor, positions: Tensor, ends: Tensor, parts: Sequence[_Part]) -> Tensor:
        """Compute a row by transformers' own layers."""
        _ROW.set(_Row(parts, self._asked))
        output = self._language_model(inputs_embeds=rows[None], position_ids=positions[None], use_cache=False)
        _ROW.set(None)
        hidden: Tensor = output.last_hidden_state[0, ends]
        return hidden
