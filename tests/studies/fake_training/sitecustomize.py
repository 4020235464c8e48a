"""Put a stand-in in the place of training and evaluation: jobs are then about scheduling alone, and quick.

Each piece of work notes itself in FAKE_LOG, waits until the file FAKE_GATE is there if one is named, and
fails where FAKE_FAILURE is in its name.
"""

import json
import os
import sys
import time
import types
from pathlib import Path


def note(name: str) -> None:
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(f"begin {name}\n")
    with Path(os.environ["FAKE_LOG"]).with_suffix(".threads").open("a") as log:
        log.write(os.environ.get("OMP_NUM_THREADS", "all") + "\n")
    while (gate := os.environ.get("FAKE_GATE")) and not Path(gate).exists():
        time.sleep(0.05)
    if (failure := os.environ.get("FAKE_FAILURE")) and failure in name:
        raise ValueError(f"{name} was told to fail")
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(f"end {name}\n")


def train(run, *, wait=False):
    stage = list(run.stages)[-1]
    note(run.name)
    metadata = {"key": run.name, "seconds": 1.0, "num_steps": 1, "last_loss": 1.0}
    for folder, name, text in (
        (run.folder / "model", "provenance.json", json.dumps({"stages": {stage: metadata}})),
        (run.folder / stage, "stage.json", json.dumps(metadata)),
        (run.folder / stage, "ledger.json", "[]"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return run.folder / "model"


def evaluate(chat, benchmark, data, output, *, model, **_):
    from tinyllava.evaluation.answers import write_predictions
    from tinyllava.evaluation.results import save_results

    note(f"{Path(model).parent.name}/{benchmark.name}")
    questions = benchmark.load(data)
    scored = benchmark.score(questions, {question.id: "yes" for question in questions})
    write_predictions(scored.predictions, output / benchmark.name / "predictions.jsonl")
    save_results([benchmark.result(questions, scored, model=model)], output / "results.json")


def stand_in(name: str, **values: object) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(values)
    sys.modules[name] = module


if "FAKE_LOG" in os.environ:
    stand_in("tinyllava.training")
    stand_in("tinyllava.training.run", train=train)
    stand_in("tinyllava.training.checkpoints", METADATA="stage.json", find_stage=lambda folder, key: folder)
    stand_in(
        "tinyllava.evaluation.run",
        Settings=dict,
        evaluate=evaluate,
        processes=lambda: types.SimpleNamespace(num_processes=1),
    )
    stand_in("tinyllava.inference.chat", Chat=types.SimpleNamespace(open=lambda *_, **__: None))
