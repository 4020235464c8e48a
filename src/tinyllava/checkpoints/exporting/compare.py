"""Compare an exported folder with the model: the same prompt, the same pixels, the same logits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tinyllava.config import run_from_json
from tinyllava.conversation import ImageRef, ask
from tinyllava.errors import CheckpointError
from tinyllava.inference.logits import check_logits
from tinyllava.model.assemble import open_checkpoint
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor

EXAMPLE_QUESTION = "What is in the picture?"
# Largest difference of a logit that rounding explains; the same operations in the same type give 0.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def compare_with_stock(
    folder: Path, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor
) -> float:
    """Open a folder with transformers alone and return the largest difference of a logit.

    Raises:
        CheckpointError: it does not open, or prompt, pixels or logits differ.
    """
    try:
        stock, report = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=model.dtype, output_loading_info=True, local_files_only=True
        )
        stock_processor = AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot open the exported folder: {error}") from error
    for fault in ("missing_keys", "unexpected_keys"):
        if report[fault]:
            raise CheckpointError(f"{folder}: {fault.replace('_', ' ')}: {', '.join(sorted(report[fault]))}.")
    image = example_image()
    content = [{"type": "image", "image": image}, {"type": "text", "text": EXAMPLE_QUESTION}]
    found = stock_processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = _encode(processor, image)
    _require_same("token ids", expected["input_ids"], found["input_ids"], 0, folder)
    _require_same("pixels", expected["pixel_values"], found["pixel_values"], 1e-5, folder)
    return _compare_logits(model, stock, expected, folder)


def compare_with_ours(
    folder: Path, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor
) -> float:
    """Open a folder of our layout and return the largest difference of a logit.

    Raises:
        CheckpointError: it does not open, or prompt, pixels or logits differ.
    """
    other, other_processor = open_checkpoint(folder, dtype=model.dtype, keep_bits=True)
    expected, found = (_encode(p, example_image()) for p in (processor, other_processor))
    _require_same("token ids", expected["input_ids"], found["input_ids"], 0, folder)
    _require_same("pixels", expected["pixel_values"], found["pixel_values"], 1e-5, folder)
    return _compare_logits(model, other, expected, folder)


def compare_with_run(
    adapters: Path, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor
) -> float | None:
    """Compare adapters merged into their base with the finished model of the run that trained them.

    Returns:
        The largest difference of a logit; None where there is no such model: adapters from elsewhere, or of a
        stage that was not the run's last.

    Raises:
        CheckpointError: they are not the same model.
    """
    stage, run = adapters.resolve().parents[1], adapters.resolve().parents[2]
    own = run / "model"
    if adapters.resolve().parent.name != "adapters" or not (own / "run.json").is_file():
        return None
    stages = run_from_json((own / "run.json").read_text(encoding="utf-8"), str(own / "run.json")).stages
    if list(stages)[-1] != stage.name:
        return None
    other, _ = open_checkpoint(own, dtype=model.dtype)
    inputs = _encode(processor, example_image())
    try:
        return _compare_logits(other, model, inputs, own)
    except CheckpointError as error:
        why = str(error).partition("not exported: ")[2]
        raise CheckpointError(
            f"{adapters} on the given base differs from {own}, the model of the same run: {why} Give the "
            "checkpoint "
            f"that the stage {stage.name!r} started from as --base, or export {own} itself (it is the only "
            "complete form for adapters on 4 or 8 bits and for adapters of two components)."
        ) from error


def example_image(width: int = 90, height: int = 61) -> Image.Image:
    """Return an image of noise, by default wider than high, so that padding and cropping show."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encode_example(processor: TinyLlavaProcessor) -> Any:
    """Return the example image with a question about it as the model's inputs."""
    return _encode(processor, example_image())


@torch.no_grad()
def example_logits(model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor) -> Tensor:
    """Return the logits [N, vocabulary] of the example."""
    inputs = encode_example(processor)
    given = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask", "pixel_values")}
    given["pixel_values"] = given["pixel_values"].to(model.dtype)
    logits: Tensor = model(**given).logits[0]
    return logits.float()


def _encode(processor: TinyLlavaProcessor, image: Image.Image) -> Any:
    text, _ = processor.render(ask(EXAMPLE_QUESTION, ImageRef(name="example")), open_answer=True)
    return processor(images=image, text=text)


@torch.no_grad()
def _compare_logits(model: Any, other: Any, inputs: Any, folder: Path) -> float:
    given = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask", "pixel_values")}
    given["pixel_values"] = given["pixel_values"].to(model.dtype)
    expected, found = model(**given).logits.float(), other.to(model.device)(**given).logits.float()
    check_logits(model, expected)
    return _require_same("logits", expected, found, _TOLERANCE[model.dtype], folder)


def _require_same(what: str, expected: Tensor, found: Tensor, tolerance: float, folder: Path) -> float:
    if expected.shape != found.shape:
        raise CheckpointError(
            f"{folder}: not exported: {what} have shape {tuple(found.shape)} in the export, "
            f"{tuple(expected.shape)} in the checkpoint."
        )
    difference = float((expected.double() - found.double()).abs().max())
    if not difference <= tolerance:
        raise CheckpointError(
            f"{folder}: not exported: {what} differ by up to {difference:.3g} (allowed: {tolerance:g})."
        )
    return difference
