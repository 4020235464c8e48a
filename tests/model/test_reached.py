"""What is trained of an encoder is what the features depend on, whatever the encoder is called."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil, ViTConfig, ViTModel

from tinyllava.config import FULL, ModelConfig, Stage, Tune, lora
from tinyllava.model.assemble import assemble
from tinyllava.model.tuning import apply_tuning, component_of
from tinyllava.parts.families import VISION_FAMILIES, VisionFamily


@pytest.mark.parametrize("tune", [FULL, lora(2)], ids=["full", "lora"])
def test_the_pooler_of_an_unfamiliar_encoder_is_not_trained(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: Tune
) -> None:
    """A ViT has a linear pooler behind its features, under a name that no list here has for it."""
    monkeypatch.setitem(VISION_FAMILIES, "vit", VisionFamily(num_prefix_tokens=1, layers="layers"))
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
        patch_size=14,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    model, processor = assemble(ModelConfig(vision_encoder=str(tmp_path), language_model=str(parts["llama"])))
    assert any(".pooler." in name for name, _ in model.named_parameters())
    apply_tuning(model, Stage(learning_rate=1e-3, global_batch_size=1, vision_encoder=tune))
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and component_of(name) == "vision_encoder"
    }
    assert len(trained) >= 16
    inputs = processor(images=[Image.new("RGB", (40, 30), (200, 30, 90))], text="<image>\nWhat is it? A dog.")
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    model(**inputs, labels=labels).loss.backward()
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    idle = [n for n, p in model.named_parameters() if ".pooler." in n or ".vision_tower.layernorm." in n]
    assert len(idle) == 4
    assert not trained.keys() & set(idle)
    assert torch.isfinite(model(**inputs).logits).all()
