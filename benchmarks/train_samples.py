"""Sizes of models, conversations and random weights that training is measured on, and the matmul peak.

Paper: section 3.2, (X, Y); the conversations are like those of the starter, several short questions each.
"""

import io
import math
import random
import statistics
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.model.compat import multiply_by_onednn

COLOURS, FORMS = ("red", "green", "blue", "yellow", "gray", "teal"), ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its samples."""

    language_model: dict[str, Any]
    """Arguments of LlamaConfig."""
    vision_encoder: dict[str, int]
    """Arguments of CLIPVisionConfig."""
    batch_size: int
    questions: tuple[int, int]
    """Fewest and most questions of one conversation."""

    def with_image_tokens(self, number: int) -> "Shape":
        """Cut the image into as many patches; their size stays."""
        side = round(number**0.5)
        assert side * side == number, f"{number} image tokens are no square grid"
        side_px = side * self.vision_encoder["patch_size"]
        return replace(self, vision_encoder=self.vision_encoder | {"image_size": side_px})

    @property
    def num_image_tokens(self) -> int:
        """T of the two-layer connector: one token for each patch."""
        return (self.vision_encoder["image_size"] // self.vision_encoder["patch_size"]) ** 2


def _llama(
    layers: int, width: int, inner: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def _clip(layers: int, width: int, heads: int, side_px: int, patch_px: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "image_size": side_px,
        "patch_size": patch_px,
    }


SHAPES = {
    # SmolLM2-135M. The stock class holds no CNN, so a small CLIP gives the same 9 image tokens.
    "starter": Shape(_llama(30, 576, 1536, 9, 3, 49152, True), _clip(12, 384, 6, 96, 32), 4, (3, 8)),
    # TinyLlama-1.1B with CLIP-L/14 at 336 px, for a GPU.
    "tinyllama": Shape(_llama(22, 2048, 5632, 32, 4, 32000, False), _clip(24, 1024, 16, 336, 14), 16, (3, 8)),
    "tiny": Shape(_llama(2, 64, 128, 4, 2, 4096, True), _clip(3, 32, 4, 28, 14), 2, (1, 4)),
}


def make_samples(stage: str, number: int, shape: Shape) -> list[Conversation]:
    """Images with a caption (pretrain) or with several short questions (finetune)."""
    draw = random.Random(0)
    samples = []
    for index in range(number):
        form, colour = draw.choice(FORMS), draw.choice(COLOURS)
        if stage == "pretrain":
            asked = [
                ("", f"a {colour} {form}" + draw.choice(["", " on white", " in the middle of the image"]))
            ]
        else:
            asked = [_ask(draw, form, colour) for _ in range(draw.randint(*shape.questions))]
        image = ImageRef(data=_draw(shape.vision_encoder["image_size"], colour), name=f"{index}.png")
        messages = []
        for question, answer in asked:
            images = () if messages else (image,)
            messages += [
                Message(role="user", text=question, images=images),
                Message(role="assistant", text=answer),
            ]
        samples.append(Conversation(messages=tuple(messages), id=str(index), source=stage))
    return samples


def _ask(draw: random.Random, form: str, colour: str) -> tuple[str, str]:
    guess = draw.choice(COLOURS)
    return draw.choice(
        [
            ("What color is the shape?", colour),
            (f"Is there a {guess} shape in the image?", "yes" if guess == colour else "no"),
            ("What is the shape of the object in the picture?", form),
            (f"Does it contain a {form}?", "yes"),
        ]
    )


def _draw(side_px: int, colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side_px, side_px), colour).save(data, "PNG")
    return data.getvalue()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from the samples themselves, so that a usual word is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    samples = [s for stage in ("pretrain", "finetune") for s in make_samples(stage, 50, SHAPES["tiny"])]
    tokenizer.train_from_iterator(
        [m.text for s in samples for m in s.messages] + ["user\nassistant\n"] * 9, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right")
    fast.add_special_tokens(
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    )
    fast.add_tokens(["<image>"], special_tokens=True)
    return fast


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Give a parameter of the same name the same random values in any model."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.fill_(float("bias" not in name))
        else:
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.normal_(0, 0.02, generator=generator)
            parameter.copy_(parameter.bfloat16())  # as those of a published model are


def count_linear(inputs: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Operations of oneDNN's linear product of [..., in] and [out, in], by shapes."""
    return 2 * math.prod(inputs) * int(weight[0])


COUNTED: dict[Any, Any] = {torch.ops.mkldnn._linear_pointwise: count_linear}
"""Operations that FlopCounterMode does not know."""


def matmul_peak(dtype: torch.dtype) -> float:
    """Operations of one large matrix product by second, or by CPU second where other programs may run.

    The better one of PyTorch's product and, on a CPU, oneDNN's, which our step may use.
    """
    cuda = torch.cuda.is_available()
    side, device, clock = (8192, "cuda", time.perf_counter) if cuda else (1536, "cpu", time.process_time)
    a = torch.randn(side, side, device=device).to(dtype)
    products: list[Any] = [torch.matmul]
    if not cuda and torch.backends.mkldnn.is_available():
        products.append(multiply_by_onednn)
    medians = []
    for multiply in products:
        seconds = []
        for _ in range(4):
            start = clock()
            multiply(a, a)[0, 0].item()
            seconds.append(clock() - start)
        medians.append(statistics.median(seconds[1:]))
    return 2 * side**3 / min(medians)


def forget_peak() -> None:
    """Count memory from now on: what the making of weights and batches took is no part of a step."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
