"""A run that is killed and started again ends with the weights of a run that never stopped, bit by bit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tinyllava.cli import main
from tinyllava.config import Hardware, lora, to_json
from tinyllava.data.sources import draw_rows, parse_source
from tinyllava.errors import CheckpointError, TrainingError
from tinyllava.model.assemble import assemble
from tinyllava.model.rebuild import RESUMED_TENSORS
from tinyllava.model.tuning import check_trained
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer, trained_tensors
from training_toys import toy_run, write_run

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


def configured(
    parts, records, folder: Path, bits: int, save_steps: int = 3, num_workers: int = 0
) -> tuple[Path, Path]:
    run = toy_run(
        parts,
        records,
        folder / "run",
        hardware=Hardware(
            num_workers=num_workers, precision="fp32", device_batch_size=2, save_steps=save_steps
        ),
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


def end_at(config: Path, metrics: Path, num_lines: int, number: int) -> tuple[int, str]:
    """Start the run and send its whole group a signal once so many steps are logged, as schedulers do.

    Returns:
        Its exit status and its words.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyllava", "train", f"{config.parent / 'mine.py'}:RUN"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= num_lines):
        time.sleep(0.002)
    os.killpg(process.pid, number)
    _, said = process.communicate()
    return process.returncode, said


def test_sigterm_and_ctrl_c_save_before_they_end(parts, records, tmp_path):
    config, whole = configured(parts, records, tmp_path / "whole", 16, save_steps=100)
    assert start(config).wait() == 0
    config, ended = configured(parts, records, tmp_path / "ended", 16, save_steps=100, num_workers=1)
    (config.parent / "mine.py").write_text(
        "from pathlib import Path\nfrom tinyllava.config import run_from_json\n"
        f"RUN = run_from_json(Path({str(config)!r}).read_text())\n"
    )
    for number, stage, num_lines in (
        (signal.SIGTERM, "pretrain", 5),
        (signal.SIGINT, "pretrain", 9),
        (signal.SIGTERM, "finetune", 4),
    ):
        metrics = ended / stage / "metrics.jsonl"
        status, said = end_at(config, metrics, num_lines, number)
        assert status == 128 + number, said
        assert "stopping: saving after this step" in said
        assert "Traceback" not in said
        num_steps = metrics.read_text().count("\n")
        assert num_lines <= num_steps < 24  # it was stopped on the way
        assert (ended / stage / f"checkpoint-{num_steps}/manifest.json").is_file()  # and nothing was lost
    assert start(config).wait() == 0
    for name in ("model/model.safetensors", "pretrain/trained.safetensors", "finetune/trained.safetensors"):
        assert (whole / name).read_bytes() == (ended / name).read_bytes(), name
    for stage in ("pretrain", "finetune"):
        lines = (ended / stage / "metrics.jsonl").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == [f'{{"step": {n}' for n in range(1, 25)]


def test_a_full_disk_is_said_before_the_first_step(parts, records, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(TrainingError, match="GB free, but checkpoints and model need"):
        train(toy_run(parts, records, tmp_path / "run"))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("tinyllava.training.trainer.save_file", "run/pretrain"),
        ("torch.save", "run/pretrain"),
        ("tinyllava.training.checkpoints.save_file", "run"),
        ("tinyllava.model.modeling.TinyLlavaForConditionalGeneration.save_pretrained", "run"),
    ],
)
def test_a_disk_that_fills_up_stops_the_run_with_the_reason_whatever_is_written(
    parts, records, tmp_path, monkeypatch, place, name
):
    def full(*args, **kwargs):
        if place == "torch.save":
            raise RuntimeError(
                "[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing"
            )
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    run = toy_run(parts, records, tmp_path / "run")
    run = dataclasses.replace(run, stages={"pretrain": run.stages["pretrain"]})
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(TrainingError) as caught:
            train(run)
    assert str(caught.value) == (
        f"{tmp_path / name}: the disk is full. Free some space and run the same command again."
    )
    assert (train(run) / "model.safetensors").is_file()


def test_a_checkpoint_of_another_plan_or_a_damaged_one_is_refused(parts, records, tmp_path):
    model, _ = assemble(toy_run(parts, records, tmp_path).model)
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    save_file(trained_tensors(model), tmp_path / RESUMED_TENSORS)
    check_trained(tmp_path / RESUMED_TENSORS, model)
    model.connector.linear_2.bias.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"linear_2\.bias \(1 tensors\)\. Delete"):
        check_trained(tmp_path / RESUMED_TENSORS, model)
    model.connector.linear_2.bias = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(CheckpointError, match=r"linear_2\.bias \(1 tensors\)"):
        check_trained(tmp_path / RESUMED_TENSORS, model)
    (tmp_path / RESUMED_TENSORS).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_trained(tmp_path / RESUMED_TENSORS, model)


def test_a_mixture_trains_on_its_samples_is_resumed_and_is_the_same_from_every_door(
    parts, records, tmp_path, monkeypatch, capsys
):
    listed = json.loads(records.read_text())
    one, other = records.with_name("one.json"), records.with_name("other.json")
    one.write_text(json.dumps(listed[:8]))
    other.write_text(json.dumps(listed[8:]))
    drawn = draw_rows(parse_source("x,repeat=1.5"), 8, 12).tolist()
    written = [*(listed[row] for row in drawn), *listed[8:]]  # as a person would write the mixture out
    assert len(drawn) == 12
    (records.parent / "plain.json").write_text(json.dumps([{**r, "id": n} for n, r in enumerate(written)]))

    def made(name: str, *files: str):
        hardware = Hardware(num_workers=0, precision="fp32", device_batch_size=2, save_steps=2)
        run = toy_run(parts, records, tmp_path / name / "run", hardware=hardware)
        stage = run.stages["finetune"]
        data = dataclasses.replace(stage.data, records=files)
        (tmp_path / name).mkdir()
        return dataclasses.replace(run, stages={"finetune": dataclasses.replace(stage, data=data)})

    train(made("plain", str(records.parent / "plain.json")))
    mixed = made("mixed", f"{one},repeat=1.5", str(other))
    step, calls = StageTrainer.training_step, iter(range(99))

    def breaking(self, *args, **kwargs):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", breaking)
        with pytest.raises(KeyboardInterrupt):
            train(mixed)
    capsys.readouterr()
    assert main(["train", write_run(mixed, tmp_path / "mixed")]) == 0
    said = capsys.readouterr().out
    assert "resuming from" in said
    assert f"{one},repeat=1.5: 12 samples of 8 records" in " ".join(said.split())
    asked = made("asked", str(records))
    files = ["--data", f"{one},repeat=1.5", "--data", str(other), "--images", str(records.parent / "images")]
    assert main(["train", write_run(asked, tmp_path / "asked"), *files]) == 0
    name = "run/finetune/trained.safetensors"
    plain = (tmp_path / "plain" / name).read_bytes()
    assert plain == (tmp_path / "mixed" / name).read_bytes() == (tmp_path / "asked" / name).read_bytes()
    kept = json.loads((tmp_path / "mixed/run/finetune/stage.json").read_text())["data"]
    assert [share["num_samples"] for share in kept["mixture"]] == [12, len(listed) - 8]
    more = dataclasses.replace(mixed.stages["finetune"].data, records=(f"{one},repeat=2", str(other)))
    stage = dataclasses.replace(mixed.stages["finetune"], data=more)
    with pytest.raises(TrainingError, match=r"data\.records = .*repeat=1\.5.*there, .*repeat=2.*now"):
        train(dataclasses.replace(mixed, stages={"finetune": stage}))
