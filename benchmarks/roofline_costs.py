"""The roofline of ``roofline.py``: what an operator, or a fused kernel, reads, writes and computes.

How fast products of matrices are was fitted to published measurements of an H100 (``product_seconds``); how
fast attention and copies are is taken from published numbers too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyllava.planning.speed import BANDWIDTH_SHARE, GPUS, LINK_SHARE, OPTIMIZER_BYTES, ROOFLINE_GPU

PRODUCT_SHARE = 0.80
"""Of the peak, by the fastest of many products of bf16 matrices on an H100 SXM: 792 of 989 TFLOP/s
(github.com/mag-/gpu_benchmark)."""
EDGE = 100
"""A product whose inner dimension is so long takes twice as long as one without a beginning and an end: tiles
are loaded before the first multiplication and written after the last."""
PRODUCT_SECONDS = 5e-6
"""Of a product, however small. ``EDGE`` and this are fitted to products that the authors of XLA measured on
an H100 (xla/service/gpu/model/matmul_interpolator_data.h); a test compares them."""
ATTENTION_SHARE = {False: 0.22, True: 0.16}
"""Of the peak, without and with causal masking, forward and backward: on an H100, at 512 to 1,024 tokens and
heads of 64, FlashAttention-2 reaches 180 to 229 of 989 TFLOP/s forward with causal masking (figure 5 of
FlashAttention-3's paper), and less backward."""
KERNEL_SECONDS = 2e-6
"""Of any other kernel, however small: it starts and ends while nothing else runs."""
GATHERS = ("embedding", "index_select", "gather", "index", "nll_loss_forward")
"""Operators that read only the rows that they return."""
EXCHANGE_SPEED = LINK_SHARE * GPUS[ROOFLINE_GPU].link
"""Bytes a second that a GPU sends, while it receives as many: a share of the 450 GB/s of an H100's NVLink by
its data sheet."""
FREE = ("detach", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh")


def product_seconds(gpu: Any, rows: float, columns: float, inner: float, batch: float = 1) -> float:
    """Seconds of a product [rows, inner] x [inner, columns], ``batch`` times, in half precision."""
    flops = 2 * batch * rows * columns * inner
    moved = 2 * batch * (rows * inner + inner * columns + rows * columns)
    computing = flops / (PRODUCT_SHARE * gpu.half_flops) * (1 + EDGE / inner)
    return max(computing, moved / copy_speed(gpu)) + PRODUCT_SECONDS


def copy_speed(gpu: Any) -> float:
    """Bytes a second that kernels read and write."""
    return float(BANDWIDTH_SHARE * gpu.bandwidth)


def optimizer_seconds(gpu: Any, num_trained: int, share: float, num_shards: int = 1) -> dict[str, float]:
    """Seconds of a micro-batch that has this share of the samples of an optimizer step.

    The first micro-batch's gradients are taken as they are, those of the others are added to them. Where
    they and the optimizer are divided, weights are copied from where they were gathered, and gradients to
    where they are reduced, in each micro-batch.
    """
    parameter = num_trained / copy_speed(gpu)
    found = {
        "optimizer": share * OPTIMIZER_BYTES * parameter / num_shards,
        "addition of gradients": 3 * 4 * parameter * max(0.0, 1 - share) / num_shards,
    }
    return found | ({"copies for the exchange": 4 * 4 * parameter} if num_shards > 1 else {})


def exchange_seconds(num_trained: int, num_shards: int) -> float:
    """Seconds in which divided weights are gathered and gradients are reduced, beside the computation."""
    return 2 * 4 * num_trained * (1 - 1 / num_shards) / EXCHANGE_SPEED


@dataclass
class Cost:
    """Sum over the calls of one operator."""

    seconds: float = 0.0
    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0


Name = tuple[str, str, str]
"""Pass, part and operator."""


class Roofline(TorchDispatchMode):
    """Sums the seconds of every operator within it, by pass, part and operator.

    In a compiled layer operators between products are collected into a kernel. A tensor that the kernel makes
    is written when a product or another layer needs it. A later kernel that needs it makes it again from what
    the first one read, unless it is cheaper to keep.
    """

    def __init__(self, gpu: Any, *, compiled: bool, lengths: Sequence[int] = ()) -> None:
        super().__init__()
        self.lengths = lengths
        """Of the samples in a packed row, of which none sees another."""
        self.gpu, self.compiled, self.is_backward = gpu, compiled, False
        self.part, self.flops = "", 0.0
        self.costs: dict[Name, Cost] = {}
        self.read: dict[int, int] = {}
        """Bytes that the open kernel reads, by storage."""
        self.made: set[int] = set()
        """Storages that it makes."""
        self.unwritten: dict[int, dict[int, int]] = {}
        """What each storage that no kernel has written was made from: bytes by storage."""
        self.casts: dict[tuple[int, torch.dtype], int] = {}
        """The first cast of a storage in this layer: compiled, the others are the same tensor."""
        self.same: dict[int, int] = {}
        self.counter, self.numbers = count(), dict[int, int]()
        """Of storages, by their addresses, which are used again."""

    @property
    def seconds(self) -> float:
        """Of all operators."""
        return sum(cost.seconds for cost in self.costs.values())

    @property
    def num_kernels(self) -> int:
        """Operators and kernels that were counted."""
        return sum(cost.calls for cost in self.costs.values())

    def split(self) -> tuple[float, float]:
        """Seconds of products and attention, and of all the rest."""
        products = sum(cost.seconds for cost in self.costs.values() if cost.flops)
        return products, self.seconds - products

    def enter(self, part: str) -> None:
        """A layer begins."""
        self._close()
        self.part, self.casts = part, {}

    def leave(self, outputs: Any) -> None:
        """A layer ends: the next reads its outputs."""
        for tensor in _tensors(outputs):
            self._write(tensor)
        self._close()
        self.part = ""

    def finish(self, gradients: Iterable[Tensor | None]) -> None:
        """All has been computed: gradients are kept."""
        for gradient in gradients:
            if gradient is not None:
                self._write(gradient)
        self._close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs, outputs = _tensors((args, kwargs or {})), _tensors(output)
        known = {_key(t) for t in inputs}
        new = [t for t in outputs if _key(t) not in known]
        writes = any(arg.alias_info and arg.alias_info.is_write for arg in func._schema.arguments)
        if name in FREE or not (new or writes):
            self._forward(inputs, new)
            return output
        for tensor in new:
            self._remember(tensor)
        if found := _product(self.gpu, name, args, output, self.lengths):
            for tensor in inputs:
                self._write(tensor)
            self._close()
            flops, seconds, label = found
            self.flops += flops
            moved = sum(_bytes(t) for t in [*inputs, *outputs])
            self._add(label, max(seconds, moved / copy_speed(self.gpu)), flops, moved)
        elif not self.compiled or not self.part:  # only layers are compiled
            moved = sum(_bytes(t) for t in (new or outputs))
            moved += moved if name in GATHERS else sum(_bytes(t) for t in inputs)
            self._add(name, KERNEL_SECONDS + moved / copy_speed(self.gpu), 0.0, moved)
        else:
            self._collect(name, inputs, new or outputs)
        return output

    def _id(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage."""
        if _key(tensor) not in self.numbers:
            self._remember(tensor)
        number = self.numbers[_key(tensor)]
        return self.same.get(number, number)

    def _forward(self, inputs: list[Tensor], new: list[Tensor]) -> None:
        """A copy that a GPU does not make: the new tensor is made from what the old ones are."""
        for tensor in new:
            self._remember(tensor)
            sources = [self.unwritten[self._id(t)] for t in inputs if self._id(t) in self.unwritten]
            if sources:
                self.unwritten[self._id(tensor)] = {k: v for source in sources for k, v in source.items()}

    def _remember(self, tensor: Tensor) -> None:
        """Give a new storage a number of its own."""
        self.numbers[_key(tensor)] = next(self.counter)

    def _collect(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Put an operator into the open kernel."""
        if name == "_to_copy":
            cast = (self._id(inputs[0]), outputs[0].dtype)
            if cast in self.casts:
                self.same[self._id(outputs[0])] = self.casts[cast]
                return
            self.casts[cast] = self._id(outputs[0])
        for tensor in inputs:
            self._need(tensor)
        if (
            name in ("sum", "mean")
            and outputs[0].numel() * 16 < inputs[0].numel()
            and outputs[0].shape[-1] > 1
        ):
            self.read[-1 - len(self.read)] = _bytes(inputs[0])  # over rows: a loop of its own
        for tensor in outputs:
            self.made.add(self._id(tensor))
            self.unwritten[self._id(tensor)] = self.read  # what it will have read at its end

    def _need(self, tensor: Tensor) -> None:
        """Let the open kernel read a tensor, or make it again."""
        key, size = self._id(tensor), _bytes(tensor)
        if key in self.made:
            return
        sources = self.unwritten.get(key)
        if sources is not None:
            if sum(n for k, n in sources.items() if k not in self.read) <= 2 * size:
                self.read |= sources
                self.made.add(key)
                return
            self._write(tensor)
        self.read[key] = max(self.read.get(key, 0), size)

    def _write(self, tensor: Tensor) -> None:
        """Write a tensor that a kernel has made."""
        if self.unwritten.pop(self._id(tensor), None) is not None:
            moved = _bytes(tensor)
            self._add("elementwise, fused", moved / copy_speed(self.gpu), 0.0, moved, calls=0)

    def _close(self) -> None:
        """End the open kernel."""
        if self.made:
            moved = sum(self.read.values())
            self._add("elementwise, fused", KERNEL_SECONDS + moved / copy_speed(self.gpu), 0.0, moved)
        self.read, self.made = {}, set()

    def _add(self, label: str, seconds: float, flops: float, moved: float, calls: int = 1) -> None:
        is_again = self.is_backward and torch.is_grad_enabled()
        when = "recomputed" if is_again else "backward" if self.is_backward else "forward"
        cost = self.costs.setdefault((when, self.part or "outside layers", label), Cost())
        cost.seconds += seconds
        cost.calls += calls
        cost.flops += flops
        cost.bytes += moved


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    """Bytes that are read or written: of an expanded tensor only what there is of it."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def _product(
    gpu: Any, name: str, args: Any, output: Any, lengths: Sequence[int]
) -> tuple[float, float, str] | None:
    """Operations, seconds and name of a product of matrices or of attention; None for everything else."""
    if name in ("mm", "bmm", "addmm"):
        left, right = args[-2:]
        rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
        batch = left.shape[0] if name == "bmm" else 1
        label = f"{rows:,} x {inner:,} x {columns:,}" + (f", {batch} times" if batch > 1 else "")
        seconds = product_seconds(gpu, rows, columns, inner, batch)
        return 2.0 * batch * rows * inner * columns, seconds, label
    if name == "convolution":
        kernel = args[1]
        positions, inner = output.numel() / kernel.shape[0], kernel[0].numel()
        seconds = product_seconds(gpu, positions, kernel.shape[0], inner)
        return 2.0 * output.numel() * inner, seconds, "convolution of patches"
    if name == "convolution_backward":
        flops = 4.0 * args[0].numel() * args[2].numel() / args[2].shape[0]
        return flops, flops / (PRODUCT_SHARE * gpu.half_flops), "convolution of patches"
    if "attention" in name:
        is_backward = "backward" in name
        query, key = (args[1], args[2]) if is_backward else (args[0], args[1])
        is_causal = any(value is True for value in args)
        products = 5 if is_backward else 2  # the scores are made again
        pairs = float(query.shape[-2] * key.shape[-2])
        if query.shape[-2] == sum(lengths):
            pairs = float(sum(n * n for n in lengths))
        heads = query.numel() / query.shape[-2]
        flops = products * (1.0 if is_causal else 2.0) * heads * pairs
        return flops, flops / (ATTENTION_SHARE[is_causal] * gpu.half_flops), "attention"
    return None
