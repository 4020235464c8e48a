"""Products and attention of layers that train in bf16 on a CPU, with fewer casts and fewer bytes kept.

Paper: none. Autocast decides what is rounded to bf16, and the same is rounded here.
Differs: autocast rounds the same rows for each layer that reads them, and keeps a copy of each weight in bf16
until the backward pass has used it. Here rows are rounded once, and weights again where they are needed. Two
things are more exact: attention scores stay in fp32, as in PyTorch's own kernels, but nothing of the size
N x N is kept; and a head of few rows multiplies in fp32, which takes less time than rounding its weight.
"""

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

from tinyllava.model.linear import multiply_pairs

HALF = torch.bfloat16

FEW_ROWS = 128
"""Rows up to which a head in fp32 costs less than rounding its weight and its weight's gradient."""

LONGEST = 256
"""Positions up to which attention here is faster than PyTorch's fused kernel (benchmarks/attention.py)."""

_CHUNK = 2**18
"""Scores that are computed at a time, so that they stay in the processor's cache."""


def computes_half(rows: Tensor) -> bool:
    """Whether autocast computes a differentiated product of these rows in bf16 on a CPU."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == HALF
        and torch.is_grad_enabled()
        and rows.device.type == "cpu"
        and rows.dtype in (torch.float32, HALF)
        and rows.numel() > 0
        and not torch.compiler.is_compiling()
    )


class _Rounded:
    """The rows that were rounded last: query, key and value read the same ones, and so do gate and up."""

    def __init__(self) -> None:
        self._rows: Any = None
        self._version = 0
        self._half: Tensor | None = None

    def of(self, rows: Tensor) -> Tensor:
        """Return rows in bf16."""
        if rows.dtype == HALF:
            return rows.detach()
        if self._half is None or self._rows() is not rows or self._version != rows._version:
            self._half = rows.detach().to(HALF)
            self._rows, self._version = ref(rows, self._forget), rows._version
        return self._half

    def _forget(self, _: Any) -> None:
        self._half = None


_rounded = _Rounded()


def multiply_half(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map [..., in] to [..., out] in bf16 by a weight [out, in]."""
    outputs: Tensor = _Product.apply(rows, _rounded.of(rows), weight, bias)  # type: ignore[no-untyped-call]
    return outputs


class _Product(torch.autograd.Function):
    """y = x W^T + b."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, half: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtype, ctx.bias_dtype = rows.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(half if ctx.needs_input_grad[2] else None, weight)
        return linear(half, weight.to(HALF), None if bias is None else bias.to(HALF))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        half, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = None, None, None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                of_rows = (gradient @ weight.to(HALF)).to(ctx.dtype)
            if ctx.needs_input_grad[2]:
                of_weight = _of_weight(gradient, half).to(weight.dtype)
            if ctx.needs_input_grad[3]:
                of_bias = gradient.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return of_rows, None, of_weight, of_bias


def _of_weight(gradient: Tensor, rows: Tensor) -> Tensor:
    return gradient.flatten(0, -2).t() @ rows.flatten(0, -2)


class _Gated(torch.autograd.Function):
    """y = (silu(gate) * up) W^T, of gate and up in bf16, which are all that it keeps."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(silu(gate).mul_(up), weight.to(HALF))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        activated, of_weight = silu(gate), None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[2]:
                of_weight = _of_weight(gradient, activated * up).to(weight.dtype)
            of_inner = gradient @ weight.to(HALF)
        of_up = activated.mul_(of_inner)
        of_gate: Tensor = torch.ops.aten.silu_backward(of_inner.mul_(up), gate)
        return of_gate, of_up, of_weight


def multiply_gated(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """Map gate and up [..., in] to (silu(gate) * up) W^T [..., out] in bf16, by a weight [out, in]."""
    outputs: Tensor = _Gated.apply(gate.to(HALF), up.to(HALF), weight)  # type: ignore[no-untyped-call]
    return outputs


def attend_half(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int] | None = None
) -> Tensor:
    """Attend causally in bf16: query [B, H, N, E], key and value [B, G, N, E] -> [B, N, H, E].

    Args:
        scale: of the scores.
        lengths: of samples one after another in one row, which do not see each other; together N.
    """
    outputs: Tensor = _Attention.apply(query, key, value, scale, lengths)  # type: ignore[no-untyped-call]
    return outputs


class _Attention(torch.autograd.Function):
    """y = softmax(scale q k^T) v, in which each position sees itself and those before it.

    The H / G heads of a group stand one below the other, [G, H / G * N, E], so that each reads key and value
    of its group once. Scores and probabilities are in fp32, and computed again in the backward pass, where
    probabilities are rounded before they multiply.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int] | None
    ) -> Tensor:
        batch, heads, length, width = query.shape
        ctx.dtypes, ctx.scale = (query.dtype, key.dtype, value.dtype), scale
        ctx.places = _places(batch, heads, lengths or [length])
        rounded = [t.to(HALF, memory_format=torch.contiguous_format) for t in (query, key, value)]
        ctx.save_for_backward(*rounded)
        outputs = query.new_empty((batch, length, heads, width), dtype=HALF)
        with torch.autocast("cpu", enabled=False):
            for place in ctx.places:
                q, k, v = (_fold(t[place], key.shape[1]) for t in rounded)
                mixed = multiply_pairs(_probabilities(q, k, scale), v.float().transpose(1, 2))
                outputs.transpose(1, 2)[place].copy_(mixed.view(-1, heads, k.shape[1], width))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rounded = ctx.saved_tensors
        groups, gradient = rounded[1].shape[1], gradient.transpose(1, 2)
        found = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(rounded, ctx.dtypes, strict=True)]
        with torch.autocast("cpu", enabled=False):
            for place in ctx.places:
                q, k, v, g = (_fold(t[place], groups) for t in (*rounded, gradient))
                probabilities = _probabilities(q, k, ctx.scale)
                of_v = torch.bmm(probabilities.to(HALF).transpose(1, 2), g)
                of_scores = multiply_pairs(g.float(), v.float()).mul_(probabilities)
                of_scores.sub_(probabilities.mul_(of_scores.sum(-1, keepdim=True)))
                scaled = of_scores.mul_(ctx.scale).to(HALF)
                results = torch.bmm(scaled, k), torch.bmm(scaled.transpose(1, 2), q), of_v
                for total, result in zip(found, results, strict=True):
                    part = total[place]
                    part.copy_(result.view(part.shape))
        return *found, None, None


def _fold(heads: Tensor, groups: int) -> Tensor:
    """Lay heads [B, H, N, E] of a group one below the other: [B * G, H / G * N, E].

    oneDNN takes a hundred times as long for matrices whose rows do not follow each other.
    """
    return heads.reshape(len(heads) * groups, -1, heads.shape[-1]).contiguous()


def _places(batch: int, heads: int, lengths: Sequence[int]) -> list[tuple[slice, slice, slice]]:
    """Cut [B, H, N] at samples that follow each other in a row, and at about ``_CHUNK`` scores."""
    places, end = [], 0
    for length in lengths:
        start, end = end, end + length
        step = max(1, _CHUNK // (heads * length * length))
        places += [
            (slice(i, min(i + step, batch)), slice(None), slice(start, end)) for i in range(0, batch, step)
        ]
    return places


def _probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Causal probabilities [G, H / G * N, N] in fp32."""
    length = key.shape[1]
    scores = multiply_pairs(query.float().mul_(scale), key.float())
    hidden = torch.full((length, length), -torch.inf).triu_(1)
    scores.view(-1, length, length).add_(hidden)
    return torch.softmax(scores, -1)
