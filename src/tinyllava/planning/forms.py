"""In which form a stage runs on a device: device batch, accumulation, recomputed activations.

Paper: none. The samples of an optimizer step are those of the recipe in every form.
"""

from dataclasses import dataclass

from tinyllava.config import Hardware, Stage
from tinyllava.planning.memory import Memory, PlannedParts, estimate_memory

USABLE_MEMORY = 0.92
"""Share of a GPU's memory that tensors can have beside the CUDA context and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A stage in one form of training on one GPU."""

    device_batch_size: int
    """Largest that fits and divides the global batch, or the one asked for."""
    accumulation: int
    """Micro-batches for each optimizer step, so that the global batch is kept."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    memory: Memory
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The properties of the devices that the choice of a form needs."""

    memory_bytes: int
    """Of one device."""
    is_half: bool
    """Whether a step computes in bf16 or fp16."""
    num_ranks: int
    most_samples: int = 0
    """Bound of the device batch beside memory; 0 means none."""


def choose_forms(
    parts: PlannedParts,
    stage: Stage,
    hardware: Hardware,
    machine: Machine,
    longest_tokens: int,
    longest_supervised: int,
) -> list[Form]:
    """Return the forms in which a stage can run, the best first, each smaller than the one before.

    The best is the largest device batch that fits. Activations are recomputed only where fewer than two
    samples fit otherwise: with one the host can hardly keep a GPU busy, and the third of time is paid for.
    The rest is for a device on which the estimate turns out too low. If nothing fits, the smallest is first.
    """
    per_rank = max(1, stage.global_batch_size // machine.num_ranks)
    most = machine.most_samples or per_rank
    sizes = [size for size in range(min(per_rank, most), 0, -1) if per_rank % size == 0]
    if hardware.device_batch_size:
        sizes = [hardware.device_batch_size]

    def form(size: int, checkpointing: bool) -> Form:
        memory = estimate_memory(
            parts,
            stage,
            batch=size,
            num_tokens=longest_tokens,
            num_supervised=longest_supervised,
            bf16=machine.is_half,
            checkpointing=checkpointing,
            compiled=hardware.compile,
            sharding=hardware.sharding,
            num_ranks=machine.num_ranks,
            accumulates=size < per_rank,
        )
        return Form(
            device_batch_size=size,
            accumulation=per_rank // size,
            checkpointing=checkpointing,
            memory=memory,
            fits=memory.peak <= USABLE_MEMORY * machine.memory_bytes,
        )

    wanted = hardware.gradient_checkpointing
    kept = [] if wanted is True else [form(size, False) for size in sizes]
    if wanted is None:  # one sample at a time only where there are no two
        kept = [f for f in kept if f.device_batch_size > 1 or len(sizes) == 1]
    recomputed = [] if wanted is False else [form(size, True) for size in sizes]
    ordered = [f for f in kept if f.fits] + [f for f in recomputed if f.fits]
    return ordered or [(kept + recomputed)[-1]]
