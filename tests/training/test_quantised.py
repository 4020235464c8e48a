"""Runs over weights in 4 and 8 bits: a plain loop's losses, what moves, what is saved and goes on."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import set_seed

from quantised_by_hand import read_weight
from tinyllava.config import FROZEN, FULL, lora
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.model.quantised import quantise, quantised_layers
from tinyllava.model.tuning import apply_tuning
from tinyllava.planning.check import find_problems
from tinyllava.recipes.variants import variant
from tinyllava.training.run import train
from training_toys import plain_loop, sampled_order, toy_run

LANGUAGES = ["llama", "phi", "stablelm"]


def quantised_run(parts, records, folder, bits: int, llm: str = "llama"):
    """One stage: the connector in full, adapters on the language model."""
    run = toy_run(parts, records, folder, llm=llm)
    stage = dataclasses.replace(run.stages["finetune"], language_model=lora(4, bits=bits), learning_rate=1e-2)
    return dataclasses.replace(run, stages={"finetune": stage})


def dequantised(run, bits: int):
    """The model of a run on the weights that the codes stand for, read by hand, in ordinary layers."""
    set_seed(run.seed)
    model, processor = assemble(run.model)
    names = [
        name for name, m in model.named_modules() if "language_model" in name and isinstance(m, nn.Linear)
    ]
    plain = {name: model.get_submodule(name) for name in names}
    quantise(model, names, bits)
    for name, layer in plain.items():
        layer.weight.data = read_weight(model.get_submodule(name))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    assert quantised_layers(model) == {}
    return model, processor


def logits(model, processor):
    inputs = processor(images=[Image.new("RGB", (40, 30), (200, 30, 90))], text="<image>\nWhat is it?")
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("llm", LANGUAGES)
def test_a_run_is_a_plain_loop_with_adapters_on_the_dequantised_weights(parts, records, tmp_path, llm, bits):
    run = quantised_run(parts, records, tmp_path / "run", bits, llm)
    folder = train(run)
    stage = run.stages["finetune"]
    model, processor = dequantised(run, bits)
    start = logits(model, processor)
    set_seed(run.seed)  # as each stage begins, so that its adapters do not hang on what came before
    apply_tuning(model, dataclasses.replace(stage, language_model=lora(4)))
    expected = plain_loop(model, processor, stage, sampled_order(12, run.seed))
    lines = (tmp_path / "run/finetune/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(expected, abs=5e-5)

    saved, processor = open_checkpoint(folder)  # an ordinary checkpoint, of the merged weights
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(saved, processor), logits(model, processor), atol=2e-3, rtol=1e-3)
    assert (logits(saved, processor) - start).abs().max() > 0.05

    rows = json.loads((tmp_path / "run/finetune/ledger.json").read_text())
    assert [row["name"] for row in rows if row["moved"] != row["trained"]] == []
    held = [row for row in rows if row["name"].endswith("base_layer.weight")]
    assert len(held) == 2 * (6 if llm == "phi" else 7)
    assert not any(row["trained"] for row in held)
    assert all(row["moved"] for row in rows if row["component"] == "connector")


@pytest.mark.parametrize("bits", [4, 8])
def test_peft_opens_the_adapters_on_the_dequantised_weights(parts, records, tmp_path, bits):
    run = quantised_run(parts, records, tmp_path / "run", bits, "phi")
    merged, processor = open_checkpoint(train(run))
    below, _ = dequantised(run, bits)
    trained = load_file(tmp_path / "run/finetune/trained.safetensors")
    below.load_state_dict({n: t for n, t in trained.items() if ".lora_" not in n}, strict=False)
    opened = PeftModel.from_pretrained(below, tmp_path / "run/finetune/adapters/language_model")
    torch.testing.assert_close(logits(opened, processor), logits(merged, processor), atol=1e-5, rtol=1e-4)


def test_encoder_and_language_model_are_held_in_one_run(parts, records, tmp_path):
    run = toy_run(parts, records, tmp_path / "run", encoder="clip")
    plan = {"vision_encoder": lora(2, bits=8), "language_model": lora(4, bits=4)}
    stage = dataclasses.replace(run.stages["finetune"], learning_rate=1e-2, **plan)
    saved, _ = open_checkpoint(train(dataclasses.replace(run, stages={"finetune": stage})))
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    rows = json.loads((tmp_path / "run/finetune/ledger.json").read_text())
    assert [row["name"] for row in rows if row["moved"] != row["trained"]] == []
    moved = {row["component"] for row in rows if row["moved"] and "lora_" in row["name"]}
    assert moved == {"vision_encoder", "language_model"}


def test_a_later_stage_goes_on_from_the_merged_weights_and_a_finished_one_is_reused(
    parts, records, tmp_path, capsys
):
    run = quantised_run(parts, records, tmp_path / "first", 4)
    later = dataclasses.replace(run.stages["finetune"], connector=FROZEN, language_model=FULL, max_steps=1)
    longer = dataclasses.replace(run, stages={**run.stages, "later": later})
    alone, _ = open_checkpoint(train(run))
    train(dataclasses.replace(longer, output=str(tmp_path / "second")))
    assert "finetune: already trained" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "second/later/ledger.json").read_text())}
    start, _ = open_checkpoint(tmp_path / "first/model")
    assert {name for name, _ in start.named_parameters()} == set(rows)
    whole = dataclasses.replace(longer, name="whole", output=str(tmp_path / "apart/run"))
    train(whole)
    again = {row["name"]: row for row in json.loads((tmp_path / "apart/run/later/ledger.json").read_text())}
    assert again == rows  # the digests before and after, whether the stage was trained or reused
    assert dict(alone.named_parameters()).keys() == rows.keys()


@pytest.mark.parametrize("bits", [4, 8])
def test_in_bf16_the_losses_stay_close_and_the_merged_weights_are_fp32(parts, records, tmp_path, bits):
    found = {}
    for precision in ("fp32", "bf16"):
        run = quantised_run(parts, records, tmp_path / precision / "run", bits, "phi")
        hardware = dataclasses.replace(run.hardware, precision=precision)
        folder = train(dataclasses.replace(run, hardware=hardware))
        lines = (folder.parent / "finetune/metrics.jsonl").read_text().splitlines()
        found[precision] = [json.loads(line)["loss"] for line in lines]
        assert {p.dtype for p in open_checkpoint(folder)[0].parameters()} == {torch.float32}
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
    assert found["bf16"] != found["fp32"]


@pytest.mark.parametrize(("recipe", "bits"), [("qlora", 4), ("qlora8", 8)])
def test_without_the_package_a_variant_is_refused_before_anything_is_loaded(monkeypatch, recipe, bits):
    monkeypatch.setattr("tinyllava.planning.rules.find_spec", lambda name: None)
    problems = [p for p in find_problems(variant(f"{recipe}-Sig-Phi")) if "bits" in p]
    assert "\n".join(problems) == (
        f"stages.finetune.language_model.bits = {bits}: needs bitsandbytes, which is not installed; "
        "run pip install 'tinyllava[quantized]', or set bits to 16 (recipe 'lora')."
    )
    monkeypatch.undo()
    assert not any("bits" in p for p in find_problems(variant(f"{recipe}-Sig-Phi")))
