"""Whoever calls the library finds the process as it was: settings, messages, random numbers, environment."""

import csv
import dataclasses
import gc
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft  # noqa: F401  # what a call imports first changes the process once: all of it is imported here
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from PIL import Image, ImageFile
from transformers.utils import logging as transformers_logging

from chats import make_chat
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.checkpoints.importing import import_checkpoint
from tinyllava.config import lora
from tinyllava.conversation import ask
from tinyllava.data.images import open_image
from tinyllava.data.records import read_records
from tinyllava.evaluation.benchmark import Benchmark, Grade
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.read import read_table
from tinyllava.evaluation.run import Settings, evaluate
from tinyllava.inference.chat import Chat
from tinyllava.model.assemble import open_checkpoint
from tinyllava.training.run import train
from training_toys import toy_run


def loggers() -> dict[str, tuple[Any, ...]]:
    known = {"": logging.getLogger(), **logging.Logger.manager.loggerDict}
    return {
        name: (logger.level, logger.disabled, logger.propagate, list(logger.filters), list(logger.handlers))
        for name, logger in known.items()
        if isinstance(logger, logging.Logger)
    }


def surroundings() -> dict[str, Any]:
    """What a process has only once, and any caller may have set."""
    hook = transformers_logging.set_tqdm_hook(None)
    transformers_logging.set_tqdm_hook(hook)
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        "environment": dict(os.environ),
        "directory": Path.cwd(),
        "path": list(sys.path),
        "transformers": (transformers_logging.get_verbosity(), hook),
        "bars": (transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()),
        "csv": csv.field_size_limit(),
        "warnings": list(warnings.filters),
        "loggers": loggers(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.multiprocessing.get_sharing_strategy(),
        ),
        "random numbers": [
            hash(random.getstate()),
            hash(torch.get_rng_state().numpy().tobytes()),
            hash(numpy_state[1].tobytes()),
            numpy_state[2:],
        ],
        "images": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "python": (
            sys.getrecursionlimit(),
            sys.get_int_max_str_digits(),
            sys.excepthook,
            sys.stdout,
            sys.stderr,
            gc.isenabled(),
            multiprocessing.get_start_method(allow_none=True),
        ),
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is not as it was; a logger that a library made on the way counts only if it changes others."""
    after["loggers"] = {name: after["loggers"].get(name) for name in before["loggers"]}
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    for name in changed.keys() & {"environment", "loggers"}:
        one, other = changed[name]
        changed[name] = {k: (one.get(k), other.get(k)) for k in one | other if one.get(k) != other.get(k)}
    return changed


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    chat = make_chat(tmp_path_factory.mktemp("toy"), "llama")
    folder = tmp_path_factory.mktemp("checkpoint")
    chat.model.save_pretrained(folder)
    chat.processor.save_pretrained(folder)
    return folder


def train_toy(parts, records, folder: Path, toy: Path) -> None:
    run = toy_run(parts, records, folder / "run")
    plans = {"fp32": lora(4, bits=4), "bf16": lora(4, bits=8)}
    for precision, plan in plans.items():
        stage = dataclasses.replace(run.stages["finetune"], language_model=plan)
        hardware = dataclasses.replace(run.hardware, precision=precision, num_workers=1)
        output = str(folder / precision)
        train(dataclasses.replace(run, stages={"finetune": stage}, hardware=hardware, output=output))


def evaluate_toy(parts, records, folder: Path, toy: Path) -> None:
    images = records.parent / "images"
    questions = [
        Question(id=path.name, conversation=ask("What is it?", path), image=path.name, target="red")
        for path in sorted(images.iterdir())
    ]
    benchmark = Benchmark(
        name="toy",
        title="Toy",
        protocol="toy",
        split="test",
        metric="accuracy",
        num_questions=len(questions),
        prompt="{question}",
        load=lambda folder: questions,
        max_new_tokens=4,
        grade=lambda question, answer: Grade(answer, float("a" in answer)),
    )
    for num_workers in (0, 2):
        settings = Settings(batch_tokens=200, num_workers=num_workers)
        chat = Chat.open(toy, device="cpu")
        evaluate(chat, benchmark, images, folder / f"{num_workers}", model="toy", settings=settings)


def answer(parts, records, folder: Path, toy: Path) -> None:
    chat = Chat.open(toy, device="cpu")
    Image.new("RGB", (30, 40)).save(folder / "a.png")
    chat.answer([ask("What is it?", folder / "a.png")], 4)
    "".join(chat.stream(ask("What is it?", folder / "a.png"), 4))


def export_and_import(parts, records, folder: Path, toy: Path) -> None:
    export_checkpoint(toy, folder / "own")
    export_checkpoint(toy, folder / "stock", layout="llava")
    import_checkpoint(folder / "stock", folder / "back")


def read_files(parts, records, folder: Path, toy: Path) -> None:
    (folder / "table.tsv").write_text("image\tquestion\n" + "A" * 200_000 + "\twhat\n" + "B\twhat\n")
    rows = read_table(folder / "table.tsv", "image")
    next(rows)
    assert csv.field_size_limit() == 131_072  # between two rows too
    assert len(list(rows)) == 1
    read_records(records, records.parent / "images")
    open_image(ask("", next((records.parent / "images").iterdir())).images[0])


CALLS: list[Callable[..., None]] = [train_toy, evaluate_toy, answer, export_and_import, read_files]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_the_process_as_it_was(call, parts, records, tmp_path, toy, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    before = surroundings()
    call(parts, records, tmp_path, toy)
    assert changes(before, surroundings()) == {}


def test_a_call_leaves_the_settings_of_its_caller(parts, records, tmp_path, toy):
    verbosity = transformers_logging.get_verbosity()
    hook = transformers_logging.set_tqdm_hook(lambda make, args, options: make(*args, **options))
    try:
        transformers_logging.set_verbosity_debug()
        disable_progress_bars()
        before = surroundings()
        open_checkpoint(toy)
        export_and_import(parts, records, tmp_path, toy)
        assert changes(before, surroundings()) == {}
    finally:
        enable_progress_bars()
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(hook)


def test_an_error_leaves_the_process_as_it_was_too(tmp_path, toy):
    (tmp_path / "config.json").write_text(json.dumps({}))
    before = surroundings()
    for call in (open_checkpoint, lambda folder: export_checkpoint(folder, tmp_path / "new")):
        with pytest.raises(Exception, match="config"):
            call(tmp_path)
    assert changes(before, surroundings()) == {}
