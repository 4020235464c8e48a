"""Micro-batches of a stage: padded, or packed into rows without padding if the model allows it.

Paper: none; the published code pads. Loss and gradients are equal, see ``tinyllava.model.modeling.Segments``.
"""

from contextlib import suppress
from math import ceil
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinyllava.config import Run, Stage
from tinyllava.data.batches import GroupedSampler, PackedBatches, PaddedBatches, RankBatches, pack
from tinyllava.data.dataset import Examples
from tinyllava.data.store import image_counts
from tinyllava.errors import ConfigError
from tinyllava.model.compat import CAUSAL, attention_of, packed_mask
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.training.compiling import not_compiled
from tinyllava.training.precision import computing_in

WINDOW = 50
"""Steps that ``length_windows`` sorts by length together."""


def check_packing(model: TinyLlavaForConditionalGeneration, precision: str, *, is_divided: bool) -> None:
    """Try whether the samples of a micro-batch can share a row, in all processes alike.

    Args:
        model: whole. It is tried on the device, or on the host if the device cannot hold it.
        is_divided: whether each process will hold a share of it (FSDP2). It is left on the host then.

    Raises:
        ConfigError: not every layer of the language model keeps samples apart.
    """
    found = None
    with not_compiled():
        with suppress(torch.OutOfMemoryError):
            found = keeps_apart(model, PartialState().device, precision)
        if found is None:
            found = keeps_apart(model, torch.device("cpu"), precision)
    if is_divided:
        model.to("cpu")
    if not all(gather_object([found])):
        raise ConfigError(
            f"hardware.packing: {model.config.text_config.model_type!r} has attention windows, or layers in "
            "which samples of one row would see each other; set hardware.packing False."
        )


def keeps_apart(
    model: TinyLlavaForConditionalGeneration, device: torch.device, precision: str = "fp32"
) -> bool:
    """Try whether a language model gives samples in one row what it gives each alone, gradients included."""
    language: Any = model.language_model
    if attention_of(language) != CAUSAL:
        return False
    model.eval()
    language.to(device)
    lengths = [5, 3, 9]
    rows = model.get_input_embeddings().weight.detach()
    embeds = rows[torch.arange(1, 1 + sum(lengths), device=device) % len(rows)].float().requires_grad_()
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    with computing_in(precision, device):
        together = language(
            inputs_embeds=embeds[None],
            attention_mask=packed_mask(lengths),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[0]
        alone = torch.cat(
            [language(inputs_embeds=e[None], use_cache=False)[0][0] for e in embeds.split(lengths)]
        )
    weights = torch.linspace(-1, 1, together.numel(), device=device).view_as(together)
    with_respect_to = [torch.autograd.grad((t.float() * weights).sum(), embeds)[0] for t in (together, alone)]
    pairs = [(together.detach(), alone.detach()), (with_respect_to[0], with_respect_to[1])]
    model.train()
    tolerance = 1e-3 if precision == "fp32" else 5e-2
    return all(float((a - b).float().norm() / b.float().norm()) < tolerance for a, b in pairs)


def pack_stage(device_batch_size: int, run: Run, stage: Stage, examples: Examples) -> PackedBatches:
    """Return the fewest micro-batches that need no more memory than padded ones of the longest samples.

    A sample takes its tokens; more where its share of the supervised tokens, or of the images that a trained
    encoder keeps activations of, is larger than its share of the tokens.
    """
    longest = max(examples.lengths)
    sizes = np.array(examples.lengths, dtype=np.int64)
    supervised = np.array(examples.supervised_lengths, dtype=np.int64)
    sizes = np.maximum(sizes, supervised * longest // max(1, supervised.max()))
    if stage.vision_encoder.trains:
        images = image_counts(examples.conversations).astype(np.int64)
        sizes = np.maximum(sizes, images * longest // max(1, images.max()))
    num_steps = -(-len(examples) // stage.global_batch_size)
    return pack(
        make_order(stage, examples, run.seed),
        sizes.tolist(),
        device_batch_size * longest,
        num_epochs=ceil(stage.max_steps / num_steps if stage.max_steps else stage.num_epochs),
        num_ranks=PartialState().num_processes,
        rank=PartialState().process_index,
    )


def pad_stage(
    device_batch_size: int, stage: Stage, examples: Examples, seed: int, num_ranks: int, rank: int
) -> PaddedBatches:
    """Return a rank's micro-batches of so many samples."""
    order = make_order(stage, examples, seed)
    return PaddedBatches(order, device_batch_size, num_ranks, rank, is_fixed=stage.loss_norm == "micro")


def make_order(stage: Stage, examples: Examples, seed: int) -> GroupedSampler:
    """Return the order of a stage's samples, whose steps do not depend on micro-batches and ranks."""
    by_modality = stage.group_by == "modality_length"
    return GroupedSampler(
        lengths=examples.lengths,
        with_image=(image_counts(examples.conversations) > 0).tolist() if by_modality else None,
        batch_size=stage.global_batch_size,
        seed=seed,
        window=WINDOW if stage.group_by == "length_windows" else 1,
        shuffles_steps=stage.group_by != "none",
    )


class Epochs(TrainerCallback):
    """Tells micro-batches which epoch begins; one that is resumed is counted in parts."""

    def __init__(self, batches: RankBatches) -> None:
        self.batches = batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Draw the order of this epoch."""
        self.batches.set_epoch(int(state.epoch or 0))
