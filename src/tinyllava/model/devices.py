"""The available device, its default precision and attention, and the threads and memory of a CPU.

Paper: none.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllava.errors import ConfigError

T = TypeVar("T")


def best_device() -> str:
    """Return ``cuda``, ``mps`` or ``cpu``, whichever comes first on this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> torch.device:
    """Return a device of torch.

    Raises:
        ConfigError: no such device, or none here.
    """
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # which a device without values (meta) cannot give
        return probe.device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"device {name!r}: {reason}; this machine's best is {best_device()!r}.") from error


def multiplies_bf16(device_type: str) -> bool:
    """Return whether devices of this type, such as ``cuda``, multiply bf16 faster than fp32.

    A GPU before Ampere and a CPU without AVX512-BF16 or AMX have bf16 too, but convert back and forth and
    are slower for it. So does a CPU that has them where ``ATEN_CPU_CAPABILITY`` holds PyTorch to AVX2.
    """
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type == "cpu":
        if torch.backends.cpu.get_cpu_capability() in ("NO AVX", "DEFAULT", "AVX2"):
            return False
        can = torch.cpu.get_capabilities()
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return False


def fastest_attention(inputs: Mapping[str, Any], *, bf16: bool) -> AbstractContextManager[None]:
    """Choose the attention kernel where PyTorch's own choice is a slow one.

    On a CPU its fused kernel goes backward in bf16 up to five times more slowly than plain matrix products,
    as long as a sequence has no more than about 160 positions (benchmarks/attention.py).

    Args:
        inputs: a batch with ``input_ids`` [B, N], and ``segments`` if its samples are packed.
        bf16: whether it is computed in bf16.
    """
    input_ids = inputs["input_ids"]
    longest = max(inputs["segments"]["lengths"]) if "segments" in inputs else input_ids.shape[1]
    is_slow = bf16 and input_ids.device.type == "cpu" and longest <= 160
    return sdpa_kernel(SDPBackend.MATH) if is_slow else nullcontext()


def call_in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function in a thread that ends with it, and return what it returns or raise what it raises.

    Each thread that computes on a CPU keeps helpers (OpenMP's) until it ends. If those of two threads are
    more than the cores, they no longer wait for work but sleep after each operation, and waking them takes a
    third of a step. A model is opened in such a thread, because answers are computed in others.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, function, *args, **kwargs).result()


def give_back_freed_memory() -> None:
    """Return freed memory to the system where the C library can (glibc); it keeps that of ended threads."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
