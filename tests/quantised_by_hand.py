"""NF4 and int8 read and written in plain PyTorch, apart from the library that training uses."""

import torch
from torch import Tensor, nn

from tinyllava.model.quantised import QuantisedLinear

# The sixteen values of NormalFloat4, as QLoRA's paper prints them (appendix E).
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def read_weight(layer: QuantisedLinear) -> Tensor:
    """Weights [out, in] from a layer's codes and constants."""
    held = dict(layer.named_buffers())
    if layer.weight.dtype == torch.int8:
        return layer.weight.float() * held["scales"][:, None] / 127
    codes = torch.stack([layer.weight.flatten() // 16, layer.weight.flatten() % 16], 1).flatten().long()
    scales = held["nested_levels"][held["scales"].long()]
    scales = scales * held["nested_scales"].repeat_interleave(256)[: len(scales)] + held["offset"]
    weight = NF4[codes] * scales.repeat_interleave(64)[: len(codes)]
    return weight[: layer.out_features * layer.in_features].reshape(layer.shape)


def nearest(weight: Tensor, bits: int) -> Tensor:
    """Weights [out, in] rounded to what the codes can say, with scales that are not rounded themselves."""
    if bits == 8:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    flat = weight.flatten()
    rows = nn.functional.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    scale = rows.abs().amax(1, keepdim=True)
    codes = ((rows / scale).unsqueeze(-1) - NF4).abs().argmin(-1)
    return (NF4[codes] * scale).flatten()[: len(flat)].reshape(weight.shape)
