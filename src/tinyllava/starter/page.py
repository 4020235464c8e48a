"""The starter's report as one HTML page: numbers with baselines, answers to browse, confusions, commands.

Paper: none; the form of Figure 9 (answered images) and of the tables, for the starter's own model. The page
needs no other file and no network; the same run gives the same bytes.
"""

import base64
import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from tinyllava.evaluation.benchmark import Prediction
from tinyllava.files import write_json
from tinyllava.starter.report import ReportTable, Shown

THUMBNAIL_PX = 128
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
    """What the page says about the run."""

    title: str
    facts: Mapping[str, str]
    """Small values for the head of the page, by their names."""
    commands: Mapping[str, str]
    """What to type next, by what it does."""


def confusion(predictions: Sequence[Prediction], truths: Mapping[str, str], kind: str) -> Confusion:
    """Count the parsed answers to the questions of a kind, by what is right.

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
    here = Path(__file__).parent
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FileSystemLoader(here),
    )
    page = environment.get_template("page.jinja").render(
        style=(here / "page.css").read_text(encoding="utf-8").strip(),
        run=run,
        table=table,
        answerers=list(next(iter(table.values()))),
        losses=_data_url("png", losses.read_bytes()),
        answers={kind: _answers(predictions, truths, images, kind) for kind in kinds},
        confusions=[confusion(predictions, truths, kind) for kind in kinds],
    )
    path.write_text(page + "\n", encoding="utf-8")
    return path


def write_examples(path: Path, shown: Sequence[Shown]) -> None:
    """Write images with their questions, for the page of ``tinyllava serve``."""
    kinds = {one.image: one.image.suffix.lower().replace(".jpg", ".jpeg")[1:] for one in shown}
    examples = [
        {"image": _data_url(kinds[one.image], one.image.read_bytes()), "question": one.question}
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
                "image": _thumbnail(images / one.image),
                "question": one.prompt,
                "answer": one.answer,
                "truth": truths[one.question_id],
                "is_right": is_right,
            }
            for one in list(chosen.values())[:NUM_SHOWN]
        ]
        shown[name] = {"cards": cards, "count": sum((one.score == 1) == is_right for one in asked)}
    return shown


def _thumbnail(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return _data_url("jpeg", buffer.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
