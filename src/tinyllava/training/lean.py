"""Layers that keep less for the backward pass on a CPU in fp32: norms, gated layers and tied embeddings.

Paper: none. Losses and gradients are equal up to rounding.

A norm of a language model keeps its input and the scale of each row; PyTorch would keep the normalised input
and read it five times. A gated layer keeps gate and up; PyTorch would keep the activated gate and the product
too. What is not kept takes one pass over numbers that are read anyway. The gradient of an embedding that the
head shares is added to the head's, row by row; PyTorch would make a second one, of zeros but for a few rows.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, rms_norm, silu

from tinyllava.model.linear import DirectLinear, multiply_directly, product
from tinyllava.model.quiet import keeping_random_state

_EXAMPLES = 4
"""Rows that tell whether a layer computes what is known here."""


def make_lean(model: nn.Module) -> Callable[[], None]:
    """Let the layers of a model that trains compute as described here; return the undo.

    The choice depends on the machine and the layers alone, so that a training that is resumed has the same
    bits. Half precision, other devices and compiled layers compute as ever.
    """
    found: list[Any] = []
    heads = {id(layer.weight) for layer in model.modules() if type(layer) is nn.Linear}
    for module in model.modules():
        forward: Callable[..., Tensor] | None = None
        if _is_rms_norm(module):
            forward = _normalise
        elif _is_gated(module):
            forward = _feed_forward
        elif type(module) is nn.Embedding and id(module.weight) in heads:
            forward = _embed
        if forward is not None:
            found.append(module)
            found[-1].forward = partial(forward, module)
    undo_products = multiply_directly(model)

    def undo() -> None:
        undo_products()
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


def _normalise(module: Any, rows: Tensor) -> Tensor:
    outputs: Tensor
    if not _is_exact(rows, module.weight):
        outputs = type(module).forward(module, rows)
        return outputs
    outputs = _Norm.apply(rows, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
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


def _is_gated(module: nn.Module) -> bool:
    """Whether a module computes down(silu(gate(x)) * up(x)) by linear layers without a bias behind."""
    parts: dict[str, Any] = dict(module.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    gate, up, down = parts["gate_proj"], parts["up_proj"], parts["down_proj"]
    is_plain = bool(type(down) is nn.Linear and down.bias is None) and _is_exact(down.weight)
    return is_plain and _computes(module, down.out_features, lambda rows: down(silu(gate(rows)) * up(rows)))


def _feed_forward(module: Any, rows: Tensor) -> Tensor:
    weight = module.down_proj.weight
    outputs: Tensor
    if not _is_exact(rows, weight) or not torch.is_grad_enabled():
        outputs = type(module).forward(module, rows)
        return outputs
    gate, up = module.gate_proj(rows), module.up_proj(rows)
    is_direct = isinstance(module.down_proj, DirectLinear)
    outputs = _GatedProduct.apply(gate, up, weight, is_direct)  # type: ignore[no-untyped-call]
    return outputs


def _embed(module: Any, ids: Tensor) -> Tensor:
    """Embed tokens; the gradient is sparse, and the sum with the head's is not."""
    is_sparse = _is_exact(module.weight) and module.weight.requires_grad
    return embedding(ids, module.weight, module.padding_idx, sparse=is_sparse)


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
