"""Published connectors other than the MLP: every tensor in its place, and the logits of their definitions."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear
from transformers import Blip2QFormerConfig, Blip2QFormerModel

import layouts
import toys
from layouts import make_toy, model_logits, reference_logits, write_bench, write_factory
from tinyllava.checkpoints.importing import Given, import_checkpoint
from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import open_checkpoint

BEFORE, AFTER = [1, 5, 9, 30], [40, 41, 7]
SIZES = {"resampler_hidden_size": 48, "num_queries": 6, "num_resampler_layers": 2}


def assert_same(folder: Path, expected: Tensor) -> None:
    model, _ = open_checkpoint(folder)
    found = model_logits(model, BEFORE, AFTER)
    assert found.shape[1] == expected.shape[1]
    assert torch.allclose(found[..., : expected.shape[-1]], expected, atol=1e-5)
    assert expected.std() > 0.01


def bench_tensors(width: int = 48, num_queries: int = 6, depth: int = 2) -> dict[str, Tensor]:
    """The tensors of TinyLLaVABench's resampler, on features of the toys' width."""
    seen = toys.WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "queries": (num_queries, width),
        "post_norm.weight": (width,),
        "post_norm.bias": (width,),
        "final_proj.weight": (toys.WIDTH, width),
    }
    for layer in range(depth):
        block = {
            "to_q.weight": (width, width),
            "to_k.weight": (width, seen),
            "to_v.weight": (width, seen),
            "to_out.weight": (width, width),
            "norm_image.weight": (seen,),
            "norm_image.bias": (seen,),
            "norm_hidden.weight": (width,),
            "norm_hidden.bias": (width,),
            "feed_forward.0.weight": (width,),
            "feed_forward.0.bias": (width,),
            "feed_forward.1.weight": (4 * width, width),
            "feed_forward.3.weight": (width, 4 * width),
        }
        shapes |= {f"resampler_blocks.{layer}.{name}": shape for name, shape in block.items()}
    return {name: torch.randn(shape) / 3 for name, shape in shapes.items()}


def bench_tokens(weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """The resampler by its definition: softmax(Q K' / sqrt(d)) V, keys from the patches alone."""

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, [x.shape[-1]], weights[f"{name}.weight"], weights[f"{name}.bias"])

    num_heads = 8 if weights["queries"].shape[1] == 512 else 12
    queries = weights["queries"][None]
    for layer in range(sum(name.endswith("to_q.weight") for name in weights)):
        at = f"resampler_blocks.{layer}"
        patches, normed = norm(features, f"{at}.norm_image"), norm(queries, f"{at}.norm_hidden")
        q = linear(normed, weights[f"{at}.to_q.weight"]).view(len(queries[0]), num_heads, -1)
        k, v = (
            linear(patches, weights[f"{at}.to_{x}.weight"]).view(patches.shape[1], num_heads, -1)
            for x in "kv"
        )
        shares = (torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", shares, v).reshape(1, len(q), -1)
        queries = queries + linear(mixed, weights[f"{at}.to_out.weight"])
        inner = linear(norm(queries, f"{at}.feed_forward.0"), weights[f"{at}.feed_forward.1.weight"])
        queries = queries + linear(gelu(inner), weights[f"{at}.feed_forward.3.weight"])
    return linear(norm(queries, "post_norm"), weights["final_proj.weight"])


@pytest.mark.parametrize("width", [48, 512])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_the_resampler_of_tinyllavabench(tmp_path: Path, vision: str, width: int) -> None:
    toy = make_toy(tmp_path, "phi", vision)
    toy.connector = bench_tensors(width)
    settings = SIZES | {"resampler_hidden_size": width}
    source = write_bench(toy, tmp_path / "source", mm_projector_type="resampler", **settings)
    report = import_checkpoint(source, tmp_path / "out")
    expected = reference_logits(
        toy, BEFORE, AFTER, num_dropped=int(vision == "clip"), tokens=bench_tokens, llm=layouts.bench_llm(toy)
    )
    assert_same(tmp_path / "out", expected)
    assert (report.num_image_tokens, report.filled) == (6, [])
    num_vision = len(layouts.bench_vision(toy)) - sum("layers.3." in name for name in toy.vision) * (
        vision == "clip"
    )
    assert report.num_tensors == len(layouts.bench_text(toy)) + num_vision + len(toy.connector)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["connector"] == "bench_resampler"


def test_the_resampler_alone_as_stage_1_saves_it_with_its_code_s_own_sizes(tmp_path: Path) -> None:
    """config.json names no size: 128 queries of width 768 through 3 layers with 12 heads."""
    toy = make_toy(tmp_path, "llama", "clip")
    toy.connector = bench_tensors(768, 128, 3)
    layouts.write_json(
        tmp_path / "run" / "config.json", layouts.bench_config(toy, mm_projector_type="resampler")
    )
    weights = {f"model.mm_projector.{n}": t for n, t in toy.connector.items()}
    torch.save(weights, tmp_path / "run" / "mm_projector.bin")
    given = Given(vision_encoder=toy.vision_folder, language_model=toy.language_folder)
    report = import_checkpoint(tmp_path / "run", tmp_path / "out", given=given)
    assert report.num_image_tokens == 128
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1, tokens=bench_tokens))


def test_a_resampler_that_does_not_fit_its_config_is_listed(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    toy.connector = bench_tensors()
    del toy.connector["resampler_blocks.1.to_v.weight"]
    toy.connector["resampler_blocks.0.to_v.bias"] = torch.ones(48)
    source = write_bench(toy, tmp_path / "source", mm_projector_type="resampler", **SIZES)
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(source, tmp_path / "out")
    message = str(caught.value)
    assert "connector bench_resampler" in message
    assert "1 tensor missing: layers.1.to_v.weight" in message
    assert "1 tensor without a counterpart in the model: layers.0.to_v.bias" in message
    uneven = write_bench(
        toy, tmp_path / "uneven", mm_projector_type="resampler", **SIZES | {"resampler_hidden_size": 50}
    )
    with pytest.raises(CheckpointError, match="width = 50 is not divisible by num_heads = 12"):
        import_checkpoint(uneven, tmp_path / "out")
    assert not (tmp_path / "out").exists()


WIDTH = 128


def make_former(depth: int) -> tuple[Blip2QFormerModel, dict[str, Tensor]]:
    """transformers' own Q-Former with random weights, and its tensors under Factory's names."""
    former = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=WIDTH,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=4 * WIDTH,
            cross_attention_frequency=2,
            encoder_hidden_size=toys.WIDTH,
        )
    ).eval()
    for name, parameter in former.named_parameters():
        if not name.startswith("layernorm."):
            torch.nn.init.normal_(parameter, std=0.2)
    tensors = {
        f"bert.{n}".replace("attention.attention.", "attention.self."): p.detach()
        for n, p in former.named_parameters()
        if not n.startswith("layernorm.")
    }
    return former, tensors | {
        "query_tokens": torch.randn(1, 5, WIDTH),
        "projector.weight": torch.randn(toys.WIDTH, WIDTH) / 8,
        "projector.bias": torch.randn(toys.WIDTH),
        "bert.embeddings.position_ids": torch.arange(512)[None],
    }


@pytest.mark.parametrize("three_folders", [False, True])
def test_the_qformer_of_factory(tmp_path: Path, three_folders: bool) -> None:
    toy = make_toy(tmp_path, "llama", "siglip")
    former, toy.connector = make_former(depth=3)

    def tokens(weights: dict[str, Tensor], features: Tensor) -> Tensor:
        seen = former(query_embeds=weights["query_tokens"], encoder_hidden_states=features)
        return linear(seen.last_hidden_state, weights["projector.weight"], weights["projector.bias"])

    source = write_factory(
        toy, tmp_path / "source", connector_type="qformer", num_queries=5, three_folders=three_folders
    )
    report = import_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1, tokens=tokens))
    assert report.num_image_tokens == 5
    assert report.filled == ["former.layernorm.bias", "former.layernorm.weight"]
    assert report.recomputed == ["bert.embeddings.position_ids"]


def test_a_qformer_with_tensors_missing_or_left_over(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    _, whole = make_former(depth=2)

    def refused(connector: dict[str, Tensor], name: str, match: str) -> None:
        toy.connector = connector
        source = write_factory(toy, tmp_path / name, connector_type="qformer")
        with pytest.raises(CheckpointError, match=match):
            import_checkpoint(source, tmp_path / "out")

    refused({n: t for n, t in whole.items() if n != "query_tokens"}, "a", "query_tokens .* is missing")
    refused(
        whole | {"bert.pooler.bias": torch.ones(2)},
        "b",
        "without a counterpart in the model: bert.pooler.bias",
    )
    short = {n: t for n, t in whole.items() if "layer.1.output_query.dense.bias" not in n}
    refused(short, "c", "missing: .*layer.1.output_query.dense.bias")
    wide = {"query_tokens": torch.ones(1, 5, 768), "bert.encoder.layer.2.x": torch.ones(1)}
    refused(wide, "d", "3 layers of width 768; expected 12")
