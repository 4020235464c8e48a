"""Attention kernels on a CPU, forward and backward: the fused one's time over that of plain matrix products.

    python benchmarks/attention.py

Paper: none. The crossing point is where ``tinyllava.model.devices.fastest_attention`` changes over.
"""

import time

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SHAPES = {"SmolLM2-135M, 8 samples": (8, 9, 64), "TinyLlama, 2 samples": (2, 32, 64)}
LENGTHS = (10, 32, 64, 96, 128, 160, 192, 256, 512)
NUM_TRIES = 6


def measure_seconds(kernel: SDPBackend, inputs: list[Tensor]) -> float:
    """Return the fastest of a few causal passes forward and backward."""
    tries = []
    for _ in range(NUM_TRIES):
        start = time.perf_counter()
        with sdpa_kernel(kernel):
            output = scaled_dot_product_attention(*inputs, is_causal=True)
        output.sum().backward()
        tries.append(time.perf_counter() - start)
    return min(tries)


def main() -> None:
    """Print a row for each shape and precision."""
    print(f"{'positions':<40}" + "".join(f"{length:>8}" for length in LENGTHS))
    for name, (batch, heads, width) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            ratios = []
            for length in LENGTHS:
                inputs = [
                    torch.randn(batch, heads, length, width, dtype=dtype, requires_grad=True)
                    for _ in range(3)
                ]
                fused, plain = (
                    measure_seconds(kernel, inputs)
                    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
                )
                ratios.append(fused / plain)
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            print(f"{label:<40}" + "".join(f"{ratio:>7.2f}x" for ratio in ratios))


if __name__ == "__main__":
    main()
