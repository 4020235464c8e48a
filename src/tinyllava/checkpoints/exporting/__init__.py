"""Write checkpoints for others: transformers' own LLaVA, vLLM, a repository on a hub, with a model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tinyllava.checkpoints.exporting.card import read_provenance, write_card
from tinyllava.checkpoints.exporting.compare import compare_with_ours, compare_with_run, compare_with_stock
from tinyllava.checkpoints.exporting.merge import open_merged
from tinyllava.checkpoints.exporting.onnx import refuse_what_onnx_cannot_hold, write_onnx
from tinyllava.checkpoints.exporting.stock import refuse_what_stock_cannot_hold, write_stock
from tinyllava.model.quiet import keeping_random_state, transformers_errors_only, without_loading_bars
from tinyllava.parts.folders import check_new_folder, written_whole

__all__ = ["Exported", "export_checkpoint"]

Layout = Literal["tinyllava", "llava", "vllm", "onnx"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written and how exactly it computes what the checkpoint does."""

    folder: Path
    largest_difference: float
    """Of a logit, over a prompt with an image, between the checkpoint and the folder opened anew."""
    measured: str = ""
    """Agreement in more words, for a format whose arithmetic is not the checkpoint's."""
    run_difference: float | None = None
    """The same between adapters on their base and the finished model of their run; None without one."""


@keeping_random_state()
@without_loading_bars()
@transformers_errors_only()  # what the loaders would warn of is compared
def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    layout: Layout = "tinyllava",
    base: str | Path | None = None,
    name: str = "",
    results: Path | None = None,
    dtype: torch.dtype | str = "auto",
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    max_shard_size: str = "5GB",
) -> Exported:
    """Write a checkpoint in a layout, open it again as its reader would, and compare.

    Args:
        checkpoint: a folder of ours, or a peft adapter over one.
        folder: where to write; it must not exist, or be empty. It appears whole or not at all.
        layout: ours; transformers' LlavaForConditionalGeneration; the same for vLLM, with vLLM's limits; ONNX
            graphs.
        base: the checkpoint below an adapter; None takes the one that the adapter names.
        name: what the model card calls the model; empty means the folder's name.
        results: results.json with scores for the card; None takes one beside the weights (or the adapter).
        dtype: type of the weights; auto keeps theirs.
        precision: of ONNX graphs, in place of ``dtype``.

    Raises:
        CheckpointError: no checkpoint, a model that the layout cannot hold, or one that answers otherwise.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    check_new_folder(folder)
    model, processor, source = open_merged(checkpoint, base, torch.float32 if layout == "onnx" else dtype)
    if layout == "onnx":
        refuse_what_onnx_cannot_hold(model.config)
    elif layout != "tinyllava":
        refuse_what_stock_cannot_hold(model.config, layout)
    adapter = checkpoint if source != checkpoint else None
    run_difference = compare_with_run(adapter, model, processor) if adapter else None
    provenance = read_provenance(source, results, adapter)
    measured = ""
    with written_whole(folder) as partial:
        if layout == "tinyllava":
            for config in (model.config.text_config, model.config.vision_config):
                config.name_or_path = ""  # the folder of somebody's machine
            model.save_pretrained(partial, max_shard_size=max_shard_size)
            processor.save_pretrained(partial)
            difference = compare_with_ours(partial, model, processor)
        elif layout == "onnx":
            agreement = write_onnx(partial, model, processor, precision)
            difference, measured = agreement.largest_difference, str(agreement)
        else:
            write_stock(partial, model, processor, max_shard_size)
            difference = compare_with_stock(partial, model, processor)
        card = write_card(name or folder.name, layout, model, provenance, measured)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Exported(
        folder=folder, largest_difference=difference, run_difference=run_difference, measured=measured
    )
