"""The closed forms of sizes against models of the real configs on no device, and against Table A1."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SiglipVisionConfig,
    StableLmConfig,
)

from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import cut_encoder
from tinyllava.model.connectors import build_connector
from tinyllava.model.encoders import EfficientNetLiteConfig
from tinyllava.parts.connectors import CONNECTORS, num_tokens, resolve_options
from tinyllava.parts.families import VISION_FAMILIES
from tinyllava.parts.language import LANGUAGE_MODELS, LanguageModel, find_language_model
from tinyllava.parts.vision import VISION_ENCODERS, VisionEncoder, find_vision_encoder
from tinyllava.planning.sizes import PartSize, connector_size, language_model_size, vision_encoder_size
from tinyllava.recipes.variants import VARIANTS, variant

CONFIGS = {
    "llama": LlamaConfig,
    "phi": PhiConfig,
    "stablelm": StableLmConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def language_config(model: LanguageModel) -> PreTrainedConfig:
    """The published config of a language model, from the spec's sizes."""
    more = {"head_dim": model.head_width} if model.head_width else {}
    more |= {"use_qkv_bias": True} if model.family == "stablelm" else {}
    return CONFIGS[model.family](
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        intermediate_size=model.mlp_width,
        tie_word_embeddings=model.tied,
        max_position_embeddings=model.context_tokens,
        **more,
    )


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_has_the_published_size_and_its_layers_the_closed_form(name: str) -> None:
    spec = LANGUAGE_MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(language_config(spec))
    size = language_model_size(spec)
    assert count(model) == size.total == spec.num_parameters
    assert count(model.base_model.layers[0]) == size.layers[0]
    check_linears(model.base_model, size)


def check_linears(module: nn.Module, size: PartSize) -> None:
    """The closed form of what adapters are put on, against the layers that are there."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert sum(m.in_features + m.out_features for m in linears) == size.adapted_widths
    assert sum(m.weight.numel() for m in linears) == size.adapted_weights


def encoder_config(encoder: VisionEncoder) -> PreTrainedConfig:
    """The published config of an encoder, from the spec's sizes."""
    sizes = {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.num_layers,
        "patch_size": encoder.patch_size_px,
    }
    return {
        "clip_vision_model": lambda: CLIPVisionConfig(
            image_size=encoder.image_size_px,
            intermediate_size=encoder.mlp_width,
            num_attention_heads=16,
            **sizes,
        ),
        "siglip_vision_model": lambda: SiglipVisionConfig(
            image_size=encoder.image_size_px,
            intermediate_size=encoder.mlp_width,
            num_attention_heads=16,
            **sizes,
        ),
        "dinov2": lambda: Dinov2Config(image_size=518, num_attention_heads=16, mlp_ratio=4, **sizes),
        "convnext": lambda: ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536]),
        "efficientnet_lite": lambda: EfficientNetLiteConfig(width_multiplier=1.1, depth_multiplier=1.2),
    }[encoder.family]()


@pytest.mark.parametrize("name", VISION_ENCODERS)
def test_an_encoder_has_the_published_size_and_its_cut_form_the_closed_one(name: str) -> None:
    spec = VISION_ENCODERS[name]
    config = encoder_config(spec)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        assert count(model) == spec.num_parameters
        if hasattr(config, "vision_use_head"):
            config.vision_use_head = False
        cut = cut_encoder(AutoModel.from_config(config), spec)
    assert count(cut) == vision_encoder_size(spec).total
    check_linears(cut, vision_encoder_size(spec))
    assert VISION_FAMILIES[spec.family].has_linears != (vision_encoder_size(spec).adapted_widths == 0)


@pytest.mark.parametrize("name", VISION_ENCODERS)
def test_an_encoder_gives_as_many_features_as_the_spec_says(name: str) -> None:
    spec = VISION_ENCODERS[name]
    with torch.device("meta"):
        model = AutoModel.from_config(encoder_config(spec))
        side = spec.image_size_px
        features = model(torch.zeros(1, 3, side, side)).last_hidden_state
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    assert features.shape == (1, spec.num_patches() + spec.num_prefix_tokens, spec.width)


SMALL = {
    "resampler": {"width": 96, "num_heads": 4},
    "qformer": {"width": 96, "num_heads": 4, "num_layers": 3},
}


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connector_has_the_closed_forms_parameters_and_tokens(name: str) -> None:
    connector = CONNECTORS[name]
    options = resolve_options(connector, SMALL.get(name, {}))
    module = build_connector(name, vision_width=48, language_width=64, num_patches=36, options=options)
    assert connector_size(connector, 48, 64, options).total == count(module)
    check_linears(module, connector_size(connector, 48, 64, options))
    assert module(torch.randn(2, 36, 48)).shape == (2, num_tokens(connector, 36, options), 64)
    assert module(torch.zeros(0, 36, 48)).shape[0] == 0  # a batch without images


TABLE_A1 = {"C-TL": 1.4, "Sig-TL": 1.5, "C-SLM": 1.9, "Sig-SLM": 2.0, "C-Phi": 3.0, "Sig-Phi": 3.1}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_have_the_sizes_of_table_a1(name: str) -> None:
    model = variant(name).model
    encoder, language = find_vision_encoder(model.vision_encoder), find_language_model(model.language_model)
    sizes: list[PartSize] = [
        vision_encoder_size(encoder),
        connector_size(CONNECTORS["mlp"], encoder.width, language.width, {}),
        language_model_size(language),
    ]
    billions = sum(size.total for size in sizes) / 1e9
    assert (
        abs(billions - TABLE_A1[name.partition("-")[2]]) < 0.1
    )  # the paper adds rounded parts: 2.7 + 0.4 = 3.1


COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
UNFAMILIAR = {
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "mixtral": MixtralConfig(**COMMON, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "gpt_neox": GPTNeoXConfig(**COMMON),
}  # fmt: skip


@pytest.mark.parametrize("family", UNFAMILIAR)
@pytest.mark.parametrize("tied", [False, True])
def test_an_unfamiliar_family_is_counted_and_not_taken_for_a_llama(tmp_path, family, tied):
    config = UNFAMILIAR[family]
    config.tie_word_embeddings = tied
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    language = find_language_model(str(tmp_path))
    size = language_model_size(language)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert size.total == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert size.adapted_widths == sum(m.in_features + m.out_features for m in linears)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = {"qwen2_moe": 4 / 6, "mixtral": 2 / 4, "gpt_neox": 0}[family]
    assert size.idle == pytest.approx(experts * share, rel=1e-6)
    assert language.mlp_width == {"qwen2_moe": 2 * 24 + 40, "mixtral": 2 * 96, "gpt_neox": 96}[family]


def test_a_family_that_transformers_cannot_build_is_named(tmp_path):
    raw = {**COMMON, "model_type": "unheard_of"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot build a model"):
        language_model_size(find_language_model(str(tmp_path)))
