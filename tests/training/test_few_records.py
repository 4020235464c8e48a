"""Fine-tuning on few records trains, at rates above zero, with settings that follow from their number."""

import dataclasses
import json
from math import ceil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

import layouts
from conftest import make_records
from tinyllava.cli import main
from tinyllava.config import FROZEN, DataConfig
from tinyllava.errors import TrainingError
from tinyllava.recipes.paper import BASE, LORA
from tinyllava.recipes.recipe import MAX_EPOCHS, fit_to
from tinyllava.training.run import train
from tinyllava.training.trainer import rate_factor
from training_toys import toy_run


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.99])
def test_warm_up_ends_at_the_full_rate_and_no_step_has_none(ratio):
    for num_steps in (1, 2, 3, 10, 33, 34, 500):
        num_warmup = ceil(num_steps * ratio)
        factors = [rate_factor(step, num_steps, num_warmup) for step in range(num_steps)]
        assert min(factors) > 0
        assert max(factors) == 1
        if num_warmup:
            assert factors[num_warmup - 1] == 1
            assert factors[:num_warmup] == sorted(factors[:num_warmup])


def test_behind_the_warm_up_the_schedule_is_the_library_s_cosine():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    expected = get_cosine_schedule_with_warmup(optimizer, 4, 100)
    for step in range(100):
        if step >= 4:
            assert rate_factor(step, 100, 4) == pytest.approx(expected.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        expected.step()


@pytest.fixture(scope="module")
def checkpoint(parts, records, tmp_path_factory) -> Path:
    return train(toy_run(parts, records, tmp_path_factory.mktemp("base") / "run"))


@pytest.mark.parametrize(
    ("recipe", "num_records", "batch"), [("base", 1, 1), ("base", 40, 4), ("lora", 12, 4)]
)
def test_a_few_records_are_learnt_from(
    parts, checkpoint, tmp_path, capsys, monkeypatch, recipe, num_records, batch
):
    """Today's least data: with one step at a rate of 0, exit 0 and nothing changed."""
    monkeypatch.chdir(tmp_path)
    records = make_records(tmp_path / "mine", num_records)
    assert (
        main(
            [
                "train",
                recipe,
                "--from",
                str(checkpoint),
                "--data",
                str(records),
                "--images",
                str(records.parent / "images"),
                "--report-to",
                "--hardware.num-workers",
                "0",
                "--finetune.max-length-tokens",
                "256",
                "--hardware.precision",
                "fp32",
                "--output",
                "run",
            ]
        )
        == 0
    )
    steps = [json.loads(line) for line in Path("run/finetune/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == ceil(num_records / batch) * MAX_EPOCHS
    assert min(step["learning_rate"] for step in steps) > 0
    if num_records == 1:
        assert steps[-1]["loss"] < steps[0]["loss"]
    printed = capsys.readouterr().out
    given = f"{num_records} record{'s' * (num_records > 1)}"
    assert f"finetune: {given}: batch {batch}, 5 epochs ({len(steps)} steps), rate " in printed
    assert ("LoRA rank 16" in printed) == (recipe == "lora")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, Path("run/model")))
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved >= {"multi_modal_projector", "language_model"}


def test_the_more_records_the_nearer_to_the_recipe():
    finetune = LORA.stages["finetune"]
    fitted = {n: fit_to(finetune, n) for n in (1, 3, 40, 128, 500, 1000, 5000, 8192, 665_298)}
    assert [s.global_batch_size for s in fitted.values()] == [1, 2, 4, 8, 16, 32, 128, 128, 128]
    assert [s.num_epochs for s in fitted.values()] == [5, 5, 5, 4, 2, 2, 2, 1, 1]
    assert [s.language_model.rank for s in fitted.values()] == [16] * 6 + [64, 128, 128]
    assert [s.language_model.alpha for s in fitted.values()] == [32] * 6 + [128, 256, 256]
    assert [s.learning_rate for s in fitted.values()] == [1e-4] * 5 + [2e-4] * 4
    assert fitted[8192] == fitted[665_298] == finetune
    assert fit_to(BASE.stages["finetune"], 100).language_model == BASE.stages["finetune"].language_model
    asked = dataclasses.replace(finetune, max_steps=7)
    assert fit_to(asked, 12) == asked


def test_a_setting_that_is_asked_for_stays(checkpoint, tmp_path, capsys):
    records = make_records(tmp_path, 12)
    with pytest.raises(SystemExit):
        main(["train", "base", "--from", str(checkpoint), "--data", str(records), "--options"])
    assert "(default: 5.0)" in " ".join(capsys.readouterr().out.split())
    assert (
        main(
            [
                "train",
                "base",
                "--from",
                str(checkpoint),
                "--data",
                str(records),
                "--report-to",
                "--images",
                str(records.parent / "images"),
                "--finetune.max-steps",
                "1",
                "--hardware.num-workers",
                "0",
                "--finetune.max-length-tokens",
                "256",
                "--finetune.global-batch-size",
                "2",
                "--output",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    assert "batch 2, 5 epochs (1 steps)" in capsys.readouterr().out


def test_a_stage_in_which_nothing_moves_is_an_error(parts, records, tmp_path, monkeypatch):
    monkeypatch.setattr("tinyllava.training.trainer.rate_factor", lambda *args: 0.0)
    run = toy_run(parts, records, tmp_path / "run")
    with pytest.raises(TrainingError, match="nothing was trained: no tensor of the trained parts"):
        train(run)
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/pretrain/stage.json").exists()


def test_text_alone_does_not_train_a_connector(parts, records, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    texts = make_records(tmp_path / "text", 4, text_only_every=1)
    run = toy_run(parts, records, tmp_path / "run")
    data = DataConfig(records=(str(texts),), images=str(tmp_path))
    both = dataclasses.replace(run.stages["finetune"], data=data)
    connector = dataclasses.replace(both, language_model=FROZEN)
    with pytest.raises(TrainingError, match="nothing was trained"):
        train(dataclasses.replace(run, stages={"finetune": connector}))
    train(dataclasses.replace(run, stages={"finetune": both}, output=str(tmp_path / "both")))
    assert "connector should be trained but did not change" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"), [("num-epochs", "nan"), ("num-epochs", "inf"), ("global-batch-size", "0")]
)
def test_settings_without_sense_are_told_before_they_are_put_into_words(
    parts, records, tmp_path, capsys, option, value
):
    start = layouts.make_checkpoint(parts, tmp_path / "start", "llama", "clip")
    command = [
        "train",
        "base",
        "--from",
        str(start),
        "--data",
        str(records),
        "--output",
        str(tmp_path / "run"),
    ]
    command += ["--images", str(records.parent / "images"), "--finetune.max-length-tokens", "512"]
    assert main([*command, f"--finetune.{option}", value]) == 2
    told = capsys.readouterr().err
    assert f"stages.finetune.{option.replace('-', '_')} = {value}" in told
    assert not (tmp_path / "run").exists()
