"""TinyLLaVA Factory's layouts, with the token that its code drops of every encoder."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear
from transformers import (
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import layouts
import toys
from layouts import make_toy, model_logits, reference_logits, write_factory
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.checkpoints.importing import Given, import_checkpoint
from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import open_checkpoint

BEFORE, AFTER = [1, 5, 9, 30], [40, 41, 7]


def assert_same(folder: Path, expected: Tensor) -> None:
    model, _ = open_checkpoint(folder)
    found = model_logits(model, BEFORE, AFTER)
    assert found.shape[1] == expected.shape[1]
    assert torch.allclose(found[..., : expected.shape[-1]], expected, atol=1e-5)


@pytest.mark.parametrize("three_folders", [False, True])
@pytest.mark.parametrize(("language", "vision", "num_tokens"), [("llama", "clip", 4), ("phi", "siglip", 3)])
def test_both_forms(tmp_path: Path, three_folders: bool, language: str, vision: str, num_tokens: int) -> None:
    toy = make_toy(tmp_path, language, vision)
    source = write_factory(toy, tmp_path / "source", three_folders=three_folders)
    report = import_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1))
    assert report.num_image_tokens == num_tokens
    assert report.kind == f"TinyLLaVA Factory, {'three folders' if three_folders else 'one file'}"


def test_siglip_at_its_real_grid_has_728_tokens(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama", "siglip")
    config = SiglipVisionConfig(
        hidden_size=toys.WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=384,
        patch_size=14,
    )
    toy.encoder = SiglipVisionModel(config)
    toy.encoder.save_pretrained(toy.vision_folder)
    report = import_checkpoint(write_factory(toy, tmp_path / "source"), tmp_path / "out")
    model, processor = open_checkpoint(tmp_path / "out")
    assert (model.config.num_prefix_tokens, model.config.num_patches) == (1, 728)
    assert (processor.num_image_tokens, report.num_image_tokens) == (728, 728)
    assert processor.image_processor.size == {"height": 384, "width": 384}
    pixels = torch.randn(1, 3, 384, 384)
    hidden = toy.encoder(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(model.model.encode_images(pixels), hidden[:, 1:], atol=1e-5)


def test_open_checkpoint_sends_a_factory_folder_to_import(tmp_path: Path) -> None:
    source = write_factory(make_toy(tmp_path), tmp_path / "source")
    with pytest.raises(CheckpointError, match="tinyllava import"):
        open_checkpoint(source)


def test_three_folders_with_adapters(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "phi", "siglip")
    source = write_factory(toy, tmp_path / "source", three_folders=True)
    base = AutoModelForCausalLM.from_pretrained(toy.language_folder)
    targets = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.fc2"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=targets)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    inner = model.base_model.model
    plain = {n: p.detach() for n, p in inner.named_parameters() if "lora_" not in n}
    assert any(".base_layer." in name for name in plain)
    torch.save(plain, source / "language_model" / "pytorch_model.bin")
    adapter = {n.replace(".default", ""): p.detach() for n, p in inner.named_parameters() if "lora_" in n}
    wrapped = {f"base_model.model.language_model.{n}": t for n, t in adapter.items()}
    torch.save(wrapped, source / "adapter_model.bin")
    full = [f"language_model.{t}" for t in targets]
    LoraConfig(r=4, lora_alpha=16, target_modules=full).save_pretrained(source)
    report = import_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1, llm=model))
    assert report.notes == ["2 weights merged with their adapters"]


def resampler_tensors(num_queries: int, depth: int, width: int) -> dict[str, Tensor]:
    shapes = {"latents": (num_queries, width), "linear.weight": (width, width), "linear.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    for layer in range(depth):
        shapes |= {
            f"layers.{layer}.0.norm_media.weight": (width,),
            f"layers.{layer}.0.norm_media.bias": (width,),
            f"layers.{layer}.0.norm_latents.weight": (width,),
            f"layers.{layer}.0.norm_latents.bias": (width,),
            f"layers.{layer}.0.to_q.weight": (512, width),
            f"layers.{layer}.0.to_kv.weight": (1024, width),
            f"layers.{layer}.0.to_out.weight": (width, 512),
            f"layers.{layer}.1.0.weight": (width,),
            f"layers.{layer}.1.0.bias": (width,),
            f"layers.{layer}.1.1.weight": (4 * width, width),
            f"layers.{layer}.1.3.weight": (width, 4 * width),
        }
    return {name: torch.randn(shape) / 3 for name, shape in shapes.items()}


def resample(weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """The resampler by its definition: 8 heads of 64, explicit softmax."""
    width = features.shape[-1]
    media = linear(features, weights["linear.weight"], weights["linear.bias"])
    queries = weights["latents"][None]
    for layer in range(sum(name.endswith("to_q.weight") for name in weights)):
        w = {n.split(".", 2)[2]: t for n, t in weights.items() if n.startswith(f"layers.{layer}.")}
        normed = layer_norm(queries, [width], w["0.norm_latents.weight"], w["0.norm_latents.bias"])
        seen = torch.cat(
            [layer_norm(media, [width], w["0.norm_media.weight"], w["0.norm_media.bias"]), normed], dim=1
        )
        q = linear(normed, w["0.to_q.weight"]).view(1, -1, 8, 64)
        k, v = (t.view(1, -1, 8, 64) for t in linear(seen, w["0.to_kv.weight"]).split(512, dim=-1))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(1, -1, 512)
        queries = queries + linear(mixed, w["0.to_out.weight"])
        inner = linear(layer_norm(queries, [width], w["1.0.weight"], w["1.0.bias"]), w["1.1.weight"])
        queries = queries + linear(gelu(inner), w["1.3.weight"])
    return layer_norm(queries, [width], weights["norm.weight"], weights["norm.bias"])


def test_resampler(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama", "siglip")
    toy.connector = resampler_tensors(num_queries=6, depth=2, width=toys.WIDTH)
    changes = {"connector_type": "resampler", "num_queries": 6, "num_resampler_layers": 2}
    report = import_checkpoint(write_factory(toy, tmp_path / "source", **changes), tmp_path / "out")
    expected = reference_logits(toy, BEFORE, AFTER, num_dropped=1, tokens=resample)
    assert_same(tmp_path / "out", expected)
    assert report.num_image_tokens == 6


def test_one_linear_layer(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama", "clip")
    toy.connector = {"weight": torch.randn(toys.WIDTH, toys.WIDTH), "bias": torch.randn(toys.WIDTH)}
    import_checkpoint(write_factory(toy, tmp_path / "source", connector_type="linear"), tmp_path / "out")
    expected = reference_logits(
        toy, BEFORE, AFTER, num_dropped=1, tokens=lambda w, x: linear(x, w["weight"], w["bias"])
    )
    assert_same(tmp_path / "out", expected)


def test_settings_of_an_old_config_reach_the_language_model(tmp_path: Path) -> None:
    """rope_theta stood beside the others until transformers 4; losing it would be silent."""
    toy = make_toy(tmp_path, "llama", "clip")
    values = toy.text_config()
    del values["rope_parameters"]
    values |= {"rope_theta": 500.0, "torch_dtype": "float16", "rms_norm_eps": 0.01}
    old = AutoModelForCausalLM.from_config(LlamaConfig(**{**values, "torch_dtype": "float32"})).eval()
    old.load_state_dict(toy.llm.state_dict())
    import_checkpoint(write_factory(toy, tmp_path / "source", text_config=values), tmp_path / "out")
    expected = reference_logits(toy, BEFORE, AFTER, num_dropped=1, llm=old)
    assert_same(tmp_path / "out", expected)
    assert not torch.allclose(expected, reference_logits(toy, BEFORE, AFTER, num_dropped=1), atol=1e-3)


def test_the_given_folders_bring_tokenizer_and_image_processor(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "phi", "siglip")
    source = write_factory(toy, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(CheckpointError, match=r"owner/not-there.*--language-model DIR"):
        import_checkpoint(source, tmp_path / "out")
    given = Given(vision_encoder=toy.vision_folder, language_model=toy.language_folder, template="chatml")
    import_checkpoint(source, tmp_path / "out", given=given)
    _, processor = open_checkpoint(tmp_path / "out")
    assert "<|im_start|>" in processor.chat_template
    assert processor.image_aspect == "square"
    assert layouts.load_config(tmp_path / "out").eos_token_id == processor.tokenizer.eos_token_id


def test_dinov2_needs_its_folder_for_the_image_processor(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama", "clip")
    config = Dinov2Config(
        hidden_size=toys.WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=42,
        patch_size=14,
        mlp_ratio=2,
    )
    toy.encoder = Dinov2Model(config).eval()
    toy.encoder.save_pretrained(toy.vision_folder)
    source = write_factory(toy, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    plain = {name.replace("_tower.vision_model.", "_tower."): tensor for name, tensor in tensors.items()}
    save_file(plain, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"no preprocessor_config.json for its dinov2.*--vision-encoder DIR"
    ):
        import_checkpoint(source, tmp_path / "out")
    import_checkpoint(source, tmp_path / "out", given=Given(vision_encoder=toy.vision_folder))
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1))


@pytest.mark.parametrize("with_copy", [False, True])
def test_a_head_that_shares_the_embedding(tmp_path: Path, with_copy: bool) -> None:
    """Qwen2-0.5B's form; torch's named_parameters leave the second name out, a state_dict does not."""
    toy = make_toy(tmp_path, "chatml", "clip")
    source = write_factory(toy, tmp_path / "source", three_folders=True)
    if not with_copy:
        torch.save(dict(toy.llm.named_parameters()), source / "language_model" / "pytorch_model.bin")
    report = import_checkpoint(source, tmp_path / "out", given=Given(template="chatml"))
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1))
    assert ("lm_head.weight" in report.dropped) == with_copy


def test_gemma_scales_image_tokens_as_transformers_4_did(tmp_path: Path) -> None:
    """There the embeddings of text and images alike were multiplied by sqrt(D); now text alone is.

    Our config has a place for the factor. Other classes have none: an export puts it into the connector.
    """
    toy = make_toy(tmp_path, "gemma", "siglip")
    with torch.no_grad():  # initial weights are so small that a norm hides the factor
        for parameter in toy.llm.parameters():
            parameter *= 5
    import_checkpoint(write_factory(toy, tmp_path / "source"), tmp_path / "out")
    expected = reference_logits(
        toy, BEFORE, AFTER, num_dropped=1, tokens=lambda w, x: layouts.mlp(w, x) * toys.WIDTH**0.5
    )
    assert_same(tmp_path / "out", expected)
    assert not torch.allclose(expected, reference_logits(toy, BEFORE, AFTER, num_dropped=1), atol=1e-3)
    assert open_checkpoint(tmp_path / "out")[0].config.image_scale == pytest.approx(toys.WIDTH**0.5)
    export_checkpoint(tmp_path / "out", tmp_path / "stock", layout="llava")  # which compares logits
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock").eval()
    ids = [*BEFORE, *[stock.config.image_token_index] * 3, *AFTER]
    with torch.no_grad():
        found = stock(input_ids=torch.tensor([ids]), pixel_values=layouts.images()).logits
    assert torch.allclose(found[..., : expected.shape[-1]], expected, atol=1e-4)
