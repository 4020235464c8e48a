"""Toy models that answer, with weights under which the answer hangs on what is asked."""

from pathlib import Path

import torch

from tinyllava.config import ModelConfig
from tinyllava.inference.chat import Chat
from tinyllava.model.assemble import assemble
from toys import make_language_model, make_vision_encoder

TEMPLATES = {"llama": "llama", "phi": "phi", "stablelm": "phi", "chatml": "chatml"}


def make_chat(folder: Path, kind: str, encoder: str = "clip") -> Chat:
    torch.manual_seed(0)
    model, processor = assemble(
        ModelConfig(
            vision_encoder=str(make_vision_encoder(folder / "v", encoder)),
            language_model=str(make_language_model(folder / "f", kind)),
            template=TEMPLATES[kind],
        )
    )
    for name, weight in model.named_parameters():  # answers that hang on the prompt, not on the last token
        if name == "lm_head.bias" or ("norm" not in name and weight.ndim > 1):
            torch.nn.init.normal_(weight, std=0.25)
    return Chat(model, processor)
