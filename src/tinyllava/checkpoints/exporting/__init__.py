"""Export checkpoints with a model card: transformers' LLaVA, vLLM, llama.cpp, ONNX, browser page, Hub."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from httpx2 import HTTPError  # what the hub's client is built on
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from tinyllava.checkpoints.exporting.card import read_provenance, write_card
from tinyllava.checkpoints.exporting.compare import (
    compare_with_ours,
    compare_with_run,
    compare_with_stock,
    example_logits,
)
from tinyllava.checkpoints.exporting.formats import (
    NOT_MEASURED,
    Format,
    Layout,
    format_rows,
    refuse_what_does_not_fit,
)
from tinyllava.checkpoints.exporting.gguf import Quantized
from tinyllava.checkpoints.exporting.llama_cpp import Agreement, describe_gguf, write_and_compare
from tinyllava.checkpoints.exporting.merge import fold_image_scale, open_merged
from tinyllava.checkpoints.exporting.onnx import PACKAGES, write_onnx
from tinyllava.checkpoints.exporting.stock import describe_versions, write_stock
from tinyllava.checkpoints.exporting.web import fetch_runtime, write_web
from tinyllava.errors import CheckpointError, MissingExtraError, first_line, require
from tinyllava.files import bytes_below
from tinyllava.inference.logits import refuse_broken_weights
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.quantised import QUANTISED_FILE, check_bits, quantise_language_model, save_quantised
from tinyllava.model.quiet import keeping_random_state, transformers_errors_only, without_loading_bars
from tinyllava.model.rebuild import whole_model
from tinyllava.parts.folders import check_checkpoint, check_new_folder, written_whole

__all__ = ["Exported", "export_checkpoint", "measure_format"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The written folder, and how closely it agrees with the checkpoint."""

    folder: Path
    largest_difference: float | None
    """Largest logit difference between the checkpoint and the reopened folder, on a prompt with an image.

    For GGUF, the largest difference of a log-probability with the written weights; None without xllamacpp."""
    agreement: Agreement | None = None
    """For GGUF: every difference measured in llama.cpp."""
    measured: str = ""
    """The agreement in words, for formats whose arithmetic differs from the checkpoint's."""
    run_difference: float | None = None
    """The same between adapters on their base and the finished model of their run; None without a run."""

    @property
    def in_short(self) -> str:
        """The agreement in short, for a table."""
        if self.agreement:
            text, image = self.agreement.text_rounding, self.agreement.image_rounding
            return f"log-probabilities within {text:.2g} (text) and {image:.2g} (image)"
        if self.largest_difference is None:
            return NOT_MEASURED
        return f"logits within {self.largest_difference:.2g}"


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
    bits: int = 16,
) -> Exported:
    """Write a checkpoint in a layout, reopen it as its reader would, and compare.

    Args:
        checkpoint: a tinyllava checkpoint, or a peft adapter of one.
        folder: where to write; it must not exist, or be empty. It is written atomically.
        layout: tinyllava; llava: transformers' LlavaForConditionalGeneration; vllm: the same within vLLM's
            limits; onnx: ONNX graphs; web: ONNX graphs with a page that answers in the browser; gguf: a pair
            of files for llama.cpp.
        base: base checkpoint of an adapter; None means the one that the adapter names.
        name: name of the model in its card; empty means the folder's name.
        results: results.json with scores for the card; None means the one next to the weights (or adapter).
        dtype: type of the weights; auto keeps the checkpoint's. Not for onnx, web and gguf.
        precision: type of the weights for onnx and web.
        quantized: type of the language model's matrices for gguf.
        bits: 4 or 8 quantises the linear layers of the language model; only for tinyllava.

    Raises:
        CheckpointError: the folder is not a checkpoint, the layout cannot hold the model, or results differ.
    """
    checkpoint, folder = whole_model(checkpoint), Path(folder)
    check_new_folder(folder)
    check_bits(bits)
    _refuse_before_loading(checkpoint, layout)
    is_exact = layout in ("onnx", "web", "gguf")
    model, processor, source = open_merged(checkpoint, base, torch.float32 if is_exact else dtype)
    refuse_what_does_not_fit(model.config, layout)
    refuse_broken_weights(model)
    adapter = checkpoint if source != checkpoint else None
    run_difference = compare_with_run(adapter, model, processor) if adapter else None
    if layout in ("llava", "vllm", "gguf"):
        fold_image_scale(model)
    provenance = read_provenance(source, results, adapter)
    with written_whole(folder) as partial:
        if layout == "gguf":
            written, told = _write_gguf(partial, model, processor, name or folder.name, quantized)
        else:
            written = _write(partial, layout, model, processor, precision, max_shard_size, folder.name, bits)
            is_stock = layout in ("llava", "vllm")
            told = describe_versions(model.config, written.largest_difference or 0.0) if is_stock else ""
        formats = format_rows(model.config, layout, written.in_short)
        card = write_card(name or folder.name, layout, model, provenance, formats, written.measured, told)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return replace(written, folder=folder, run_difference=run_difference)


def measure_format(checkpoint: Path, row: Format, base: Path | None = None) -> Format:
    """Export in a format, into a folder that goes away, and return the row with its real size and agreement.

    A model that the comparison refuses gets the reason.
    """
    if row.reasons:
        return row
    chosen = {"onnx": "precision", "web": "precision", "gguf": "quantized"}.get(row.layout)
    kind: Any = {chosen: row.kind} if chosen else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "exported"
        try:
            exported = export_checkpoint(checkpoint, folder, layout=row.layout, base=base, **kind)
        except (CheckpointError, MissingExtraError) as error:
            return replace(row, reasons=(str(error).replace(f"{folder}: not exported: ", ""),))
        num_bytes = bytes_below(folder)
    return replace(row, num_bytes=num_bytes, agreement=exported.in_short)


def _write(
    folder: Path,
    layout: Layout,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    precision: Literal["fp32", "fp16", "int8"],
    max_shard_size: str,
    name: str,
    bits: int,
) -> Exported:
    """Write and compare."""
    if layout in ("onnx", "web"):
        if layout == "web":
            graphs = write_web(folder, model, processor, name, precision)
        else:
            graphs = write_onnx(folder, model, processor, precision)
        return Exported(folder=folder, largest_difference=graphs.largest_difference, measured=str(graphs))
    if layout == "tinyllava":
        return _write_own(folder, model, processor, max_shard_size, bits)
    write_stock(folder, model, processor, max_shard_size)
    return Exported(folder=folder, largest_difference=compare_with_stock(folder, model, processor))


def _write_own(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    max_shard_size: str,
    bits: int,
) -> Exported:
    """Write the tinyllava layout, quantised first if requested, and compare."""
    for config in (model.config.text_config, model.config.vision_config):
        config.name_or_path = ""  # the folder of somebody's machine
    measured, tensors, difference = "", None, 0.0
    if bits < 16:
        expected = example_logits(model, processor)
        quantise_language_model(model, bits)
        difference = float((example_logits(model, processor) - expected).abs().max())
        measured = (
            f"language model in {bits} bits; largest logit difference {difference:.2g} (standard "
            f"deviation of the logits: {float(expected.std()):.2g})"
        )
        held = save_quantised(model, folder / QUANTISED_FILE)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in held}
    model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=tensors)
    processor.save_pretrained(folder)
    difference = max(difference, compare_with_ours(folder, model, processor))
    return Exported(folder=folder, largest_difference=difference, measured=measured)


def _write_gguf(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    name: str,
    quantized: Quantized,
) -> tuple[Exported, str]:
    """Write and compare; return the card's sections too."""
    agreement = write_and_compare(folder, model, processor, name, quantized)
    difference = max(agreement.text, agreement.image) if agreement else None
    exported = Exported(folder=folder, largest_difference=difference, agreement=agreement)
    return exported, describe_gguf(processor, quantized, agreement)


def _refuse_before_loading(checkpoint: Path, layout: Layout) -> None:
    """Check only the config.

    Raises:
        MissingExtraError: a package that writes the layout is not installed.
        PackageError: the runtime of a page cannot be downloaded.
        CheckpointError: no checkpoint, or a model that the layout cannot hold.
    """
    for package in PACKAGES if layout in ("onnx", "web") else ():
        require(package, "onnx", "writes and opens ONNX graphs")
    if layout == "web":
        fetch_runtime()
    if not (checkpoint / "adapter_config.json").is_file():  # an adapter's base is not known yet
        check_checkpoint(checkpoint)
        refuse_what_does_not_fit(TinyLlavaConfig.from_pretrained(checkpoint), layout)


_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check_repository(repository: str) -> None:
    """Fail before long work if a repository's name is invalid, or no user is logged in.

    Raises:
        CheckpointError: not of the form owner/name, characters that the hub does not allow, or no token.
    """
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise CheckpointError(f"--push {repository}: {error}") from error
    if repository.count("/") != 1:
        raise CheckpointError(f"--push {repository}: expected owner/name, for example alice/my-model.")
    if get_token() is None:
        raise CheckpointError(f"--push {repository}: not logged in; {_LOG_IN}.")


def push(folder: Path, repository: str, *, private: bool = False, message: str = "Upload model") -> str:
    """Create the repository if needed, upload a folder in one commit, and return its URL.

    Raises:
        CheckpointError: not logged in, not allowed, or no connection.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        fix = _LOG_IN if status in (401, 403) else "try again later"
        said = first_line(error.server_message or error).rstrip(".")
        raise CheckpointError(f"{repository}: the hub answered {status}: {said}; {fix}.") from error
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        cause = error.__cause__ or error  # of an upload that broke off: what broke it
        said = first_line(cause).rstrip(".")
        raise CheckpointError(
            f"{repository}: could not be pushed ({type(cause).__name__}: {said}); check "
            "the network and try again."
        ) from error
    return str(commit.commit_url)
