"""The measurement of the training step: the same task on both sides, and a script that runs."""

import json
import re
from pathlib import Path

import pytest
import torch

from processes import run_script

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_step

    return train_step


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_stock_and_ours_see_the_same_batch_and_give_the_same_loss_and_gradients(train_step, tmp_path, stage):
    shape = train_step.SHAPES["tiny"]
    stock, ours, packed = (
        train_step.Contestant(way, stage, shape, 1, tmp_path, "fp32") for way in ("stock", "ours", "packed")
    )
    for name in ("input_ids", "attention_mask", "labels", "pixel_values"):
        assert torch.equal(stock.batches[0][name], ours.batches[0][name])
    assert not stock.batches[0]["attention_mask"].all()  # something is padded
    names = [{n for n, p in c.model.named_parameters() if p.requires_grad} for c in (stock, ours)]
    assert names[0] == names[1]
    first, second, third = stock.step(0), ours.step(0), packed.step(0)
    for name in ("loss_sum", "gradient_norm"):
        assert [second[name], third[name]] == pytest.approx([first[name]] * 2, rel=1e-5)
    assert first["tokens"] == second["tokens"] == third["tokens"] == third["positions"] < first["positions"]


def test_other_work_is_not_taken_for_faster_work(train_step):
    fast, slow = (
        train_step.Measured(
            rounds=[
                {
                    "loss_sum": loss,
                    "supervised": 1,
                    "seconds": 1,
                    "cpu_seconds": 1,
                    "samples": 1,
                    "tokens": 1,
                    "positions": 1,
                    "gradient_norm": 1,
                }
            ],
            flops=1,
        )
        for loss in (2.0, 2.001)
    )
    with pytest.raises(AssertionError, match="ours: loss"):
        train_step.report(
            "finetune", {"stock": slow, "ours": fast, "packed": slow, "cached": slow}, [1.0], 1e-4
        )


def test_the_script_prints_ratios_and_writes_them(train_step, tmp_path):
    from gpu import over_stock

    path = tmp_path / "step.json"
    command = "train_step.py --shape tiny --stages finetune --batches 1 --rounds 1 --json-file"
    script, *options = command.split()
    printed = run_script(BENCHMARKS / script, *options, str(path), said=tmp_path / "said")
    found = re.findall(r"^(ours|packed|cached) against stock: speed ([\d.]+)", printed, re.MULTILINE)
    assert [way for way, _ in found] == ["ours", "packed", "cached"]
    numbers = json.loads(path.read_text())["finetune"]
    assert numbers["ours"]["operations"] < 0.6  # most of the tiny shape's work is its head
    assert f"{numbers['ours']['speed'][0]:.2f}" == found[0][1]
    assert over_stock(json.loads(path.read_text())) == {
        "finetune": {
            "speed_over_stock": numbers["ours"]["speed"][0],
            "memory_over_stock": numbers["ours"]["peak_memory"],
        }
    }
