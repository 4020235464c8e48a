"""A small study as a grid leaves it: two panels, two recipes, two seeds, one cell failed and one not run.

``python tests/studies/studies.py`` writes ``tests/studies/study`` anew, and both committed reports.
"""

import random
import shutil
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from tinyllava.evaluation.benchmark import Benchmark, Prediction
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.metrics.statistics import estimate
from tinyllava.evaluation.results import Metric, Result
from tinyllava.studies.paper import CLAIMS
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

FOLDER = Path(__file__).parent / "study"
MEASURED = Path(__file__).parents[2] / "docs" / "starter-grid"
"""What ``tinyllava reproduce starter`` measured."""
OBJECTS = ("dining table", "cat", "snowboard", "umbrella", "traffic light", "orange")
SKILL = {
    ("TinyLlama", "base"): 0.70,
    ("TinyLlama", "share"): 0.86,
    ("Phi-2", "base"): 0.84,
    ("Phi-2", "share"): 0.86,
}
PUBLISHED = {("TinyLlama", "share"): "share-C-TL", ("Phi-2", "share"): "share-C-Phi"}
TRAINED = {
    "base": {"pretrain": {"connector": 6_300_000}},
    "share": {
        "pretrain": {"connector": 6_300_000, "language_model": 1_100_000_000, "vision_encoder": 150_000_000}
    },
}


def pope_predictions(skill: float, bias: float, seed: str, num_images: int = 10) -> list[Prediction]:
    """Answer three splits with this chance to see what is there; ``bias`` turns a no into a yes."""
    draw, found = random.Random(seed), []
    for number, split in enumerate(("adversarial", "popular", "random")):
        for image in range(num_images):
            for place, name in enumerate(OBJECTS[:4]):
                truth = "yes" if place % 2 else "no"
                answer = truth if draw.random() < skill else {"yes": "no", "no": "yes"}[truth]
                answer = "yes" if draw.random() < bias else answer
                article = "an" if name[0] in "aeiou" else "a"
                found.append(
                    Prediction(
                        benchmark="pope",
                        question_id=f"{number}{image:02}{place}",
                        image=f"{image}.jpg",
                        answer=answer,
                        parsed=answer,
                        category=split,
                        prompt=f"Is there {article} {name} in the image?\nAnswer with one word.",
                        score=float(answer == truth),
                        groups=(f"label={truth}",),
                    )
                )
    return found


def gqa_predictions(skill: float, seed: str) -> list[Prediction]:
    draw = random.Random(seed)
    scores = [float(draw.random() < skill - 0.2) for _ in range(80)]
    return [
        Prediction(
            benchmark="gqa",
            question_id=f"g{i}",
            image=f"{i // 4}.jpg",
            prompt=f"What is {i}?",
            answer="",
            parsed="it",
            score=score,
        )
        for i, score in enumerate(scores)
    ]


def as_result(benchmark: Benchmark, predictions: list[Prediction], model: str) -> Result:
    metrics = tuple(_rounded(estimate(*item)) for item in benchmark.summarise(predictions).items())
    return Result(
        benchmark=benchmark.name,
        protocol=benchmark.protocol,
        split=benchmark.split,
        model=model,
        metric=benchmark.metric,
        metrics=metrics,
        num_questions=len(predictions),
        num_images=10,
        num_expected=len(predictions),
        date="2026-01-01T00:00:00+00:00",
    )


def _rounded(metric: Metric) -> Metric:
    """The last digits differ from processor to processor."""
    low, high = metric.interval or (0.0, 0.0)
    return replace(
        metric,
        value=round(metric.value, 6),
        standard_error=round(metric.standard_error or 0, 6),
        interval=(round(low, 6), round(high, 6)),
    )


def make_cell(language: str, recipe: str, seed: int) -> tuple[StudyCell, dict[str, list[Prediction]]]:
    key = f"{recipe}-C-{language}-seed{seed}"
    skill = SKILL[language, recipe]
    answers = {
        "pope": pope_predictions(skill, 0.25 if (language, recipe) == ("Phi-2", "share") else 0.05, key),
        "gqa": gqa_predictions(skill, key),
    }
    losses = tuple((step, round(0.9 + 3.0 / (1 + step / 12) + 0.05 * seed, 4)) for step in range(1, 120, 3))
    stages = (
        StageRecord(
            name="pretrain",
            key=f"p-{language}-{recipe}-{seed}",
            seconds=61.0 + seed,
            num_steps=120,
            num_trained_parameters=TRAINED[recipe]["pretrain"],
            losses=losses,
        ),
        StageRecord(
            name="finetune",
            key=f"f-{key}",
            seconds=121.5,
            num_steps=90,
            num_trained_parameters={"connector": 6_300_000, "language_model": 1_100_000_000},
            losses=tuple((step, loss / 2) for step, loss in losses),
        ),
    )
    cell = StudyCell(
        id=key,
        panel=language,
        label=recipe,
        labels={"language_model": language, "recipe": recipe},
        seed=seed,
        status="done",
        results=tuple(as_result(BENCHMARKS[name], given, key) for name, given in answers.items()),
        published=PUBLISHED.get((language, recipe), ""),
        stages=stages,
        num_image_tokens=576,
        num_parameters={"vision_encoder": 303_000_000, "connector": 6_300_000, "language_model": 11 * 10**8},
    )
    return cell, answers


def make_study() -> tuple[Study, dict[str, dict[str, list[Prediction]]]]:
    """Return the study, and by benchmark and cell the predictions."""
    cells, answers = [], {"pope": {}, "gqa": {}}
    for language in ("TinyLlama", "Phi-2"):
        for recipe in ("base", "share"):
            for seed in (0, 1):
                cell, given = make_cell(language, recipe, seed)
                if (language, recipe, seed) == ("TinyLlama", "share", 1):
                    empty = {"status": "failed", "error": "loss is not a number <at step 41>"}
                    cell = replace(cell, results=(), stages=(), **empty)
                else:
                    for name, predictions in given.items():
                        answers[name][cell.id] = predictions
                cells.append(cell)
    unrun = make_cell("Phi-2", "base", 0)[0]
    unrun = replace(
        unrun,
        id="share-C-StableLM-2-seed0",
        panel="StableLM-2",
        label="share",
        status="missing",
        results=(),
        stages=(),
        labels={"language_model": "StableLM-2", "recipe": "share"},
        published="share-C-SLM",
    )
    study = Study(
        name="figure-8",
        title="Training recipes on toy answers",
        paper="Figure 8",
        axes={"language_model": ("TinyLlama", "StableLM-2", "Phi-2"), "recipe": ("base", "share")},
        panels=("TinyLlama", "StableLM-2", "Phi-2"),
        cells=(*cells, unrun),
        claims=CLAIMS["figure-8"],
        environment={"python": "3.11", "torch": "2.13.0"},
        notes=("Drawn answers, to test the report; no model was trained.",),
    )
    return study, answers


def write_study(folder: Path) -> Path:
    study, answers = make_study()
    save_study(study, folder)
    save_scores({name: pack_predictions(by_cell) for name, by_cell in answers.items()}, folder)
    (folder / "images").mkdir(exist_ok=True)
    colours = ("#c0392b", "#2e86ab", "#7fb069")
    for number, colour in enumerate(colours):
        image = Image.new("RGB", (160, 120), "#f2efe6")
        ImageDraw.Draw(image).ellipse((40, 20, 120, 100), fill=colour)
        image.save(folder / "images" / f"{number}.jpg", quality=85)
    asked = answers["pope"]
    first = next(iter(asked.values()))
    save_examples(
        [
            Example(
                benchmark="pope",
                question_id=first[i].question_id,
                category=first[i].category,
                image=f"images/{number}.jpg",
                prompt=first[i].prompt,
                truth="yes" if "label=yes" in first[i].groups else "no",
                answers={cell: given[i].answer for cell, given in asked.items()},
                scores={cell: given[i].score for cell, given in asked.items()},
            )
            for number, i in enumerate((0, 5, 10))
        ],
        folder,
    )
    return folder


if __name__ == "__main__":
    from tinyllava.studies.report.page import write_report

    write_report(write_study(FOLDER))
    shutil.rmtree(FOLDER / "figures")  # they are in the page too
    write_report(MEASURED)
    for figure in (MEASURED / "figures").iterdir():
        if not figure.name.startswith("bars") or figure.suffix == ".svg":  # what the guide does not show
            figure.unlink()
