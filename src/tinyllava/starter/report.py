"""The starter's report: results, loss curves, a sheet of answered images, and an HTML page with all of it.

Paper: none; the form of Figure 9 (answered images) and of the tables, for the starter's own model. The page
needs no other file and no network. The same run gives the same bytes.
"""

import random
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from tinyllava.conversation import ImageRef
from tinyllava.data.images import thumbnail_url
from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.results import Metric, Result
from tinyllava.files import data_url, page_environment, whole_objects, write_json, write_text


class Cell(TypedDict):
    """One number of the report: accuracy in [0, 1], its 95% interval, the number of questions."""

    accuracy: float
    interval: tuple[float, float]
    count: int


ReportTable = dict[str, dict[str, Cell]]
"""Kind of question -> who answered -> number."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One image of the contact sheet."""

    image: Path
    question: str
    answer: str
    truth: str
    is_right: bool


def results_table(results: Mapping[str, Result]) -> ReportTable:
    """Return the numbers of all answerers, overall and for each kind of question.

    Args:
        results: by answerer (model, majority, blanked), of the starter's benchmark.
    """
    first = next(iter(results.values()))
    kinds = [metric.name for metric in first.metrics if metric.name.startswith("kind=")]
    table: ReportTable = {}
    for name in ["accuracy", *kinds]:
        label = name.removeprefix("kind=") if name != "accuracy" else "overall"
        table[label] = {who: _cell(result.metric_named(name)) for who, result in results.items()}
    return table


def _cell(metric: Metric) -> Cell:
    low, high = metric.interval or (metric.value, metric.value)
    return {
        "accuracy": round(metric.value / 100, 4),
        "interval": (round(low / 100, 4), round(high / 100, 4)),
        "count": metric.num_questions,
    }


def draw_losses(metrics: Mapping[str, Path], path: Path) -> None:
    """Draw the loss of each stage over its steps, with a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (stage, file) in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True
    ):
        lines = [line for line in whole_objects(file) if {"step", "loss"} <= line.keys()]
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        axes.plot(steps, losses, color="0.75", linewidth=0.8)
        axes.plot(steps, _running_mean(losses, max(1, len(losses) // 20)), color="tab:blue")
        axes.set(title=stage, xlabel="optimizer step", ylabel="loss (nats per supervised token)")
        axes.set_ylim(0, min(max(losses, default=8), 8))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    return [
        sum(values[max(0, i - window) : i + 1]) / len(values[max(0, i - window) : i + 1])
        for i in range(len(values))
    ]


def draw_sheet(
    shown: Sequence[Shown], path: Path, columns: int = 6, *, dpi: int = 110, num_colours: int = 0
) -> None:
    """Draw images in a grid, below each the question, the model's answer and the truth.

    Args:
        num_colours: of a palette, which makes a small file; 0 keeps all colours.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = -(-len(shown) // columns)
    layout = ConstrainedLayoutEngine(h_pad=0.12)  # room for a title and an answer of two lines
    figure = Figure(figsize=(columns * 2.3, rows * 3.1), layout=layout)
    for axes, one in zip(
        figure.subplots(rows, columns, squeeze=False).flat,
        [*shown, *[None] * (rows * columns - len(shown))],
        strict=True,
    ):
        axes.set_axis_off()
        if one is None:
            continue
        axes.imshow(Image.open(one.image).convert("RGB"))
        below = (one.answer or "(nothing)") + ("" if one.is_right else f"  (truth: {one.truth})")
        axes.set_title(_wrap(one.question), fontsize=8)
        axes.text(
            0.5,
            -0.04,
            _wrap(below),
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color="darkgreen" if one.is_right else "crimson",
        )
    figure.savefig(path, dpi=dpi)
    if num_colours:
        with Image.open(path) as image:
            image.convert("RGB").quantize(num_colours).save(path, optimize=True)


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


def choose_strip(
    predictions: Sequence[Prediction], truths: dict[str, str], images: Path, count: int = 6
) -> list[Shown]:
    """Take a row for a first look: one right answer of each kind, and one wrong one at its end."""
    shown = choose_shown(predictions, truths, images, count=len(predictions))
    right = [one for one in shown if one.is_right]
    wrong = [one for one in shown if not one.is_right]
    return [*right[: count - 1], *wrong[:1]]


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 34))


NUM_SHOWN = 8
"""Right answers, and as many wrong ones, that the page shows of each kind."""
OTHER = "(other)"


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often each right answer got each answer; ``counts[truth][answer]``."""

    kind: str
    truths: tuple[str, ...]
    answers: tuple[str, ...]
    """The truths, and behind them ``OTHER`` where something else was said."""
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts about the run that the page shows."""

    title: str
    facts: Mapping[str, str]
    """Small values for the head of the page, by their names."""
    commands: Mapping[str, str]
    """What to type next, by what it does."""


def confusion(predictions: Sequence[Prediction], truths: Mapping[str, str], kind: str) -> Confusion:
    """Count the parsed answers to the questions of a kind by their right answers.

    Args:
        truths: right answer of each question, by its id.
    """
    asked = [prediction for prediction in predictions if prediction.category == kind]
    counts = Counter((truths[one.question_id].lower(), one.parsed.lower()) for one in asked)
    rows = tuple(sorted({truth for truth, _ in counts}))
    others = Counter(truth for (truth, answer), n in counts.items() for _ in range(n) if answer not in rows)
    table = [[counts[truth, answer] for answer in rows] for truth in rows]
    if others:
        table = [[*row, others[truth]] for row, truth in zip(table, rows, strict=True)]
    return Confusion(
        kind=kind, truths=rows, answers=(*rows, OTHER) if others else rows, counts=tuple(map(tuple, table))
    )


def write_page(
    path: Path,
    run: RunFacts,
    table: ReportTable,
    predictions: Sequence[Prediction],
    truths: Mapping[str, str],
    images: Path,
    losses: Path,
) -> Path:
    """Write the page.

    Args:
        predictions: the model's scored answers.
        truths: right answer of each question, by its id.
        images: folder that the predictions' image paths start from.
        losses: the drawn loss curves, a PNG.
    """
    kinds = [kind for kind in table if kind != "overall"]
    environment = page_environment(Path(__file__).parent)
    page = environment.get_template("page.jinja").render(
        run=run,
        table=table,
        answerers=list(next(iter(table.values()))),
        losses=data_url(losses.read_bytes(), "image/png"),
        answers={kind: _answers(predictions, truths, images, kind) for kind in kinds},
        confusions=[confusion(predictions, truths, kind) for kind in kinds],
    )
    write_text(path, page + "\n")
    return path


def write_examples(path: Path, shown: Sequence[Shown]) -> None:
    """Write images with their questions, for the page of ``tinyllava serve``."""
    kinds = {one.image: one.image.suffix.lower().replace(".jpg", ".jpeg")[1:] for one in shown}
    examples = [
        {"image": data_url(one.image.read_bytes(), f"image/{kinds[one.image]}"), "question": one.question}
        for one in shown
    ]
    write_json(path, examples)


def _answers(
    predictions: Sequence[Prediction], truths: Mapping[str, str], images: Path, kind: str
) -> dict[str, Any]:
    """Return the counts of a kind and a fixed random choice of right and wrong answers, each image once."""
    asked = [prediction for prediction in predictions if prediction.category == kind]
    mixed = random.Random(0).sample(asked, len(asked))
    shown: dict[str, Any] = {}
    for name, is_right in (("wrong", False), ("right", True)):
        chosen = {one.image: one for one in mixed if (one.score == 1) == is_right}
        cards = [
            {
                "image": thumbnail_url(ImageRef(path=images / one.image)),
                "question": one.prompt,
                "answer": one.answer,
                "truth": truths[one.question_id],
                "is_right": is_right,
            }
            for one in list(chosen.values())[:NUM_SHOWN]
        ]
        shown[name] = {"cards": cards, "count": sum((one.score == 1) == is_right for one in asked)}
    return shown
