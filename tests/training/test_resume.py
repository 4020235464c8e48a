"""A run that is killed and started again ends with the weights of a run that never stopped, bit by bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllava.config import to_json
from tinyllava.errors import TrainingError
from tinyllava.training.run import train
from training_toys import toy_run

PROGRAM = """
import sys, torch
from pathlib import Path
from tinyllava.config import run_from_json
from tinyllava.training.run import train
torch.set_num_threads(1)
train(run_from_json(Path(sys.argv[1]).read_text(), sys.argv[1]))
"""


def start(config: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(config)], env=environment, stdout=subprocess.DEVNULL
    )


def kill_at(config: Path, metrics: Path, num_lines: int) -> bool:
    """Start the run and kill it without warning once so many steps are logged; False if it ended before."""
    process = start(config)
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= num_lines:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def configured(parts, records, folder: Path, bits: int) -> tuple[Path, Path]:
    import dataclasses

    from tinyllava.config import Hardware, lora

    run = toy_run(
        parts,
        records,
        folder / "run",
        hardware=Hardware(num_workers=0, precision="fp32", device_batch_size=2, save_steps=3),
    )
    stages = {name: dataclasses.replace(stage, num_epochs=8) for name, stage in run.stages.items()}
    stages["finetune"] = dataclasses.replace(
        stages["finetune"], language_model=lora(4, dropout=0.2, bits=bits)
    )  # draws random numbers
    folder.mkdir()
    (folder / "run.json").write_text(to_json(dataclasses.replace(run, stages=stages)))
    return folder / "run.json", folder / "run"


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_killed_in_both_stages_and_resumed_gives_the_same_bytes(parts, records, tmp_path, bits):
    config, whole = configured(parts, records, tmp_path / "whole", bits)
    assert start(config).wait() == 0
    config, broken = configured(parts, records, tmp_path / "broken", bits)
    assert kill_at(config, broken / "pretrain/metrics.jsonl", 8)
    assert kill_at(config, broken / "finetune/metrics.jsonl", 11)
    assert not (broken / "model").exists()
    assert start(config).wait() == 0
    for name in ("model/model.safetensors", "pretrain/trained.safetensors", "finetune/trained.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    steps = [line.split(",")[0] for line in (broken / "finetune/metrics.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {n}' for n in range(1, 25)]  # no step lost, none twice


def test_a_full_disk_is_said_before_the_first_step(parts, records, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(TrainingError, match="GB free, checkpoints and model need"):
        train(toy_run(parts, records, tmp_path / "run"))


def test_a_disk_that_fills_up_while_training_stops_the_run_with_the_reason(
    parts, records, tmp_path, monkeypatch
):
    from safetensors import SafetensorError

    import tinyllava.training.trainer as trainer

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(TrainingError, match="the disk is full"):
        train(toy_run(parts, records, tmp_path / "run"))
