"""Layers in 4 and 8 bits against the same codes read by hand: what they hold, and what they compute."""

import pytest
import torch
from torch import nn

from quantised_by_hand import nearest, read_weight
from tinyllava.config import FULL, DataConfig, Stage, lora
from tinyllava.errors import TrainingError
from tinyllava.model.assemble import assemble
from tinyllava.model.quantised import EightBitLinear, FourBitLinear, QuantisedLinear, quantised_layers
from tinyllava.model.tuning import apply_tuning, close_ledger, component_of, merge_adapters, open_ledger
from training_toys import toy_run

KINDS = {4: FourBitLinear, 8: EightBitLinear}
# Whole blocks and broken ones, more than 256 blocks, an odd number of weights; then rows of toys and of real
# models, of which bitsandbytes' own CPU kernels read some wrongly.
SHAPES = [(64, 32), (48, 40), (300, 130), (7, 33)]
SHAPES += [(33, width) for width in (32, 64, 96, 160, 576, 896, 1152, 4304)]


def make_layer(shape: tuple[int, int], bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(shape[1], shape[0], bias=bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", KINDS)
def test_the_weights_are_those_that_the_codes_say_and_near_the_given_ones(bits, shape):
    layer = make_layer(shape)
    held = KINDS[bits](layer)
    expected = read_weight(held)
    torch.testing.assert_close(held.dequantise(), expected, atol=1e-7, rtol=1e-6)
    given = layer.weight.detach()
    rounded = nearest(given, bits)
    if bits == 8:
        torch.testing.assert_close(expected, rounded, atol=1e-7, rtol=1e-6)
    else:  # beyond rounding to the nearest value, scales in 8 bits
        assert (expected - rounded).abs().max() < 0.2 * given.abs().max()
        assert (expected - rounded).pow(2).mean() < (given - rounded).pow(2).mean() / 10
    assert (given - expected).abs().max() < {4: 0.2, 8: 0.006}[bits] * given.abs().max()


@pytest.mark.parametrize("bits", KINDS)
def test_as_many_bytes_are_held_as_qlora_says(bits):
    held = KINDS[bits](make_layer((512, 256)))
    scales = sum(t.numel() * t.element_size() for name, t in held.named_buffers() if "levels" not in name)
    num_weights = 512 * 256
    codes = held.weight.numel() * held.weight.element_size()
    assert codes == num_weights * bits // 8
    assert scales == {4: num_weights // 64 + 4 * num_weights // (64 * 256) + 4, 8: 4 * 512}[bits]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", KINDS)
def test_outputs_and_gradients_are_those_of_the_dequantised_weights(bits, shape, bias):
    held = KINDS[bits](make_layer(shape, bias))
    weight, inputs = read_weight(held), torch.randn(2, 5, shape[1], requires_grad=True)
    outputs = held(inputs)
    given = torch.randn_like(outputs)
    (gradient,) = torch.autograd.grad(outputs, inputs, given)
    expected = nn.functional.linear(inputs, weight, held.bias)
    (expected_gradient,) = torch.autograd.grad(expected, inputs, given)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", KINDS)
def test_without_gradients_outputs_are_the_same_but_in_8_bits_inputs_are_rounded_too(bits, shape):
    held = KINDS[bits](make_layer(shape)).eval()
    inputs = torch.randn(2, 5, shape[1]).half().float()  # LLM.int8 rounds to fp16 first
    with torch.no_grad():
        outputs = held(inputs)
    if bits == 8:
        scale = inputs.abs().amax(-1, keepdim=True) / 127
        rounded = (inputs / scale).round() * scale
        expected = nn.functional.linear(rounded, read_weight(held), held.bias)
        torch.testing.assert_close(outputs, expected, atol=2e-3, rtol=0)  # a few round to the other side
    else:
        expected = nn.functional.linear(inputs, read_weight(held), held.bias)
        torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)


def test_no_dequantised_weights_are_kept_from_forward_to_backward():
    held = FourBitLinear(make_layer((64, 32)))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda kept: kept):
        held(torch.randn(3, 32, requires_grad=True))
    assert 64 * 32 not in kept


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", KINDS)
def test_products_follow_the_precision_of_autocast_and_the_bias_stays_as_it_is(bits, shape):
    held = KINDS[bits](make_layer(shape))
    bias, inputs = held.bias.detach().clone(), torch.randn(3, shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = held(inputs)
    assert outputs.dtype == torch.bfloat16
    assert held.bias.dtype == torch.float32
    assert torch.equal(held.bias, bias)
    expected = nn.functional.linear(inputs, read_weight(held), bias)
    torch.testing.assert_close(outputs.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", KINDS)
def test_an_ordinary_layer_comes_back_in_the_type_that_it_had(bits, dtype):
    layer = make_layer((64, 32)).to(dtype)
    held = KINDS[bits](layer)
    back = held.to_linear()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, held.dequantise().to(dtype))
    assert back.bias is layer.bias


def tuned(parts, records, folder, llm: str, bits: int, encoder_bits: int = 0):
    torch.manual_seed(0)
    model, _ = assemble(toy_run(parts, records, folder, llm=llm, encoder="clip").model)
    plan = {"vision_encoder": lora(2, bits=encoder_bits)} if encoder_bits else {}
    stage = Stage(
        data=DataConfig(),
        connector=FULL,
        language_model=lora(4, bits=bits),
        learning_rate=1e-3,
        global_batch_size=2,
        **plan,
    )
    apply_tuning(model, stage)
    return model


@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize(("llm", "num_linears"), [("llama", 7), ("phi", 6), ("stablelm", 7)])
def test_every_linear_layer_below_adapters_is_held_and_nothing_else(
    parts, records, tmp_path, llm, num_linears, bits
):
    model = tuned(parts, records, tmp_path, llm, bits)
    held = quantised_layers(model)
    assert len(held) == 2 * num_linears  # two layers
    assert {component_of(name) for name in held} == {"language_model"}
    assert all(type(layer) is KINDS[bits] for layer in held.values())
    plain = [m for n, m in model.language_model.named_modules() if type(m) is nn.Linear and "lora_" not in n]
    assert plain == []
    others = [p for n, p in model.named_parameters() if n not in held]
    assert all(p.dtype == torch.float32 for p in others)
    merge_adapters(model)
    assert quantised_layers(model) == {}
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("bits", KINDS)
def test_the_encoder_can_be_held_too(parts, records, tmp_path, bits):
    model = tuned(parts, records, tmp_path, "llama", 16, encoder_bits=bits)
    held = quantised_layers(model)
    assert {component_of(name) for name in held} == {"vision_encoder"}
    pixels = torch.rand(2, 3, 28, 28)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    features = model.model.encode_images(pixels)
    merge_adapters(model)
    torch.testing.assert_close(model.model.encode_images(pixels), features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("buffer", ["", "scales", "nested_scales", "offset"])
def test_the_ledger_notices_codes_and_scales_that_moved(parts, records, tmp_path, buffer):
    model = tuned(parts, records, tmp_path, "phi", 4)
    ledger = open_ledger(model)
    shapes = {row.name: row.shape for row in ledger.rows if row.name.endswith("fc1.base_layer.weight")}
    assert set(shapes.values()) == {(64, 32)}
    close_ledger(ledger, model)  # nothing has moved yet
    layer: QuantisedLinear = next(iter(quantised_layers(model).values()))
    tensor = getattr(layer, buffer) if buffer else layer.weight.data
    tensor += 1
    with pytest.raises(TrainingError, match=r"frozen tensors changed: .*base_layer\.weight \(1 in all\)"):
        close_ledger(ledger, model)
