"""What decides a result decides whether work is resumed, reused, refused or started over."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from PIL import Image

from conftest import make_records
from tinyllava.config import Hardware, Run, lora
from tinyllava.errors import DataError, OutputError, TrainingError
from tinyllava.model.assemble import open_checkpoint
from tinyllava.training import checkpoints
from tinyllava.training.progress import StageProgress
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer
from training_toys import make_captions, toy_run

OFTEN = Hardware(num_workers=0, precision="fp32", device_batch_size=2, save_steps=1)
STAGES = ("pretrain", "finetune")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@contextmanager
def killed_at(stage: str, step: int) -> Iterator[None]:
    """Stop in a stage before a step's gradient is there."""
    original = StageTrainer.training_step

    def stopping(self, *args, **kwargs):
        if Path(self.args.output_dir).name == stage and self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", stopping)
        with suppress(Killed):
            yield
            pytest.fail("it was not stopped")


def count_steps(action: Callable[[], object]) -> dict[str, int]:
    """Return how many optimizer steps an action takes in each stage."""
    taken = dict.fromkeys(STAGES, 0)
    original = StageTrainer.train

    def counting(self, *args, **kwargs):
        before = self.state.global_step
        resumed = kwargs["resume_from_checkpoint"]
        start = int(resumed.rpartition("-")[2]) if resumed else before
        result = original(self, *args, **kwargs)
        taken[Path(self.args.output_dir).name] += self.state.global_step - start
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "train", counting)
        action()
    return taken


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_records(tmp_path / "data")


def often(
    parts: dict[str, Path], data: Path, output: Path, *, stages: Sequence[str] = STAGES, **changes
) -> Run:
    run = toy_run(parts, data, output, **({"hardware": OFTEN} | changes))
    return dataclasses.replace(run, stages={name: run.stages[name] for name in stages})


def edit(data: Path) -> None:
    """Correct an answer: the file's size in bytes stays."""
    data.write_text(data.read_text().replace('"red"', '"rad"', 1))
    make_captions(data)


def grow(data: Path) -> None:
    records = json.loads(data.read_text())
    data.write_text(json.dumps([*records, *({**r, "id": f"n{r['id']}"} for r in records[:4])]))
    make_captions(data)


def repaint(data: Path) -> None:
    """Another image under the same name, of the same size in bytes."""
    path = data.parent / "images/0.ppm"
    before = path.stat().st_size
    Image.new("RGB", (50, 40), (1, 2, 3)).save(path)
    assert path.stat().st_size == before


CHANGES = {"records": edit, "records, images": grow, "images": repaint}


@pytest.fixture
def fixed_size(data: Path) -> Path:
    """Records whose first image is a file without compression."""
    Image.open(data.parent / "images/0.png").save(data.parent / "images/0.ppm")
    data.write_text(data.read_text().replace('"0.png"', '"0.ppm"'))
    return data


@pytest.mark.parametrize("changed", CHANGES)
def test_a_killed_run_on_changed_data_starts_over_and_ends_as_one_on_the_new_data_alone(
    parts, fixed_size, tmp_path, capsys, changed
):
    run = often(parts, fixed_size, tmp_path / "killed/run", stages=("pretrain",))
    with killed_at("pretrain", 2):
        train(run)
    CHANGES[changed](fixed_size)
    train(run)
    assert f"pretrain: {changed} changed since it was trained here; starting over" in capsys.readouterr().out
    train(dataclasses.replace(run, output=str(tmp_path / "fresh/run")))
    assert weights(tmp_path / "killed/run") == weights(tmp_path / "fresh/run")
    steps = (tmp_path / "killed/run/pretrain/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(1, len(steps) + 1))


def test_a_finished_run_on_a_changed_image_starts_over_and_no_run_beside_it_reuses_it(
    parts, fixed_size, tmp_path, capsys
):
    run = often(parts, fixed_size, tmp_path / "run")
    train(run)
    old = weights(tmp_path / "run")
    repaint(fixed_size)
    capsys.readouterr()
    train(dataclasses.replace(run, output=str(tmp_path / "beside")))
    assert "already trained" not in capsys.readouterr().out
    shutil.move(tmp_path / "beside", tmp_path / "far/away/beside")  # out of the way of reuse
    train(run)
    said = capsys.readouterr().out
    assert "pretrain: images changed since it was trained here; starting over" in said
    assert "finetune: images, weights changed since it was trained here; starting over" in said
    assert weights(tmp_path / "run") == weights(tmp_path / "far/away/beside") != old


def test_other_weights_in_the_folder_that_a_run_starts_from_start_it_over(parts, data, tmp_path, capsys):
    start = train(often(parts, data, tmp_path / "first"))
    tuned = often(parts, data, tmp_path / "tuned/run", start_from=str(start))
    tuned = dataclasses.replace(tuned, stages={"finetune": tuned.stages["finetune"]})
    with killed_at("finetune", 2):
        train(tuned)
    train(often(parts, data, tmp_path / "other/run", seed=7))
    shutil.rmtree(start)
    shutil.copytree(tmp_path / "other/run/model", start)
    train(dataclasses.replace(tuned, output=str(tmp_path / "fresh/run")))
    capsys.readouterr()
    train(tuned)
    assert "finetune: weights changed since it was trained here; starting over" in capsys.readouterr().out
    assert weights(tmp_path / "tuned/run") == weights(tmp_path / "fresh/run")


def test_what_changes_nothing_is_allowed_on_resume_and_said(parts, data, tmp_path, capsys):
    train(often(parts, data, tmp_path / "whole/run"))
    with killed_at("finetune", 2):
        train(often(parts, data, tmp_path / "a/run"))
    (tmp_path / "a").rename(tmp_path / "moved")
    shutil.copytree(data.parent, tmp_path / "elsewhere")
    run = often(
        parts,
        tmp_path / "elsewhere/records.json",
        tmp_path / "moved/run",
        name="another name",
        hardware=dataclasses.replace(OFTEN, num_workers=1, save_steps=2, gradient_checkpointing=True),
        report_to=("tensorboard",),
    )
    skip = {
        name: dataclasses.replace(s, data=dataclasses.replace(s.data, skip=("too_long", "roles")))
        for name, s in run.stages.items()
    }
    capsys.readouterr()
    steps = count_steps(lambda: train(dataclasses.replace(run, stages=skip)))
    said = capsys.readouterr().out
    assert steps == {"pretrain": 0, "finetune": 1}
    assert "finetune: resuming from " in said
    assert "hardware.num_workers = 0 before, 1 now: it does not change the result" in said
    assert weights(tmp_path / "moved/run") == weights(tmp_path / "whole/run")


def test_another_batch_of_the_device_is_allowed_except_where_it_decides(parts, data, tmp_path):
    run = often(parts, data, tmp_path / "run", stages=("pretrain",))
    with killed_at("pretrain", 2):
        train(run)
    smaller = dataclasses.replace(OFTEN, device_batch_size=1)
    assert count_steps(lambda: train(dataclasses.replace(run, hardware=smaller)))["pretrain"] == 1
    micro = dataclasses.replace(run, output=str(tmp_path / "micro/run"))
    micro = dataclasses.replace(
        micro, stages={n: dataclasses.replace(s, loss_norm="micro") for n, s in micro.stages.items()}
    )
    with killed_at("pretrain", 2):
        train(micro)
    with pytest.raises(TrainingError, match=r"stages\.pretrain\.micro_batch_size = 2 before, 1 now"):
        train(dataclasses.replace(micro, hardware=smaller))


DECISIVE = {
    "seed": (lambda run: dataclasses.replace(run, seed=1), r"stages\.pretrain\.seed = 42 before, 1 now"),
    "learning rate": (
        lambda run: dataclasses.replace(
            run, stages={n: dataclasses.replace(s, learning_rate=0.5) for n, s in run.stages.items()}
        ),
        r"stages\.pretrain\.learning_rate = 0\.01 before, 0\.5 now\n.*finetune\.learning_rate = 0\.001",
    ),
    "adapters": (
        lambda run: dataclasses.replace(
            run,
            stages={
                **run.stages,
                "finetune": dataclasses.replace(run.stages["finetune"], language_model=lora(2)),
            },
        ),
        r"language_model\.kind = 'full' before, 'lora' now",
    ),
    "stages": (
        lambda run: dataclasses.replace(run, stages={"pretrain": run.stages["pretrain"]}),
        r"stages = pretrain, finetune before, pretrain now",
    ),
    "connector": (
        lambda run: dataclasses.replace(run, model=dataclasses.replace(run.model, connector="linear")),
        r"model\.connector = 'mlp' before, 'linear' now",
    ),
    "length": (
        lambda run: dataclasses.replace(
            run,
            stages={
                n: dataclasses.replace(
                    s, max_length_tokens=72, data=dataclasses.replace(s.data, skip=("too_long",))
                )
                for n, s in run.stages.items()
            },
        ),
        r"max_length_tokens = 256 before, 72 now",
    ),
}


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory) -> tuple[Path, Path]:
    """A run that is done, and its records; only refusals are tried on it."""
    folder = tmp_path_factory.mktemp("finished")
    data = make_records(folder / "data")
    train(often(parts, data, folder / "run"))
    return folder / "run", data


@pytest.mark.parametrize("setting", DECISIVE)
def test_what_decides_the_result_is_refused_with_both_values(parts, finished, setting):
    folder, data = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    change, message = DECISIVE[setting]
    with pytest.raises(TrainingError, match=message) as caught:
        train(change(often(parts, data, folder)))
    assert f"Choose another --output, or delete {folder} to start over." in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before


def test_other_records_by_another_name_are_refused_and_the_same_ones_are_not(parts, finished, tmp_path):
    folder, data = finished
    other = make_records(tmp_path / "other", num_records=8)
    with pytest.raises(TrainingError) as caught:
        train(often(parts, other, folder))
    captions = data.with_name("captions.json"), other.with_name("captions.json")
    assert f"stages.pretrain.data.records = ['{captions[0]}'] before, ['{captions[1]}'] now" in str(
        caught.value
    )
    with pytest.raises(TrainingError, match=r"model\.language_model = '.*llama' before, '.*phi' now"):
        train(often(parts, data, folder, llm="phi"))
    shutil.copytree(data.parent, tmp_path / "copy")
    copied = shutil.copytree(parts["llama"], tmp_path / "llama")
    run = often(parts | {"llama": copied}, tmp_path / "copy/records.json", folder)
    assert count_steps(lambda: train(run)) == {"pretrain": 0, "finetune": 0}


def test_a_first_try_that_failed_does_not_lock_the_folder(parts, data, tmp_path):
    good = data.read_text()
    data.write_text(good.replace('"value": "yes"', '"value": ""', 1))
    with pytest.raises(DataError, match=r"\[empty_answer\]"):
        train(often(parts, data, tmp_path / "run", stages=("finetune",)))
    data.write_text(good)
    with killed_at("finetune", 0):
        train(often(parts, data, tmp_path / "run", stages=("finetune",)))
    train(often(parts, data, tmp_path / "run", seed=3, llm="phi"))  # nothing was trained: nothing to lose


def damage(path: Path) -> Iterator[Callable[[], None]]:
    """Yield ways to damage a file."""
    whole = path.read_bytes()
    yield path.unlink
    yield lambda: path.write_bytes(b"")
    yield lambda: path.write_bytes(whole[: len(whole) // 2])
    yield lambda: path.write_bytes(bytes(len(whole)))
    yield lambda: path.write_text("null")


def test_a_checkpoint_with_any_file_damaged_is_passed_over_for_the_one_before(parts, data, tmp_path, capsys):
    run = often(parts, data, tmp_path / "broken/run", stages=("pretrain",))
    with killed_at("pretrain", 2):
        train(run)
    stage = tmp_path / "broken/run/pretrain"
    assert sorted(path.name for path in stage.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    names = sorted(path.name for path in (stage / "checkpoint-2").iterdir())
    assert {
        "manifest.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    } <= set(names)
    key = json.loads((stage / "checkpoint-2/manifest.json").read_text())["key"]
    for name in names:
        for way in range(5):
            copy = shutil.copytree(stage, tmp_path / "copy")
            list(damage(copy / "checkpoint-2" / name))[way]()
            said = []
            assert checkpoints.find_checkpoint(copy, key, said.append) == copy / "checkpoint-1", (name, way)
            assert len(said) == 1
            assert said[0].startswith(f"{copy / 'checkpoint-2'}: ")
            assert said[0].endswith("skipped")
            shutil.rmtree(copy)
    (stage / "checkpoint-2/optimizer.pt").write_bytes(b"garbage")
    capsys.readouterr()
    assert count_steps(lambda: train(run))["pretrain"] == 2
    assert f"pretrain: resuming from {stage / 'checkpoint-1'}" in capsys.readouterr().out
    train(dataclasses.replace(run, output=str(tmp_path / "whole/run")))
    assert weights(tmp_path / "broken/run") == weights(tmp_path / "whole/run")


def test_a_kill_between_the_last_checkpoint_and_the_result_costs_no_step_and_adds_none(
    parts, data, tmp_path, monkeypatch
):
    def kill(*_: object) -> None:
        raise Killed

    run = often(parts, data, tmp_path / "run", stages=("pretrain",))
    short = dataclasses.replace(run.stages["pretrain"], max_steps=2)  # it ends within an epoch
    run = dataclasses.replace(run, stages={"pretrain": short})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_stage", kill)
        with pytest.raises(Killed):
            train(run)
    assert count_steps(lambda: train(run))["pretrain"] == 0
    train(dataclasses.replace(run, output=str(tmp_path / "whole/run")))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole/run")
    steps = (tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]


def test_with_every_checkpoint_damaged_the_stage_starts_over_and_says_so(parts, data, tmp_path, capsys):
    run = often(parts, data, tmp_path / "run", stages=("pretrain",))
    with killed_at("pretrain", 2):
        train(run)
    for path in (tmp_path / "run/pretrain").glob("checkpoint-*/optimizer.pt"):
        path.unlink()
    assert count_steps(lambda: train(run))["pretrain"] == 3
    said = capsys.readouterr().out
    assert said.count("optimizer.pt is missing; skipped") == 2
    assert "pretrain: its files are missing or damaged; starting over" in said


def test_old_checkpoints_go_by_step_not_by_date_and_all_go_at_the_end(parts, data, tmp_path):
    with killed_at("pretrain", 1):
        train(often(parts, data, tmp_path / "run"))
    stage = tmp_path / "run/pretrain"
    tomorrow = time.time() + 86_400
    os.utime(stage / "checkpoint-1", (tomorrow, tomorrow))
    (stage / "checkpoint-old").mkdir()  # not one of ours
    with killed_at("finetune", 2):
        train(often(parts, data, tmp_path / "run"))
    assert [path.name for path in stage.glob("checkpoint-*")] == ["checkpoint-old"]
    train(often(parts, data, tmp_path / "run"))
    assert not list((tmp_path / "run/finetune").glob("checkpoint-*"))
    assert not list((tmp_path / "run").rglob("*.partial"))


DAMAGED = ("null", "[]", "{", '{"key": 3}', "", "\x00", "3")


@pytest.mark.parametrize("name", ["run.json", "pretrain/stage.json"])
@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_metadata_never_ends_in_a_traceback(parts, finished, name, text):
    folder, data = finished
    expected = weights(folder)
    (folder / name).write_text(text)
    train(often(parts, data, folder))
    assert weights(folder) == expected


@pytest.mark.parametrize("text", [*DAMAGED, '{"step": "x"}\n{"step": 1}\n', "\n\n"])
def test_damaged_metrics_are_left_out(tmp_path, text):
    line = '{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(f"{line}{text}\n{line}{text}")
    progress = StageProgress("pretrain", tmp_path / "metrics.jsonl")
    progress.on_train_begin(
        None, SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=3), None
    )
    progress.progress.stop()
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert kept.count(line.strip()) == 2
    assert {json.loads(one)["step"] for one in kept} == {1}


@pytest.mark.parametrize("name", ["trained.safetensors", "stage.json"])
def test_a_neighbour_that_is_damaged_is_not_reused(parts, data, tmp_path, capsys, name):
    run = often(parts, data, tmp_path / "first", stages=("pretrain",))
    train(run)
    path = tmp_path / "first/pretrain" / name
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x00}")
    capsys.readouterr()
    train(dataclasses.replace(run, output=str(tmp_path / "second")))
    said = capsys.readouterr().out
    assert ("first/pretrain: trained.safetensors is damaged; not reused" in said) == (name != "stage.json")
    assert "pretrain: already trained" not in said
    assert weights(tmp_path / "second") == weights(tmp_path / "first")


def test_two_processes_never_train_in_one_folder(parts, data, tmp_path):
    run = often(parts, data, tmp_path / "run", stages=("pretrain",))
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run/.lock"),
        pytest.raises(OutputError, match=r"run: another process is writing there\. Wait until it ends"),
    ):
        train(run)
    train(run)  # a lock that was left behind is no lock


def test_what_is_saved_can_be_read_by_others(parts, data, tmp_path):
    mask = os.umask(0o022)
    try:
        with killed_at("finetune", 2):
            train(often(parts, data, tmp_path / "run"))
        [*_, checkpoint] = sorted((tmp_path / "run/finetune").glob("checkpoint-*"))
        modes = {path: path.stat().st_mode & 0o777 for path in checkpoint.rglob("*") if path.is_file()}
        train(often(parts, data, tmp_path / "run"))
    finally:
        os.umask(mask)
    modes |= {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path: mode for path, mode in modes.items() if mode != 0o644} == {}
    open_checkpoint(tmp_path / "run/model")
