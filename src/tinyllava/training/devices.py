"""How a stage uses the devices of this run: device batch, activation checkpointing, workers, and a trial.

Paper: section 4.1.2 gives the samples of an optimizer step, which never depend on these choices.
"""

import dataclasses
import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from numpy.typing import NDArray
from torch import nn

from tinyllava.config import Hardware, Run, Stage
from tinyllava.data.batches import PackedBatches
from tinyllava.data.dataset import Collator, Examples
from tinyllava.data.reporting import say
from tinyllava.data.store import image_counts
from tinyllava.data.workers import PAGES_BYTES, PREFETCHED, usable_workers
from tinyllava.errors import TinyLlavaError, TrainingError
from tinyllava.model.compat import lonely_group
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.planning.forms import Form, Machine, choose_forms
from tinyllava.planning.memory import Memory
from tinyllava.planning.plan import plan_parts
from tinyllava.training.compiling import recompute
from tinyllava.training.packing import check_packing, pack_stage
from tinyllava.training.precision import HALF, choose_precision, computing_in
from tinyllava.training.prepare import Prepared
from tinyllava.training.sharding import choose_sharding, local_part, shard
from tinyllava.training.trainer import MOST_SAMPLES, micro_batch
from tinyllava.training.writing import main_memory


def fit_hardware(
    run: Run,
    stage: Stage,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    prepared: Prepared,
) -> tuple[Hardware, int, PackedBatches | None]:
    """Return the run's hardware settings with device batch, checkpointing and workers settled.

    The choice is that of the plan which `tinyllava show` prints, for the longest sample that is here. On a
    GPU the largest micro-batches are run before the first step. If they do not fit, the next smaller form is
    tried, in all processes alike.

    Returns:
        The settings; the number of batches that each worker prepares ahead, together the next step's; and
        this process's micro-batches if samples are packed.

    Raises:
        ConfigError: packing was asked for and cannot be.
        TrainingError: not even the smallest form fits, or the one that was asked for.
    """
    forms = _possible_forms(run, stage, prepared)
    packs = run.hardware.packing
    if packs:
        is_divided = choose_sharding(run.hardware) != "none"
        check_packing(model, choose_precision(run.hardware.precision), is_divided=is_divided)
    for form in forms:
        packed = pack_stage(form.device_batch_size, run, stage, prepared.examples) if packs else None
        if survives(form, run, model, processor, prepared, packed):
            break
    else:
        smallest = forms[-1]
        can_divide = PartialState().num_processes > 1 and run.hardware.sharding != "all"
        raise TrainingError(out_of_memory(smallest.device_batch_size, smallest.checkpointing, can_divide))
    size, checkpointing = form.device_batch_size, form.checkpointing
    if form is not forms[0]:
        _say(
            f"out of memory with {_describe(forms[0])}; training with {_describe(form)} instead, still "
            f"{stage.global_batch_size} samples per step"
        )
    recompute(model, checkpointing)
    hardware = dataclasses.replace(run.hardware, device_batch_size=size, gradient_checkpointing=checkpointing)
    return *_limit_workers(stage, hardware, processor, prepared, packed), packed


def _describe(form: Form) -> str:
    kept = "recomputed" if form.checkpointing else "kept"
    return f"a device batch of {form.device_batch_size} and activations {kept}"


def _possible_forms(run: Run, stage: Stage, prepared: Prepared) -> Sequence[Form]:
    """Return the forms of the plan, the best first; for parts that nothing can be planned of, usual ones."""
    hardware, examples = run.hardware, prepared.examples
    usual = micro_batch(stage, hardware)
    if stage.loss_norm == "micro":  # the size decides the result, so it does not depend on the machine
        hardware = dataclasses.replace(hardware, device_batch_size=usual)
    machine = Machine(
        memory_bytes=min(gather_object([_memory_bytes()])),
        is_half=choose_precision(hardware.precision) in HALF,
        num_ranks=PartialState().num_processes,
        most_samples=0 if can_run_out() else MOST_SAMPLES,
    )
    try:
        parts = plan_parts(run)
    except TinyLlavaError:  # a checkpoint need not say what its parts are
        sizes = [n for n in range(usual, 0, -1) if usual % n == 0 and hardware.device_batch_size in (0, n)]
        wanted = hardware.gradient_checkpointing
        each = itertools.product([False, True] if wanted is None else [wanted], sizes)
        per_rank = stage.global_batch_size // machine.num_ranks
        return [_unplanned(size, per_rank // size, checkpointing) for checkpointing, size in each]
    return choose_forms(
        parts, stage, hardware, machine, max(examples.lengths), max(examples.supervised_lengths)
    )


def _unplanned(size: int, accumulation: int, checkpointing: bool) -> Form:
    nothing = Memory(weights=0, optimizer=0, gradients=0, activations=0, accumulates=False)
    return Form(
        device_batch_size=size,
        accumulation=accumulation,
        checkpointing=checkpointing,
        memory=nothing,
        fits=True,
    )


def _memory_bytes() -> int:
    """Memory of this process's device; on a CPU its share of the machine's, or of the container's limit."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(PartialState().device).total_memory)
    return main_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _limit_workers(
    stage: Stage,
    hardware: Hardware,
    processor: TinyLlavaProcessor,
    prepared: Prepared,
    packed: PackedBatches | None,
) -> tuple[Hardware, int]:
    """Use fewer workers if shared memory cannot hold their batches, and report this.

    The Trainer takes all micro-batches of a step before it computes the first. They are held outside the
    shared memory (``StageTrainer.get_batch_samples``), so that only those of the next step are in it.
    """
    examples = prepared.examples
    counts = image_counts(examples.conversations)
    image_bytes = examples.packing.image_bytes if examples.packing else 4 * 3 * processor.image_size_px**2
    if examples.features is not None:
        image_bytes = examples.features.row_bytes
    size = hardware.device_batch_size
    num_images = size * int(counts.max())
    tokens_bytes = 5 * 8 * size * max(examples.lengths)  # ids, mask, labels, places
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_held = 1  # the one that is taken
    if prepared.held_out:  # workers of a validation run beside those of the training, with ready batches
        num_held += PREFETCHED * hardware.num_workers + 1
    accumulation = -(-stage.global_batch_size // (size * PartialState().num_processes))
    if packed is not None:
        num_images = max(int(counts[part].sum()) for part in packed.of_all_epochs())
        accumulation = packed.num_passes
    num_bytes = num_images * image_bytes + tokens_bytes + PAGES_BYTES
    loading = usable_workers(hardware.num_workers, num_bytes, num_held, num_processes, accumulation)
    if loading.why:
        _say(loading.why)
    return dataclasses.replace(hardware, num_workers=loading.num_workers), loading.prefetch_factor


def _say(text: str) -> None:
    if PartialState().is_main_process:
        say(text)


def out_of_memory(device_batch_size: int, checkpointing: bool, can_divide: bool = False) -> str:
    """Return advice for a device that ran out of memory."""
    advice = [] if device_batch_size == 1 else [f"--hardware.device-batch-size {device_batch_size // 2}"]
    advice += [] if checkpointing else ["--hardware.gradient-checkpointing True"]
    advice += ["--hardware.sharding all"] if can_divide else []
    advice += ["a recipe with adapters (lora, qlora)", "a smaller max_length_tokens"]
    return (
        f"out of memory with a device batch of {device_batch_size}"
        f"{' and recomputed activations' if checkpointing else ''}. Try {', '.join(advice[:-1])} or "
        f"{advice[-1]}; `tinyllava show` estimates each."
    )


def can_run_out() -> bool:
    """Whether this device says that its memory is full; on a CPU the system ends the process instead."""
    return bool(PartialState().device.type != "cpu")


def survives(
    form: Form,
    run: Run,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    prepared: Prepared,
    packed: PackedBatches | None = None,
) -> bool:
    """Run the largest micro-batches of a form forward and back, and leave everything as it was before.

    Memory for the optimizer's moments is taken meanwhile, and gradients of one pass lie there in the next.
    Each process does so alone, also with its share of a divided model: if one ran out of memory in the middle
    of a pass, the others would wait for it. Then they agree.
    """
    if not can_run_out():
        return True
    device = PartialState().device
    recompute(model, form.checkpointing)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        tried, sharding = model, choose_sharding(run.hardware)
        group = stack.enter_context(lonely_group()) if sharding != "none" else None
        try:
            tried = model.to(device) if group is None else shard(model, sharding, group)
            batches = _largest_batches(form.device_batch_size, processor, prepared, packed)
            _run_passes(tried, batches, prepared.examples, run.hardware.precision)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        del tried
        model.zero_grad(set_to_none=True)
        gc.collect()  # a divided model refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return all(gather_object([fits]))


def _run_passes(
    model: nn.Module, batches: Iterator[dict[str, Any]], examples: Examples, precision: str
) -> None:
    device = PartialState().device
    trained = [local_part(p) for p in model.parameters() if p.requires_grad]
    moments = [torch.empty_like(tensor, device=device) for tensor in [*trained, *trained]]
    for batch in batches:
        inputs = examples.unpacked(send_to_device(batch, device))
        with computing_in(choose_precision(precision), device):
            loss = model(**inputs).loss
        loss.backward()
        del inputs, loss
    del moments


def _largest_batches(
    size: int, processor: TinyLlavaProcessor, prepared: Prepared, packed: PackedBatches | None
) -> Iterator[dict[str, Any]]:
    """Yield the batches of ``largest_parts``, one after the other, as the model takes them."""
    examples = prepared.examples
    counts = image_counts(examples.conversations)
    measures = [np.array(of) for of in (examples.lengths, counts, examples.supervised_lengths)]
    collate = Collator(processor.tokenizer.pad_token_id, processor.image_token_id, packed is not None)
    for taken in largest_parts(size, measures, packed):
        batch = collate([examples[place] for place in taken])
        for name in ("sample_ids", "num_tokens", "attention_mask"):  # see StageTrainer
            batch.pop(name, None)
        yield batch


def largest_parts(
    size: int, measures: Sequence[NDArray[Any]], packed: PackedBatches | None = None
) -> list[list[int]]:
    """Return micro-batches of which none of any epoch has more tokens, images or supervised tokens.

    Padded ones hold those with most of each measure, once with the longest sample, to which they are padded.
    Packed ones are those of all epochs.

    Args:
        size: samples of a padded micro-batch.
        measures: tokens of each sample, then other numbers.
    """
    lengths = measures[0]
    if packed is None:
        orders = [np.lexsort((-lengths, -of)) for of in measures]
        longest = orders[0][0]
        orders += [np.array([longest, *order[order != longest]]) for order in orders[1:]]
        parts = [np.resize(order, size).tolist() for order in orders]
    else:
        found: list[tuple[int, list[int]]] = [(-1, [])] * (1 + len(measures))
        for part in packed.of_all_epochs():
            taken = [packed.size_of(part), *(int(of[part].sum()) for of in measures)]
            pairs = zip(found, taken, strict=True)
            found = [(most, part) if most > before[0] else before for before, most in pairs]
        parts = [part for _, part in found]
    return [part for number, part in enumerate(parts) if part not in parts[:number]]
