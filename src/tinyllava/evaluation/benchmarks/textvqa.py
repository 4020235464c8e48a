"""TextVQA: questions about text in images, ten human answers each (val 0.5.1).

Paper: appendix A; the column VQA-T of Tables 3 and A1, asked with the line of OCR tokens that LLaVA-1.5 adds.
Differs: ``textvqa-no-ocr`` is a second protocol without that line. Its scores are several points lower.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from tinyllava.conversation import ImageRef
from tinyllava.evaluation.benchmark import Benchmark, Grade
from tinyllava.evaluation.metrics.vqa import NUM_ANNOTATORS, grade_textvqa
from tinyllava.evaluation.question import SHORT, Question, QuestionList, no_source, read_llava_prompts
from tinyllava.evaluation.read import (
    ImageFiles,
    NeededFile,
    Record,
    find_parquet,
    read_json,
    read_list,
    read_parquet,
    unpack_image,
)

PROMPT = "{question}\nReference OCR token: {ocr}\n" + SHORT
PROMPT_WITHOUT_OCR = "{question}\n" + SHORT
GOLD = "TextVQA_0.5.1_val.json"
LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
ROSETTA = "TextVQA_Rosetta_OCR_v0.2_val.json"
SITE = "https://textvqa.org/dataset"

Prompts = dict[tuple[str, str], str]
"""LLaVA's prompt by image id and lower-cased question; its ids alone do not tell questions apart."""


def load(folder: Path, *, with_ocr: bool) -> list[Question]:
    """Read the gold file, the OCR tokens from LLaVA's question file or Rosetta's, or a parquet mirror."""
    questions = QuestionList()
    prompts = _read_llava(folder / LLAVA) if with_ocr and (folder / LLAVA).exists() else {}
    tokens: dict[str, list[str]] | None = None
    if with_ocr and not prompts and (folder / GOLD).exists():
        tokens = _read_rosetta(folder)
    for record, image in _read_records(folder):
        image_id, question = record.text("image_id"), record.text("question")
        answers = record.texts("answers", num=NUM_ANNOTATORS)
        text = PROMPT_WITHOUT_OCR.format(question=question.capitalize())
        if prompts:
            if (image_id, question.lower()) not in prompts:
                record.fail(f"no prompt for image {image_id!r} and this question in {folder / LLAVA}.")
            text = prompts[image_id, question.lower()]
        elif with_ocr:
            ocr = tokens.get(image_id, []) if tokens is not None else record.texts("ocr_tokens")
            text = PROMPT.format(question=question.capitalize(), ocr=", ".join(ocr))
        meta = {"llava_id": image_id}
        questions.add(
            record, id=record.text("question_id"), text=text, image=image, target=answers, meta=meta
        )
    return questions.finish(folder / GOLD)


def _read_llava(path: Path) -> Prompts:
    prompts: Prompts = {}
    for record, text in read_llava_prompts(path):
        lines = text.split("\n")
        if len(lines) != 3 or not lines[1].startswith("Reference OCR token:"):
            record.fail("field 'text' must have three lines: question, 'Reference OCR token: ...', suffix.")
        prompts[record.text("question_id"), lines[0].lower()] = text
    return prompts


def _read_rosetta(folder: Path) -> dict[str, list[str]]:
    if not (folder / ROSETTA).exists():
        raise no_source(folder, "textvqa", LLAVA, ROSETTA)
    document = read_json(folder / ROSETTA)
    return {one.text("image_id"): one.texts("ocr_tokens") for one in read_list(document, "data", "image_id")}


def _read_records(folder: Path) -> Iterator[tuple[Record, ImageRef]]:
    if (folder / GOLD).exists():
        images = ImageFiles(folder / "train_images")
        for record in read_list(read_json(folder / GOLD), "data", "question_id"):
            yield record, images[f"{record.text('image_id')}.jpg"]
        return
    shards = find_parquet(folder, "validation")
    if not shards:
        raise no_source(folder, "textvqa", GOLD, "parquet shards (validation)")
    for record in read_parquet(shards):
        yield record, unpack_image(record, "image", folder, f"{record.text('image_id')}.jpg")


def grade(question: Question, answer: str) -> Grade:
    """Grade by the M4C evaluator."""
    return Grade(*grade_textvqa(answer, question.target))


BENCHMARK = Benchmark(
    name="textvqa",
    title="TextVQA",
    protocol="textvqa/ocr/llava-1.5",
    split="val",
    metric="accuracy",
    num_questions=5_000,
    prompt=PROMPT,
    load=partial(load, with_ocr=True),
    grade=grade,
    files=(
        NeededFile(
            names=(GOLD, "**/*validation*.parquet"),
            purpose="5,000 questions with ten answers each",
            source="https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
            licence="CC BY 4.0",
        ),
        NeededFile(
            names=(LLAVA, ROSETTA, "**/*validation*.parquet"),
            purpose="the OCR tokens (Rosetta, v0.2)",
            source=f"LLaVA's eval.zip (docs/Evaluation.md of the LLaVA repository), or {SITE}",
            licence="CC BY 4.0",
        ),
        NeededFile(
            names=("train_images", "**/*validation*.parquet"),
            purpose="images, train_images/{image_id}.jpg",
            source="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
            licence="CC BY 4.0 (data set); images are of Open Images",
        ),
    ),
    notes=("prompts include the OCR tokens",),
)

WITHOUT_OCR = replace(
    BENCHMARK,
    name="textvqa-no-ocr",
    title="TextVQA (no OCR)",
    protocol="textvqa/no-ocr/lmms-eval",
    prompt=PROMPT_WITHOUT_OCR,
    load=partial(load, with_ocr=False),
    files=(BENCHMARK.files[0], BENCHMARK.files[2]),
    notes=("prompts without OCR tokens; not comparable with TextVQA",),
)
