"""A kept checkpoint is a model: its last one is the run's, an earlier one has the weights of its step."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.cli.chat import main as chat
from tinyllava.cli.train import main as train_command
from tinyllava.config import Hardware, Run, lora
from tinyllava.errors import CheckpointError
from tinyllava.inference.chat import Chat
from tinyllava.model.rebuild import whole_model
from tinyllava.training.run import train
from training_toys import toy_run


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


def test_an_earlier_checkpoint_is_asked_exported_and_trained_on_like_any_model(
    parts, records, tmp_path, capsys
):
    train(kept(parts, records, tmp_path / "run"))
    checkpoint = tmp_path / "run/finetune/checkpoint-2"
    image = next((records.parent / "images").glob("*.png"))
    state = torch.get_rng_state()
    asked = Chat.open(checkpoint)
    assert torch.equal(torch.get_rng_state(), state)
    stored = load_file(checkpoint / "model.safetensors")
    weights = asked.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
    assert chat([str(image), "What colour is it?", "--model", str(checkpoint)]) == 0
    assert asked.ask("What colour is it?", image) in capsys.readouterr().out
    export_checkpoint(checkpoint, tmp_path / "exported", layout="llava")
    options = ["--output", str(tmp_path / "more"), "--images", str(records.parent / "images")]
    options += [
        "--hardware.num-workers",
        "0",
        "--finetune.max-steps",
        "1",
        "--finetune.max-length-tokens",
        "256",
    ]
    assert train_command(["lora", "--from", str(checkpoint), "--data", str(records), *options]) == 0
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
