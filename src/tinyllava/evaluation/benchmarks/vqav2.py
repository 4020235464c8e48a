"""VQAv2: open questions about COCO images, ten human answers each.

Paper: appendix A; the column VQA-v2 of Tables 3 and A1 is test-dev, whose answers only the server knows.
Differs: ``vqav2-val`` scores locally on val2014, with answers normalised as for the upload. Its scores are
about two points lower than on test-dev.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tinyllava.conversation import ImageRef
from tinyllava.errors import DataError
from tinyllava.evaluation.benchmark import Benchmark, Grade, write_export
from tinyllava.evaluation.metrics.choices import says_yes_or_no
from tinyllava.evaluation.metrics.vqa import NUM_ANNOTATORS, grade_vqa, normalise_evalai, normalise_vqa
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
    read_json,
    read_lines,
    read_list,
    read_parquet,
    unpack_image,
)

PROMPT = "{question}\n" + SHORT
SITE = "https://visualqa.org/download.html"
LLAVA = "LLaVA's eval.zip (docs/Evaluation.md of the LLaVA repository)"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
LICENCE = "CC BY 4.0 (annotations); Flickr terms of use (COCO images)"


def load_test(folder: Path, *, split: str) -> list[Question]:
    """Read the questions of test-dev or test from LLaVA's file, the official one, or parquet; no targets."""
    questions, images = QuestionList(), ImageFiles(folder / "test2015")
    names = (f"llava_vqav2_mscoco_{split}2015.jsonl", f"v2_OpenEnded_mscoco_{split}2015_questions.json")
    source, shards = find_source(folder, *names), find_parquet(folder, split.replace("-", "") + "-")
    if source is None:
        if not shards:
            raise no_source(folder, "vqav2", *names, "parquet shards")
        return _load_parquet(shards, folder, "test2015")
    if source.name == names[0]:
        for record, text in read_llava_prompts(source):
            image = images[record.text("image")]
            questions.add(record, id=record.text("question_id"), text=text, image=image, target=None)
    else:
        for record in read_list(read_json(source), "questions", "question_id"):
            _add(questions, record, images[_image_name(record, "test2015")])
    return questions.finish(source)


def load_val(folder: Path) -> list[Question]:
    """Read val2014 with its answers from the official files or from parquet."""
    questions, images = QuestionList(), ImageFiles(folder / "val2014")
    source, shards = folder / QUESTIONS, find_parquet(folder, "validation")
    if not source.exists():
        if not shards:
            raise no_source(folder, "vqav2-val", QUESTIONS, "parquet shards (validation)")
        return _load_parquet(shards, folder, "val2014")
    annotated = read_list(read_json(folder / ANNOTATIONS), "annotations", "question_id")
    annotations = {record.text("question_id"): record for record in annotated}
    for record in read_list(read_json(source), "questions", "question_id"):
        annotation = annotations.get(record.text("question_id"))
        if annotation is None:
            record.fail(f"question {record.text('question_id')} has no annotation in {folder / ANNOTATIONS}.")
        _add(questions, record, images[_image_name(record, "val2014")], annotation)
    return questions.finish(source)


def _load_parquet(shards: list[Path], folder: Path, images: str) -> list[Question]:
    questions = QuestionList()
    for record in read_parquet(shards):
        image = unpack_image(record, "image", folder, _image_name(record, images))
        _add(questions, record, image, record if images == "val2014" else None)
    return questions.finish(shards[0])


def _image_name(record: Record, images: str) -> str:
    return f"COCO_{images}_{record.integer('image_id'):012d}.jpg"


def _add(questions: QuestionList, record: Record, image: ImageRef, annotation: Record | None = None) -> None:
    answers: list[str] | None = None
    groups: tuple[str, ...] = ()
    if annotation is not None:
        entries = list(read_list(annotation, "answers", "answer_id"))
        if len(entries) != NUM_ANNOTATORS:
            annotation.fail(f"field 'answers' has {len(entries)} entries; it must have {NUM_ANNOTATORS}.")
        answers = [entry.text("answer") for entry in entries]
        groups = tuple(f"{kind}={annotation.text(kind)}" for kind in ("answer_type", "question_type"))
    text = PROMPT.format(question=record.text("question"))
    questions.add(
        record, id=record.text("question_id"), text=text, image=image, target=answers, groups=groups
    )


def grade(question: Question, answer: str) -> Grade:
    """Grade the uploaded form of the answer as the official tool does; without public answers, show it."""
    uploaded = normalise_evalai(answer)
    if question.target is None:
        return Grade(uploaded, None)
    return Grade(*grade_vqa(uploaded, question.target), _is_of_its_kind(question, answer))


def _is_of_its_kind(question: Question, answer: str) -> bool:
    if "answer_type=yes/no" in question.groups:
        return says_yes_or_no(answer)
    has_digit = any(character.isdigit() for character in normalise_vqa(answer))
    return has_digit or "answer_type=number" not in question.groups


def export_upload(
    questions: Sequence[Question], answers: Mapping[str, str], folder: Path, out: Path
) -> Sequence[Path]:
    """Write the JSON for EvalAI (challenge 830): all test2015 ids, with "" for missing answers.

    Without a file that lists them all, the server will refuse what is written, and its name says so.
    """
    names = ("llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json")
    source = find_source(folder, *names) or next(iter(find_parquet(folder, "test-")), None)
    ids = _read_ids(source, folder) if source else [int(question.id) for question in questions]
    unknown = {question.id for question in questions} - {str(one) for one in ids}
    if unknown:
        raise DataError(f"{source}:1: {len(unknown)} questions are missing, such as {min(unknown)}.")
    upload = [{"question_id": one, "answer": normalise_evalai(answers.get(str(one), ""))} for one in ids]
    name = "vqav2_upload.json" if source else "vqav2_upload_incomplete.json"
    return write_export(out / name, json.dumps(upload))


def _read_ids(source: Path, folder: Path) -> list[int]:
    records: Iterable[Record]
    if source.suffix == ".parquet":
        records = read_parquet(find_parquet(folder, "test-"), columns=["question_id"])
    elif source.suffix == ".jsonl":
        records = read_lines(source)
    else:
        records = read_list(read_json(source), "questions", "question_id")
    return [record.integer("question_id") for record in records]


_TEST_IMAGES = NeededFile(
    names=("test2015", "**/*test*.parquet"),
    purpose="81,434 images",
    source=SITE,
    licence=LICENCE,
    num_files=81_434,
)

BENCHMARK = Benchmark(
    name="vqav2",
    title="VQAv2",
    protocol="vqav2/test-dev/llava-1.5",
    split="test-dev2015",
    metric="accuracy",
    num_questions=107_394,
    prompt=PROMPT,
    has_number_ids=True,
    load=partial(load_test, split="test-dev"),
    grade=grade,
    unclear="empty, or not a yes, no or number if the answer is one",
    export=export_upload,
    files=(
        NeededFile(
            names=(
                "llava_vqav2_mscoco_test-dev2015.jsonl",
                "v2_OpenEnded_mscoco_test-dev2015_questions.json",
                "**/*testdev*.parquet",
            ),
            purpose="107,394 questions",
            source=f"{LLAVA}, or {SITE}",
            licence=LICENCE,
        ),
        NeededFile(
            names=(
                "llava_vqav2_mscoco_test2015.jsonl",
                "v2_OpenEnded_mscoco_test2015_questions.json",
                "**/test-*.parquet",
            ),
            purpose="447,793 ids that define the upload",
            source=f"{LLAVA}, or {SITE}",
            licence=LICENCE,
            is_optional=True,
        ),
        _TEST_IMAGES,
    ),
    notes=(
        "the score comes from the server: upload the exported file to EvalAI, challenge 830, Test-Dev phase",
    ),
)

TEST = replace(
    BENCHMARK,
    name="vqav2-test",
    title="VQAv2 (test)",
    protocol="vqav2/test/llava-1.5",
    split="test2015",
    num_questions=447_793,
    load=partial(load_test, split="test"),
    files=(replace(BENCHMARK.files[1], purpose="447,793 questions", is_optional=False), _TEST_IMAGES),
    notes=("the score comes from the server: upload the exported file to EvalAI, challenge 830",),
)

VAL = replace(
    BENCHMARK,
    name="vqav2-val",
    title="VQAv2 (val)",
    protocol="vqav2/val/llava-1.5",
    split="val2014",
    num_questions=214_354,
    load=load_val,
    export=None,
    files=(
        NeededFile(
            names=(QUESTIONS, "**/*validation*.parquet"),
            purpose="214,354 questions",
            source=SITE,
            licence=LICENCE,
        ),
        NeededFile(
            names=(ANNOTATIONS, "**/*validation*.parquet"),
            purpose="ten answers to each question",
            source=SITE,
            licence=LICENCE,
        ),
        NeededFile(
            names=("val2014", "**/*validation*.parquet"),
            purpose="40,504 images",
            source=SITE,
            licence=LICENCE,
            num_files=40_504,
        ),
    ),
    notes=("val reads about 2 points lower than test-dev; not comparable with VQAv2",),
)
