"""Checkpoints for exports to llama.cpp, of every family, with logits that vary; graphs in OpenVINO."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import openvino
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

import toys
from tinyllava.config import ModelConfig
from tinyllava.model.assemble import assemble

TEMPLATES = {"llama": "llama", "phi": "phi", "stablelm": "phi", "gemma": "gemma"}


def make_qwen(folder: Path, kind: str) -> Path:
    tokenizer = toys.chatml_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    classes: dict[str, Any] = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
    config = classes[kind](vocab_size=448, num_key_value_heads=2, head_dim=8, **toys._COMMON, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make(folder: Path, language: str, vision: str = "siglip", **settings: Any) -> Path:
    """A checkpoint whose logits have a standard deviation above 1, and whose vectors are not 0 or 1."""
    torch.manual_seed(0)
    is_qwen = language.startswith("qwen")
    make_language = make_qwen if is_qwen else toys.make_language_model
    config = ModelConfig(
        vision_encoder=str(toys.make_vision_encoder(folder / "vision", vision)),
        language_model=str(make_language(folder / "language", language)),
        template=TEMPLATES.get(language, "chatml"),
        **settings,
    )
    model, processor = assemble(config)
    for name, weight in model.named_parameters():
        if "norm" not in name and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.25)
        else:
            weight.data += torch.randn_like(weight) / 10
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


class InOpenVino:
    """A graph in OpenVINO, called as onnxruntime calls a session.

    In a process of its own: OpenVINO replaces the stack on which signals are handled, and frees it later, so
    the next signal would end the tests.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
        return _own_process().submit(_run, self.path, inputs).result()


@cache
def _own_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("fork"))


@cache
def _compiled(path: Path) -> Any:
    """In 32 bits: by its own default it computes in 16 where the CPU multiplies bfloat16."""
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return core.compile_model(path, "CPU")


def _run(path: Path, inputs: dict[str, Any]) -> list[Any]:
    return [value.copy() for value in _compiled(path)(inputs).values()]
