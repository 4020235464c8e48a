"""Loss, gradient and one optimizer step equal the published code's, which steps.json holds (README.md)."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    StableLmConfig,
)

from parity.test_tokens import GOLDEN, write_vocabulary
from tinyllava.config import ModelConfig
from tinyllava.data.dataset import Collator, Examples
from tinyllava.data.records import read_records
from tinyllava.model.assemble import assemble
from tinyllava.parts.templates import as_published, read_template

STEPS: dict[str, Any] = json.loads(Path(__file__).with_name("steps.json").read_text(encoding="utf-8"))
CASES = [(code, family) for code, families in STEPS.items() for family in families]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}  # fmt: skip
ROWS = {"llama": 32_000, "gemma": 32_064}
VOCABULARIES = {"llama": "llama-false", "llama-legacy": "llama-true"}
LEARNING_RATE = 1e-3


def language_config(family: str) -> Any:
    sizes = SIZES | {"vocab_size": ROWS.get(family.partition("-")[0], 20_040)}
    return {
        "llama": lambda: LlamaConfig(num_key_value_heads=2, rms_norm_eps=1e-5, **sizes),
        "phi": lambda: PhiConfig(partial_rotary_factor=0.5, resid_pdrop=0.0, embd_pdrop=0.0, **sizes),
        "qwen2": lambda: Qwen2Config(
            num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=False, **sizes
        ),
        "stablelm": lambda: StableLmConfig(
            num_key_value_heads=4, partial_rotary_factor=0.25, use_qkv_bias=True, layer_norm_eps=1e-5, **sizes
        ),
        "gemma": lambda: GemmaConfig(num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes),
    }[family.partition("-")[0]]()


def make_parts(folder: Path, family: str) -> tuple[Path, Path]:
    language = write_vocabulary(folder / "language", VOCABULARIES.get(family, family))
    AutoModelForCausalLM.from_config(language_config(family)).save_pretrained(language)
    encoder = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=28,
        patch_size=14, projection_dim=32,
    )  # fmt: skip
    CLIPVisionModel(encoder).save_pretrained(folder / "encoder")
    side = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side).save_pretrained(folder / "encoder")
    return folder / "encoder", language


def published_name(name: str) -> str:
    """The name that the weights are made by: the language model's own, ``vision.*`` and ``connector.*``."""
    for ours, theirs in {
        "model.vision_tower.vision_model.": "vision.", "model.vision_tower.": "vision.",
        "model.multi_modal_projector.linear_1.": "connector.0.",
        "model.multi_modal_projector.linear_2.": "connector.2.", "model.language_model.": "model.",
    }.items():  # fmt: skip
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def weights(name: str, shape: torch.Size, family: str) -> Tensor:
    """Values that follow from a tensor's name: a sine, around 1 for the weights of norms."""
    wave = np.sin(np.arange(shape.numel()) * 0.7310585 + zlib.crc32(name.encode()) % 6283 / 1000)
    is_norm = "norm" in name and name.endswith("weight")
    centre = float(is_norm and not (family == "gemma" and name.startswith("model.")))  # Gemma adds 1 itself
    scale = 0.3 if name.startswith(("model.embed", "lm_head", "connector")) else 0.15
    return torch.tensor(centre + scale * wave, dtype=torch.float32).reshape(shape)


@torch.no_grad()
def fill(model: nn.Module, family: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights(published_name(name), parameter.shape, family)[: len(parameter)])


def write_data(folder: Path) -> None:
    y, x, channel = np.mgrid[0:30, 0:50, 0:3]
    Image.fromarray(((x * 5 + y * 3 + channel * 40) % 256).astype(np.uint8)).save(folder / "a.png")
    for name in ("records", "captions"):
        (folder / f"{name}.json").write_text(json.dumps(GOLDEN[name]))


@pytest.mark.parametrize(("code", "family"), CASES)
def test_one_step_of_each_stage(tmp_path: Path, code: Any, family: str) -> None:
    """Captions train the connector; multi-turn and text-only records train it with the language model."""
    encoder, language = make_parts(tmp_path, family)
    write_data(tmp_path)
    settings = ModelConfig(vision_encoder=str(encoder), language_model=str(language), code=code)
    model, processor = assemble(settings)
    for stage, expected in STEPS[code][family].items():
        is_first = stage == "pretrain"
        processor.image_aspect = "pad" if code != "factory" and not is_first else "square"
        records = read_records(tmp_path / ("captions.json" if is_first else "records.json"), tmp_path)
        template = as_published(read_template("caption")) if is_first else None
        examples = Examples(conversations=records.conversations, processor=processor, template=template)
        collate = Collator(processor.tokenizer.pad_token_id, processor.image_token_id)
        batch = collate([examples[i] for i in range(len(examples))])
        del batch["sample_ids"], batch["num_tokens"]
        pixels = batch["pixel_values"][0].double()
        assert [float(pixels.sum()), float((pixels**2).sum())] == pytest.approx(expected["pixels"], rel=1e-6)
        fill(model, family)
        trained = {
            published_name(name): parameter
            for name, parameter in model.named_parameters()
            if published_name(name).startswith("connector" if is_first else ("connector", "model", "lm_head"))
        }
        model.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        loss = model.train()(**batch).loss
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
        loss.backward()
        norm = clip_grad_norm_(trained.values(), 1.0)
        assert norm.item() == pytest.approx(expected["gradient_norm"], rel=1e-5)
        torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0.0).step()
        for name, parameter in trained.items():
            if name in expected:
                found = parameter.detach().flatten()[: len(expected[name])]
                assert torch.allclose(found, torch.tensor(expected[name]), atol=1e-5), name
        with torch.no_grad():
            assert model(**batch).loss.item() == pytest.approx(expected["loss_after"], rel=1e-5)
