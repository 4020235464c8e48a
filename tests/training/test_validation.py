"""Validation measures exactly, changes no weight, survives a kill, and its best step is the one it names."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import make_records
from tinyllava.config import Hardware, Run, Validation, lora
from tinyllava.data.dataset import Examples
from tinyllava.data.records import read_records
from tinyllava.errors import ConfigError, TrainingError
from tinyllava.inference.chat import Chat
from tinyllava.model.assemble import open_checkpoint
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer
from tinyllava.training.validation import best_step, is_stopped
from training_toys import toy_run


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven records of their own, with images by their whole paths."""
    path = make_records(tmp_path_factory.mktemp("held"), 7)
    records = json.loads(path.read_text())
    for record in records:
        if "image" in record:
            record["image"] = str(path.parent / "images" / record["image"])
        record["conversations"][1]["value"] += " indeed"
    path.write_text(json.dumps(records))
    return path


def validated(parts, records: Path, output: Path, validation: Validation, keep: int = 0, **changes) -> Run:
    """Fine-tuning with dropout, which draws random numbers, measured on the way."""
    hardware = Hardware(
        num_workers=0, precision="fp32", device_batch_size=2, save_steps=3, keep_checkpoints=keep
    )
    run = toy_run(parts, records, output, hardware=hardware)
    settings = {"language_model": lora(4, dropout=0.2), "num_epochs": 4, "validation": validation} | changes
    return dataclasses.replace(
        run, stages={"finetune": dataclasses.replace(run.stages["finetune"], **settings)}
    )


def curve_of(output: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (output / "finetune/metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def loss_of(folder: Path, file: Path) -> float:
    """The mean loss over the supervised tokens of a file's records, one by one, in plain torch."""
    model, processor = open_checkpoint(folder)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in Examples(
            conversations=read_records(file, file.parent).conversations, processor=processor
        ):
            logits = model(input_ids=example.input_ids[None], pixel_values=example.pixel_values).logits[0]
            logits = logits[:-1, : model.config.num_language_rows or None].double()
            total += float(torch.nn.functional.cross_entropy(logits, example.labels[1:], reduction="sum"))
            count += int((example.labels[1:] != -100).sum())
    return total / count


def test_the_loss_is_that_of_plain_torch_in_a_tracker_too_and_the_weights_are_those_without_both(
    parts, records, held, tmp_path, capfd
):
    wanted = Validation(held_out=str(held), every_steps=5, num_answers=2)
    measured = validated(parts, records, tmp_path / "with/run", wanted)
    model = train(dataclasses.replace(measured, report_to=("tensorboard",)))
    train(validated(parts, records, tmp_path / "without/run", Validation()))
    name = "run/finetune/trained.safetensors"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    curve = curve_of(tmp_path / "with/run")
    assert [step for step, _ in curve] == [0, 5, 10, 12]
    assert curve[-1][1] == pytest.approx(loss_of(model, held), rel=1e-5)
    assert curve[-1][1] < curve[0][1]
    tracked = EventAccumulator(str(next((tmp_path / "with/run").rglob("events.out.*")).parent)).Reload()
    kept = [(point.step, point.value) for point in tracked.Scalars("eval/loss")]
    assert kept == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in curve]
    lines = map(json.loads, (tmp_path / "with/run/finetune/metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [point.value for point in tracked.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    metadata = json.loads((tmp_path / "with/run/finetune/stage.json").read_text())
    assert metadata["validation"]["best_step"] == min(curve[1:], key=lambda point: point[1])[0]
    assert metadata["data"]["held_out"]["num_samples"] == 7
    assert metadata["key"] == json.loads((tmp_path / "without/run/finetune/stage.json").read_text())["key"]
    said = capfd.readouterr().out
    assert f"finetune: step 12, held-out loss {curve[-1][1]:.4f}" in said


def test_the_page_has_the_samples_images_questions_and_the_answers_that_the_model_gives(
    parts, records, held, tmp_path
):
    wanted = Validation(held_out=str(held), every_steps=6, num_answers=4)
    model = train(validated(parts, records, tmp_path / "run", wanted))
    given = [json.loads(line) for line in (tmp_path / "run/finetune/held-out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in given] == [0] * 4 + [6] * 4 + [12] * 4
    talks = read_records(held, held.parent).conversations[:4]
    asked = [dataclasses.replace(one, messages=one.messages[:1]) for one in talks]
    chat = Chat.open(model)  # one by one: questions of several lengths, with and without an image
    assert [line["answer"] for line in given[-4:]] == [chat.answer([one])[0] for one in asked]
    page = (tmp_path / "run/finetune/held-out.html").read_text()
    assert page.count("<article>") == page.count("<td>step 12</td>") == 4
    assert page.count('src="data:image/jpeg;base64,/9j/') == 3
    assert "What colour is number 0?" in page
    assert "expected: red indeed" in page


def test_broken_off_and_resumed_gives_the_same_weights_curve_and_answers(
    parts, records, tmp_path, monkeypatch
):
    wanted = Validation(held_out="25%", every_steps=2, num_answers=2, result="best")
    whole, broken = (
        validated(parts, records, tmp_path / name / "run", wanted, num_epochs=8)
        for name in ("whole", "broken")
    )
    train(whole)
    step, calls = StageTrainer.training_step, iter(range(19))

    def breaking(self, *args, **kwargs):
        if next(calls) == 18:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", breaking)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert curve_of(broken.folder)[-1][0] == 10  # a checkpoint is of step 9
    train(broken)
    for name in ("model/model.safetensors", "finetune/trained.safetensors", "finetune/held-out.jsonl"):
        assert (whole.folder / name).read_bytes() == (broken.folder / name).read_bytes(), name
    assert curve_of(whole.folder) == curve_of(broken.folder)
    [left] = broken.folder.glob("finetune/checkpoint-*")  # the best one stays beside the result
    assert left.name == f"checkpoint-{best_step(curve_of(whole.folder))}"


def test_early_stopping_ends_with_the_best_weights_and_is_found_again_after_a_kill(
    parts, records, held, tmp_path, capfd
):
    wanted = Validation(held_out=str(held), every_steps=1, patience=2, result="best")
    run = validated(parts, records, tmp_path / "run", wanted, 3, num_epochs=30, learning_rate=0.3)
    model = train(run)
    curve = curve_of(tmp_path / "run")
    best, last = best_step(curve), curve[-1][0]
    assert last == best + 2 < 90
    folder = tmp_path / "run/finetune"
    result = load_file(folder / "trained.safetensors")
    kept = load_file(folder / f"checkpoint-{best}/model.safetensors")
    assert all(torch.equal(result[name], kept[name]) for name in result)
    assert dict(curve)[best] == pytest.approx(loss_of(model, held), rel=1e-5)
    before = (folder / "trained.safetensors").read_bytes()
    for name in ("trained.safetensors", "stage.json"):  # as a kill behind the last checkpoint leaves it
        (folder / name).unlink()
    capfd.readouterr()
    train(run)
    assert f"resuming from {folder / f'checkpoint-{last}'}" in capfd.readouterr().out
    assert curve_of(tmp_path / "run") == curve
    assert (folder / "trained.safetensors").read_bytes() == before


def test_when_the_best_step_was_counted():
    curve = [(0, 1.0), (2, 3.0), (4, 2.0), (6, 2.0), (8, 2.5)]
    assert best_step(curve) == 4  # the weights of step 0 are the start's
    assert best_step(curve[:1]) is None
    assert [is_stopped(curve, Validation(patience=n)) for n in (0, 1, 2, 3)] == [False, True, True, False]


def test_the_kept_checkpoints_are_the_newest_and_the_best(parts, records, held, tmp_path):
    wanted = Validation(held_out=str(held), every_steps=2)
    train(validated(parts, records, tmp_path / "run", wanted, 2, learning_rate=0.05))
    best = best_step(curve_of(tmp_path / "run"))
    found = {int(path.name.partition("-")[2]) for path in (tmp_path / "run/finetune").glob("checkpoint-*")}
    assert found == {best, 9, 12} | ({10} if 10 in found else set()) - ({9} if 10 in found else set())


def test_what_is_held_out_decides_the_result_only_where_it_changes_the_training(
    parts, records, held, tmp_path
):
    train(validated(parts, records, tmp_path / "run", Validation()))
    with pytest.raises(TrainingError, match=r"validation\.held_out = '' before, '25%' now"):
        train(validated(parts, records, tmp_path / "run", Validation(held_out="25%")))
    train(validated(parts, records, tmp_path / "run", Validation(held_out=str(held))))  # reused
    with pytest.raises(TrainingError, match=r"validation\.patience = None before, 1 now"):
        train(validated(parts, records, tmp_path / "run", Validation(held_out=str(held), patience=1)))


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        (Validation(held_out="60%"), "validation.held_out = '60%': must be above 0% and at most 50%"),
        (Validation(held_out="mine.json"), "mine.json: no such record file"),
        (Validation(patience=3), "validation.held_out: empty"),
        (Validation(held_out="10%", every_steps=-1), "validation.every_steps = -1: must not be negative"),
    ],
)
def test_validation_that_cannot_be_is_refused_before_anything_is_loaded(
    parts, records, tmp_path, validation, said
):
    with pytest.raises(ConfigError) as caught:
        train(validated(parts, records, tmp_path / "run", validation))
    assert said in str(caught.value)


def test_images_that_are_on_both_sides_are_counted_and_said(parts, records, tmp_path, capfd):
    train(validated(parts, records, tmp_path / "run", Validation(held_out=str(records)), num_epochs=1))
    assert "9 of them show an image that is also trained on" in capfd.readouterr().out
