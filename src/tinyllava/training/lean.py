"""Layers that keep less for the backward pass on a CPU: norms, gated layers and tied embeddings.

Paper: none. Losses and gradients are equal up to rounding.

A norm of a language model keeps its input and the scale of each row; PyTorch would keep the normalised input
and read it five times. A gated layer keeps gate and up; PyTorch would keep the activated gate and the product
too. What is not kept takes one pass over numbers that are read anyway. The gradient of an embedding that the
head shares is added to the head's, row by row; PyTorch would make a second one, of zeros but for a few rows.
In bf16, linear layers and attention keep less too: see ``half``.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, linear, rms_norm, silu
from transformers import PreTrainedModel

from tinyllava.model.compat import give_kernel
from tinyllava.model.devices import best_device, multiplies_bf16
from tinyllava.model.linear import DirectLinear, multiply_directly, product
from tinyllava.model.quiet import keeping_random_state
from tinyllava.training.half import (
    FEW_ROWS,
    LONGEST,
    attend_half,
    computes_half,
    multiply_gated,
    multiply_half,
)

_EXAMPLES = 4
"""Rows that tell whether a layer computes what is known here."""


def make_lean(model: nn.Module, precision: str) -> Callable[[], None]:
    """Let the layers of a model that trains compute as described here; return the undo.

    The choice depends on the machine, the layers and their inputs' sizes alone, so that a training that is
    resumed has the same bits. fp16, CPUs that do not multiply bf16, other devices and compiled layers compute
    as ever.

    Args:
        precision: what the stage computes in, such as bf16.
    """
    found: list[Any] = []
    is_half = precision == "bf16" and best_device() == "cpu" and multiplies_bf16("cpu")
    ties = {id(m.weight): _Tie() for m in model.modules() if type(m) is nn.Embedding}
    if (
        is_half
        and isinstance(model, PreTrainedModel)
        and isinstance(model.get_output_embeddings(), nn.Linear)
    ):
        ties.setdefault(id(model.get_output_embeddings().weight), _Tie())
    linears = {id(m.weight) for m in model.modules() if type(m) is nn.Linear}
    for module in model.modules():
        forward: Callable[[Any, bool, Tensor], Tensor] | None = None
        if _is_rms_norm(module):
            forward = _normalise
        elif _is_gated(module):
            forward = _feed_forward
        elif type(module) is nn.Embedding and id(module.weight) in linears:
            forward = ties[id(module.weight)].embed
        elif type(module) is nn.Linear and id(module.weight) in ties:
            forward = ties[id(module.weight)].multiply
        elif type(module) is nn.Linear and is_half:
            forward = _multiply
        if forward is not None:
            found.append(module)
            found[-1].forward = partial(forward, module, is_half)
    undo_others = [multiply_directly(model)]
    if is_half:
        undo_others.append(give_kernel(model, _attend))

    def undo() -> None:
        for give_back in undo_others:
            give_back()
        for module in found:
            del module.forward

    return undo


def _is_exact(*tensors: Tensor) -> bool:
    """Whether plain fp32 is computed on a CPU, in which the functions below differentiate."""
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and tensors[0].numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _computes(module: nn.Module, width: int, formula: Callable[[Tensor], Tensor]) -> bool:
    """Whether a module maps rows [N, width] as a formula does, and takes nothing else; a trial tells.

    Each architecture has classes of its own. They may have the same parts and multiply, drop or gate besides.
    """
    if len(signature(type(module).forward).parameters) != 2:  # itself and the rows
        return False
    rows = torch.linspace(-2, 3, _EXAMPLES * width).view(_EXAMPLES, width)
    was_training = module.training
    with torch.no_grad(), keeping_random_state():
        found = module.train()(rows)
        module.train(was_training)
        return bool(torch.allclose(found, formula(rows), 1e-4, 1e-6))


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is ``rms_norm`` with its weight."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float) or not _is_exact(weight):
        return False
    if weight.ndim != 1 or len(list(module.parameters())) > 1:
        return False
    return _computes(module, len(weight), lambda rows: rms_norm(rows, weight.shape, weight, epsilon))


def _normalise(module: Any, is_half: bool, rows: Tensor) -> Tensor:
    outputs: Tensor
    is_autocast = is_half and computes_half(rows) and rows.dtype == module.weight.dtype == torch.float32
    if not is_autocast and not _is_exact(rows, module.weight):
        return _as_ever(module, rows)
    kind = _NormOfHalf if is_autocast else _Norm
    outputs = kind.apply(rows, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return outputs


class _Norm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + epsilon) over the last dimension."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scales = norms.square_().div_(rows.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(rows, weight, scales)
        return (rows * scales).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scales = ctx.saved_tensors
        normalised = rows * scales
        of_weight = (gradient * normalised).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        scaled = gradient * weight
        along = torch.linalg.vecdot(scaled, normalised).unsqueeze(-1).div_(-rows.shape[-1])
        return scaled.addcmul_(normalised, along).mul_(scales), of_weight, None


class _NormOfHalf(_Norm):
    """The same by fewer passes, where no bits of earlier runs in fp32 are to be kept."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scales = ctx.saved_tensors
        normalised, of_rows, of_weight = rows * scales, None, None
        with torch.autocast("cpu", enabled=False):
            along = (gradient * normalised).flatten(0, -2)
            if ctx.needs_input_grad[1]:
                of_weight = along.sum(0)
            if ctx.needs_input_grad[0]:
                means = torch.mv(along, weight).view_as(scales).mul_(scales).div_(-rows.shape[-1])
                of_rows = (gradient * weight).mul_(scales).addcmul_(normalised, means)
        return of_rows, of_weight, None


def _is_gated(module: nn.Module) -> bool:
    """Whether a module computes down(silu(gate(x)) * up(x)) by linear layers without a bias behind."""
    parts: dict[str, Any] = dict(module.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    gate, up, down = parts["gate_proj"], parts["up_proj"], parts["down_proj"]
    is_plain = bool(type(down) is nn.Linear and down.bias is None) and _is_exact(down.weight)
    return is_plain and _computes(module, down.out_features, lambda rows: down(silu(gate(rows)) * up(rows)))


def _feed_forward(module: Any, is_half: bool, rows: Tensor) -> Tensor:
    weight = module.down_proj.weight
    outputs: Tensor
    if is_half and computes_half(rows):
        return multiply_gated(module.gate_proj(rows), module.up_proj(rows), weight)
    if not _is_exact(rows, weight) or not torch.is_grad_enabled():
        return _as_ever(module, rows)
    gate, up = module.gate_proj(rows), module.up_proj(rows)
    is_direct = isinstance(module.down_proj, DirectLinear)
    outputs = _GatedProduct.apply(gate, up, weight, is_direct)  # type: ignore[no-untyped-call]
    return outputs


def _multiply(module: Any, is_half: bool, rows: Tensor) -> Tensor:
    if is_half and computes_half(rows):
        return multiply_half(rows, module.weight, module.bias)
    return _as_ever(module, rows)


def _as_ever(module: Any, rows: Tensor) -> Tensor:
    outputs: Tensor = type(module).forward(module, rows)
    return outputs


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, lengths: Sequence[int] | None
) -> Tensor | None:
    """Attend in bf16 where autocast does, and otherwise leave it to PyTorch."""
    longest = max(lengths) if lengths else key.shape[2]
    is_known = value.shape == key.shape and query.shape[1] % key.shape[1] == 0
    if not computes_half(query) or not is_known or query.shape[2] != key.shape[2] or longest > LONGEST:
        return None
    return attend_half(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, lengths)


class _Tie:
    """An embedding and the head that shares its weight: one gradient for both.

    The embedding's gradient is sparse. PyTorch would copy the head's to add the two.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Tie":
        return _Tie()

    def embed(self, module: Any, is_half: bool, ids: Tensor) -> Tensor:
        """Embed tokens, and let the head that follows take its weight from here."""
        weight, self._weight = module.weight, None  # of a pass that ended before its head
        is_lean = _is_exact(weight) or (is_half and computes_half(weight))
        if not (is_lean and weight.requires_grad and torch.is_grad_enabled()):
            return _as_ever(module, ids)
        weight, self._weight = _Twins.apply(weight)  # type: ignore[no-untyped-call]
        return embedding(ids, weight, module.padding_idx, sparse=True)

    def multiply(self, module: Any, is_half: bool, rows: Tensor) -> Tensor:
        """Map [R, D] to logits [R, vocabulary]; in bf16 few rows are multiplied in fp32."""
        weight, self._weight = module.weight if self._weight is None else self._weight, None
        has_half = is_half and computes_half(rows)
        if has_half and (rows.numel() > FEW_ROWS * rows.shape[-1] or weight.dtype != torch.float32):
            return multiply_half(rows, weight, module.bias)
        with torch.autocast("cpu", enabled=False) if has_half else nullcontext():
            if isinstance(module, DirectLinear):
                return module.multiply(rows.float() if has_half else rows, weight)
            return linear(rows.float() if has_half else rows, weight, module.bias)


class _Twins(torch.autograd.Function):
    """A weight twice, of which the first is differentiated sparsely."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, sparse: Tensor | None, dense: Tensor | None) -> Tensor | None:
        if sparse is None or dense is None:
            return sparse if dense is None else dense
        return dense.add_(sparse)  # the head has just made it


class _GatedProduct(torch.autograd.Function):
    """y = (silu(gate) * up) W^T."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, is_direct: bool) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.is_direct = is_direct
        return product(silu(gate).mul_(up), weight, is_direct)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        activated, of_weight = silu(gate), None
        if ctx.needs_input_grad[2]:
            inner = (activated * up).flatten(0, -2)
            of_weight = product(gradient.flatten(0, -2).t(), inner.t(), ctx.is_direct)
        of_inner = product(gradient, weight.t(), ctx.is_direct)
        of_up = activated.mul_(of_inner)
        of_gate: Tensor = torch.ops.aten.silu_backward(of_inner.mul_(up), gate)
        return of_gate, of_up, of_weight, None
