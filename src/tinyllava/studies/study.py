"""The files of a grid that its report is drawn from: cells, scores of questions, examples.

Paper: the runs behind Figures 4 to 8 and Tables 3 and A1. The files contain no details of the machine and no
date, so a committed folder gives the same report byte for byte.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tinyllava.errors import DataError
from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.results import Result, ResultTable, parse_result
from tinyllava.files import write_text

FORMAT_VERSION = 1
STATUSES = ("done", "failed", "missing")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage of one cell as it was trained, here or before (``reused``)."""

    name: str
    key: str
    """Hash of all that decides the stage; equal in the cells that share it."""
    seconds: float
    num_steps: int
    reused: bool = False
    num_trained_parameters: Mapping[str, int] = field(default_factory=dict)
    """By component (vision_encoder, connector, language_model), only what the stage moves."""
    losses: tuple[tuple[int, float], ...] = ()
    """(step, loss), thinned to at most 200 points."""


@dataclass(frozen=True, kw_only=True)
class StudyCell:
    """One model of a grid: a place on every axis, and a seed."""

    id: str
    panel: str
    """Title of the subplot that the cell stands in."""
    label: str
    """What the legend says; cells of one panel and label differ in the seed alone."""
    labels: Mapping[str, str]
    """Axis -> label, for all axes of the study."""
    seed: int = 0
    status: str = "missing"
    error: str = ""
    published: str = ""
    """Variant name (``base-C-TL``) whose published numbers are shown beside; "" for none."""
    results: tuple[Result, ...] = ()
    """One a benchmark, with the cell's id as ``model``."""
    stages: tuple[StageRecord, ...] = ()
    num_parameters: Mapping[str, int] = field(default_factory=dict)
    """By component, trained or not."""
    num_image_tokens: int = 0

    @property
    def seconds(self) -> float:
        """Seconds of training for the cell, including reused stages."""
        return sum(stage.seconds for stage in self.stages)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that the paper's text says of two sides of a comparison, in our own words.

    It is tested on every pair of cells of which one has the labels ``better``, the other ``worse``, and that
    agree in the seed and in all labels that neither names; or, with a ``rival``, on every cell with the
    labels ``better`` against the numbers that the paper prints of another group's model.
    """

    text: str
    source: str
    """Where the paper says it: ``section 4.2.1``."""
    better: Mapping[str, str]
    worse: Mapping[str, str] = field(default_factory=dict)
    rival: str = ""
    """Row of Table 3, as ``tinyllava.studies.published.other_name`` spells it, in the place of ``worse``."""
    margin: float = 0.0
    """Points by which the claimed side may be behind where all that is claimed is that it is comparable."""
    benchmark: str = ""
    """"" for each benchmark that was measured."""
    metric: str = ""
    """"" for the headline metric."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid and its results: the content of ``study.json``."""

    name: str
    title: str
    axes: Mapping[str, tuple[str, ...]]
    """Name of an axis (language_model, vision_encoder, connector, data, recipe, ...) -> its labels."""
    panels: tuple[str, ...]
    cells: tuple[StudyCell, ...]
    benchmarks: tuple[str, ...] = ()
    """Those that every cell is to be measured on."""
    paper: str = ""
    """The place in the paper that it follows: ``Figure 4``."""
    claims: tuple[Claim, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What the study shows and what it cannot show."""

    def __post_init__(self) -> None:
        ids = [cell.id for cell in self.cells]
        for cell in self.cells:
            self._check_cell(cell)
            if ids.count(cell.id) > 1:
                raise DataError(f"study {self.name!r}: two cells have the id {cell.id!r}; rename one.")
        self.table  # noqa: B018 - refuses columns that mix protocols, data sets or judges

    def _check_cell(self, cell: StudyCell) -> None:
        where = f"study {self.name!r}, cell {cell.id!r}"
        if cell.status not in STATUSES:
            raise DataError(f"{where}: field 'status' is {cell.status!r}; known: {', '.join(STATUSES)}.")
        if cell.panel not in self.panels:
            raise DataError(f"{where}: panel {cell.panel!r} is not in {list(self.panels)}; add it.")
        if set(cell.labels) != set(self.axes):
            raise DataError(
                f"{where}: labels for {sorted(cell.labels)}, but the axes are {sorted(self.axes)}; "
                "give one label per axis."
            )
        for axis, label in cell.labels.items():
            if label not in self.axes[axis]:
                raise DataError(f"{where}: label {label!r} is not on axis {axis!r}: {list(self.axes[axis])}.")
        for result in cell.results:
            if result.model != cell.id:
                raise DataError(
                    f"{where}: has a result of {result.model!r}, but a cell may only have its own."
                )

    @property
    def table(self) -> ResultTable:
        """All results, a row a cell."""
        return ResultTable(results=tuple(result for cell in self.cells for result in cell.results))

    def cell(self, id: str) -> StudyCell:
        """Return the cell of this id, which has to be there."""
        return next(cell for cell in self.cells if cell.id == id)


@dataclass(frozen=True, kw_only=True)
class BenchmarkScores:
    """The scores of every cell on every question of one benchmark, in columns, small enough to commit."""

    questions: tuple[str, ...]
    images: tuple[str, ...]
    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    texts: tuple[str, ...]
    """The parsed answers that occur; ``parsed`` points into it."""
    parsed: Mapping[str, tuple[int, ...]]
    """Cell -> index into ``texts`` for each question."""
    scores: Mapping[str, tuple[float | None, ...]]
    """Cell -> score in [0, 1] for each question."""

    def predictions(self, benchmark: str, cell: str) -> list[Prediction]:
        """Return one cell's predictions, without the raw answers."""
        columns = (
            self.questions,
            self.images,
            self.prompts,
            self.categories,
            self.groups,
            self.parsed[cell],
            self.scores[cell],
        )
        return [
            Prediction(
                benchmark=benchmark,
                question_id=key,
                image=image,
                prompt=prompt,
                answer="",
                parsed=self.texts[text],
                score=score,
                category=category,
                groups=tuple(groups),
            )
            for key, image, prompt, category, groups, text, score in zip(*columns, strict=True)
        ]


def pack_predictions(predictions: Mapping[str, Sequence[Prediction]]) -> BenchmarkScores:
    """Return the predictions of several cells on one benchmark as columns.

    Args:
        predictions: By cell id, all of the same questions.

    Raises:
        DataError: two cells answered different questions.
    """
    first_cell, first = next(iter(predictions.items()))
    ordered: dict[str, list[Prediction]] = {}
    for cell, answered in predictions.items():
        by_id = {one.question_id: one for one in answered}
        if by_id.keys() != {one.question_id for one in first}:
            raise DataError(
                f"cells {first_cell!r} and {cell!r} answered different questions of {first[0].benchmark}; "
                "evaluate both on the same data."
            )
        ordered[cell] = [by_id[one.question_id] for one in first]
    texts = sorted({one.parsed for answered in ordered.values() for one in answered})
    index = {text: number for number, text in enumerate(texts)}
    return BenchmarkScores(
        questions=tuple(one.question_id for one in first),
        images=tuple(one.image for one in first),
        prompts=tuple(one.prompt for one in first),
        categories=tuple(one.category for one in first),
        groups=tuple(one.groups for one in first),
        texts=tuple(texts),
        parsed={cell: tuple(index[one.parsed] for one in answered) for cell, answered in ordered.items()},
        scores={cell: tuple(one.score for one in answered) for cell, answered in ordered.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question that the report shows with its image and every cell's answer."""

    benchmark: str
    question_id: str
    category: str
    image: str
    """Path of a small JPEG file, relative to the study's folder; "" for a question without image."""
    prompt: str
    truth: str
    answers: Mapping[str, str]
    """Cell -> raw answer."""
    scores: Mapping[str, float | None]


def save_study(study: Study, folder: Path) -> None:
    """Write ``study.json``, whole or not at all."""
    _write(folder / "study.json", asdict(study))


def load_study(folder: Path) -> Study:
    """Read ``study.json``.

    Raises:
        DataError: the file is missing or does not follow the format, or mixes protocols in a column.
    """
    return _read(folder / "study.json", _parse_study)


def save_scores(scores: Mapping[str, BenchmarkScores], folder: Path) -> None:
    """Write ``scores.json``: by benchmark, the score of every cell on every question."""
    _write(folder / "scores.json", {"benchmarks": {name: asdict(one) for name, one in scores.items()}})


def load_scores(folder: Path) -> dict[str, BenchmarkScores]:
    """Read ``scores.json``; a folder without it has no scores.

    Raises:
        DataError: the file does not follow the format.
    """
    return _read(folder / "scores.json", _parse_scores) if (folder / "scores.json").exists() else {}


def save_examples(examples: Sequence[Example], folder: Path) -> None:
    """Write ``examples.json``. The caller writes the images next to it."""
    _write(folder / "examples.json", {"examples": [asdict(one) for one in examples]})


def load_examples(folder: Path) -> list[Example]:
    """Read ``examples.json``; a folder without it has no examples.

    Raises:
        DataError: the file does not follow the format.
    """
    return _read(folder / "examples.json", _parse_examples) if (folder / "examples.json").exists() else []


def _parse_study(values: dict[str, Any]) -> Study:
    return Study(
        **{
            **values,
            "axes": {axis: tuple(labels) for axis, labels in values["axes"].items()},
            "panels": tuple(values["panels"]),
            "benchmarks": tuple(values.get("benchmarks", ())),
            "cells": tuple(_parse_cell(cell) for cell in values["cells"]),
            "claims": tuple(Claim(**claim) for claim in values.get("claims", ())),
            "notes": tuple(values.get("notes", ())),
        }
    )


def _parse_cell(values: dict[str, Any]) -> StudyCell:
    stages = tuple(
        StageRecord(**{**stage, "losses": tuple((step, loss) for step, loss in stage.get("losses", ()))})
        for stage in values.get("stages", ())
    )
    results = tuple(parse_result(result) for result in values.get("results", ()))
    return StudyCell(**{**values, "stages": stages, "results": results})


def _parse_scores(values: dict[str, Any]) -> dict[str, BenchmarkScores]:
    return {name: _parse_columns(columns) for name, columns in values["benchmarks"].items()}


def _parse_columns(columns: dict[str, Any]) -> BenchmarkScores:
    changed: dict[str, Any] = {key: tuple(column) for key, column in columns.items()}
    changed["groups"] = tuple(tuple(groups) for groups in columns["groups"])
    for key in ("parsed", "scores"):
        changed[key] = {cell: tuple(column) for cell, column in columns[key].items()}
    return BenchmarkScores(**changed)


def _parse_examples(values: dict[str, Any]) -> list[Example]:
    return [Example(**example) for example in values["examples"]]


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON with a line for each field, and for each entry of a list."""
    dump = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    fields = []
    for name, value in {"version": FORMAT_VERSION, **values}.items():
        is_list = isinstance(value, list | tuple) and value
        text = "[\n" + ",\n".join(map(dump, value)) + "\n]" if is_list else dump(value)
        fields.append(f"{dump(name)}: {text}")
    write_text(path, "{\n" + ",\n".join(fields) + "\n}\n")


def _read(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Run `tinyllava reproduce` to write it.") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Write it again with `tinyllava reproduce`.") from None
    version = values.pop("version", None) if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {version!r}; this program reads version {FORMAT_VERSION}. Write it "
            "again with `tinyllava reproduce`."
        )
    try:
        return parse(values)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: does not follow the format of a study ({error}).") from None
