"""Preparing, training, evaluating and answering a file survive kills at random moments, bit by bit.

Each is killed as often as ``TINYLLAVA_KILLS`` says (20) and ends as if nobody had killed it: nothing lost,
nothing doubled. Run by ``pytest -m kills``; ``TINYLLAVA_SEED`` repeats the moments of an earlier run.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from chats import make_chat
from conftest import make_records
from evaluation.test_run import BENCHMARK, data
from processes import in_ranks, start
from tinyllava.config import FULL, Hardware, lora
from tinyllava.evaluation.run import Settings, evaluate
from tinyllava.inference import file
from tinyllava.model.rebuild import MANIFEST
from tinyllava.training.run import train
from training_toys import toy_run

pytestmark = [pytest.mark.kills, pytest.mark.timeout(3600)]
NUM_KILLS = int(os.environ.get("TINYLLAVA_KILLS", "20"))
SEED = int(os.environ.get("TINYLLAVA_SEED") or random.SystemRandom().randrange(10**6))
__all__ = ["data"]  # a fixture


def begun_checkpoints(folder: Path) -> set[tuple[Path, int]]:
    """Return the checkpoints that a run is writing, or was when it was killed."""
    begun = set()
    for path in folder.glob("*/checkpoint-*"):
        with suppress(FileNotFoundError):
            if not (path / MANIFEST).is_file():
                begun.add((path, path.stat().st_ino))
    return begun


def survives(
    action: Callable[[Path], object], read: Callable[[Path], object], folder: Path, *, aims: bool = False
) -> None:
    """Do an action undisturbed, and in another folder killed again and again; both have to leave the same.

    Where it ends before it is killed, what it left is compared, removed, and it begins again.

    Args:
        action: makes something in a folder; done again, it resumes.
        read: returns what counts of that.
        folder: for all of it.
        aims: every other kill comes in the writing of the checkpoint that follows the random moment.
    """
    moments = random.Random(SEED)
    log = folder / "log.txt"
    begun = time.monotonic()
    whole = start(lambda: action(folder / "whole" / "run"), log)
    whole.join()
    assert whole.exitcode == 0, log.read_text()
    seconds = time.monotonic() - begun
    expected = read(folder / "whole" / "run")
    disturbed = folder / "disturbed" / "run"
    num_kills = num_ends = num_in_checkpoints = 0
    while num_kills < NUM_KILLS or num_ends == 0:
        before = begun_checkpoints(disturbed)
        process = start(lambda: action(disturbed), log)
        process.join(moments.uniform(0, seconds) if num_kills < NUM_KILLS else None)
        while aims and num_kills % 2 and process.is_alive() and begun_checkpoints(disturbed) <= before:
            time.sleep(0.002)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            num_kills += 1
            num_in_checkpoints += not begun_checkpoints(disturbed) <= before
            continue
        assert process.exitcode == 0, f"seed {SEED}, after {num_kills} kills:\n{log.read_text()}"
        assert read(disturbed) == expected, f"seed {SEED}, after {num_kills} kills"
        shutil.rmtree(disturbed.parent)
        num_ends += 1
    print(
        f"seed {SEED}: {num_kills} kills, {num_in_checkpoints} of them in the writing of a checkpoint, "
        f"{num_ends} ends"
    )


def read_run(folder: Path) -> dict[str, object]:
    names = [
        "model/model.safetensors",
        *(str(p.relative_to(folder)) for p in folder.glob("*/trained.safetensors")),
    ]
    steps = {
        str(path.parent.name): [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in folder.glob("*/metrics.jsonl")
    }
    assert not list(folder.glob("*/checkpoint-*"))
    return {name: (folder / name).read_bytes() for name in names} | steps


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training(parts, tmp_path, num_workers):
    records = make_records(tmp_path / "data")
    hardware = Hardware(num_workers=num_workers, precision="fp32", device_batch_size=2, save_steps=1)

    def action(folder: Path) -> None:
        run = toy_run(parts, records, folder, hardware=hardware)
        finetune = dataclasses.replace(run.stages["finetune"], language_model=lora(4, dropout=0.2))
        train(dataclasses.replace(run, stages={**run.stages, "finetune": finetune}))

    survives(action, read_run, tmp_path, aims=True)


@pytest.mark.parametrize("sharding", ["none", "gradients", "all"])
def test_training_in_two_processes(parts, tmp_path, sharding):
    """With DDP and with FSDP2; both are killed, in the middle of whatever they do together."""
    records = make_records(tmp_path / "data")
    hardware = Hardware(num_workers=0, precision="fp32", device_batch_size=1, save_steps=1, sharding=sharding)

    def action(folder: Path) -> None:
        run = toy_run(parts, records, folder, hardware=hardware)
        finetune = dataclasses.replace(
            run.stages["finetune"], vision_encoder=FULL, language_model=lora(4, dropout=0.2)
        )
        run = dataclasses.replace(run, stages={**run.stages, "finetune": finetune})
        assert in_ranks(2, lambda _: train(run)) == [0, 0]

    survives(action, read_run, tmp_path, aims=True)


def test_preparing(parts, tmp_path):
    """Hashes and features of many images; one step of training tells whether they are right."""
    records = make_records(tmp_path / "data", num_records=400)
    hardware = Hardware(num_workers=0, precision="fp32", device_batch_size=2, cache_features=True)

    def action(folder: Path) -> None:
        run = toy_run(parts, records, folder, hardware=hardware)
        train(
            dataclasses.replace(
                run, stages={"pretrain": dataclasses.replace(run.stages["pretrain"], max_steps=1)}
            )
        )

    def read(folder: Path) -> dict[str, object]:
        [index] = folder.parent.glob(".features/*/index.txt")
        digests = index.read_text().splitlines()
        assert len(digests) == len(set(digests)) == 300
        return read_run(folder) | {"features": (index.parent / "features.f32").read_bytes(), "index": digests}

    survives(action, read, tmp_path)


def test_evaluating(tmp_path, data):
    chat = make_chat(tmp_path / "parts", "llama")
    settings = Settings(batch_tokens=100, num_workers=0)

    def read(folder: Path) -> dict[str, object]:
        lines = [
            json.loads(line)["question_id"]
            for path in (folder / "toy").glob("answers-*")
            for line in path.read_text().splitlines()
        ]
        result = json.loads((folder / "results.json").read_text())["results"]
        assert len(lines) == len(set(lines)) == 60
        return {
            "predictions": (folder / "toy/predictions.jsonl").read_bytes(),
            "results": [{**one, "date": ""} for one in result],
        }

    survives(
        lambda folder: evaluate(chat, BENCHMARK, data, folder, model="toy-model", settings=settings),
        read,
        tmp_path,
    )


def test_answering_a_file(tmp_path, data, monkeypatch):
    monkeypatch.setattr(file, "_AT_ONCE", 3)
    chat = make_chat(tmp_path / "parts", "llama")
    questions = tmp_path / "questions.jsonl"
    asked = [{"question": f"Is there a dog {n}?", "image": str(data / f"{n % 20}.png")} for n in range(60)]
    questions.write_text("".join(json.dumps(one) + "\n" for one in asked))
    lines = file.read_questions(questions)

    def action(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in file.answer_file(
            lambda some: chat.answer(some, 6), lines, folder / "a.jsonl", {"weights": "1"}
        ):
            pass

    survives(action, lambda folder: (folder / "a.jsonl").read_bytes(), tmp_path)
