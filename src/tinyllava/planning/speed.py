"""How fast a stage computes, and how long it takes besides: start-up, images, checkpoints.

Paper: section 4.1.2, the stages. The shares of the peak are those of a roofline over every operator of our
own step (``benchmarks/roofline.py``), scaled to the width of the language model and to the GPU. Runs reach a
part of it (``REACHED``), which a measurement by ``benchmarks/gpu.py`` replaces.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tinyllava.config import Sharding, Stage
from tinyllava.errors import ConfigError
from tinyllava.files import read_object
from tinyllava.parts.families import LANGUAGE_FAMILIES, LanguageFamily
from tinyllava.planning.memory import PlannedParts, count_trained


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU: memory, and the peaks of its dense matrix products as its maker states them."""

    memory_bytes: int
    half_flops: float
    """In bf16 or fp16."""
    fp32_flops: float
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second that it sends to others of its machine while it receives as many: NVLink or PCIe."""
    has_bf16: bool = True
    """Without it 'auto' trains in fp32, as ``training.trainer.choose_precision`` does there."""

    def precision(self, wanted: str) -> str:
        """Return fp32, tf32, bf16 or fp16 for what a run asks for."""
        if wanted == "tf32":
            return wanted if self.has_bf16 else "fp32"  # both came with Ampere
        return ("bf16" if self.has_bf16 else "fp32") if wanted == "auto" else wanted

    def flops(self, precision: str) -> float:
        """Return the peak in a precision; TF32 has half of bf16's, and no less than fp32's."""
        tf32 = max(self.fp32_flops, self.half_flops / 2)
        return {"fp32": self.fp32_flops, "tf32": tf32}.get(precision, self.half_flops)

    def balance(self, precision: str) -> float:
        """Return the operations at the peak in the time in which the memory moves a byte."""
        return self.flops(precision) / self.bandwidth


GPUS: dict[str, Gpu] = {
    "V100-32G": Gpu(
        memory_bytes=32 * 2**30,
        half_flops=125e12,
        fp32_flops=15.7e12,
        bandwidth=0.90e12,
        link=0.15e12,
        has_bf16=False,
    ),
    "RTX-3090": Gpu(
        memory_bytes=24 * 2**30, half_flops=71e12, fp32_flops=35.6e12, bandwidth=0.936e12, link=0.032e12
    ),
    "RTX-4090": Gpu(
        memory_bytes=24 * 2**30, half_flops=165e12, fp32_flops=82.6e12, bandwidth=1.008e12, link=0.032e12
    ),
    "A100-40G": Gpu(
        memory_bytes=40 * 2**30, half_flops=312e12, fp32_flops=19.5e12, bandwidth=1.555e12, link=0.3e12
    ),
    "A100-80G": Gpu(
        memory_bytes=80 * 2**30, half_flops=312e12, fp32_flops=19.5e12, bandwidth=2.039e12, link=0.3e12
    ),
    "L40S": Gpu(
        memory_bytes=48 * 2**30, half_flops=362e12, fp32_flops=91.6e12, bandwidth=0.864e12, link=0.032e12
    ),
    "H100-80G": Gpu(
        memory_bytes=80 * 2**30, half_flops=989e12, fp32_flops=67e12, bandwidth=3.35e12, link=0.45e12
    ),
    "H200": Gpu(
        memory_bytes=141 * 10**9, half_flops=989e12, fp32_flops=67e12, bandwidth=4.8e12, link=0.45e12
    ),
}


def find_gpu(device: str) -> Gpu | None:
    """Return the GPU that CUDA calls so, such as ``NVIDIA H100 80GB HBM3``; None if it is not known."""
    return next((gpu for key, gpu in GPUS.items() if all(word in device for word in key.split("-"))), None)


ROOFLINE_GPU = "H100-80G"
"""For which the roofline was made."""
BANDWIDTH_SHARE = 0.85
"""Of a GPU's memory bandwidth, which large copies reach."""
LINK_SHARE = 0.8
"""Of a link's speed, that an exchange reaches. Assumed."""
Model = Literal["C-TL", "Sig-Phi"]
Kind = Literal["pretrain", "finetune"]
"""A stage that freezes the language model, or one that trains it."""


WIDTHS: dict[Model, int] = {"C-TL": 2048, "Sig-Phi": 2560}
"""Of the language models in the roofline. Bytes grow with the width, operations with its square."""
REACHED: dict[Kind, float] = {"pretrain": 0.86, "finetune": 0.56}
"""Part of the roofline's speed that runs reach: the rest is the host, exchange of gradients and padding.
Fitted to hours that LLaVA and users of TinyLLaVA Factory report for A100, whose code is not ours. Ours has
not been measured on a GPU."""
OPTIMIZER_BYTES = 40
"""Of a trained parameter in a step: AdamW reads four tensors and writes three, clipping reads and scales."""

START_SECONDS = 60.0
"""Processes, imports and communication of a stage."""
DISK_BYTES_PER_SECOND = 1e9
"""At which weights are read and checkpoints written: a solid-state disk."""
HOST_BYTES_PER_SECOND = 3e9
"""At which a checkpoint is copied from a GPU to main memory that is not pinned. Assumed, not measured."""
CORES_PER_GPU = 8
"""Of a usual machine with GPUs."""
RECORD_SECONDS = 0.62e-3
"""Core time in which a record is read, checked and tokenised once (``benchmarks/records.py``)."""
DECODING_SECONDS = 5e-3
"""Core time in which an image of 640 x 480 pixels is decoded once, to see that it is whole."""
PREPARING_SECONDS = 1 / 190
"""Core time in which a worker prepares such an image for a model (``benchmarks/loading.py``)."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """What a stage takes, by what it waits for."""

    computing: float
    images: float
    """Beyond computing, where workers are slower."""
    start_up: float
    """Processes and weights; records and images looked at once, which a second start does not repeat."""
    checkpoints: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.computing + self.images + self.start_up + self.checkpoints


def utilisation(
    parts: PlannedParts,
    *,
    is_trained: bool,
    balance: float,
    compiled: bool = False,
    recomputed: bool = False,
    sharded: bool = False,
    reached: Mapping[Kind, float] = REACHED,
) -> float:
    """Return the share of a GPU's peak that a stage, or answering, is expected to reach.

    Args:
        is_trained: whether the language model is.
        balance: operations at the GPU's peak in the time in which its memory moves a byte.
        sharded: whether gradients and optimizer are divided among the GPUs.
        reached: part of the roofline's speed.
    """
    kind: Kind = "finetune" if is_trained else "pretrain"
    return reached[kind] * _roofline_share(parts, kind, balance, compiled, recomputed, sharded)


@cache
def rooflines() -> dict[str, Any]:
    """Return what ``benchmarks/roofline.py`` found, by model, stage and form; it has the command."""
    found: dict[str, Any] = json.loads(_ROOFLINES.read_text(encoding="utf-8"))
    return found


_ROOFLINES = Path(__file__).with_name("rooflines.json")


def _roofline_share(
    parts: PlannedParts, kind: Kind, balance: float, compiled: bool, recomputed: bool, sharded: bool
) -> float:
    """Return the share of a peak by the roofline of the model whose layers are alike, in packed rows.

    Divided, eager and recomputed layers compute what they compute whole. Only of compiled ones there is an
    entry of its own, with the larger device batch that then fits.
    """
    family = LANGUAGE_FAMILIES.get(parts.language.family, LanguageFamily())
    model: Model = "C-TL" if family.gated else "Sig-Phi"
    form = ("compiled" if compiled else "eager") + (", recomputed" if recomputed else "")
    name, gpu = f"{model} {kind} packed {form}", GPUS[ROOFLINE_GPU]
    found = (rooflines().get(f"{name}, sharded") if sharded else None) or rooflines()[name]
    products = found["product_seconds"] * gpu.half_flops / found["executed_flops"]
    moved = found["memory_seconds"] * BANDWIDTH_SHARE * gpu.bandwidth / found["executed_flops"]
    scaled = moved * WIDTHS[model] / parts.language.width
    return float(1 / (products + scaled * balance / BANDWIDTH_SHARE))


def start_up_seconds(model_bytes: float, num_records: int, num_images: float, num_gpus: int) -> float:
    """Return the seconds of a first start before the first step, with images looked at (``check_images``)."""
    cores = CORES_PER_GPU * num_gpus
    once = (num_records * RECORD_SECONDS + num_images * DECODING_SECONDS) / cores
    return START_SECONDS + model_bytes / DISK_BYTES_PER_SECOND + once


def copy_seconds(num_bytes: float, bandwidth: float) -> float:
    """Return the seconds in which kernels read and write so many bytes of a memory of this bandwidth."""
    return num_bytes / (BANDWIDTH_SHARE * bandwidth)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What each GPU sends, and receives, in a micro-batch of a divided stage, in bytes."""

    sent: float
    exposed: float
    """Of it, what no computation can hide: see ``count_exchange``."""
    copied: float
    """Read and written beside: weights from where they were gathered, gradients to where they are reduced."""

    def seconds(self, gpu: Gpu, computing: float) -> float:
        """Return what a micro-batch of so many seconds takes longer."""
        speed = LINK_SHARE * gpu.link
        waiting = max(self.exposed / speed, self.sent / speed - computing)
        return waiting + copy_seconds(self.copied, gpu.bandwidth)


def count_exchange(
    parts: PlannedParts, stage: Stage, sharding: Sharding, num_gpus: int, is_half: bool
) -> Exchange:
    """Count what FSDP2 moves in a micro-batch, as ``tinyllava.training.sharding.shard`` divides the model.

    Trained weights are gathered and their gradients reduced, in fp32. With ``all`` what is frozen is gathered
    too, but for a frozen encoder, and the layers a second time for the backward pass. FSDP gathers a layer
    while the one before it computes, and reduces its gradients in the same way. The first gather and the
    last reduction overlap with nothing (PyTorch's FSDP Notes): here embedding, head and connector, which are
    one group, and one layer.
    """
    gathered = reduced = exposed = 0.0
    frozen_bytes = 2 if is_half else 4
    for component, size in parts.sizes.items():
        tune, in_layers = stage.tune(component), sum(size.layers)
        trained = count_trained(size, tune)
        is_whole = (
            sharding == "gradients" or tune.bits < 16 or (component == "vision_encoder" and not trained)
        )
        outer = max(0, trained - in_layers) if tune.kind == "full" else 0
        outer_bytes, layer_bytes = 4.0 * outer, 4.0 * (trained - outer)
        if not is_whole and tune.kind != "full":
            outer_bytes += frozen_bytes * (size.total - in_layers)
            layer_bytes += frozen_bytes * max(0, in_layers - trained * (tune.kind == "from_layer"))
        gathered += outer_bytes + layer_bytes * (2 if sharding == "all" else 1)
        reduced += 4.0 * trained
        of_layer = (layer_bytes + 4.0 * (trained - outer)) / max(1, len(size.layers))
        exposed += outer_bytes + 4.0 * outer + of_layer
    sent = 1 - 1 / num_gpus
    return Exchange(sent=sent * (gathered + reduced), exposed=sent * exposed, copied=2 * (gathered + reduced))


def checkpoint_seconds(num_bytes: float, number: int, computing: float) -> float:
    """Return the seconds in which a stage waits for its checkpoints.

    It waits for the copy of each. A checkpoint is written while the steps up to the next are computed, which
    takes ``computing`` seconds for all of them; what is left of the writing then is waited for.
    """
    if not number:
        return 0.0
    copied, written = num_bytes / HOST_BYTES_PER_SECOND, num_bytes / DISK_BYTES_PER_SECOND
    return number * copied + (number - 1) * max(0.0, written - computing / number) + written


def image_seconds(num_images: float, num_gpus: int, num_workers: int) -> float:
    """Return the seconds in which the workers of all processes prepare the images of a stage."""
    return num_images * PREPARING_SECONDS / (num_gpus * max(1, num_workers))


def read_measured(path: Path) -> tuple[dict[str, Any], Gpu]:
    """Return what ``benchmarks/gpu.py --json-file`` wrote, and the GPU that it ran on.

    Raises:
        ConfigError: not such a file, one of toy sizes, or of a GPU that is not in ``GPUS``.
    """
    found = read_object(path) or {}
    if found.get("tiny"):
        raise ConfigError(
            f"{path}: written with --tiny, whose toy model says nothing about speed. Run "
            "`python benchmarks/gpu.py --json-file FILE` on a GPU."
        )
    device = str(found.get("device", ""))
    gpu = find_gpu(device)
    if gpu is None:
        known = ", ".join(GPUS)
        raise ConfigError(
            f"{path}: measured on {device or 'nothing that it names'}; known are {known}. Give a file that "
            "`python benchmarks/gpu.py --json-file FILE` wrote on one of them."
        )
    return found, gpu


def compare_measured(
    path: Path, found: Mapping[str, Any], shares: Mapping[tuple[Model, Kind, bool], float]
) -> dict[Kind, float]:
    """Return the part of the roofline's speed that a measurement reached, the mean of its models.

    Args:
        found: what ``benchmarks/gpu.py --json-file`` wrote into ``path``.
        shares: of the measured GPU's peak that useful operations reach by the roofline, by model, stage and
            whether activations are recomputed.

    Raises:
        ConfigError: there is no share of a GPU's peak in it.
    """
    reached: dict[Kind, list[float]] = {"pretrain": [], "finetune": []}
    for (model, kind, recomputed), share in shares.items():
        measured: Any = found.get("parts", {}).get(f"train {model}", {}).get(kind, {})
        if measured.get("recomputed") is recomputed and "mfu" in measured:
            reached[kind].append(measured["mfu"] / share)
    for kind, values in reached.items():
        if not values:
            raise ConfigError(
                f"{path}: no share of the peak of {kind} (parts, train C-TL or train Sig-Phi, {kind}, mfu). "
                f"Run `python benchmarks/gpu.py --json-file {path}` on a GPU of `tinyllava show gpus`."
            )
    return {kind: sum(values) / len(values) for kind, values in reached.items()}
