"""Compiled layers give the losses and gradients of the others, and what cannot be compiled is said."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tinyllava.config import FROZEN, FULL, Hardware, ModelConfig, Stage, Validation, from_layer, lora
from tinyllava.errors import ConfigError
from tinyllava.model.assemble import assemble
from tinyllava.model.compat import causal_without_looking, decoder_layers, encoder_layers
from tinyllava.model.tuning import apply_tuning
from tinyllava.training import compiling
from tinyllava.training.compiling import check_compiler, compile_layers, recompute
from tinyllava.training.run import train
from training.test_distributed import make_records
from training.test_sharding import compare, losses, sharded, train_in
from training_toys import toy_run

STAGE = Stage(learning_rate=1e-3, global_batch_size=2, language_model=FULL, vision_encoder=from_layer(1))
ADAPTERS = dataclasses.replace(STAGE, language_model=lora(4, dropout=0.2))


@pytest.fixture(autouse=True)
def without_code(monkeypatch):
    """Trace and differentiate the layers as always, but run the graphs without making C++ of them.

    Where PyTorch would give up after too many of them, it raises.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    with torch.compiler.config.patch(fail_on_recompile_limit_hit=True):
        yield


def padded(model, num_samples, length):
    ids = torch.randint(10, 60, (num_samples, length))
    ids[:, 1:5] = model.config.image_token_id
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(num_samples, 3, 28, 28)}


def packed(model, *lengths):
    samples = [padded(model, 1, length) for length in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    kept = [torch.arange(start, start + length - 1) for start, length in zip(starts, lengths, strict=False)]
    segments = {
        "lengths": [length - 1 for length in lengths],
        "kept": torch.cat(kept),
        "positions": torch.cat([torch.arange(length - 1) for length in lengths])[None],
    }
    row = {name: torch.cat([s[name] for s in samples], dim=1) for name in ("input_ids", "labels")}
    return row | {"pixel_values": torch.cat([s["pixel_values"] for s in samples]), "segments": segments}


def step(model, batch):
    torch.manual_seed(3)  # of dropout
    with causal_without_looking(model.language_model):
        loss = model(**batch).loss
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def check_equal(parts, stage, recomputed=False):
    """For batches of several lengths, padded and packed; layers of one form share their graphs."""
    config = ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["llama"]))
    model, _ = assemble(config)
    apply_tuning(model, stage)
    model.train()
    batches = [padded(model, 2, 12), padded(model, 3, 17), packed(model, 9, 12), packed(model, 8, 14, 10)]
    expected = [step(model, batch) for batch in batches]
    counters.clear()
    undo = compile_layers(model)
    recompute(model, recomputed)
    runs = []
    layers = [*decoder_layers(model.language_model), *encoder_layers(model.vision_encoder)]
    for layer in layers:
        compiled = layer.forward.run
        layer.forward.run = lambda *args, compiled=compiled, **kw: runs.append(1) or compiled(*args, **kw)
    for batch, (loss, gradients) in zip(batches, expected, strict=True):
        found_loss, found = step(model, batch)
        torch.testing.assert_close(found_loss, loss, rtol=0, atol=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert len(runs) == len(batches) * len(layers) * (1 + recomputed)
    assert 0 < counters["stats"]["unique_graphs"] <= 12  # of two kinds of layers, for one row or more
    undo()
    assert all("forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("stage", [STAGE, ADAPTERS])
def test_losses_and_gradients_are_equal(parts, stage, recomputed):
    check_equal(parts, stage, recomputed)


def test_those_of_compiled_code_are_equal(parts):
    """In a process of its own, as a training is: in one that had run hundreds of tests, such code aborted."""
    called = f"check_equal({ {name: str(folder) for name, folder in parts.items()} }, STAGE)"
    done = subprocess.run(
        [sys.executable, "-c", f"from training.test_compiling import STAGE, check_equal\n{called}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("sharding", "settings", "encoder", "language"),
    [
        ("none", {"gradient_checkpointing": True}, FULL, FULL),
        ("gradients", {"packing": True}, FROZEN, lora(4)),
        ("all", {"gradient_checkpointing": True, "save_steps": 1}, FULL, FULL),
    ],
)
def test_two_processes_train_and_validate_compiled(parts, tmp_path, sharding, settings, encoder, language):
    """As one process does without compiling; with whole or divided weights, or resumed at the second step."""
    check_compiler(torch.device("cpu"))  # what it imports, the two need not
    records = make_records(tmp_path, {2} if sharding == "all" else set())
    run = toy_run(parts, records, tmp_path)
    validation = Validation(held_out=str(records))
    stage = dataclasses.replace(
        run.stages["finetune"],
        max_steps=2,
        vision_encoder=encoder,
        language_model=language,
        validation=validation,
    )
    run = dataclasses.replace(run, stages={"finetune": stage})
    train_in(1, sharded(run, "none", tmp_path / "plain"))
    run = sharded(run, sharding, tmp_path / "compiled", **settings)
    if "save_steps" in settings:
        train_in(2, run, dies_at=2)
    held = train_in(2, sharded(run, sharding, tmp_path / "compiled", compile=True))
    assert all((own < 0.55 * whole) is (sharding != "none") for own, whole in held)
    compare(tmp_path / "plain", tmp_path / "compiled")
    expected, found = (losses(tmp_path / name / "run/finetune") for name in ("plain", "compiled"))
    assert len(found) == 2
    assert found == pytest.approx(expected, abs=1e-5)
    written = json.loads((tmp_path / "compiled/run/run.json").read_text())
    assert written["hardware"]["compile"] is True


def test_a_machine_that_cannot_compile_is_told_before_anything_is_read(parts, records, tmp_path, monkeypatch):
    def no_compiler(graph, inputs):
        raise OSError("no C++ compiler found: g++")

    monkeypatch.setattr(compiling, "BACKEND", no_compiler)
    run = toy_run(parts, records, tmp_path / "run", hardware=Hardware(num_workers=0, compile=True))
    with pytest.raises(
        ConfigError, match=r"hardware\.compile: this machine cannot compile \(.*g\+\+.*\)\. Set"
    ):
        train(run)
    assert not (tmp_path / "run/pretrain").exists()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    check_compiler(torch.device("cpu"))
