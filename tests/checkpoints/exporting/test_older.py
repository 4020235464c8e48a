"""Exported folders in transformers 4.57, in an environment of its own: same ids, pixels, logits, answers."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import toys
from layouts import chat_logits, make_checkpoint
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.checkpoints.exporting.compare import example_image

SCRIPT = """
import sys
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, __version__

assert __version__.startswith("4.57"), __version__
folder, image, target = sys.argv[1:]
model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
assert not any(report.values()), report
processor = AutoProcessor.from_pretrained(folder, use_fast=False)
def chat(text):
    return [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": text}]}]
text, other = (
    processor.apply_chat_template(chat(t), add_generation_prompt=True)
    for t in ("How many?", "Is there a dog? yes no.")
)
pixels = Image.open(image).convert("RGB")
two_steps = processor(images=pixels, text=text, return_tensors="pt")
one_step = processor.apply_chat_template(
    chat("How many?"), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
batch = processor(images=[pixels] * 2, text=[text, other], padding=True, return_tensors="pt")
new = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
with torch.no_grad():
    logits = model(**two_steps).logits
save_file(
    {
        "two_steps": two_steps["input_ids"],
        "one_step": one_step["input_ids"],
        "pixels": two_steps["pixel_values"],
        "logits": logits,
        "alone": model.generate(**two_steps, **new)[0, -4:].clone(),
        "in_batch": model.generate(**batch, **new)[0, -4:].clone(),
    },
    target,
)
"""


@pytest.mark.older
@pytest.mark.parametrize(
    ("language", "vision"),
    [
        ("llama", "clip"),
        ("llama", "siglip"),
        ("stablelm", "clip"),
        ("stablelm", "siglip"),
        ("chatml", "clip"),
        ("qwen2", "clip"),
        ("qwen2", "siglip"),
    ],
)
def test_transformers_4_computes_the_same(
    parts: dict[str, Path], tmp_path: Path, language: str, vision: str
) -> None:
    parts = parts | {"qwen2": toys.make_language_model(tmp_path / "qwen2", "qwen2")}
    checkpoint = make_checkpoint(parts, tmp_path / "own", language, vision)
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"].setdefault("rope_parameters", {"rope_type": "default"})["rope_theta"] = 77.0
    (checkpoint / "config.json").write_text(json.dumps(config))
    export_checkpoint(checkpoint, tmp_path / "out", layout="llava")
    example_image().save(tmp_path / "image.png")
    done = subprocess.run(
        [os.environ["TINYLLAVA_OLDER_PYTHON"], "-c", SCRIPT, "out", "image.png", "found.safetensors"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    inputs, logits = chat_logits(checkpoint, "How many?")
    assert found["two_steps"].tolist() == found["one_step"].tolist() == inputs["input_ids"].tolist()
    assert torch.equal(found["pixels"], inputs["pixel_values"])
    assert torch.allclose(found["logits"], logits, atol=1e-5)
    assert found["in_batch"].tolist() == found["alone"].tolist()


@pytest.mark.parametrize(
    ("language", "vision", "told"),
    [
        ("qwen2", "siglip", "transformers 4.57 gives the same results: "),
        ("gemma", "siglip", "transformers 4 multiplies the image tokens of Gemma"),
        ("llama", "dinov2", "has not been tested in transformers 4"),
    ],
)
def test_the_card_names_the_versions_that_compute_the_same(
    parts: dict[str, Path], tmp_path: Path, language: str, vision: str, told: str
) -> None:
    parts = parts | {
        "dinov2": toys.make_dino(tmp_path / "dinov2"),
        **{kind: toys.make_language_model(tmp_path / kind, kind) for kind in ("qwen2", "gemma")},
    }
    checkpoint = make_checkpoint(parts, tmp_path / "own", language, vision)
    export_checkpoint(checkpoint, tmp_path / "out", layout="llava")
    card = (tmp_path / "out/README.md").read_text()
    assert f"compared with the checkpoint in transformers {transformers.__version__}" in card
    assert told in card


def test_what_older_versions_read_is_written(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "stablelm", "siglip")
    export_checkpoint(checkpoint, tmp_path / "out", layout="vllm")
    config, names, pipeline = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("config.json", "tokenizer_config.json", "tokenizer.json")
    )
    rotary = config["text_config"]["rope_parameters"]
    assert config["text_config"]["rope_theta"] == rotary["rope_theta"]
    assert config["text_config"]["partial_rotary_factor"] == rotary["partial_rotary_factor"]
    assert names["padding_side"] == "left"
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert names["model_input_names"] == ["input_ids", "attention_mask"]
    assert (pipeline["post_processor"] or {"type": "ByteLevel"})["type"] == "ByteLevel"
