"""Linear layers whose frozen weights are stored in 4 or 8 bits, for QLoRA and for inference.

Differs: the paper trains on weights in 16 bits or more. The 4-bit form is QLoRA's (NF4 in blocks of 64 with
quantised scales), the 8-bit form LLM.int8's (one scale per row). bitsandbytes chooses the codes and
multiplies, except in 4 bits on a CPU. There its kernels (0.50.2, CPUs with AVX-512) read the scale of the
wrong block if a row is not a whole number of blocks, so this module dequantises the codes itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyllava.errors import CheckpointError, ConfigError, first_line, require
from tinyllava.model.quiet import quiet_bitsandbytes_import, without_messages_of

BITS = (4, 8, 16)
QUANTISED_FILE = "quantised.safetensors"
"""Beside model.safetensors, with the layers of a checkpoint that is stored in 4 or 8 bits."""
_BLOCK, _NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share one
_OUTLIER = 6.0  # inputs beyond it are multiplied in 16 bits (LLM.int8's own value; on a GPU only)


def quantise(model: nn.Module, names: Iterable[str], bits: int) -> None:
    """Put a quantised layer in place of each named linear layer.

    Args:
        bits: 4 or 8.
    """
    kind = _KINDS[bits]
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), child, kind(layer))


def check_bits(bits: int) -> None:
    """Fail before long work if this number of bits is not supported.

    Raises:
        ConfigError: not 4, 8 or 16.
        MissingExtraError: fewer than 16, and bitsandbytes is not installed.
    """
    if bits not in BITS:
        raise ConfigError(f"bits = {bits!r}: choose one of {', '.join(map(str, BITS))}.")
    if bits < 16:
        require("bitsandbytes", "quantized", "holds weights in 4 or 8 bits")


def quantise_language_model(model: nn.Module, bits: int) -> None:
    """Hold the linear layers of the language model, without the head, in 4 or 8 bits; 16 changes nothing.

    Encoder, connector, embedding, head and norms keep their type: they are small, and errors in them weigh.

    Raises:
        ConfigError: it is held in another number of bits already.
    """
    held = quantised_bits(model)
    if bits < 16 and held not in (bits, 16):
        raise ConfigError(f"bits = {bits}: the checkpoint is stored in {held} bits. Remove bits.")
    if bits < held:
        names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        quantise(model, [name for name in names if ".language_model." in f".{name}"], bits)


def quantised_bits(model: nn.Module) -> int:
    """Return the number of bits of a model's quantised layers; 16 if it has none."""
    return min((layer.bits for layer in quantised_layers(model).values()), default=16)


def quantised_layers(model: nn.Module) -> dict[str, "QuantisedLinear"]:
    """Return the quantised layers of a model by the names of their weights."""
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def dequantise(model: nn.Module) -> None:
    """Put ordinary layers with the dequantised weights in place of quantised ones."""
    for name, layer in quantised_layers(model).items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to_linear())


def save_quantised(model: nn.Module, path: Path) -> set[str]:
    """Write the codes of the quantised layers and the tables that decode them.

    Returns:
        Names of the weights that are written there, and need not be written elsewhere.
    """
    tensors = {}
    held = quantised_layers(model)
    for name, layer in held.items():
        tensors[name] = layer.weight
        tensors |= {f"{name}.{buffer}": tensor for buffer, tensor in layer.named_buffers()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {"bits": str(quantised_bits(model)), "format": "pt"})
    return set(held)


def load_quantised(model: nn.Module, path: Path) -> None:
    """Put the layers that ``save_quantised`` wrote in the place of a model's ordinary ones.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kind = _KINDS[int((file.metadata() or {})["bits"])]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        for name in [name for name in tensors if name.endswith(".weight")]:
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            layer = model.get_submodule(name.removesuffix(".weight"))
            if not isinstance(layer, nn.Linear):
                raise KeyError(name)
            stored = {key.removeprefix(f"{name}."): tensors[key] for key in tensors if f"{name}." in key}
            setattr(model.get_submodule(parent), child, kind(layer, (tensors[name], stored)))
    except (SafetensorError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not the quantised weights of this model ({first_line(error)}); copy the folder again."
        ) from error


class QuantisedLinear(nn.Linear, ABC):
    """A frozen linear layer from [*, in] to [*, out] with integer codes as its ``weight``.

    The tables of the codes are buffers; the bias stays as it was. Gradients flow to the input. Products are
    computed in the precision of autocast, without it in that of the input.

    Args:
        layer: what is quantised, on a CPU wherever it is: the same codes on every machine.
        stored: codes and constants that were computed before.
    """

    bits: int
    bias: nn.Parameter | None  # type: ignore[assignment]  # nn.Linear says it is never None

    def __init__(self, layer: nn.Linear, stored: tuple[Tensor, dict[str, Tensor]] | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw random weights
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype, self.training = layer.weight.dtype, layer.training
        codes, constants = stored or self._quantise(layer.weight.detach().float().cpu())
        self.weight = nn.Parameter(codes, requires_grad=False)
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)
        self.bias = layer.bias
        self.to(layer.weight.device)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape [out, in] of the dequantised weights."""
        return self.out_features, self.in_features

    def stored(self) -> list[Tensor]:
        """Return the codes and the tables that decode them, without the bias."""
        return [self.weight, *self.buffers()]

    def to_linear(self) -> nn.Linear:
        """Return an ordinary layer with the dequantised weights [out, in], in the type that they had."""
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, bias=False)
        weight = self.dequantise().to(self.weight.device, self.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [*, in] to [*, out]."""
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        return self._multiply(inputs.to(dtype), None if self.bias is None else self.bias.to(dtype))

    @abstractmethod
    def dequantise(self) -> Tensor:
        """Return the dequantised weights [out, in], in fp32 and on a CPU."""

    @abstractmethod
    def _quantise(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return codes and constants of weights [out, in]."""

    @abstractmethod
    def _multiply(self, inputs: Tensor, bias: Tensor | None) -> Tensor: ...


class FourBitLinear(QuantisedLinear):
    """NF4: two codes a byte, an 8-bit scale for 64 weights, an fp32 scale for 256 of those."""

    bits = 4
    scales: Tensor
    """The scales' codes [out * in / 64]."""
    offset: Tensor
    """The scales' mean, which was taken off before they were quantised."""
    nested_scales: Tensor
    levels: Tensor
    """The 16 values of NF4."""
    nested_levels: Tensor

    def _quantise(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with quiet_bitsandbytes_import():
            from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
        return codes, {
            "scales": state.absmax,
            "offset": state.offset,
            "nested_scales": state.state2.absmax,
            "levels": state.code,
            "nested_levels": state.state2.code,
        }

    def dequantise(self) -> Tensor:
        """Return the dequantised weights [out, in], in fp32 and on a CPU."""
        codes, scales, levels, nested_levels = (
            tensor.detach().cpu() for tensor in (self.weight, self.scales, self.levels, self.nested_levels)
        )
        # The two weights of each of the 256 bytes as one number of 64 bits, which is copied in half the time.
        pairs = torch.cartesian_prod(levels, levels).contiguous().view(torch.int64).flatten()
        weight = pairs[codes.flatten().int()].view(torch.float32)
        nested_scales = self.nested_scales.cpu().repeat_interleave(_NESTED_BLOCK)[: scales.numel()]
        block_scales = nested_levels[scales.int()].mul_(nested_scales).add_(self.offset.cpu())
        num_weights, num_whole = self.out_features * self.in_features, weight.numel() // _BLOCK * _BLOCK
        weight[:num_whole].view(-1, _BLOCK).mul_(block_scales[: num_whole // _BLOCK].unsqueeze(1))
        weight[num_whole:].mul_(block_scales[-1])  # nothing, or what is left for the last block
        return weight[:num_weights].view(self.shape)

    def _multiply(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        if inputs.device.type == "cpu":
            outputs: Tensor = _MultiplyByCodes.apply(inputs, self)  # type: ignore[no-untyped-call]
            return outputs if bias is None else outputs + bias
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import QuantState

        nested = QuantState(
            absmax=self.nested_scales, code=self.nested_levels, blocksize=_NESTED_BLOCK, dtype=torch.float32
        )
        state = QuantState(
            absmax=self.scales,
            shape=torch.Size(self.shape),
            code=self.levels,
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
            offset=self.offset,
            state2=nested,
        )
        return cast(Tensor, matmul_4bit(inputs, self.weight, state, bias=bias))


class _MultiplyByCodes(torch.autograd.Function):
    """Inputs [*, in] times the weights of a layer in 4 bits; backward reads the codes again.

    Left to autograd, every dequantised weight would be kept from forward to backward.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(inputs, layer.dequantise().to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantise().to(gradient.dtype), None


class EightBitLinear(QuantisedLinear):
    """LLM.int8: codes [out, in] from -127 to 127 and the largest absolute weight of each row.

    The input is rounded to 8 bits too, row by row, except in training on a CPU.
    """

    bits = 8
    scales: Tensor
    """Largest absolute weights [out], fp32."""

    def _quantise(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with quiet_bitsandbytes_import():
            from bitsandbytes.functional import int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(weight)
        return codes, {"scales": scales}

    def dequantise(self) -> Tensor:
        """Return the dequantised weights [out, in], in fp32 and on a CPU."""
        return self.weight.detach().float().cpu() * (self.scales.cpu() / 127).unsqueeze(1)

    def _multiply(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        from bitsandbytes import MatmulLtState, matmul

        state = MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights = self.weight, self.scales, False
        state.is_training, state.threshold = self.training, _OUTLIER
        # It warns in every step that inputs are cast to 16 bits, which is what LLM.int8 does.
        with without_messages_of("bitsandbytes.autograd._functions"):
            outputs: Tensor = matmul(inputs, self.weight, state=state, bias=bias)
        return outputs


_KINDS: dict[int, type[QuantisedLinear]] = {4: FourBitLinear, 8: EightBitLinear}
