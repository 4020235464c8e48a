"""Layers that keep less for the backward pass compute what stock ones do."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllava.config import FROZEN, FULL, Hardware, ModelConfig, Stage, lora
from tinyllava.model import linear, modeling
from tinyllava.model.assemble import assemble
from tinyllava.model.compat import causal_without_looking, set_checkpointing
from tinyllava.model.linear import DirectLinear
from tinyllava.model.tuning import apply_tuning
from tinyllava.training import half as half_module
from tinyllava.training import lean as lean_module
from tinyllava.training import run as training
from tinyllava.training.lean import make_lean
from tinyllava.training.precision import computing_in, hold_frozen_in_half
from tinyllava.training.run import train
from training_toys import toy_run

STAGE = Stage(learning_rate=1e-3, global_batch_size=2)
STAGES = {
    "pretrain": STAGE,
    "finetune": Stage(learning_rate=1e-3, global_batch_size=2, vision_encoder=FULL, language_model=FULL),
    "adapters": Stage(learning_rate=1e-3, global_batch_size=2, language_model=lora(4), connector=FROZEN),
}


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def direct(monkeypatch, request):
    """Multiply by oneDNN whatever the machine and the size, or never."""
    monkeypatch.setattr(linear, "_is_packed_faster", lambda weight: request.param)
    monkeypatch.setattr(linear, "SMALLEST_PRODUCT", 1)
    return request.param


@pytest.fixture
def half(monkeypatch):
    """Let layers compute as on a CPU that multiplies bf16; the shapes of queries that attention took."""
    monkeypatch.setattr(lean_module, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(lean_module, "best_device", lambda: "cpu")
    attended = []
    attend = half_module.attend_half

    def noted(query, *others):
        attended.append(tuple(query.shape))
        return attend(query, *others)

    monkeypatch.setattr(lean_module, "attend_half", noted)
    return attended


def tuned(parts, llm, stage):
    torch.manual_seed(0)
    model, _ = assemble(ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts[llm])))
    apply_tuning(model, stage)
    with torch.no_grad():  # adapters begin at zero, and norms at one
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def lean_layers(model):
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def gradients_of(model, dtype=torch.float32):
    """The loss and every gradient of one batch."""
    torch.manual_seed(1)
    ids = torch.randint(10, 60, (2, 12))
    ids[:, 1:5] = model.config.image_token_id
    labels = ids.clone()
    labels[:, :6] = -100
    loss = model(input_ids=ids, pixel_values=torch.randn(2, 3, 28, 28).to(dtype), labels=labels).loss
    loss.backward()
    return loss.double(), {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("llm", ["chatml", "phi"])
def test_a_lean_model_trains_as_a_stock_one_in_64_bits_does(parts, llm, name, direct):
    model = tuned(parts, llm, STAGES[name])
    expected = gradients_of(deepcopy(model).double(), torch.float64)
    undo = make_lean(model, "fp32")
    assert any(isinstance(m, DirectLinear) for m in model.modules()) == direct
    head = "DirectLinear" if direct else "Linear"
    assert lean_layers(model) == {
        ("chatml", "pretrain"): {"LlamaRMSNorm", "LlamaMLP", "Embedding", head},
        ("chatml", "finetune"): {"LlamaRMSNorm", "LlamaMLP", "Embedding", head},
        ("chatml", "adapters"): {"LlamaRMSNorm", "Embedding", head},
    }.get((llm, name), set())
    twin = deepcopy(model)  # as of a sharded model
    loss, gradients = gradients_of(twin)
    assert gradients.keys() == expected[1].keys()
    assert not any(p.grad.is_sparse for p in twin.parameters() if p.grad is not None)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    for place, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][place], rtol=1e-3, atol=1e-6, msg=place)
    twin.zero_grad()
    set_checkpointing(twin, True)
    again = gradients_of(twin)
    assert all(torch.equal(again[1][place], gradient) for place, gradient in gradients.items())
    undo()
    assert not any(isinstance(m, DirectLinear) for m in model.modules())
    assert lean_layers(model) == set()


def distance(gradients, expected):
    """How far all gradients are from others, beside their length."""
    squares = sum((gradient - expected[1][place]).square().sum() for place, gradient in gradients[1].items())
    return float((squares / sum(gradient.square().sum() for gradient in expected[1].values())).sqrt())


@pytest.mark.parametrize(("few_rows", "positions"), [(0, 1024), (128, 1024), (128, 5)])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("llm", ["chatml", "phi"])
def test_a_lean_model_trains_in_bf16_as_exactly_as_autocast(
    parts, llm, name, few_rows, positions, half, monkeypatch
):
    monkeypatch.setattr(lean_module, "FEW_ROWS", few_rows)
    monkeypatch.setattr(modeling, "LOSS_POSITIONS", positions)
    model = tuned(parts, llm, STAGES[name])
    expected = gradients_of(deepcopy(model).double(), torch.float64)

    def trained(model):
        model.zero_grad()
        with causal_without_looking(model.language_model), computing_in("bf16", torch.device("cpu")):
            return gradients_of(model)

    plain = trained(deepcopy(model))
    undo = [hold_frozen_in_half(model, "bf16"), make_lean(model, "bf16")]
    found = trained(model)
    assert len(half) == model.config.text_config.num_hidden_layers
    assert found[1].keys() == plain[1].keys()
    assert not any(p.grad.is_sparse for p in model.parameters() if p.grad is not None)
    assert abs(found[0] - expected[0]) <= abs(plain[0] - expected[0]) + 1e-3 * expected[0]
    assert distance(found, expected) <= 1.1 * distance(plain, expected)
    set_checkpointing(model, True)
    again = trained(model)
    assert torch.equal(again[0], found[0])
    assert all(torch.equal(again[1][place], gradient) for place, gradient in found[1].items())
    for give_back in undo:
        give_back()
    assert lean_layers(model) == set()
    set_checkpointing(model, False)
    assert torch.equal(trained(model)[0], plain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_products_are_those_of_autocast(dtype, half):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(48, 80), nn.Linear(48, 32, bias=False)])
    leaf = torch.randn(2, 5, 48).to(dtype).requires_grad_()
    found = []
    for begin in (lambda: list, lambda: make_lean(layers, "bf16")):
        undo, rows = begin(), leaf * 1
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [layer(rows) for layer in layers]
            outputs += [layers[0](rows * 2)]
            if dtype == torch.float32:  # what was rounded before a change is not taken for what is there now
                rows.detach().mul_(2)
                outputs += [layers[1](rows)]
        total = sum(output.float().square().sum() for output in outputs)
        found.append([*outputs, *torch.autograd.grad(total, [leaf, *layers.parameters()])])
        undo()
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert all(
        torch.equal(one, other) for one, other in zip(*(each[: -1 - 3] for each in found), strict=True)
    )


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("chunk", [1, 2**18])
def test_attention_in_bf16_is_as_exact_as_pytorchs_fused_kernel(groups, chunk, monkeypatch, direct):
    monkeypatch.setattr(half_module, "_CHUNK", chunk)
    torch.manual_seed(0)
    shapes = [(3, 6, 19, 8), (3, groups, 19, 8), (3, groups, 19, 8)]
    inputs = [(2 * torch.randn(shape)).bfloat16() for shape in shapes]
    gradient = torch.randn(3, 19, 6, 8).bfloat16()
    found = []
    for dtype in (torch.float64, torch.bfloat16, None):
        leaves = [t.to(dtype or torch.bfloat16, copy=True).requires_grad_() for t in inputs]
        if dtype is None:
            with torch.autocast("cpu", torch.bfloat16):
                output = half_module.attend_half(*leaves, 0.3)
        else:
            kernel = SDPBackend.MATH if dtype == torch.float64 else SDPBackend.FLASH_ATTENTION
            with sdpa_kernel(kernel):
                heads = nn.functional.scaled_dot_product_attention(
                    *leaves, is_causal=True, scale=0.3, enable_gqa=True
                )
            output = heads.transpose(1, 2)
        gradients = torch.autograd.grad(output, leaves, gradient.to(output.dtype))
        found.append([t.double() for t in (output, *gradients)])
    for exact, fused, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= 1.1 * (fused - exact).norm()


def test_packed_samples_attend_as_rows_of_their_own_do(direct, monkeypatch):
    multiply = linear.multiply_by_onednn

    def checked(rows, weight):
        """Other layouts take it a hundred times as long."""
        assert all(t.is_contiguous() or t.t().is_contiguous() for t in (rows, weight))
        return multiply(rows, weight)

    monkeypatch.setattr(linear, "multiply_by_onednn", checked)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 17, h, 8).bfloat16().transpose(1, 2).requires_grad_() for h in (6, 2, 2)]
    found = []
    for lengths in ([5, 1, 11], None):
        with torch.autocast("cpu", torch.bfloat16):
            if lengths:
                output = half_module.attend_half(*inputs, 0.3, lengths)
            else:
                samples = zip(*(t.split([5, 1, 11], dim=2) for t in inputs), strict=True)
                output = torch.cat([half_module.attend_half(*sample, 0.3) for sample in samples], dim=1)
        total = (output.float() * torch.arange(8)).sum()
        found.append([output, *torch.autograd.grad(total, inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.75), ("bf16", 0.6)])
def test_lean_layers_keep_less(parts, precision, share, half):
    def kept_bytes(model):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        embeds = torch.randn(4, 150, model.config.text_config.hidden_size, requires_grad=True)
        attending = causal_without_looking(model.language_model)
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with computing_in(precision, torch.device("cpu")), attending, saving:
            output = model.language_model(inputs_embeds=embeds).last_hidden_state  # keeps the graph
        found = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
        del output
        return found

    model = tuned(parts, "chatml", STAGES["finetune"])
    before = kept_bytes(model)
    make_lean(model, precision)
    assert kept_bytes(model) < share * before


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_emulated_half_precision_and_compiled_layers_compute_as_ever(parts, precision, monkeypatch):
    monkeypatch.setattr(lean_module, "multiplies_bf16", lambda device: False)
    model = tuned(parts, "chatml", STAGES["finetune"])
    lean = deepcopy(model)
    make_lean(lean, precision)
    with torch.autocast("cpu", torch.bfloat16), causal_without_looking(lean.language_model):
        found, expected = gradients_of(lean), gradients_of(model)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(gradient, expected[1][place]) for place, gradient in found[1].items())
    rows = torch.randn(2, 5, model.config.text_config.hidden_size)
    for place in ("layers.0.mlp", "layers.0.input_layernorm"):
        one, other = (m.language_model.get_submodule(place) for m in (lean, model))
        torch._dynamo.reset()
        assert torch.equal(torch.compile(one.forward, backend="aot_eager")(rows), other(rows))


class Gated(nn.Module):
    """The layer of Llama, with what others have besides: Seed-OSS drops, Falcon-H1 multiplies."""

    def __init__(self, dropout=0.0, factor=1.0):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.act_fn, self.dropout, self.factor = nn.SiLU(), dropout, factor

    def forward(self, rows):
        inner = self.act_fn(self.gate_proj(rows)) * self.up_proj(rows) * self.factor
        return nn.functional.dropout(self.down_proj(inner), self.dropout, self.training)


class Norm(nn.Module):
    """The norm of Llama."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, rows):
        return nn.functional.rms_norm(rows, (8,), self.weight, self.variance_epsilon)


class GatedNorm(Norm):
    """The norm of Bamba and other hybrids, which multiplies by a gate where one is given."""

    def forward(self, rows, gate=None):
        return super().forward(rows if gate is None else rows * gate)


def test_layers_that_look_alike_and_compute_something_else_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.ModuleList([Gated(), Norm(), Gated(dropout=0.1), Gated(factor=2.0), GatedNorm()]).eval()
    expected, before = torch.rand(1, generator=torch.Generator().manual_seed(3)), torch.manual_seed(3)
    make_lean(model, "fp32")
    assert [one for one in model if "forward" in vars(one)] == [*model[:2]]
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.rand(1, generator=before), expected)  # the trials draw no number
    rows, gate = torch.randn(2, 8), torch.randn(2, 8)
    assert torch.equal(model[4](rows, gate), Norm()(rows * gate))


def test_a_pass_that_ended_before_its_head_leaves_it_nothing():
    words, head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
    head.weight = words.weight
    make_lean(nn.ModuleList([words, head]), "fp32")
    words(torch.tensor([1, 2]))  # and an error
    words.weight.data = torch.randn(9, 8)
    with torch.no_grad():
        rows = words(torch.tensor([3]))
        assert torch.equal(head(rows), rows @ words.weight.T)


def test_a_run_in_fp32_trains_by_lean_layers_and_leaves_none_behind(parts, records, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "_is_packed_faster", lambda weight: True)
    monkeypatch.setattr(linear, "SMALLEST_PRODUCT", 1)
    made, weights = [], []
    make = training.make_lean
    for name, chosen in (
        ("lean", lambda model, precision: made.append(model) or make(model, precision)),
        ("stock", lambda model, precision: list),
    ):
        monkeypatch.setattr(training, "make_lean", chosen)
        hardware = Hardware(num_workers=0, precision="fp32")
        folder = train(toy_run(parts, records, tmp_path / name, hardware=hardware))
        weights.append(load_file(folder / "model.safetensors"))
    assert len(made) == 2  # a model for each stage
    assert all(not lean_layers(model) for model in made)
    for place, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][place], rtol=1e-2, atol=1e-4, msg=place)
