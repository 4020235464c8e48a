"""POPE: is there an object of this kind in the image? Three splits of questions on COCO val2014.

Paper: appendix A. The paper says "POPE accuracy", but its numbers follow LLaVA's script: the mean F1 of the
adversarial, popular and random splits, at the pinned release with 2,910 random questions.
Differs: answers and labels are joined by id, not by order. ``pope-pooled`` is lmms-eval's protocol: 9,000
questions in one pool, exact match. Here ``yes_ratio`` is the share of yes among the answers, as in POPE's own
tool. In lmms-eval it is the share among the labels.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tinyllava.conversation import ImageRef
from tinyllava.evaluation.benchmark import Benchmark, Grade, Prediction, Summary, mean_of, write_export
from tinyllava.evaluation.metrics.choices import NO, OTHER, YES, parse_exact, parse_pope, says_yes_or_no
from tinyllava.evaluation.metrics.statistics import Ratio
from tinyllava.evaluation.question import SHORT, Question, QuestionList, no_source
from tinyllava.evaluation.read import (
    ImageFiles,
    NeededFile,
    Record,
    find_parquet,
    read_lines,
    read_parquet,
    unpack_image,
)
from tinyllava.evaluation.results import Metric

PROMPT = "{question}\n" + SHORT
FIRST_ID = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
NUM_PINNED_RANDOM = 2_910
PINNED = "commit e3e3926 of https://github.com/AoiDragon/POPE (output/coco)"


def load(folder: Path, *, is_pinned: bool) -> list[Question]:
    """Read the three files (in the folder or in ``coco/``), or the parquet mirror; ids are LLaVA's."""
    questions = QuestionList()
    num_random = 0
    for split, record, image in _read_records(folder):
        if split not in FIRST_ID:
            record.fail(f"field 'category' is {split!r}; it must be one of {', '.join(FIRST_ID)}.")
        num_random += split == "random"
        if is_pinned and num_random > NUM_PINNED_RANDOM:
            record.fail(
                f"the random split has more than the {NUM_PINNED_RANDOM:,} questions of the release that "
                "published numbers use.",
                f"Use the files of {PINNED}, or evaluate pope-pooled.",
            )
        label = record.one_of("label" if "label" in record.values else "answer", YES, NO)
        text = record.text("text" if "text" in record.values else "question")
        questions.add(
            record,
            id=str(FIRST_ID[split] + record.integer("question_id")),
            text=PROMPT.format(question=text),
            image=image,
            target=label,
            category=split,
            groups=(f"label={label}",),
        )
    return questions.finish(folder)


def _read_records(folder: Path) -> Iterator[tuple[str, Record, ImageRef]]:
    names = {split: f"coco_pope_{split}.json" for split in FIRST_ID}
    root = folder / "coco" if (folder / "coco").is_dir() else folder
    is_official = any((root / name).exists() for name in names.values())
    shards = find_parquet(folder, "")
    if shards and not is_official:
        for record in read_parquet(shards):
            name = f"{record.text('image_source')}.jpg"
            yield record.text("category").lower(), record, unpack_image(record, "image", folder, name)
        return
    if not is_official:
        raise no_source(folder, "pope", *names.values(), "parquet shards")
    images = ImageFiles(folder / "val2014")
    for split, name in names.items():
        for record in read_lines(root / name):
            yield split, record, images[record.text("image")]


def grade(question: Question, answer: str) -> Grade:
    """Compare yes or no. An unclear answer counts as yes."""
    parsed = parse_pope(answer)
    return Grade(parsed, float(parsed == question.target), says_yes_or_no(answer))


def grade_exact(question: Question, answer: str) -> Grade:
    """Compare the whole answer in lower case; an empty one is neither yes nor no, and not a missing one."""
    parsed = parse_exact(answer) or OTHER
    return Grade(parsed, float(parsed == question.target), parsed in (YES, NO))


def summarise(predictions: Sequence[Prediction]) -> Summary:
    """Return the mean F1 of the splits, the accuracy over all, and the five numbers of each split."""
    splits = [split for split in FIRST_ID if any(p.category == split for p in predictions)]
    by_split = {split: _rates([p for p in predictions if p.category == split]) for split in splits}
    headline = [replace(by_split[split]["f1"], weight=100 / len(splits)) for split in splits]
    each = {f"{split} {name}": [rate] for split in splits for name, rate in by_split[split].items()}
    return {"f1": headline, "accuracy": [mean_of(predictions)], **each}


def count_outcomes(questions: Sequence[Question], predictions: Sequence[Prediction]) -> list[Metric]:
    """Return the four counts of each split that the official tool prints, yes being positive.

    A missing answer is a false one of its label.
    """
    metrics: list[Metric] = []
    for split in FIRST_ID:
        chosen = [p for p in predictions if p.category == split]
        counts = dict.fromkeys(("TP", "FP", "TN", "FN"), 0) if chosen else {}
        for prediction in chosen:
            kind = "P" if ("label=yes" in prediction.groups) == bool(prediction.score) else "N"
            counts[f"{'T' if prediction.score else 'F'}{kind}"] += 1
        metrics += [
            Metric(name=f"{split} {kind}", value=num, num_questions=len(chosen))
            for kind, num in counts.items()
        ]
    return metrics


def export_answers(
    questions: Sequence[Question], answers: Mapping[str, str], folder: Path, out: Path
) -> Sequence[Path]:
    """Write for each split the lines that the official evaluate.py reads: question and answer, in order."""
    written: list[Path] = []
    for split in dict.fromkeys(question.category for question in questions):
        lines = [
            {"question": q.prompt.removesuffix("\n" + SHORT), "answer": answers.get(q.id, "")}
            for q in questions
            if q.category == split
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        written += write_export(out / f"coco_pope_{split}_answers.json", text)
    return written


def summarise_pooled(predictions: Sequence[Prediction]) -> Summary:
    """Return the five numbers over all questions in one pool."""
    return {name: [rate] for name, rate in _rates(predictions).items()}


def _rates(predictions: Sequence[Prediction]) -> dict[str, Ratio]:
    """Return F1, accuracy, precision, recall and the share of yes among the predictions.

    A missing answer is a false one of its label, and no yes.
    """
    clusters = [p.cluster for p in predictions]
    is_yes = ["label=yes" in p.groups for p in predictions]
    hit = [float(truth and p.parsed == YES) for p, truth in zip(predictions, is_yes, strict=True)]
    false_yes = [
        float(not truth and p.parsed in (YES, "")) for p, truth in zip(predictions, is_yes, strict=True)
    ]
    false_no = [float(truth and p.parsed in (NO, "")) for p, truth in zip(predictions, is_yes, strict=True)]

    def ratio(numerators: list[float], *rest: list[float]) -> Ratio:
        bottom = [sum(parts) for parts in zip(numerators, *rest, strict=True)]
        return Ratio(numerators=numerators, denominators=bottom, clusters=clusters)

    doubled = [2 * one for one in hit]
    return {
        "f1": ratio(doubled, false_yes, false_no),
        "accuracy": mean_of(predictions),
        "precision": ratio(hit, false_yes),
        "recall": ratio(hit, false_no),
        "yes_ratio": Ratio(numerators=[float(p.parsed == YES) for p in predictions], clusters=clusters),
    }


_FILES = (
    *(
        NeededFile(
            names=(f"coco_pope_{split}.json", f"coco/coco_pope_{split}.json"),
            purpose=f"{num:,} questions, split {split}",
            source=PINNED,
            licence="MIT (of the repository)",
            size=f"{num_bytes:,} bytes",
            known_md5={md5: "the pinned release"},
        )
        for split, num, num_bytes, md5 in (
            ("adversarial", 3_000, 370_459, "b3f9df71709d436462611d7e88ce1447"),
            ("popular", 3_000, 370_234, "8233e15e9bb7587b03a624b38a1cee74"),
            ("random", NUM_PINNED_RANDOM, 360_212, "b635b20061b1262cba65ed5bef7660a2"),
        )
    ),
    NeededFile(
        names=("val2014",),
        purpose="500 images of COCO val2014",
        source="https://cocodataset.org",
        licence="Flickr terms of use",
        num_files=500,
    ),
)

BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    protocol="pope/mean-f1/llava-1.5",
    split="adversarial + popular + random (2,910)",
    metric="f1",
    num_questions=8_910,
    prompt=PROMPT,
    has_number_ids=True,
    load=partial(load, is_pinned=True),
    grade=grade,
    unclear="neither yes nor no; counted as yes",
    summarise=summarise,
    details=count_outcomes,
    export=export_answers,
    files=_FILES,
    notes=("f1 is the mean F1 of the three splits; accuracy is printed beside it",),
)

POOLED = replace(
    BENCHMARK,
    name="pope-pooled",
    title="POPE (pooled)",
    protocol="pope/pooled-exact/lmms-eval",
    split="adversarial + popular + random (3,000)",
    metric="accuracy",
    num_questions=9_000,
    load=partial(load, is_pinned=False),
    grade=grade_exact,
    unclear="neither yes nor no",
    summarise=summarise_pooled,
    details=None,
    files=(
        NeededFile(
            names=("**/*.parquet", "coco_pope_random.json", "coco/coco_pope_random.json"),
            purpose="9,000 questions, with images in parquet",
            source="the data set lmms-lab/POPE, or https://github.com/AoiDragon/POPE",
            licence="MIT (of the repository); Flickr terms of use (images)",
        ),
    ),
    notes=(
        "exact match of yes or no over one pool; not comparable with POPE",
        "yes_ratio is the share of yes among the answers; lmms-eval prints that of the labels",
    ),
)
