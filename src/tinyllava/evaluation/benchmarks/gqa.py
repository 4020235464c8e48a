"""GQA: compositional questions about Visual Genome images, one gold answer each (testdev_balanced).

Paper: appendix A; the column GQA of Tables 3 and A1.
Differs: the official validity, plausibility and consistency are left out, because they need files that the
release does not contain.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tinyllava.conversation import ImageRef
from tinyllava.evaluation.benchmark import Benchmark, Grade, Prediction, write_export
from tinyllava.evaluation.metrics.choices import NO, YES, says_yes_or_no
from tinyllava.evaluation.question import (
    SHORT,
    Question,
    QuestionList,
    find_source,
    no_source,
    read_llava_prompts,
)
from tinyllava.evaluation.read import (
    ImageFiles,
    NeededFile,
    Record,
    find_parquet,
    read_entries,
    read_list,
    read_parquet,
    unpack_image,
)
from tinyllava.evaluation.results import Metric

PROMPT = "{question}\n" + SHORT
GOLD = "testdev_balanced_questions.json"
LLAVA = "llava_gqa_testdev_balanced.jsonl"
SITE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
_NO_STEP = ("exist", "query: name", "choose name")


def load(folder: Path) -> list[Question]:
    """Read the gold file, with LLaVA's prompts where its question file is there, or the parquet configs."""
    questions = QuestionList()
    prompts: dict[str, str] = {}
    if (folder / LLAVA).exists():
        prompts = {record.text("question_id"): text for record, text in read_llava_prompts(folder / LLAVA)}
    source = folder / GOLD
    for question_id, record, image in _read_records(folder):
        if record.values.get("isBalanced") is False:
            continue  # the official accuracy leaves these out
        types = record.part("types")
        text = prompts.get(question_id) or PROMPT.format(question=record.text("question"))
        structural = types.text("structural")
        groups = (
            f"answer_type={'open' if structural == 'query' else 'binary'}",
            f"structural={structural}",
            f"semantic={types.text('semantic')}",
            f"steps={_count_steps(record)}",
            f"words={len(record.text('question').split())}",
        )
        meta = {"group": record.part("groups").values.get("global")}
        answer = record.text("answer")
        questions.add(record, id=question_id, text=text, image=image, target=answer, groups=groups, meta=meta)
    return questions.finish(source)


def _read_records(folder: Path) -> Iterator[tuple[str, Record, ImageRef]]:
    gold = find_source(folder, GOLD, f"data/{GOLD}")  # the second in LLaVA's layout
    if gold is not None:
        images = ImageFiles(gold.parent / "images")
        for question_id, record in read_entries(gold).items():
            yield question_id, record, images[f"{record.text('imageId')}.jpg"]
        return
    shards = find_parquet(folder, "testdev")
    if not shards:
        raise no_source(folder, "gqa", GOLD, "parquet shards (testdev_balanced_instructions and _images)")
    refs: dict[str, ImageRef] = {}
    for record in read_parquet([path for path in shards if "images" in str(path.relative_to(folder))]):
        name = f"{record.text('id')}.jpg"
        refs[record.text("id")] = unpack_image(record, "image", folder, name)
    for record in read_parquet([path for path in shards if "images" not in str(path.relative_to(folder))]):
        if record.text("imageId") not in refs:
            record.fail(f"no image {record.text('imageId')!r} among the shards of the config _images.")
        yield record.text("id"), record, refs[record.text("imageId")]


def _count_steps(record: Record) -> int:
    """Return the reasoning steps as the official tool counts them: without the closing look-up of a name."""
    steps = [
        f"{step.text('operation')}: {step.text('argument')}"
        for step in read_list(record, "semantic", "operation")
    ]
    return sum(not any(mark in step for mark in _NO_STEP) for step in steps)


def post_process(answer: str) -> str:
    """Drop trailing periods and lower the case, as LLaVA's converter does."""
    return answer.rstrip(".").lower()


def grade(question: Question, answer: str) -> Grade:
    """Compare to the letter after post-processing."""
    parsed = post_process(answer)
    is_clear = question.target not in (YES, NO) or says_yes_or_no(parsed)
    return Grade(parsed, float(parsed == question.target), is_clear)


def measure_distribution(
    questions: Sequence[Question], predictions: Sequence[Prediction]
) -> tuple[Metric, ...]:
    """Return the official distance of predicted from gold answers; lower is better.

    The chi-square of each group, weighted by its questions, over 100: the official tool divides, and prints
    the quotient without a percent sign.
    """
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for question, prediction in zip(questions, predictions, strict=True):
        group = question.meta["group"]
        if group is not None:
            gold[group][question.target] += 1
            predicted[group][prediction.parsed] += 1
    total, weighted = 0, 0.0
    for group, counts in gold.items():
        distance = sum((predicted[group][answer] - num) ** 2 / num for answer, num in counts.items())
        weighted += distance * counts.total()
        total += counts.total()
    return (Metric(name="distribution", value=weighted / total / 100, num_questions=total),) if total else ()


def export_predictions(
    questions: Sequence[Question], answers: Mapping[str, str], folder: Path, out: Path
) -> Sequence[Path]:
    """Write the file that the official eval.py reads; questions without an answer get an empty one."""
    entries = [{"questionId": q.id, "prediction": post_process(answers.get(q.id, ""))} for q in questions]
    return write_export(out / "testdev_balanced_predictions.json", json.dumps(entries))


BENCHMARK = Benchmark(
    name="gqa",
    title="GQA",
    protocol="gqa/llava-1.5",
    split="testdev_balanced",
    metric="accuracy",
    num_questions=12_578,
    prompt=PROMPT,
    load=load,
    grade=grade,
    unclear="empty, or neither yes nor no to a yes/no question",
    details=measure_distribution,
    export=export_predictions,
    files=(
        NeededFile(
            names=(GOLD, f"data/{GOLD}", "**/testdev*.parquet"),
            purpose="12,578 questions with answers and types",
            source=SITE,
            licence="CC BY 4.0 (as its mirrors state)",
        ),
        NeededFile(
            names=("images", "data/images", "**/*images*/testdev*.parquet"),
            purpose="398 images (n161313.jpg and so on, out of images.zip)",
            num_files=398,
            source=SITE,
            licence="not stated",
        ),
        NeededFile(
            names=(LLAVA,),
            purpose="LLaVA's prompts (otherwise made by the same rule)",
            source="LLaVA's eval.zip (docs/Evaluation.md of the LLaVA repository)",
            licence="not stated",
            is_optional=True,
        ),
    ),
)
