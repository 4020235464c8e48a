"""Collect finished nodes into the study that the report reads: results, losses, sizes, examples.

Paper: Figures 1 and 4 to 9, Tables 3 and A1.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from tinyllava.config import COMPONENTS
from tinyllava.data.images import open_image
from tinyllava.data.reporting import say
from tinyllava.errors import ImageError
from tinyllava.evaluation.answers import read_predictions
from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.benchmarks import find_benchmark
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.results import Result, load_results
from tinyllava.studies.graph import Graph, Node, SeededCell, read_once
from tinyllava.studies.grid import Grid
from tinyllava.studies.study import (
    Example,
    StageRecord,
    Study,
    StudyCell,
    pack_predictions,
    save_examples,
    save_scores,
    save_study,
)
from tinyllava.studies.work import State, load_state

NUM_EXAMPLES = 12
IMAGE_PX = 320
MOST_LOSSES = 200
_ENVIRONMENT = ("tinyllava", "python", "torch", "transformers", "system", "machine", "num_threads", "devices")


def write_study(grid: Grid, graph: Graph, folder: Path) -> Study:
    """Write study.json, scores.json, examples.json and the examples' images; return the study.

    Raises:
        DataError: cells answered different questions, or results mix protocols.
    """
    states = {id_: load_state(node) for id_, node in graph.nodes.items()}
    used: set[str] = set()
    cells = []
    for cell in graph.cells:
        cells.append(_study_cell(cell, graph, states, used))
        used.update(cell.stages)
    study = Study(
        name=grid.name,
        title=grid.title,
        paper=grid.paper,
        panels=grid.panels,
        cells=tuple(cells),
        axes=grid.axes,
        benchmarks=tuple(find_benchmark(name).name for name in grid.benchmarks),
        claims=grid.claims,
        environment=_environment(graph, states),
        notes=grid.notes,
    )
    save_study(study, folder)
    predictions = _predictions(graph, states)
    save_scores({name: pack_predictions(cells) for name, cells in predictions.items()}, folder)
    save_examples(_examples(grid, graph, predictions, folder), folder)
    return study


def _study_cell(cell: SeededCell, graph: Graph, states: Mapping[str, State], used: set[str]) -> StudyCell:
    done = [id_ for id_ in cell.stages if states[id_].status == "done"]
    failed = [id_ for id_ in cell.nodes if states[id_].status == "failed"]
    results = tuple(
        replace(result, model=cell.id, date="")
        for id_ in cell.evaluations
        for result in _results(graph.nodes[id_], states[id_])
    )
    status = "done" if len(results) == len(cell.evaluations) else "failed" if failed else "missing"
    ledger = _ledger(graph.nodes[done[-1]], states[done[-1]]) if done else []
    return StudyCell(
        id=cell.id,
        panel=cell.cell.panel,
        label=cell.cell.label,
        labels=cell.cell.labels,
        seed=cell.seed,
        status=status,
        error="; ".join(f"{id_}: {states[id_].error}" for id_ in failed),
        published=cell.cell.published,
        results=results,
        stages=tuple(_stage_record(graph.nodes[id_], states[id_], reused=id_ in used) for id_ in done),
        num_parameters=_count(ledger),
        num_image_tokens=_image_tokens(cell),
    )


def _results(node: Node, state: State) -> tuple[Result, ...]:
    return load_results(node.folder / "results.json") if state.status == "done" else ()


def stage_folder(node: Node, state: State) -> Path:
    """Return the folder of a finished stage."""
    return (node.folder / state.result).resolve()


def _stage_record(node: Node, state: State, *, reused: bool) -> StageRecord:
    folder = stage_folder(node, state)
    metadata = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    trained = [row for row in _ledger(node, state) if row["trained"]]
    return StageRecord(
        name=node.name,
        key=metadata["key"],
        seconds=metadata["seconds"],
        num_steps=metadata["num_steps"],
        reused=reused,
        losses=read_losses(folder / "metrics.jsonl"),
        num_trained_parameters={name: count for name, count in _count(trained).items() if count},
    )


def read_losses(path: Path) -> tuple[tuple[int, float], ...]:
    """Return (step, loss) of a stage, thinned evenly, the last step always among them."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps = [line for line in map(json.loads, lines) if "loss" in line]  # others are validations
    points = [(int(line["step"]), round(float(line["loss"]), 5)) for line in steps]
    every = -(-len(points) // MOST_LOSSES) if points else 1
    kept = points[every - 1 :: every]
    return tuple(kept if not points or kept[-1] == points[-1] else [*kept[: MOST_LOSSES - 1], points[-1]])


def _ledger(node: Node, state: State) -> list[dict[str, Any]]:
    return _read_ledger(stage_folder(node, state) / "ledger.json")


@read_once
def _read_ledger(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _count(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of parameters by component."""
    counts: dict[str, int] = dict.fromkeys(COMPONENTS, 0) if rows else {}
    for row in rows:
        size = 1
        for side in row["shape"]:
            size *= side
        counts[row["component"]] += size
    return counts


def _image_tokens(cell: SeededCell) -> int:
    from tinyllava.errors import TinyLlavaError
    from tinyllava.planning.plan import plan_parts

    try:
        return plan_parts(cell.cell.run).num_image_tokens
    except TinyLlavaError:
        return 0


def _environment(graph: Graph, states: Mapping[str, State]) -> dict[str, str]:
    """Return the environments of the runs; if they differ, each of the values."""
    found: dict[str, dict[str, None]] = {}
    for id_, node in graph.nodes.items():
        path = node.run.folder / "environment.json"
        if node.kind == "stage" and states[id_].status == "done" and path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            for name in _ENVIRONMENT:
                value = values.get(name, "")
                text = ", ".join(value) if isinstance(value, list) else str(value)
                found.setdefault(name, {})[text] = None
    return {name: " / ".join(texts) for name, texts in found.items()}


def _predictions(graph: Graph, states: Mapping[str, State]) -> dict[str, dict[str, list[Prediction]]]:
    """Return benchmark -> cell -> predictions, of the cells that were measured."""
    found: dict[str, dict[str, list[Prediction]]] = {}
    for cell in graph.cells:
        for id_ in cell.evaluations:
            node = graph.nodes[id_]
            if states[id_].status == "done":
                path = node.folder / node.name / "predictions.jsonl"
                found.setdefault(node.name, {})[cell.id] = read_predictions(path)
    return found


def _examples(
    grid: Grid, graph: Graph, predictions: Mapping[str, Mapping[str, list[Prediction]]], folder: Path
) -> list[Example]:
    """Return a fixed choice of questions with every cell's answer, and write their images."""
    share = max(1, NUM_EXAMPLES // max(1, len(predictions)))
    examples: list[Example] = []
    for name, cells in predictions.items():
        node = next(node for node in graph.nodes.values() if node.kind == "evaluation" and node.name == name)
        if not node.data or not Path(node.data).is_dir():
            say(f"{name}: its folder is missing, so the report shows no examples. Name it with --benchmarks.")
            continue
        questions = {one.id: one for one in node.benchmark.load(Path(node.data))}
        by_cell = {cell: {one.question_id: one for one in answered} for cell, answered in cells.items()}
        for one in choose_examples(next(iter(cells.values())), share):
            question = questions[one.question_id]
            answered = {cell: found[one.question_id] for cell, found in by_cell.items()}
            examples.append(
                Example(
                    benchmark=name,
                    question_id=one.question_id,
                    category=one.category,
                    image=_save_image(question, folder),
                    prompt=one.prompt,
                    truth=_text_of(question.target),
                    answers={cell: found.answer for cell, found in answered.items()},
                    scores={cell: found.score for cell, found in answered.items()},
                )
            )
    return examples


def choose_examples(predictions: list[Prediction], count: int) -> list[Prediction]:
    """Return as many of every category as of any other, each of another image, fixed by their ids."""
    ordered = sorted(predictions, key=lambda one: hashlib.sha256(one.question_id.encode()).hexdigest())
    categories = sorted({one.category for one in ordered})
    chosen: list[Prediction] = []
    seen: set[str] = set()
    for number in range(count):
        category = categories[number % len(categories)] if categories else ""
        fresh = (one for one in ordered if one.category == category and one.cluster not in seen)
        if (one := next(fresh, None)) is not None:
            chosen.append(one)
            seen.add(one.cluster)
    return chosen


def _save_image(question: Question, folder: Path) -> str:
    images = [ref for message in question.conversation.messages for ref in message.images]
    if not images:
        return ""
    name = f"images/{hashlib.sha256(question.id.encode()).hexdigest()[:12]}.jpg"
    try:
        image = open_image(images[0])
    except ImageError:  # the evaluation has named it, and counts its questions as not answered
        return ""
    image.thumbnail((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, quality=85)
    return name


def _text_of(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, (list, tuple)) and target and all(isinstance(one, str) for one in target):
        words: list[str] = list(target)
        return max(sorted(set(words)), key=words.count)
    return json.dumps(target, ensure_ascii=False, default=str)[:200]
