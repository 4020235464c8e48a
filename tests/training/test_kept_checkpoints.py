"""A kept checkpoint is a model: its last one is the run's, an earlier one has the weights of its step."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyllava.cli import main
from tinyllava.config import Hardware, Run, lora
from tinyllava.errors import CheckpointError
from tinyllava.evaluation.answers import read_predictions
from tinyllava.inference.chat import Chat
from tinyllava.model.rebuild import whole_model
from tinyllava.training.run import train
from training_toys import toy_run, write_run


def kept(parts, records: Path, output: Path, **changes) -> Run:
    """Both stages; the second keeps its last two checkpoints, of steps 2 and 3."""
    hardware = Hardware(
        num_workers=0, device_batch_size=2, precision="fp32", save_steps=1, keep_checkpoints=2
    )
    run = toy_run(parts, records, output, hardware=hardware)
    finetune = dataclasses.replace(run.stages["finetune"], **changes)
    return dataclasses.replace(run, stages={**run.stages, "finetune": finetune})


@pytest.mark.parametrize("bits", [0, 16, 4])
def test_the_last_checkpoint_is_the_runs_model_bit_by_bit(parts, records, tmp_path, bits):
    changes = {"language_model": lora(4, bits=bits)} if bits else {}
    model = train(kept(parts, records, tmp_path / "run", **changes))
    whole = whole_model(tmp_path / "run/finetune/checkpoint-3")
    assert (whole / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in model.iterdir())
    assert not (tmp_path / "run/finetune/checkpoint-1").exists()


def test_an_earlier_checkpoint_is_asked_evaluated_exported_and_trained_on_like_any_model(
    parts, records, tmp_path, capsys
):
    run = kept(parts, records, tmp_path / "run")
    run = dataclasses.replace(run, hardware=dataclasses.replace(run.hardware, keep_checkpoints=0))
    assert main(["train", write_run(run, tmp_path), "--keep", "2"]) == 0
    kept_folders = sorted(path.name for path in (tmp_path / "run/finetune").glob("checkpoint-*"))
    assert kept_folders == ["checkpoint-2", "checkpoint-3"]
    checkpoint = tmp_path / "run/finetune/checkpoint-2"
    image = next((records.parent / "images").glob("*.png"))
    state = torch.get_rng_state()
    asked = Chat.open(checkpoint)
    assert torch.equal(torch.get_rng_state(), state)
    stored = load_file(checkpoint / "model.safetensors")
    weights = asked.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
    answer = asked.ask("What colour is it?", image, max_new_tokens=6)
    options = ["--max-tokens", "6"]
    capsys.readouterr()
    assert main(["chat", str(image), "What colour is it?", "--model", str(checkpoint), *options]) == 0
    assert answer in capsys.readouterr().out
    test = tmp_path / "test.csv"
    test.write_text(f"image,question,answer\n{image},What colour is it?,red\n")
    output = ["--output", str(tmp_path / "evaluated")]
    assert main(["evaluate", str(checkpoint), "--data", str(test), *output, *options]) == 0
    [prediction] = read_predictions(tmp_path / "evaluated/own-test/predictions.jsonl")
    assert prediction.answer.strip() == answer.strip()
    assert main(["export", str(checkpoint), str(tmp_path / "exported"), "--format", "llava"]) == 0
    exported = load_file(tmp_path / "exported/model.safetensors")
    name = next(name for name in exported if name.endswith("layers.0.mlp.up_proj.weight"))
    assert torch.equal(exported[name], asked.model.model.language_model.layers[0].mlp.up_proj.weight)
    options = ["--output", str(tmp_path / "more"), "--images", str(records.parent / "images")]
    options += ["--hardware.num-workers", "0", "--finetune.max-steps", "1"]
    options += ["--finetune.max-length-tokens", "256"]
    assert main(["train", "lora", "--from", str(checkpoint), "--data", str(records), *options]) == 0
    metadata = json.loads((tmp_path / "more/model/run.json").read_text())
    assert metadata["start_from"] == str(checkpoint / "model")


def test_a_checkpoint_whose_start_has_changed_or_is_gone_is_refused_by_name(parts, records, tmp_path):
    mine = {name: shutil.copytree(parts[name], tmp_path / name) for name in ("siglip", "llama")}
    train(kept(mine, records, tmp_path / "run"))
    checkpoint = tmp_path / "run/finetune/checkpoint-3"
    before = tmp_path / "run/pretrain/trained.safetensors"
    before.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"pretrain/trained\.safetensors of the stage before"):
        whole_model(checkpoint)
    (tmp_path / "away").rename(before)
    file = tmp_path / "siglip/model.safetensors"
    moved = {name: value + 1 for name, value in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"siglip and .*llama or of an earlier stage"):
        whole_model(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has a wrong size\. Use another"):
        whole_model(checkpoint)
