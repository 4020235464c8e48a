"""Adapters as a stage leaves them are read by PEFT itself, and give what the merged model gives."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import set_seed

from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.config import FULL, Tune, lora
from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.training.run import train
from training_toys import toy_run

PLANS = {
    "language model": {"connector": FULL, "language_model": lora(4, alpha=16)},
    "encoder too": {
        "vision_encoder": lora(2),
        "connector": FULL,
        "language_model": lora(4, alpha=16, dropout=0.1),
    },
}


@pytest.mark.parametrize("plan", PLANS)
def test_peft_opens_them_on_the_weights_below(
    parts: dict[str, Path], records: Path, tmp_path: Path, plan: str
) -> None:
    run = toy_run(parts, records, tmp_path / "run", llm="phi", encoder="clip")
    stage = dataclasses.replace(run.stages["finetune"], learning_rate=1e-2, **PLANS[plan])
    folder = train(dataclasses.replace(run, stages={"finetune": stage}))
    adapted: dict[str, Tune] = {name: tune for name, tune in PLANS[plan].items() if tune.kind == "lora"}
    saved = tmp_path / "run/finetune/adapters"
    assert {path.name for path in saved.iterdir()} == set(adapted)
    for name, tune in adapted.items():
        config = PeftConfig.from_pretrained(saved / name)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (tune.rank, tune.alpha, tune.dropout)
        assert {path.name for path in (saved / name).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }

    rows = json.loads((tmp_path / "run/finetune/ledger.json").read_text())
    assert [row["name"] for row in rows if row["moved"] != row["trained"]] == []  # none was switched off
    merged, processor = open_checkpoint(folder)
    inputs = processor(images=[Image.new("RGB", (40, 30), (200, 30, 90))], text="<image>\nWhat is it?")
    set_seed(run.seed)
    below, _ = assemble(run.model)
    start = copy.deepcopy(below)
    with torch.no_grad():
        expected, without = merged(**inputs).logits, start(**inputs).logits
        opened = below
        for name in adapted:
            if opened is below:
                opened = PeftModel.from_pretrained(below, saved / name, adapter_name=name)
            else:
                opened.load_adapter(saved / name, adapter_name=name)
        opened.base_model.set_adapter(list(adapted))
        torch.testing.assert_close(opened.eval()(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert (without - expected).abs().max() > 1e-2


def test_a_stage_without_adapters_leaves_no_folder_for_them(
    parts: dict[str, Path], records: Path, tmp_path: Path
) -> None:
    run = toy_run(parts, records, tmp_path / "run")
    train(dataclasses.replace(run, stages={"pretrain": run.stages["pretrain"]}))
    assert json.loads((tmp_path / "run/pretrain/stage.json").read_text())["stage"] == "pretrain"
    assert not (tmp_path / "run/pretrain/adapters").exists()


def test_an_export_on_the_start_keeps_the_connector_and_is_the_runs_own_model(
    parts: dict[str, Path], records: Path, tmp_path: Path
) -> None:
    """Without what was trained beside them, adapters on their start are another model."""
    start = train(toy_run(parts, records, tmp_path / "start"))
    run = toy_run(parts, records, tmp_path / "run")
    stage = dataclasses.replace(
        run.stages["finetune"], learning_rate=1e-2, connector=FULL, language_model=lora(4)
    )
    own = train(dataclasses.replace(run, stages={"finetune": stage}, start_from=str(start)))
    adapters = tmp_path / "run/finetune/adapters/language_model"
    exported = export_checkpoint(adapters, tmp_path / "out", base=start)
    assert exported.run_difference is not None
    assert exported.run_difference < 1e-4
    found, expected = (open_checkpoint(folder)[0].state_dict() for folder in (tmp_path / "out", own))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)

    other = train(toy_run(parts, records, tmp_path / "other", seed=5))
    with pytest.raises(
        CheckpointError, match=r"differs from .*/run/model, .*: logits differ by up to .* --base"
    ):
        export_checkpoint(adapters, tmp_path / "wrong", base=other)
    assert not (tmp_path / "wrong").exists()
