"""The assembled model: against transformers' own classes, saved and opened, answering in batches."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    LlavaForConditionalGeneration,
)

from tinyllava.config import ModelConfig
from tinyllava.conversation import ask
from tinyllava.errors import CheckpointError, ConfigError
from tinyllava.model import modeling
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.model.connectors import build_connector
from tinyllava.model.modeling import TinyLlavaOutput
from tinyllava.parts.connectors import CONNECTORS, num_tokens

LLMS, ENCODERS = ("llama", "phi", "stablelm", "chatml"), ("clip", "siglip")
PAIRS = [(llm, encoder) for llm in LLMS for encoder in ENCODERS]


def make(parts: dict[str, Path], llm: str, encoder: str, **kwargs):
    torch.manual_seed(1)
    config = ModelConfig(vision_encoder=str(parts[encoder]), language_model=str(parts[llm]), **kwargs)
    return assemble(config)


def image(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.effect_noise(size, 60 + seed).convert("RGB")


@pytest.mark.parametrize("llm", LLMS)
def test_text_alone_gives_the_language_models_own_logits(parts, llm):
    model, processor = make(parts, llm, "siglip")
    reference = AutoModelForCausalLM.from_pretrained(parts[llm])
    ids = processor.tokenizer("A red circle and 12 blue squares.", return_tensors="pt").input_ids
    expected, found = reference(ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=0)
    assert found[..., expected.shape[-1] :].abs().sum() == 0  # rows added for <image> are neutral


@pytest.mark.parametrize("encoder", ENCODERS)
def test_features_are_hidden_states_of_the_second_last_layer(parts, encoder):
    from transformers import AutoModel

    model, processor = make(parts, "llama", encoder)
    pixels = processor.to_pixels([image(0), image(1)])
    whole = AutoModel.from_pretrained(parts[encoder])(pixels, output_hidden_states=True).hidden_states[-2]
    expected = whole[:, 1:] if encoder == "clip" else whole
    torch.testing.assert_close(model.model.encode_images(pixels), expected, rtol=0, atol=0)
    assert expected.shape[1] == 4
    assert len(model.vision_encoder.encoder.layers) == 3  # the layer above the feature layer is not there


@pytest.mark.parametrize(("llm", "encoder"), PAIRS)
def test_saved_folder_opens_the_same_under_any_name(parts, tmp_path, llm, encoder):
    model, processor = make(parts, llm, encoder)
    folder = tmp_path / "llava-lora-phi-3.1b"  # a name that the published loaders would misread
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again, processor_again = open_checkpoint(folder)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    prompt, _ = processor.render(ask("What is it?", "x"), open_answer=True)
    inputs = processor(images=[image(0)], text=prompt)
    assert processor_again.render(ask("What is it?", "x"), open_answer=True)[0] == prompt
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert again.lm_head.bias is None or llm == "phi"
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is type(model)
    assert type(AutoProcessor.from_pretrained(folder)) is type(processor)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_stock_llava_opens_a_llama_mlp_checkpoint_with_equal_logits(parts, tmp_path, encoder):
    model, processor = make(parts, "llama", encoder)
    model.save_pretrained(tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    prompt, _ = processor.render(ask("What is it?", "x"), open_answer=True)
    inputs = processor(images=[image(0)], text=prompt)
    torch.testing.assert_close(stock(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_phi_head_bias_is_kept_and_used(parts):
    model, _ = make(parts, "phi", "clip")
    reference = AutoModelForCausalLM.from_pretrained(parts["phi"])
    assert torch.equal(model.lm_head.bias, reference.lm_head.bias)
    assert model.lm_head.bias.abs().max() > 0.5


def test_loss_is_cross_entropy_over_supervised_positions(parts):
    model, _ = make(parts, "phi", "clip")
    ids = torch.randint(0, 200, (3, 20))
    labels = ids.masked_fill(torch.rand(3, 20) < 0.6, -100)
    logits = model(input_ids=ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, expected)
    halved = model(
        input_ids=ids, labels=labels, num_items_in_batch=2 * int((labels[:, 1:] != -100).sum())
    ).loss
    torch.testing.assert_close(halved, expected / 2)


def test_logits_of_many_positions_are_held_in_parts_with_the_same_loss_and_gradients(parts, monkeypatch):
    model, _ = make(parts, "phi", "clip")
    model.requires_grad_(True)
    ids = torch.randint(0, 200, (3, 20))
    rows, weights = model.lm_head.out_features, model.lm_head.weight.untyped_storage().data_ptr()
    results = []
    for limit in (1024, 7):
        monkeypatch.setattr(modeling, "LOSS_POSITIONS", limit)
        kept: dict[int, int] = {}

        def pack(tensor, kept=kept):
            place = tensor.untyped_storage().data_ptr()
            if tensor.shape[-1:] == (rows,) and place != weights:
                kept[place] = len(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        in_forward = sum(kept.values())
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((in_forward, loss.detach(), gradients))
        model.zero_grad()
    (whole, loss, gradients), (in_parts, loss_in_parts, gradients_in_parts) = results
    assert (whole, in_parts) == (3 * 19, 0)
    torch.testing.assert_close(loss_in_parts, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == gradients_in_parts.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_in_parts[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("llm", LLMS)
def test_a_loss_fills_no_cache_and_leaves_the_configs_as_they_were(parts, llm, monkeypatch):
    model, processor = make(parts, llm, "siglip")
    before = model.config.to_json_string()
    fills, fill = [], DynamicCache.update
    monkeypatch.setattr(DynamicCache, "update", lambda *args, **kw: fills.append(1) or fill(*args, **kw))
    ids = processor.tokenizer("A red circle.", return_tensors="pt").input_ids
    for mode in (True, False):
        model.train(mode)
        model(input_ids=ids, labels=ids).loss.backward()
    assert fills == []
    assert model.config.to_json_string() == before
    model(input_ids=ids)
    assert fills  # logits without labels still come with a cache


def test_training_does_not_run_the_last_position_also_where_it_is_an_image(parts):
    model, processor = make(parts, "llama", "clip")
    inputs = processor(images=[image(0), image(1)], text=["a b <image>", "<image> c d e f g"])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    num_rows = model.config.num_language_rows  # the rows behind make room for <image> and are never predicted
    assert 0 < num_rows < model.lm_head.out_features
    expected = torch.nn.functional.cross_entropy(
        model(**inputs).logits[:, :-1, :num_rows].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    widths = []
    model.language_model.layers[0].register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    assert widths == [labels.shape[1] - 1]


@pytest.mark.parametrize(("llm", "encoder"), PAIRS)
def test_generate_for_a_mixed_padded_batch_equals_each_alone(parts, llm, encoder):
    model, processor = make(parts, llm, encoder)
    requests = [
        (ask("What is it?", "x"), [image(0)]),
        (ask("Is there a dog in the picture? Answer the question using a single word or phrase."), []),
        (ask("What is in it, and what is not?", "x", "y"), [image(1), image(2, (30, 80))]),
        (ask("A"), []),
    ]
    prompts = [processor.render(conversation, open_answer=True)[0] for conversation, _ in requests]
    images = [image for _, group in requests for image in group]
    together = model.generate(**processor(images=images, text=prompts), max_new_tokens=8, min_new_tokens=8)[
        :, -8:
    ]
    for row, prompt, (_, group) in zip(together, prompts, requests, strict=True):
        alone = model.generate(**processor(images=group, text=prompt), max_new_tokens=8, min_new_tokens=8)[
            0, -8:
        ]
        assert row.tolist() == alone.tolist()


def test_generate_without_a_cache_sees_the_images_at_every_step(parts):
    model, processor = make(parts, "phi", "clip")
    prompt, _ = processor.render(ask("What is it?", "x"), open_answer=True)
    inputs = processor(images=[image(0)], text=prompt)
    features = model.model.encode_images(inputs["pixel_values"])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8).tolist()
    for images in ({"pixel_values": inputs["pixel_values"]}, {"image_features": features}):
        for use_cache in (True, False):
            found = model.generate(**text, **images, max_new_tokens=8, min_new_tokens=8, use_cache=use_cache)
            assert found.tolist() == expected


def test_nothing_is_inherited_from_another_model_of_transformers(parts):
    model, _ = make(parts, "llama", "clip")
    classes = (type(model), type(model.model), type(model.config), TinyLlavaOutput)
    bases = {f"{base.__module__}.{base.__name__}" for cls in classes for base in cls.__mro__}
    assert "transformers.modeling_utils.PreTrainedModel" in bases
    assert [base for base in bases if base.startswith("transformers.models.")] == []


def test_config_json_has_the_keys_of_stock_llava_and_no_defaults_of_every_model(parts, tmp_path):
    model, _ = make(parts, "chatml", "siglip")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.keys() >= {
        "image_token_index",
        "image_seq_length",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "tie_word_embeddings",
    }
    assert saved["tie_word_embeddings"]
    for name, kind in (("text_config", "llama"), ("vision_config", "siglip_vision_model")):
        assert saved[name]["model_type"] == kind
        assert "id2label" not in saved[name]
    again = AutoConfig.from_pretrained(tmp_path)
    assert json.loads(again.to_json_string()) == saved
    assert again.image_token_id == saved["image_token_index"]


def test_wrong_number_of_image_tokens_is_refused(parts):
    model, processor = make(parts, "llama", "clip")
    prompt, _ = processor.render(ask("What is it?", "x"), open_answer=True)
    inputs = processor(images=[image(0)], text=prompt)
    ids = inputs["input_ids"]
    first = (ids == processor.image_token_id).nonzero()[0]
    too_few = ids.index_put(tuple(first[:, None]), torch.tensor(5))
    with pytest.raises(ValueError, match="1 images of 4 tokens need 4 image tokens in input_ids, found 3"):
        model(input_ids=too_few, pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("name", ["linear", "mlp", "resampler", "pixel_shuffle", "pool", "slots"])
def test_connectors_give_the_tokens_they_announce(name):
    options = {"pixel_shuffle": {"block": 3}, "resampler": {"num_queries": 5, "width": 32}}.get(name, {})
    connector = build_connector(name, vision_width=24, language_width=40, num_patches=36, options=options)
    features = torch.randn(2, 36, 24)
    assert connector(features).shape == (2, num_tokens(CONNECTORS[name], 36, options), 40)
    assert torch.equal(connector(features)[1], connector(features[1:])[0]) or torch.allclose(
        connector(features)[1], connector(features[1:])[0], atol=1e-6
    )
    assert name in CONNECTORS


def test_slots_drop_features_in_training_only():
    sizes = {"vision_width": 24, "language_width": 40, "num_patches": 36}
    plain = build_connector("slots", **sizes, options={"num_slots": 3, "dropout_percent": 0})
    dropping = build_connector("slots", **sizes, options={"num_slots": 3, "dropout_percent": 50})
    dropping.load_state_dict(plain.state_dict())
    kept = []
    dropping.linear_1.register_forward_hook(lambda module, args, output: kept.append(args[0] != 0))
    features = torch.randn(500, 36, 24)
    assert torch.equal(dropping.eval()(features), plain(features))
    dropping.train()(features)
    assert kept[0].all()
    assert kept[1].float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_pixel_shuffle_keeps_neighbours_together():
    connector = build_connector(
        "pixel_shuffle", vision_width=1, language_width=4, num_patches=16, options={"block": 2}
    )
    seen = []
    connector.linear_1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    connector(torch.arange(16.0).reshape(1, 16, 1))
    assert seen[0][0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_grid_that_does_not_divide_is_refused_with_the_sizes_that_do():
    with pytest.raises(ConfigError, match=r"27 x 27.*blocks of 2 x 2.*\[1, 3, 9, 27\]"):
        num_tokens(CONNECTORS["pixel_shuffle"], 729, {"block": 2})


def test_a_missing_shard_is_named(parts, tmp_path):
    model, processor = make(parts, "llama", "clip")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    processor.save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(tmp_path)


def test_a_truncated_weight_file_is_a_checkpoint_error(parts, tmp_path):
    model, processor = make(parts, "llama", "clip")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="is truncated"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="elsewhere: no such folder"):
        open_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a tinyllava checkpoint"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="'phi', not 'tinyllava'"):
        open_checkpoint(parts["phi"])
