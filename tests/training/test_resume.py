"""A run that is killed and started again ends with the weights of a run that never stopped, bit by bit."""

import dataclasses
import json
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from processes import start
from tinyllava.cli import main
from tinyllava.config import Hardware, Run, lora
from tinyllava.data.sources import draw_rows, parse_source
from tinyllava.errors import CheckpointError, TrainingError
from tinyllava.model.assemble import assemble
from tinyllava.model.rebuild import RESUMED_TENSORS
from tinyllava.model.tuning import check_trained
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer, trained_tensors
from training_toys import signalled_at, toy_run, write_run


def end_of(action: Callable[[], object], said: Path) -> int | None:
    """Do an action in a process of its own and return its exit status."""
    process = start(action, said)
    process.join()
    return process.exitcode


def configured(parts, records, folder: Path, bits: int, save_steps: int = 3) -> Run:
    run = toy_run(
        parts,
        records,
        folder / "run",
        hardware=Hardware(num_workers=0, precision="fp32", device_batch_size=2, save_steps=save_steps),
    )
    stages = {name: dataclasses.replace(stage, num_epochs=8) for name, stage in run.stages.items()}
    stages["finetune"] = dataclasses.replace(
        stages["finetune"], language_model=lora(4, dropout=0.2, bits=bits)
    )  # draws random numbers
    return dataclasses.replace(run, stages=stages)


@pytest.fixture(scope="module")
def undisturbed(parts, records, tmp_path_factory) -> Callable[[int], Path]:
    """Return the folder of a run over weights of so many bits that nobody stopped."""

    @cache
    def trained(bits: int) -> Path:
        run = configured(parts, records, tmp_path_factory.mktemp("whole"), bits)
        train(run)
        return run.folder

    return trained


def same_as(whole: Path, folder: Path) -> None:
    """A run that was stopped has the bytes of the whole one, no step lost and none twice."""
    for name in ("model/model.safetensors", "pretrain/trained.safetensors", "finetune/trained.safetensors"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes(), name
    for stage in ("pretrain", "finetune"):
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 25))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_killed_in_both_stages_and_resumed_gives_the_same_bytes(parts, records, undisturbed, tmp_path, bits):
    whole = undisturbed(bits)
    run = configured(parts, records, tmp_path, bits)
    for stage, step in (("pretrain", 8), ("finetune", 11)):
        killed = partial(signalled_at, stage, step, signal.SIGKILL, lambda: train(run))
        assert end_of(killed, tmp_path / "said") == -signal.SIGKILL
        assert len((run.folder / stage / "metrics.jsonl").read_text().splitlines()) == step
    assert not (run.folder / "model").exists()
    assert end_of(lambda: train(run), tmp_path / "said") == 0
    same_as(whole, run.folder)


def test_sigterm_and_ctrl_c_save_before_they_end(parts, records, undisturbed, tmp_path):
    whole = undisturbed(16)
    run = configured(parts, records, tmp_path, 16, save_steps=100)
    command = ["train", write_run(run, tmp_path)]
    for number, stage, step in (
        (signal.SIGTERM, "pretrain", 5),
        (signal.SIGINT, "pretrain", 9),
        (signal.SIGTERM, "finetune", 4),
    ):
        said = tmp_path / f"said-{step}"
        ended = end_of(partial(signalled_at, stage, step, number, lambda: main(command)), said)
        assert ended == 128 + number
        assert "stopping: saving after this step" in said.read_text()
        assert "Traceback" not in said.read_text()
        num_steps = len((run.folder / stage / "metrics.jsonl").read_text().splitlines())
        assert step <= num_steps < 24  # it was stopped on the way
        assert (run.folder / stage / f"checkpoint-{num_steps}/manifest.json").is_file()  # nothing was lost
    assert end_of(lambda: main(command), tmp_path / "said") == 0
    same_as(whole, run.folder)


def test_a_full_disk_is_said_before_the_first_step(parts, records, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(TrainingError, match="GB free, but checkpoints and model need"):
        train(toy_run(parts, records, tmp_path / "run"))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("tinyllava.training.writing.save_file", "run/pretrain"),
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
    with pytest.raises(TrainingError, match=r"data\.records = .*repeat=1\.5.*before, .*repeat=2.*now"):
        train(dataclasses.replace(mixed, stages={"finetune": stage}))
