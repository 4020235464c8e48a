"""Activations are recomputed also under a frozen language model, which passes gradients to the connector."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tinyllava.config import FROZEN, FULL, ModelConfig, Stage, Tune, lora
from tinyllava.model.assemble import assemble
from tinyllava.model.tuning import apply_tuning

TUNES = {"frozen": FROZEN, "full": FULL, "lora": lora(2)}


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("kind", ["llama", "phi", "stablelm"])
def test_each_layer_runs_twice_with_the_same_gradients(parts: dict[str, Path], kind: str, tune: str) -> None:
    torch.manual_seed(0)
    model, processor = assemble(
        ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts[kind]))
    )
    language: Tune = TUNES[tune]
    apply_tuning(model, Stage(learning_rate=1e-3, global_batch_size=1, language_model=language))
    inputs = processor(images=[Image.new("RGB", (40, 30), (200, 30, 90))], text="<image>\nWhat is it? A dog.")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    calls: list[int] = []
    for number, layer in enumerate(model.language_model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: calls.append(number))

    def gradients(expected_calls: int) -> dict[str, torch.Tensor]:
        calls.clear()
        model.zero_grad()
        model.train()
        model(**inputs).loss.backward()
        assert sorted(calls) == sorted([0, 1] * expected_calls)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients(1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients(2)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
