"""Linear layers that multiply by oneDNN on CPUs: packed ones that answer, and ones that train.

Paper: none.
"""

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinyllava.model.compat import hold_in_huge_pages, lay_out_weight, multiply_by_onednn, own_parameters
from tinyllava.model.devices import multiplies_bf16

SMALLEST_PRODUCT = 2**21
"""Multiplications below which a call of oneDNN costs more in training than it saves."""
_LARGE = 2**17  # weights of a layer, half a MiB or so, below which the size of pages does not matter


class PackedLinear(nn.Linear):
    """A linear layer that only answers, on a CPU: its weight is in the layout of oneDNN's kernels.

    Torch multiplies 32 bits by MKL, whose fastest code runs on Intel's CPUs only. A 16-bit weight it lays out
    anew in each call. Who asks for ``weight``, perhaps to change it, makes an ordinary layer of it. Saving,
    copying, moving and casting leave it packed.

    Args:
        is_tied: the weight is also another module's, such as the embedding: what is packed is a copy.
    """

    packed: Tensor | None
    rows: slice | None
    """Its rows of ``packed`` if that has the weights of several layers, see ``pack_together``."""
    tied: nn.Parameter | None

    def __init__(self, layer: nn.Linear, *, is_tied: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw random weights
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("bias", layer.bias)
        self.training = layer.training
        self.__dict__["tied"] = layer.weight if is_tied else None  # not as a parameter of its own
        self._hold(layer.weight)

    def _hold(self, weight: Tensor) -> None:
        self.packed, self.rows, own_parameters(self)["weight"] = None, None, self._as_parameter(weight)
        if _is_packed_faster(weight):
            del own_parameters(self)["weight"]
            self.packed = lay_out_weight(weight.detach())

    def _as_parameter(self, weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight.detach(), requires_grad=False) if self.tied is None else self.tied

    def unpacked(self) -> Tensor:
        """Return the weight [out, in] laid out as ever; a copy if it is packed and not tied."""
        if self.packed is None:
            return self.weight
        if self.tied is not None:
            return self.tied
        dense = self.packed.to_dense()
        return dense if self.rows is None else dense[self.rows].clone()

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("packed") is not None:
            with torch.inference_mode(False):
                own_parameters(self)["weight"] = self._as_parameter(self.unpacked())
            self.packed = self.rows = None
        return super().__getattr__(name)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if self.packed is None or (torch.is_grad_enabled() and inputs.requires_grad):
            return nn.functional.linear(inputs, self.unpacked(), self.bias)
        if rows := self.rows:
            outputs, bias = multiply_by_onednn(inputs, self.packed)[..., rows], own_parameters(self)["bias"]
            return outputs if bias is None else outputs + bias
        return multiply_by_onednn(inputs, self.packed, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.unpacked()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _ = self.weight  # which makes a place for it
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None if self.packed is None else self.unpacked(), "rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.packed is not None:
            self._hold(self.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        weight = None if self.packed is None else fn(self.unpacked())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None:
            self._hold(weight)
        return self


def pack_linear_layers(model: nn.Module, *, copies_tied: bool = True) -> None:
    """Pack the linear layers of a model that only answers, where that is faster.

    Args:
        copies_tied: a layer that shares its weight with another module, as a head does with the embedding,
            packs a copy; otherwise it stays.
    """
    owners = Counter(
        id(parameter) for module in model.modules() for parameter in own_parameters(module).values()
    )
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and _is_packed_faster(layer.weight):
                is_tied = owners[id(layer.weight)] > 1
                if copies_tied or not is_tied:
                    setattr(parent, name, PackedLinear(layer, is_tied=is_tied))


def pack_together(layers: Sequence[nn.Module]) -> None:
    """Let packed layers that map the same inputs share one product: ``multiply_together`` computes it."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear) and layer.packed is not None]
    weights, at = [layer.unpacked() for layer in packed], 0
    if len(packed) < len(layers) or len({weight.dtype for weight in weights}) > 1:
        return
    whole = lay_out_weight(torch.cat(weights))
    for layer, weight in zip(packed, weights, strict=True):
        layer.packed, layer.rows = whole, slice(at, at + len(weight))
        at += len(weight)


def pack_apart(layers: Sequence[nn.Module]) -> None:
    """Undo ``pack_together``."""
    for layer in layers:
        if isinstance(layer, PackedLinear) and layer.rows is not None:
            layer._hold(layer.unpacked())


def multiply_together(layers: Sequence[Any], inputs: Tensor) -> Tensor:
    """Return the outputs of several layers one after another [..., sum of out], without a backward pass."""
    whole = getattr(layers[0], "packed", None)
    if whole is None or any(getattr(layer, "packed", None) is not whole for layer in layers):
        return torch.cat([layer(inputs) for layer in layers], -1)
    if layers[0].bias is None:
        return multiply_by_onednn(inputs, whole)
    return multiply_by_onednn(inputs, whole, torch.cat([layer.bias for layer in layers]))


def speed_up_reading(model: nn.Module) -> None:
    """Let a model on a CPU read its large linear layers a tenth faster; takes a second or two."""
    found: dict[int, Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.in_features * layer.out_features >= _LARGE:
            weight = layer.packed if isinstance(layer, PackedLinear) else None
            weight = own_parameters(layer).get("weight") if weight is None else weight
            if weight is not None and weight.device.type == "cpu":
                found[id(weight)] = weight
    hold_in_huge_pages(found.values())


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters of a model, those of packed layers included."""
    layers = (
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLinear) and layer.packed is not None and layer.tied is None
    )
    return chain(model.named_parameters(), ((f"{name}.weight", layer.unpacked()) for name, layer in layers))


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the type of a module's first weight; one of packed layers without a bias has no parameter."""
    for part in module.modules():
        if isinstance(part, PackedLinear) and part.packed is not None:
            return part.packed.dtype
        for parameter in own_parameters(part).values():
            if parameter is not None:
                return parameter.dtype
    return torch.get_default_dtype()


class _Product(torch.autograd.Function):
    """y = x W^T + b and its gradients; oneDNN takes transposed views as they are."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight)
        return multiply_by_onednn(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_inputs = multiply_by_onednn(gradient, weight.t())
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            of_weight = multiply_by_onednn(rows.t(), inputs.reshape(-1, inputs.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_inputs, of_weight, of_bias


def product(inputs: Tensor, weight: Tensor, is_direct: bool) -> Tensor:
    """Map [..., in] to [..., out] by a weight [out, in] as ``DirectLinear`` would, or as PyTorch does."""
    if is_direct and inputs.numel() * len(weight) >= SMALLEST_PRODUCT:
        return multiply_by_onednn(inputs, weight)
    return nn.functional.linear(inputs, weight)


def multiply_pairs(rows: Tensor, others: Tensor) -> Tensor:
    """Multiply matrices [G, R, E] by transposed ones [G, N, E] in fp32, without a backward pass.

    Each matrix has to be contiguous, or a transposed view of one that is; otherwise oneDNN is very slow.
    """
    is_large = rows[0].numel() * others.shape[1] >= SMALLEST_PRODUCT
    if is_large and _is_packed_faster(others):
        return torch.stack([multiply_by_onednn(a, b) for a, b in zip(rows, others, strict=True)])
    return torch.bmm(rows, others.transpose(1, 2))


class DirectLinear(nn.Linear):
    """A linear layer in training on a CPU whose products in fp32 are oneDNN's; its weight stays as it is."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return self.multiply(inputs, self.weight)

    def multiply(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Map [..., in] to [..., out] by a tensor that stands for the layer's weight [out, in]."""
        is_plain = (
            inputs.dtype == weight.dtype == torch.float32
            and inputs.numel() * self.out_features >= SMALLEST_PRODUCT
            and weight.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )
        if not is_plain:
            return nn.functional.linear(inputs, weight, self.bias)
        outputs: Tensor = _Product.apply(inputs, weight, self.bias)  # type: ignore[no-untyped-call]
        return outputs


def multiply_directly(model: nn.Module) -> Callable[[], None]:
    """Let the linear layers of a model that trains multiply by oneDNN where that is faster; return the undo.

    The choice depends on the machine alone, so that a training that is resumed has the same bits.
    """
    layers = [
        m
        for m in model.modules()
        if type(m) is nn.Linear and m.weight.dtype == torch.float32 and _is_packed_faster(m.weight)
    ]
    for layer in layers:
        layer.__class__ = DirectLinear

    def undo() -> None:
        for layer in layers:
            layer.__class__ = nn.Linear

    return undo


def _is_packed_faster(weight: Tensor) -> bool:
    """Return whether a weight is better packed (docs/guides/ship.md has the measurement)."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return multiplies_bf16("cpu")
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return weight.dtype == torch.float32 and has_avx512 and cpu_vendor() == "AMD"


@cache
def cpu_vendor() -> str:
    """Return ``AMD``, ``Intel``, or an empty text for others."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text() if listed.is_file() else platform.processor()
    return next((name for mark, name in _VENDORS.items() if mark in text), "")


_VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
