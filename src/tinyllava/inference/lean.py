"""The layers of Llama and of its kin for a few new tokens: the same numbers from fewer, larger operations.

Paper: none. Differs: transformers computes each layer by several modules, which serve training, caches and
attention of every kind. For one token they take a quarter of the pass. Only the last token of each sequence
goes through the last feed-forward block, because no other hidden state is used.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from tinyllava.model.compat import decoder_layers
from tinyllava.model.linear import multiply_together, pack_apart, pack_together
from tinyllava.parts.families import LANGUAGE_FAMILIES

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Maps the number of a layer, query [H, N, E], key and value [G, N, E] to [N, H, E]."""


class LeanModel:
    """A language model of transformers, without its embedding and its head."""

    def __init__(self, language_model: Any) -> None:
        self._rotary, self._norm = language_model.rotary_emb, language_model.norm
        self._layers = [_Layer(layer) for layer in decoder_layers(language_model)]
        for layer in self._layers:
            pack_together(layer.inputs)
            pack_together(layer.gated)

    def close(self) -> None:
        """Give the layers their own weights back."""
        for layer in self._layers:
            pack_apart(layer.inputs)
            pack_apart(layer.gated)

    @classmethod
    def of(cls, language_model: Any) -> Self | None:
        """Return the lean form of a language model; None if its layers are not of Llama's kind."""
        family = LANGUAGE_FAMILIES.get(language_model.config.model_type)
        if family is None or not family.has_llama_layers:
            return None
        is_known = all(
            _names(layer) == _LAYER
            and _names(layer.self_attn) - {"q_norm", "k_norm"} == _ATTENTION
            and _names(layer.mlp) == _FEED_FORWARD
            for layer in decoder_layers(language_model)
        )
        return cls(language_model) if is_known else None

    def forward(self, rows: Tensor, positions: Tensor, ends: Tensor, attend: Attend) -> Tensor:
        """Compute new tokens, embedded [N, D], at their positions [N] in their sequences.

        Args:
            ends: the rows [S] whose hidden states [S, D] are returned.
            attend: within each sequence, with its own past.
        """
        cosine, sine = (found[0, :, None] for found in self._rotary(rows, positions[None]))
        half = sine.shape[-1] // 2
        sine = torch.cat((-sine[..., :half], sine[..., half:]), -1)  # see _rotate
        last = self._layers[-1]
        for layer in self._layers:
            rows = layer.forward(rows, cosine, sine, attend, ends if layer is last else None)
        return _normalise(self._norm, rows)


def _names(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, block = layer.self_attn, layer.mlp
        self.number: int = attention.layer_idx
        self.width: int = attention.head_dim
        settings = attention.config
        self.num_heads = (settings.num_attention_heads, settings.num_key_value_heads)
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        self.output = attention.o_proj
        self.gated = (block.gate_proj, block.up_proj)
        self.activate, self.down = block.act_fn, block.down_proj

    def forward(
        self, rows: Tensor, cosine: Tensor, sine: Tensor, attend: Attend, ends: Tensor | None
    ) -> Tensor:
        """Map [N, D] to [N, D]; to the rows of ``ends`` alone if they are given."""
        normed = _normalise(self.norms[0], rows)
        heads = multiply_together(self.inputs, normed).unflatten(-1, (-1, self.width))
        num_queries, num_keys = self.num_heads
        rotated, value = heads[:, : num_queries + num_keys], heads[:, num_queries + num_keys :]
        if self.head_norms:
            query_norm, key_norm = self.head_norms
            rotated = torch.cat((query_norm(rotated[:, :num_queries]), key_norm(rotated[:, num_queries:])), 1)
        rotated = _rotate(rotated, cosine, sine).transpose(0, 1)
        attended = attend(self.number, rotated[:num_queries], rotated[num_queries:], value.transpose(0, 1))
        attended = attended.flatten(-2)
        if ends is not None:
            rows, attended = rows[ends], attended[ends]
        rows = rows + self.output(attended)
        normed = _normalise(self.norms[1], rows)
        gate, up = multiply_together(self.gated, normed).chunk(2, -1)
        output: Tensor = rows + self.down(self.activate(gate) * up)
        return output


def _normalise(norm: Any, rows: Tensor) -> Tensor:
    """Compute an RMS norm; in half precision by its own module, which rounds between two steps."""
    if rows.dtype == torch.float32:
        return rms_norm(rows, norm.weight.shape, norm.weight, norm.variance_epsilon)
    normed: Tensor = norm(rows)
    return normed


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate [N, H, E] by the positions: halves (a, b) become (a cos - b sin, b cos + a sin)."""
    exchanged = heads.roll(heads.shape[-1] // 2, -1)
    return (heads * cosine).add_(exchanged.mul_(sine))
