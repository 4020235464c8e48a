"""Write checkpoints for others: transformers' LLaVA, vLLM, llama.cpp, a hub; with a model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tinyllava.checkpoints.exporting.card import read_provenance, write_card
from tinyllava.checkpoints.exporting.compare import compare_with_ours, compare_with_run, compare_with_stock
from tinyllava.checkpoints.exporting.gguf import Quantized, refuse_what_gguf_cannot_hold
from tinyllava.checkpoints.exporting.llama_cpp import Agreement, describe_gguf, write_and_compare
from tinyllava.checkpoints.exporting.merge import open_merged
from tinyllava.checkpoints.exporting.onnx import refuse_what_onnx_cannot_hold, write_onnx
from tinyllava.checkpoints.exporting.stock import refuse_what_stock_cannot_hold, write_stock
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.quiet import keeping_random_state, transformers_errors_only, without_loading_bars
from tinyllava.parts.folders import check_checkpoint, check_new_folder, written_whole

__all__ = ["Exported", "export_checkpoint"]

Layout = Literal["tinyllava", "llava", "vllm", "onnx", "gguf"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written and how exactly it computes what the checkpoint does."""

    folder: Path
    largest_difference: float | None
    """Of a logit, over a prompt with an image, between the checkpoint and the folder opened anew.

    For GGUF of a log-probability, with the weights as written; None where xllamacpp is not installed."""
    agreement: Agreement | None = None
    """For GGUF: every difference that was measured in llama.cpp."""
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
    quantized: Quantized = "f32",
) -> Exported:
    """Write a checkpoint in a layout, open it again as its reader would, and compare.

    Args:
        checkpoint: a folder of ours, or a peft adapter over one.
        folder: where to write; it must not exist, or be empty. It appears whole or not at all.
        layout: ours; transformers' LlavaForConditionalGeneration; the same for vLLM, with vLLM's limits; ONNX
            graphs; a pair of GGUF files for llama.cpp.
        base: the checkpoint below an adapter; None takes the one that the adapter names.
        name: what the model card calls the model; empty means the folder's name.
        results: results.json with scores for the card; None takes one beside the weights (or the adapter).
        dtype: type of the weights; auto keeps theirs. Not for ONNX and GGUF.
        precision: of ONNX graphs.
        quantized: type of the language model's matrices in GGUF.

    Raises:
        CheckpointError: no checkpoint, a model that the layout cannot hold, or one that answers otherwise.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    check_new_folder(folder)
    _refuse_before_loading(checkpoint, layout)
    is_exact = layout in ("onnx", "gguf")
    model, processor, source = open_merged(checkpoint, base, torch.float32 if is_exact else dtype)
    _refuse_what_does_not_fit(model.config, layout)
    adapter = checkpoint if source != checkpoint else None
    run_difference = compare_with_run(adapter, model, processor) if adapter else None
    provenance = read_provenance(source, results, adapter)
    with written_whole(folder) as partial:
        if layout == "gguf":
            agreement = write_and_compare(partial, model, processor, name or folder.name, quantized)
            told = describe_gguf(processor, quantized, agreement)
            found = (max(agreement.text, agreement.image) if agreement else None), ""
        else:
            agreement, told = None, ""
            found = _write(partial, layout, model, processor, precision, max_shard_size)
        card = write_card(name or folder.name, layout, model, provenance, found[1], told)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Exported(
        folder=folder,
        largest_difference=found[0],
        run_difference=run_difference,
        measured=found[1],
        agreement=agreement,
    )


def _write(
    folder: Path,
    layout: Layout,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    precision: Literal["fp32", "fp16", "int8"],
    max_shard_size: str,
) -> tuple[float | None, str]:
    """Write and compare; return the largest difference of a logit, and more words on it."""
    if layout == "onnx":
        graphs = write_onnx(folder, model, processor, precision)
        return graphs.largest_difference, str(graphs)
    if layout == "tinyllava":
        for config in (model.config.text_config, model.config.vision_config):
            config.name_or_path = ""  # the folder of somebody's machine
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        return compare_with_ours(folder, model, processor), ""
    write_stock(folder, model, processor, max_shard_size)
    return compare_with_stock(folder, model, processor), ""


def _refuse_before_loading(checkpoint: Path, layout: Layout) -> None:
    if layout == "gguf" and not (checkpoint / "adapter_config.json").is_file():
        check_checkpoint(checkpoint)  # the base of an adapter is known once it is opened
        _refuse_what_does_not_fit(TinyLlavaConfig.from_pretrained(checkpoint), layout)


def _refuse_what_does_not_fit(config: TinyLlavaConfig, layout: Layout) -> None:
    if layout == "gguf":
        refuse_what_gguf_cannot_hold(config)
    elif layout == "onnx":
        refuse_what_onnx_cannot_hold(config)
    elif layout != "tinyllava":
        refuse_what_stock_cannot_hold(config, layout)
