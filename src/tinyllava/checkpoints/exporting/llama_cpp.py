"""Compare a pair of GGUF files with the model: the same prompts in llama.cpp, the same log-probabilities.

There are two prompts. One is text, as a client sends it to llama.cpp's server: the template in the file
renders it, and the tokens in the file split it. The other is a question about an image of the encoder's own
size, so that nothing resizes it.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tinyllava.checkpoints.exporting import llama_cpp_process
from tinyllava.checkpoints.exporting.compare import example_image
from tinyllava.checkpoints.exporting.gguf import MMPROJ, MODEL, Quantized, write_gguf
from tinyllava.checkpoints.exporting.gguf_text import write_modelfile
from tinyllava.conversation import ImageRef, ask
from tinyllava.errors import CheckpointError
from tinyllava.files import data_url
from tinyllava.inference.logits import check_logits
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor

_QUESTION = "What is in the picture? Answer in 12 words, or say: it's a dog."
LARGEST_DIFFERENCE: dict[Quantized, float] = {"f32": 0.01, "f16": 0.03, "q8_0": 0.3, "q4_0": 0.3}
"""Of a log-probability, between the weights as written here and there, that rounding explains.

llama.cpp rounds what a matrix is multiplied with too: to 16 bits for a matrix of 16, to 8 for one of 8 or 4.
Largest measured on toys: 3e-3, 8e-3 and 0.18. Mistakes measured on toys, in 32 bits: a line break missing
behind the image 0.57 to 2.5, CLIP's class token in the wrong place 0.75, rows in the wrong order 3.7 to
7.2.

Activations of 8 bits move a real model by more (SmolLM2-135M: 0.59 in q8_0, 0.76 in q4_0). Then the same
weights have to agree in 16 bits, and the distribution of the next token has to stay within
``LARGEST_DIVERGENCE``."""
LARGEST_DIVERGENCE = 0.1
"""Kullback-Leibler divergence in nats that activations of 8 bits explain; largest measured: 0.016."""
_CLIP_FAULTS = (
    " llama.cpp puts the class token of CLIP after the patches (ggml-org/llama.cpp #25814, fix #25844) "
    "and runs one layer too few (#25817, fix #25845). The export works once the installed llama.cpp "
    "(`pip install -U xllamacpp`) has both fixes. Until then use a SigLIP encoder, or `--format llava`."
)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Largest differences of a log-probability, over the whole vocabulary after a prompt."""

    text: float
    """llama.cpp with the files, and ours with the same rounded weights."""
    image: float
    text_rounding: float
    """llama.cpp with the files, and the checkpoint as it was."""
    image_rounding: float
    version: str
    """Of xllamacpp, which has llama.cpp inside."""


def write_and_compare(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    name: str,
    quantized: Quantized,
) -> Agreement | None:
    """Write model.gguf, mmproj.gguf and an Ollama Modelfile, and compare them in llama.cpp.

    The model's weights are rounded to those that were written.

    Returns:
        How exactly llama.cpp computes the same; None if xllamacpp is not installed.

    Raises:
        CheckpointError: llama.cpp does not open the files, or computes something else.
    """
    is_clip = model.config.vision_config.model_type == "clip_vision_model"
    can_compare = find_spec("xllamacpp") is not None
    if is_clip and not can_compare:
        raise CheckpointError(
            "CLIP is exported for llama.cpp only if it can be compared in llama.cpp: `pip install "
            "tinyllava[gguf]`." + _CLIP_FAULTS
        )
    image = example_image(processor.image_size_px, processor.image_size_px)
    original = _our_logprobs(model, processor, image) if can_compare else []
    write_gguf(folder, model, processor, name, quantized)
    (folder / "Modelfile").write_text(write_modelfile(processor, MODEL, MMPROJ), encoding="utf-8")
    if not can_compare:
        return None
    rounded = _our_logprobs(model, processor, image)
    found = _their_logprobs(folder, model, processor, image)
    exact, rounding = (_largest_differences(expected, found) for expected in (rounded, original))
    fault = _find_fault(exact, quantized)
    if fault and quantized in ("q8_0", "q4_0"):
        fault = _find_fault_in_16_bits(folder, model, processor, image) or _find_divergence(rounded, found)
    if fault:
        raise CheckpointError(f"{folder}: not exported: {fault}" + (_CLIP_FAULTS if is_clip else ""))
    return Agreement(
        text=max(exact[:2]),
        image=exact[2],
        text_rounding=max(rounding[:2]),
        image_rounding=rounding[2],
        version=version("xllamacpp"),
    )


Logprobs = list[np.ndarray[Any, Any]]
_PROMPTS = ("text", "text in a chat", "image")


def _largest_differences(ours: Logprobs, theirs: Logprobs) -> list[float]:
    return [float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)]


def _find_fault(differences: list[float], quantized: Quantized) -> str:
    """Return which prompt's log-probabilities differ by more than rounding explains; empty if none."""
    limit = LARGEST_DIFFERENCE[quantized]
    for what, difference in zip(_PROMPTS, differences, strict=True):
        if not difference <= limit:
            return (
                f"after a prompt with {what}, llama.cpp's log-probabilities differ by up to "
                f"{difference:.3g} (allowed in {quantized}: {limit:g})."
            )
    return ""


def _find_fault_in_16_bits(
    folder: Path, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, image: Image.Image
) -> str:
    """Compare the same weights once more, stored so that llama.cpp rounds no activation to 8 bits."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        write_gguf(Path(scratch), model, processor, "the same weights in 16 bits", "f16")
        ours = _our_logprobs(model, processor, image)
        return _find_fault(
            _largest_differences(ours, _their_logprobs(Path(scratch), model, processor, image)), "f16"
        )


def _find_divergence(ours: Logprobs, theirs: Logprobs) -> str:
    for what, a, b in zip(_PROMPTS, ours, theirs, strict=True):
        divergence = float((np.exp(a) * (a - b)).sum())
        if not divergence <= LARGEST_DIVERGENCE:
            return (
                f"after a prompt with {what}, the next token's distribution in llama.cpp diverges by "
                f"{divergence:.3g} nats (allowed: {LARGEST_DIVERGENCE:g}), although the same weights agree "
                "in 16 bits. This model is not exact with 8-bit activations. Use --quantize f16."
            )
    return ""


def _prompt(processor: TinyLlavaProcessor, *images: ImageRef) -> str:
    return processor.render(ask(_QUESTION, *images), open_answer=True)[0]


@torch.no_grad()
def _our_logprobs(
    model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, image: Image.Image
) -> list[np.ndarray[Any, Any]]:
    """Return log-probabilities of the next token after text, text again, and image with text."""
    text = processor(text=_prompt(processor))
    both = processor(images=image, text=_prompt(processor, ImageRef(name="noise")))
    names = ("input_ids", "attention_mask", "pixel_values")
    logits = [
        model(**{name: inputs[name].to(model.device) for name in names if name in inputs}).logits[0, -1]
        for inputs in (text, both)
    ]
    for row in logits:
        check_logits(model, row)
    after_text, after_image = (row.double().log_softmax(-1).cpu().numpy() for row in logits)
    return [after_text, after_text, after_image]


def _their_logprobs(
    folder: Path, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, image: Image.Image
) -> list[np.ndarray[Any, Any]]:
    """Return llama.cpp's log-probabilities after a rendered text, a chat of text, and a chat with the image.

    Raises:
        CheckpointError: it ends with an error.
    """
    data = BytesIO()
    image.save(data, "PNG")
    url = data_url(data.getvalue(), "image/png")
    words = {"type": "text", "text": _QUESTION}
    content = [{"type": "image_url", "image_url": {"url": url}}, words]
    prompt = _prompt(processor)
    num_tokens = len(processor.tokenizer(prompt)["input_ids"]) + processor.num_image_tokens
    with tempfile.TemporaryDirectory() as scratch:
        request = {
            "model": str(folder / MODEL),
            "mmproj": str(folder / MMPROJ),
            "output": str(Path(scratch) / "answers.json"),
            "num_threads": torch.get_num_threads(),
            "context": num_tokens + 64,
            "num_rows": model.config.text_config.vocab_size,
            "next_token": processor.tokenizer("A", add_special_tokens=False)["input_ids"][-1],
            "questions": [
                prompt,
                [{"role": "user", "content": _QUESTION}],
                [{"role": "user", "content": content}],
            ],
        }
        done = subprocess.run(
            [sys.executable, "-P", str(Path(llama_cpp_process.__file__))],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            telling = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
            reason = " / ".join(telling[:3] or lines[-3:]) or "no message"
            raise CheckpointError(
                f"{folder}: not exported: llama.cpp {version('xllamacpp')} ended with exit status "
                f"{done.returncode}: {reason}"
            )
        answers = json.loads(Path(request["output"]).read_text(encoding="utf-8"))
    return [np.asarray(answer) for answer in answers]


def describe_gguf(processor: TinyLlavaProcessor, quantized: Quantized, agreement: Agreement | None) -> str:
    """Return the card's sections on agreement, images and Ollama."""
    side = processor.image_size_px
    colour = "rgb({}, {}, {})".format(*processor.mean_colour)
    if agreement is None:
        measured = (
            "Not measured, because `xllamacpp` was not installed. To compare the files with the model in "
            "llama.cpp, run `pip install tinyllava[gguf]` and export again."
        )
    else:
        measured = (
            f"The weights are {quantized}. The table has the largest difference of a log-probability over "
            "the whole "
            f"vocabulary after one prompt, measured in llama.cpp (xllamacpp {agreement.version}) with a "
            "32-bit "
            "cache:\n\n| llama.cpp compared with | text | text and an image |\n| --- | --- | --- |\n"
            f"| tinyllava with the same rounded weights | {agreement.text:.2g} | {agreement.image:.2g} |\n"
            f"| the model before rounding | {agreement.text_rounding:.2g} | "
            f"{agreement.image_rounding:.2g} |\n\n"
            "llama.cpp's default 16-bit cache increases these differences."
        )
    shaped = (
        f"The model was trained on images that were first padded to a square with {colour} and then resized."
        if processor.image_aspect == "pad"
        else "The model was trained on images resized or cropped to a square without padding."
    )
    images = (
        f"{shaped} llama.cpp first resizes and then pads, which changes answers about images that are not "
        f"square. For exact answers, prepare square images in the same way, ideally at {side} x {side} "
        "pixels."
    )
    ollama = (
        "`ollama create NAME -f Modelfile` reads both files. The Modelfile was generated from the chat "
        "template "
        "and was not tested in Ollama. Ollama puts the image directly before the question, but the model "
        "was trained with a line break between them. Start a question about an image with a line break."
    )
    return f"## Agreement\n\n{measured}\n\n## Images\n\n{images}\n\n## Ollama\n\n{ollama}"
