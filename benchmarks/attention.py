"""Attention kernels on a CPU, forward and backward: CPU time over that of plain matrix products.

    python benchmarks/attention.py

Paper: none. `fused` is PyTorch's kernel, and `ours` that of training in bf16. Where `fused` falls below 1,
``tinyllava.model.devices.fastest_attention`` changes over. ``LONGEST`` is below where it beats `ours`.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tinyllava.training.half import attend_half

SHAPES = {"SmolLM2-135M, 8 samples": (8, 9, 3, 64), "TinyLlama, 2 samples": (2, 32, 4, 64)}
"""Samples, heads, heads of keys and values, and width of a head."""
LENGTHS = (10, 32, 64, 96, 128, 160, 192, 256, 512)
NUM_TRIES = 12


def attend(kernel: SDPBackend | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally by a kernel of PyTorch, or by ours."""
    with torch.autocast("cpu", torch.bfloat16, enabled=query.dtype == torch.bfloat16):
        if kernel is None:
            return attend_half(query, key, value, query.shape[-1] ** -0.5)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def measure_seconds(kernels: list[Callable[..., Tensor]], inputs: list[Tensor]) -> list[float]:
    """Return the median of passes forward and backward for each kernel, which take turns."""
    tries: list[list[float]] = [[] for _ in kernels]
    for _ in range(NUM_TRIES):
        for kernel, seconds in zip(kernels, tries, strict=True):
            start = time.process_time()
            kernel(*inputs).sum().backward()
            seconds.append(time.process_time() - start)
    return [statistics.median(seconds) for seconds in tries]


def main() -> None:
    """Print a row for each shape, precision and kernel."""
    print(f"{'positions':<40}" + "".join(f"{length:>8}" for length in LENGTHS))
    for name, (batch, heads, groups, width) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            kernels: dict[str, SDPBackend | None] = {"math": SDPBackend.MATH}
            kernels["fused"] = SDPBackend.FLASH_ATTENTION
            if dtype == torch.bfloat16:
                kernels["ours"] = None
            rows: dict[str, list[float]] = {kernel: [] for kernel in kernels}
            for length in LENGTHS:
                inputs = [
                    torch.randn(batch, length, h, width).to(dtype).transpose(1, 2).requires_grad_()
                    for h in (heads, groups, groups)
                ]
                seconds = measure_seconds([partial(attend, kernel) for kernel in kernels.values()], inputs)
                for kernel, found in zip(kernels, seconds, strict=True):
                    rows[kernel].append(found / seconds[0])
            for kernel in list(rows)[1:]:
                label = f"{name}, {str(dtype).removeprefix('torch.')}, {kernel}"
                print(f"{label:<40}" + "".join(f"{ratio:>7.2f}x" for ratio in rows[kernel]))


if __name__ == "__main__":
    main()
