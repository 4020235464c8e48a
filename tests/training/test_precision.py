"""Frozen linear layers in half precision give the same bits, and TF32 is only what was asked for."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tinyllava.config import FROZEN, FULL, Hardware, ModelConfig, Stage, Validation, from_layer, lora
from tinyllava.errors import ConfigError
from tinyllava.model.assemble import assemble
from tinyllava.model.tuning import apply_tuning
from tinyllava.planning.check import check
from tinyllava.training import lean
from tinyllava.training import prepare as preparing
from tinyllava.training import run as training
from tinyllava.training.precision import computing_in, hold_frozen_in_half, multiplying
from tinyllava.training.progress import make_progress
from tinyllava.training.run import train
from training_toys import toy_run

STAGE = Stage(learning_rate=1e-3, global_batch_size=2)
STAGES = {
    "connector": STAGE,
    "adapters": dataclasses.replace(STAGE, language_model=lora(4)),
    "upper half of the encoder": dataclasses.replace(STAGE, vision_encoder=from_layer(1)),
    "language model": dataclasses.replace(STAGE, language_model=FULL, connector=FROZEN),
}


def step(model, precision):
    """Loss and gradients of one batch, in the half precision of the run."""
    torch.manual_seed(1)
    ids = torch.randint(10, 60, (2, 12))
    ids[:, 1:5] = model.config.image_token_id
    labels = ids.clone()
    labels[:, :6] = -100
    with computing_in(precision, torch.device("cpu")):
        loss = model(input_ids=ids, pixel_values=torch.randn(2, 3, 28, 28), labels=labels).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss, gradients


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("llm", ["llama", "phi"])
def test_frozen_layers_in_half_precision_give_the_same_bits(parts, llm, name, precision):
    model, _ = assemble(ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts[llm])))
    apply_tuning(model, STAGES[name])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    exact = model.language_model.layers[0].mlp
    exact = next(m for m in exact.modules() if type(m) is nn.Linear)
    with torch.no_grad():  # one that half precision represents, beside those that it does not
        exact.weight.copy_(exact.weight.bfloat16().half())
        before |= {n: p.detach().clone() for n, p in model.named_parameters()}
    loss, gradients = step(model, precision)
    give_back = hold_frozen_in_half(model, precision)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for module_name, module in model.named_modules():
        if type(module) is nn.Linear and "multi_modal" not in module_name:
            is_tied = module is model.lm_head and model.config.tie_word_embeddings
            is_held = not module.weight.requires_grad and not is_tied
            assert module.weight.dtype == (half if is_held else torch.float32), module_name
    held_loss, held_gradients = step(model, precision)
    assert torch.equal(held_loss, loss)
    assert gradients.keys() == held_gradients.keys()
    assert all(torch.equal(held_gradients[n], gradient) for n, gradient in gradients.items())
    give_back()
    after = dict(model.named_parameters())
    assert all(p.dtype == torch.float32 and torch.equal(p, before[n]) for n, p in after.items())


def test_a_run_in_bf16_ends_with_the_same_bits(parts, records, tmp_path, monkeypatch):
    """With adapters on what was held, which they are merged into, and answers to held-out records."""
    monkeypatch.setattr(lean, "FEW_ROWS", 0)  # a head that is not held would multiply few rows in fp32
    for folder in ("held", "plain"):
        if folder == "plain":
            monkeypatch.setattr(training, "hold_frozen_in_half", lambda model, precision: lambda: None)
        hardware = Hardware(num_workers=0, device_batch_size=2, precision="bf16")
        run = toy_run(parts, records, tmp_path / folder / "run", hardware=hardware)
        answered = Validation(held_out=run.stages["finetune"].data.records[0], num_answers=1)
        adapters = dataclasses.replace(run.stages["finetune"], language_model=lora(4), validation=answered)
        stages = {"finetune": dataclasses.replace(adapters, max_steps=1)}
        train(dataclasses.replace(run, stages=stages))
    one, two = (load_file(tmp_path / f / "run/model/model.safetensors") for f in ("held", "plain"))
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == torch.float32 for name in one)


@pytest.mark.parametrize(("precision", "rounds"), [("fp32", False), ("bf16", False), ("tf32", True)])
def test_products_are_rounded_to_tf32_only_if_that_was_asked_for(precision, rounds):
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    with multiplying(precision):
        assert [kind.allow_tf32 for kind in kinds] == [rounds, rounds]
    assert [kind.allow_tf32 for kind in kinds] == before


def test_kept_features_are_exact_whatever_the_run_computes_in(tmp_path, monkeypatch):
    rounds = []

    def fill(*_, **__):
        rounds.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    monkeypatch.setattr(preparing, "FeatureCache", lambda *_: SimpleNamespace(fill=fill))
    run = SimpleNamespace(hardware=Hardware(precision="tf32"), folder=tmp_path / "run")
    model = SimpleNamespace(vision_encoder=nn.Linear(1, 1))
    with multiplying("tf32"), make_progress() as bar:
        preparing._fill_features(run, model, None, [], None, bar)
    assert rounds == [(False, False)]


@pytest.mark.parametrize(
    ("has_cuda", "capability", "hip"),
    [(False, (0, 0), None), (True, (7, 0), None), (True, (9, 0), "6.0"), (True, (8, 0), None)],
)
def test_tf32_needs_a_gpu_that_has_it(parts, records, tmp_path, monkeypatch, has_cuda, capability, hip):
    run = toy_run(parts, records, tmp_path / "run", hardware=Hardware(num_workers=0, precision="tf32"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    if capability == (8, 0):
        check(run)
        return
    with pytest.raises(ConfigError, match=r"precision = 'tf32': needs an NVIDIA GPU since Ampere .*fp32"):
        check(run)
