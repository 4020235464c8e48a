"""The records of architectures, against transformers' own models on the meta device."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    StableLmConfig,
    ViTConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tinyllava.errors import CheckpointError
from tinyllava.model.compat import decoder_layers, encoder_layers
from tinyllava.parts.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from tinyllava.parts.language import find_language_model
from tinyllava.parts.vision import VISION_ENCODERS, VisionEncoder, find_vision_encoder
from tinyllava.planning.sizes import language_model_size, vision_encoder_size

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def write_folder(folder: Path, config: PreTrainedConfig, eos_token: str = "</s>") -> Path:
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    return folder


@pytest.mark.parametrize("family", sorted(LANGUAGE_FAMILIES))
def test_the_record_of_a_language_family_gives_its_size_and_its_layers(family: str, tmp_path: Path) -> None:
    usual = LANGUAGE_FAMILIES[family].usual
    config = CONFIG_MAPPING[family](**{**TEXT, "head_dim": 8, **usual})
    model = AutoModelForCausalLM.from_config(config)
    spec = find_language_model(str(write_folder(tmp_path / family, config)))
    assert spec.is_usual
    size = language_model_size(spec)
    assert size.total == count(model)
    layers = decoder_layers(model.base_model)
    assert size.layers == tuple(count(layer) for layer in layers)
    assert [type(layer).__name__ for layer in layers] == [type(layers[0]).__name__] * 3


@pytest.mark.parametrize(
    "config",
    [
        Qwen2MoeConfig(**TEXT, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=6),
        MixtralConfig(**TEXT, num_local_experts=5),
        GPTNeoXConfig(**{k: v for k, v in TEXT.items() if k != "num_key_value_heads"}),
        # A family with a record, but with settings on which the closed form does not rely.
        LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True),
        StableLmConfig(**TEXT, use_qkv_bias=False),
    ],
    ids=lambda config: config.model_type,
)
def test_a_language_model_without_a_record_is_counted(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config)
    spec = find_language_model(str(write_folder(tmp_path / "model", config)))
    size = language_model_size(spec)
    assert size.total == count(model)
    assert sum(size.layers) == sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    linears = [m for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    assert size.adapted_widths == sum(m.in_features + m.out_features for m in linears)


def test_experts_that_are_not_chosen_are_idle(tmp_path: Path) -> None:
    config = MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=1)
    size = language_model_size(find_language_model(str(write_folder(tmp_path / "model", config))))
    one_expert = 3 * TEXT["hidden_size"] * TEXT["intermediate_size"]
    assert size.idle == 3 * TEXT["num_hidden_layers"] * one_expert


def test_a_family_that_transformers_does_not_know_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", LlamaConfig(**TEXT))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "not_there"}))
    with pytest.raises(CheckpointError, match="not_there"):
        language_model_size(find_language_model(str(folder)))


@pytest.mark.parametrize(
    "family", sorted(name for name, record in VISION_FAMILIES.items() if record.kind == "transformer")
)
def test_the_record_of_a_vision_family_names_its_layers(family: str) -> None:
    config = CONFIG_MAPPING[family](**VISION)
    with torch.device("meta"):
        tower = AutoModel.from_config(config)
    record = VISION_FAMILIES[family]
    layers = encoder_layers(tower)
    assert any(module is layers for name, module in tower.named_modules() if name.endswith(record.layers))


def spec_of(config: PreTrainedConfig, folder: Path) -> VisionEncoder:
    return VisionEncoder(
        name="own",
        abbreviation="own",
        path=str(folder),
        kind="transformer",
        family=config.model_type,
        image_size_px=config.image_size,
        patch_size_px=config.patch_size,
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_prefix_tokens=1,
    )


def test_an_encoder_without_a_record_is_counted(tmp_path: Path) -> None:
    config = ViTConfig(**VISION, image_size=28, patch_size=7)
    spec = spec_of(config, write_folder(tmp_path / "vit", config))
    tower = AutoModel.from_config(
        ViTConfig(**{**VISION, "num_hidden_layers": 2}, image_size=28, patch_size=7)
    )
    size = vision_encoder_size(spec)
    assert size.total == count(tower)
    behind = {n: p.numel() for n, p in tower.named_parameters() if n.startswith(("layernorm.", "pooler."))}
    assert size.behind == sum(behind.values()) > 0
    assert len(size.layers) == 2


def test_an_encoder_of_a_known_family_with_unusual_settings_is_counted(tmp_path: Path) -> None:
    config = Dinov2Config(
        **{k: v for k, v in VISION.items() if k != "intermediate_size"}, use_swiglu_ffn=True
    )
    spec = find_vision_encoder(str(write_folder(tmp_path / "dino", config)))
    assert not spec.is_usual
    config.num_hidden_layers = 2
    assert vision_encoder_size(spec).total == count(AutoModel.from_config(config))


def test_what_is_counted_agrees_with_the_closed_form(tmp_path: Path) -> None:
    config = CLIPVisionConfig(**VISION, image_size=28, patch_size=7)
    spec = find_vision_encoder(str(write_folder(tmp_path / "clip", config)))
    assert vision_encoder_size(spec) == vision_encoder_size(replace(spec, is_usual=False))


def test_every_family_of_the_tables_has_a_record() -> None:
    assert {encoder.family for encoder in VISION_ENCODERS.values()} <= set(VISION_FAMILIES)


@pytest.mark.parametrize("family", sorted(LANGUAGE_FAMILIES))
def test_the_record_of_a_language_family_names_it_as_llama_cpp_does(family: str) -> None:
    assert LANGUAGE_FAMILIES[family].llama_cpp in gguf.MODEL_ARCH_NAMES.values()
