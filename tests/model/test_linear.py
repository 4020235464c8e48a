"""Layers that multiply by oneDNN compute what plain ones do, in answers and in training."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from tinyllava.config import ModelConfig
from tinyllava.model import linear
from tinyllava.model.assemble import assemble
from tinyllava.model.devices import multiplies_bf16
from tinyllava.model.linear import (
    PackedLinear,
    multiply_directly,
    multiply_together,
    named_weights,
    pack_apart,
    pack_linear_layers,
    pack_together,
    speed_up_reading,
)


@pytest.fixture(params=["phi", "chatml"])
def packed(parts, request, monkeypatch):
    """A model and a copy whose layers are packed, as they are in 32 bits on an AMD CPU with AVX-512."""
    monkeypatch.setattr(linear, "_is_packed_faster", lambda weight: weight.dtype == torch.float32)
    chosen = ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts[request.param]))
    model = assemble(chosen)[0].eval()
    copy = deepcopy(model)
    pack_linear_layers(copy)
    return model, copy


def test_packed_layers_compute_the_same_forwards_and_backwards(packed):
    model, copy = packed
    layers = {name: layer for name, layer in copy.named_modules() if isinstance(layer, PackedLinear)}
    assert all(layer.packed is not None for layer in layers.values())
    assert layers.keys() == {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    exact = deepcopy(model).double()
    ids, pixels = torch.arange(7)[None], torch.randn(1, 3, 28, 28)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.inference_mode():
        features, logits = (
            [found.model.get_image_features(pixels.to(kind)), found(inputs_embeds=embeds.to(kind)).logits]
            for found, kind in ((copy, torch.float32), (exact, torch.float64))
        )
    for one, other in zip(features, logits, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    gradients = []
    for found in (model, copy):
        inputs = embeds.clone().requires_grad_()
        found(inputs_embeds=inputs).logits.square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients)


def test_a_connector_without_a_bias_can_be_packed(parts, monkeypatch):
    monkeypatch.setattr(linear, "_is_packed_faster", lambda weight: weight.dtype == torch.float32)
    chosen = ModelConfig(
        vision_encoder=str(parts["clip"]), language_model=str(parts["phi"]), connector="linear"
    )
    model = assemble(chosen)[0].eval()
    model.connector.linear.bias = None
    ids, pixels = (
        torch.full((1, model.config.num_image_tokens), model.config.image_token_id),
        torch.randn(1, 3, 28, 28),
    )
    with torch.inference_mode():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        pack_linear_layers(model)
        assert not list(model.connector.parameters())
        torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, expected)


def test_a_packed_model_is_saved_checked_cast_and_copied_as_before(packed):
    model, copy = packed
    before = model.state_dict()
    for changed in (copy, deepcopy(copy), deepcopy(copy).double().float()):
        after = changed.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    weights = dict(named_weights(copy))
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    cast = deepcopy(copy).double()
    assert all(weight.dtype == torch.float64 for _, weight in named_weights(cast))
    inputs = torch.randn(1, 3, cast.config.text_config.hidden_size, dtype=torch.float64)
    assert torch.equal(
        cast(inputs_embeds=inputs).logits, deepcopy(model).double()(inputs_embeds=inputs).logits
    )


def test_a_packed_weight_that_is_changed_or_loaded_counts(packed):
    model, copy = packed
    embeds = model.get_input_embeddings()(torch.arange(7)[None]).detach()
    place = "model.language_model.layers.0.self_attn.q_proj"
    with torch.inference_mode():
        for found in (model, copy):
            found.get_submodule(place).weight.mul_(3)
        torch.testing.assert_close(copy(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits)
    assert f"{place}.weight" in dict(copy.named_parameters())
    embedding = copy.get_input_embeddings().weight
    assert (copy.lm_head.weight is embedding) == model.config.tie_word_embeddings
    copy.load_state_dict({name: 2 * weight for name, weight in model.state_dict().items()})
    assert all(torch.equal(weight, 2 * model.state_dict()[name]) for name, weight in named_weights(copy))


def test_a_tied_head_is_packed_only_if_a_copy_is_wanted(packed):
    model, _ = packed
    kept = deepcopy(model)
    pack_linear_layers(kept, copies_tied=False)
    is_tied = model.config.tie_word_embeddings
    assert type(kept.lm_head) is (nn.Linear if is_tied else PackedLinear)
    pack_linear_layers(kept)
    assert isinstance(kept.lm_head, PackedLinear)
    moved = deepcopy(kept).double()  # which is not packed
    assert (moved.lm_head.weight is moved.get_input_embeddings().weight) == is_tied


@pytest.mark.parametrize("has_bias", [True, False])
def test_layers_that_share_a_product_stay_layers_of_their_own(has_bias, monkeypatch):
    monkeypatch.setattr(linear, "_is_packed_faster", lambda weight: weight.dtype == torch.float32)
    plain = nn.Sequential(*(nn.Linear(48, size, bias=has_bias) for size in (64, 16, 24)))
    inputs = torch.randn(3, 48)
    expected = torch.cat([layer(inputs) for layer in plain], -1).detach()
    shared = deepcopy(plain)
    with torch.no_grad():
        torch.testing.assert_close(multiply_together(shared, inputs), expected)
        pack_together(shared)  # which are not packed
        pack_linear_layers(shared)
        pack_together(shared)
        assert len({id(layer.packed) for layer in shared}) == 1
        for copy in (shared, deepcopy(shared)):
            torch.testing.assert_close(multiply_together(copy, inputs), expected)
            torch.testing.assert_close(torch.cat([layer(inputs) for layer in copy], -1), expected)
            assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in named_weights(copy))
        changed = deepcopy(shared)
        pack_together(changed)
        changed[1].weight.mul_(2)
        halves = multiply_together(changed, inputs).split((64, 16, 24), -1)
        wanted = expected.split((64, 16, 24), -1)
        bias = plain[1].bias.detach() if has_bias else 0
        torch.testing.assert_close(halves[1], 2 * (wanted[1] - bias) + bias)
        torch.testing.assert_close(halves[2], wanted[2])
        pack_apart(shared)
        assert len({id(layer.packed) for layer in shared}) == 3
        torch.testing.assert_close(torch.cat([layer(inputs) for layer in shared], -1), expected)
    inputs.requires_grad_()
    pack_together(shared)
    found, right = (
        torch.autograd.grad(torch.cat([layer(inputs) for layer in layers], -1).sum(), inputs)[0]
        for layers in (shared, plain)
    )
    torch.testing.assert_close(found, right)


def test_large_weights_are_read_faster_once_each_wherever_they_are(monkeypatch):
    monkeypatch.setattr(linear, "_is_packed_faster", lambda weight: len(weight) > 500)
    held = []
    monkeypatch.setattr(linear, "hold_in_huge_pages", held.extend)
    layers = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 600), nn.Linear(512, 500), nn.Linear(4, 4))
    pack_linear_layers(layers)
    pack_together(layers[:2])
    speed_up_reading(layers)
    assert [id(weight) for weight in held] == [id(layers[0].packed), id(layers[2].weight)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_follows_the_machine_and_the_outputs_do_not(dtype, monkeypatch):
    monkeypatch.setattr(linear, "cpu_vendor", lambda: "AMD")
    layer, inputs = nn.Linear(48, 80).to(dtype), torch.randn(2, 5, 48).to(dtype)
    holder = nn.Sequential(layer)
    pack_linear_layers(holder)
    can = (
        multiplies_bf16("cpu")
        if dtype == torch.bfloat16
        else "AVX512" in torch.backends.cpu.get_cpu_capability()
    )
    assert isinstance(holder[0], PackedLinear) == can
    with torch.no_grad():
        torch.testing.assert_close(holder(inputs), layer(inputs))
    monkeypatch.setattr(linear, "cpu_vendor", lambda: "Intel")
    holder = nn.Sequential(nn.Linear(48, 80))
    pack_linear_layers(holder)
    assert type(holder[0]) is nn.Linear


@pytest.fixture
def always_direct(monkeypatch):
    """Multiply by oneDNN whatever the machine and the size."""
    monkeypatch.setattr(linear, "_is_packed_faster", lambda weight: weight.dtype == torch.float32)
    monkeypatch.setattr(linear, "SMALLEST_PRODUCT", 1)


@pytest.fixture
def products(monkeypatch):
    """Shapes of the weights that oneDNN has multiplied."""
    seen = []
    multiply = linear.multiply_by_onednn

    def counted(inputs, weight, bias=None):
        seen.append(tuple(weight.shape))
        return multiply(inputs, weight, bias)

    monkeypatch.setattr(linear, "multiply_by_onednn", counted)
    return seen


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48)])
def test_direct_layers_differentiate_as_plain_ones_in_64_bits_do(shape, has_bias, always_direct, products):
    layer = nn.Linear(48, 80, bias=has_bias)
    exact = deepcopy(layer).double()
    multiply_directly(nn.Sequential(layer))
    inputs = torch.randn(shape).transpose(0, -2).requires_grad_()
    gradient = torch.randn(*inputs.shape[:-1], 80)
    found, expected = [], []
    for module, results in ((layer, found), (exact, expected)):
        outputs = module(inputs.to(module.weight.dtype))
        given = gradient.to(outputs.dtype)
        results += [outputs, *torch.autograd.grad(outputs, [inputs, *module.parameters()], given)]
    assert products == [(80, 48), (48, 80), (48, inputs.numel() // 48)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_direct_layer_keeps_its_inputs_only_for_the_gradient_of_its_weight(is_frozen, always_direct):
    layer = nn.Linear(48, 80).requires_grad_(not is_frozen)
    multiply_directly(nn.Sequential(layer))
    inputs, kept = torch.randn(7, 48, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda unused: None):
        layer(inputs)
    assert any(one is inputs for one in kept) != is_frozen


def test_pairs_of_matrices_are_multiplied_by_either(always_direct, products, monkeypatch):
    rows, others = torch.randn(3, 7, 16), torch.randn(3, 16, 5).transpose(1, 2)
    found = linear.multiply_pairs(rows, others)
    assert products == [(5, 16)] * 3
    monkeypatch.setattr(linear, "SMALLEST_PRODUCT", 7 * 5 * 16 + 1)
    for one in (found, linear.multiply_pairs(rows, others)):
        torch.testing.assert_close(one, rows @ others.transpose(1, 2))
    assert len(products) == 3


def test_direct_layers_leave_half_precision_empty_and_compiled_passes_alone(always_direct, products):
    plain = nn.Linear(48, 80)
    layer = deepcopy(plain)
    undo = multiply_directly(nn.Sequential(layer))
    inputs = torch.randn(3, 5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(inputs), plain(inputs))
    assert layer(inputs[:0]).shape == (0, 5, 80)
    compiled = torch.compile(layer, backend="aot_eager")
    assert torch.equal(compiled(inputs), plain(inputs))
    assert torch.equal(deepcopy(layer).double()(inputs.double()), deepcopy(plain).double()(inputs.double()))
    assert products == []
    layer(inputs)
    assert products == [(80, 48)]
    undo()
    layer(inputs)
    assert type(layer) is nn.Linear
    assert products == [(80, 48)]


@pytest.mark.parametrize("vendor", ["AMD", "Intel", ""])
def test_products_are_chosen_by_machine_and_size_alone(vendor, monkeypatch, products):
    monkeypatch.setattr(linear, "cpu_vendor", lambda: vendor)
    layers = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))
    multiply_directly(layers)
    layers(torch.zeros(64, 256))
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert products == ([(256, 256)] if vendor == "AMD" and has_avx512 else [])
