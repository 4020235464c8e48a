"""A checkpoint is written while training goes on, with the state of its step; what fails in it is said."""

import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tinyllava.config import Hardware, Run
from tinyllava.data.reporting import reporting
from tinyllava.errors import TrainingError
from tinyllava.model.rebuild import MANIFEST
from tinyllava.training import checkpoints, devices, writing
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer
from tinyllava.training.writing import CheckpointWriter, free_memory
from training_toys import toy_run


def one_stage(parts, records, output: Path, num_steps: int) -> Run:
    """Fine-tuning with a checkpoint of every second step."""
    hardware = Hardware(
        num_workers=0, precision="fp32", device_batch_size=4, save_steps=2, keep_checkpoints=9
    )
    run = toy_run(parts, records, output, hardware=hardware)
    stage = dataclasses.replace(run.stages["finetune"], max_steps=num_steps)
    return dataclasses.replace(run, stages={"finetune": stage})


def test_steps_are_computed_while_a_checkpoint_is_written_and_it_has_the_state_of_its_own(
    parts, records, tmp_path, monkeypatch, capsys
):
    """Written while training waits, where main memory is short, it is the same."""
    is_further, compute, save = threading.Event(), StageTrainer.training_step, writing.save_file

    def computing(self, *args, **kwargs):
        if self.state.global_step == 3:  # so the step behind the checkpoint's is done
            is_further.set()
        return compute(self, *args, **kwargs)

    def saving(*args, **kwargs):
        assert is_further.wait(600), "training waits for the checkpoint"
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", computing)
        patch.setattr(writing, "save_file", saving)
        train(one_stage(parts, records, tmp_path / "background/run", 4))
    monkeypatch.setattr(writing, "free_memory", lambda: 1000)
    with reporting(is_shown=True):
        train(one_stage(parts, records, tmp_path / "waiting/run", 4))
    said = (
        "training waits for each checkpoint: a copy of its 0.0 GB is not made in 0.0 GB of free main memory"
    )
    assert " ".join(capsys.readouterr().out.split()).count(said) == 1
    for name in ("checkpoint-2", "checkpoint-4"):
        found, expected = (tmp_path / f"{way}/run/finetune" / name for way in ("background", "waiting"))
        files = [json.loads((folder / MANIFEST).read_text())["files"] for folder in (found, expected)]
        assert files[0].keys() == files[1].keys()
        assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
        states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (found, expected)]
        assert states[0]["param_groups"] == states[1]["param_groups"]
        assert len(states[0]["state"]) == len(load_file(found / "model.safetensors"))
        for number, values in states[1]["state"].items():
            for key, value in values.items():
                assert torch.equal(states[0]["state"][number][key], value)


def test_what_a_checkpoint_fails_in_ends_the_run_and_is_said(parts, records, tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints, "describe_files", refused)
    run = one_stage(parts, records, tmp_path / "run", 60)
    with pytest.raises(
        TrainingError, match=r"checkpoint-2: cannot be written \(.*Permission denied\)\. Make"
    ):
        train(run)
    steps = (tmp_path / "run/finetune/metrics.jsonl").read_text().splitlines()
    assert 2 <= len(steps) <= 4  # the next checkpoint waits for it at the latest


def test_a_second_ctrl_c_leaves_an_incomplete_checkpoint_and_the_end_a_whole_one(tmp_path, monkeypatch):
    """The writer is told while it writes the first file."""
    model = torch.nn.Linear(2, 2)
    save, finished = writing.save_file, []
    for gives_up in (True, False):
        writer, optimizer = CheckpointWriter(), torch.optim.AdamW(model.parameters())
        told, end = threading.Event(), writer._thread.shutdown
        monkeypatch.setattr(writer._thread, "shutdown", lambda told=told, end=end: (told.set(), end()))
        monkeypatch.setattr(writing, "save_file", lambda *a, told=told, **k: (told.wait(600), save(*a, **k)))
        optimizer.register_state_dict_post_hook(writer.take_state)
        writer.take(tmp_path, dict(model.named_parameters()), model, optimizer)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        writer.write(finished.append)
        writer.close(gives_up=gives_up)
        writer.check()
    assert finished == [tmp_path]
    assert (tmp_path / "model.safetensors").is_file()


def test_free_memory_heeds_the_limits_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_control_groups", lambda: [tmp_path / "none", tmp_path])
    assert free_memory() > 0
    monkeypatch.setattr(writing.psutil, "virtual_memory", lambda: SimpleNamespace(available=9000))
    assert free_memory() == 9000
    for name, text in {"max": "5000", "current": "4500", "stat": "anon 1\ninactive_file 1500\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == 9000


def test_what_fits_on_a_cpu_heeds_the_limits_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_control_groups", lambda: [tmp_path / "none", tmp_path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    whole = devices._memory_bytes()
    (tmp_path / "memory.max").write_text("max\n")
    assert devices._memory_bytes() == whole > 2**29
    (tmp_path / "memory.max").write_text(f"{2**29}\n")
    assert devices._memory_bytes() == 2**28
