"""LLaVA-Bench (in the wild): 60 questions on 24 images; a judge compares the answers with GPT-4's.

Paper: appendix A; the column LLaVA-W of Tables 3 and A1 is the ratio of the mean scores over all questions.
Differs: ``llava-w-own-prompt`` uses this project's own judge prompt, for users without LLaVA's files.
"""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tinyllava.conversation import ImageRef
from tinyllava.errors import DataError
from tinyllava.evaluation.benchmark import Benchmark, Grade, Prediction, Summary, write_export
from tinyllava.evaluation.metrics.statistics import Ratio
from tinyllava.evaluation.question import JudgeRequest, Judging, Question, QuestionList, Wording, no_source
from tinyllava.evaluation.read import (
    ImageFiles,
    NeededFile,
    Record,
    find_parquet,
    read_json,
    read_lines,
    read_parquet,
    read_python,
    unpack_image,
)

CATEGORIES = ("conv", "detail", "complex")
_DECIMALS = (3, 1)
RULES, SCRIPT = "rule.json", "eval_gpt_review_bench.py"
SITE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
LLAVA = "https://github.com/haotian-liu/LLaVA, llava/eval"
LICENCE = "Apache-2.0"


def load(folder: Path) -> list[Question]:
    """Read questions, captions and reference answers from the official files, or from a parquet mirror."""
    questions = QuestionList()
    for record, text, image, caption, reference in _read_records(folder):
        questions.add(
            record,
            id=record.text("question_id"),
            text=text,
            image=image,
            target={"reference": reference, "caption": caption},
            category=record.one_of("category", *CATEGORIES),
        )
    return questions.finish(folder)


def _read_records(folder: Path) -> Iterator[tuple[Record, str, ImageRef, str, str]]:
    if not (folder / "questions.jsonl").exists():
        shards = find_parquet(folder, "")
        if not shards:
            raise no_source(folder, "llava-w", "questions.jsonl", "parquet shards")
        for record in read_parquet(shards):
            image = unpack_image(
                record, "image", folder, f"{record.text('image_id').removesuffix('.jpg')}.jpg"
            )
            yield record, record.text("question"), image, _caption(record), record.text("gpt_answer")
        return
    images = ImageFiles(folder / "images")
    contexts = {record.text("image"): record for record in read_lines(folder / "context.jsonl")}
    answers = {record.text("question_id"): record for record in read_lines(folder / "answers_gpt4.jsonl")}
    for record in read_lines(folder / "questions.jsonl"):
        question_id, image_name = record.text("question_id"), record.text("image")
        if image_name not in contexts:
            record.fail(f"image {image_name!r} has no caption in {folder / 'context.jsonl'}.")
        if question_id not in answers:
            record.fail(f"question {question_id} has no reference answer in {folder / 'answers_gpt4.jsonl'}.")
        caption, reference = _caption(contexts[image_name]), answers[question_id].text("text")
        yield record, record.text("text"), images[image_name], caption, reference


def _caption(record: Record) -> str:
    caption = record.field("caption")
    return "\n".join(record.texts("caption")) if isinstance(caption, list) else record.text("caption")


def read_official_wording(folder: Path) -> Wording:
    """Return the rules, the role and the system line out of the user's copy of LLaVA's files."""
    for name in (RULES, SCRIPT):
        if not (folder / name).exists():
            raise DataError(
                f"{folder / name}: no such file; it contains the official judge prompt. Download it from "
                f"{LLAVA}, or evaluate llava-w-own-prompt, whose scores have their own column."
            )
    rules = read_json(folder / RULES)
    wording: dict[str, str] = {}
    for category in CATEGORIES:
        rule = rules.part(f"llava_bench_{category}")
        wording[category], wording[f"{category} role"] = rule.text("prompt"), rule.text("role")
    system = [
        _constants(node)["content"]
        for node in ast.walk(read_python(folder / SCRIPT, LLAVA))
        if isinstance(node, ast.Dict) and _constants(node).get("role") == "system"
    ]
    if not system:
        raise DataError(f"{folder / SCRIPT}:1: no system message. Download the file from {LLAVA}.")
    return {**wording, "system": system[0]}


def _constants(node: ast.Dict) -> dict[str, str]:
    return {
        str(key.value): str(value.value)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    }


_OWN_RULE = (
    "Two assistants answered a question about an image that they saw and you know from the context alone. "
    "Grade both from 1 to 10 by how helpful, to the point, right and detailed the answer is; which came "
    "first must not matter. The first line of your reply holds the two grades and nothing else, a space "
    "between them; then give reasons."
)
_OWN_WORDING = {
    "system": "You grade answers with care.",
    **dict.fromkeys(CATEGORIES, _OWN_RULE),
    **{f"{category} role": "Assistant" for category in CATEGORIES},
}


def _ask(wording: Wording, question: Question, answer: str, num_tries: int) -> JudgeRequest:
    """Lay out context, question, reference, answer and rule in the official order."""
    role = wording[f"{question.category} role"]
    blocks = (
        f"[Context]\n{question.target['caption']}",
        f"[Question]\n{question.prompt}",
        f"[{role} 1]\n{question.target['reference']}\n\n[End of {role} 1]",
        f"[{role} 2]\n{answer}\n\n[End of {role} 2]",
        f"[System]\n{wording[question.category]}",
    )
    content = "".join(block + "\n\n" for block in blocks)
    messages = ({"role": "system", "content": wording["system"]}, {"role": "user", "content": content})
    return JudgeRequest(messages=messages, temperature=0.2, max_tokens=1024)


def read_scores(reply: str) -> tuple[float, float]:
    """Return the scores of reference and model from the first line, else (-1, -1), which counts in the mean.

    "8, 7" is not readable: the comma becomes a second space, and the official script then sees three parts.
    """
    parts = reply.split("\n", maxsplit=1)[0].replace(",", " ").split(" ")
    try:
        reference, model = (float(part) for part in parts)
    except ValueError:
        return -1.0, -1.0
    return reference, model


def _grade_reply(question: Question, reply: str) -> tuple[str, float]:
    reference, model = read_scores(reply)
    return f"{reference:g} {model:g}", model / 10


def summarise(predictions: Sequence[Prediction]) -> Summary:
    """Return the ratio of means (model / reference, percent), all and by category; both means times ten.

    LLaVA's script rounds the means to three decimals, divides, and rounds to one: so do these numbers.
    """
    summary: dict[str, list[Ratio]] = {}
    for name in ("all", *CATEGORIES):
        chosen = [p for p in predictions if name in ("all", p.category)]
        if not chosen:
            continue
        pairs = [tuple(map(float, p.parsed.split())) for p in chosen]
        reference, model = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        clusters = [p.cluster for p in chosen]
        ratio = Ratio(numerators=model, denominators=reference, clusters=clusters, decimals=_DECIMALS)
        mean = replace(ratio, denominators=None, weight=10, most=10)
        summary[name] = [ratio]
        summary[f"{name} reference"] = [replace(mean, numerators=reference)]
        summary[f"{name} model"] = [mean]
    return summary


def export_answers(
    questions: Sequence[Question], answers: Mapping[str, str], folder: Path, out: Path
) -> Sequence[Path]:
    """Write the answers file that LLaVA's review script reads, in the order of the questions."""
    lines = [
        json.dumps(
            {"question_id": int(q.id), "prompt": q.prompt, "text": answers.get(q.id, ""), "answer_id": q.id}
        )
        for q in questions
    ]
    return write_export(out / "llava_w_answers.jsonl", "\n".join(lines) + "\n")


_FILES = (
    *(
        NeededFile(
            names=(name, "**/*.parquet"),
            purpose=purpose,
            source=SITE,
            size=size,
            licence=LICENCE,
            num_files=num_files,
        )
        for name, purpose, size, num_files in (
            ("questions.jsonl", "60 questions", "8.25 kB", None),
            ("context.jsonl", "captions of the 24 images, for the judge", "8.04 kB", None),
            ("answers_gpt4.jsonl", "reference answers", "46.5 kB", None),
            ("images", "24 images", "9.7 MB", 24),
        )
    ),
)

BENCHMARK = Benchmark(
    name="llava-w",
    title="LLaVA-W",
    protocol="llava-w/official-prompt",
    split="test",
    metric="all",
    num_questions=60,
    prompt="{question}",
    has_number_ids=True,
    load=load,
    grade=lambda *_: Grade("", None),
    unclear="empty, or no two scores in the judge's reply",
    summarise=summarise,
    max_new_tokens=1024,
    judging=Judging(
        official_judge="gpt-4-0314",
        wording=read_official_wording,
        ask=_ask,
        is_valid=lambda _, reply: read_scores(reply) != (-1.0, -1.0),
        grade=_grade_reply,
    ),
    export=export_answers,
    folders=("llava-bench-in-the-wild",),
    files=(
        *_FILES,
        NeededFile(
            names=(RULES,),
            purpose="the official rules for the judge",
            source=f"{LLAVA}/table",
            licence=LICENCE,
        ),
        NeededFile(names=(SCRIPT,), purpose="the judge's system line", source=LLAVA, licence=LICENCE),
    ),
)

OWN_PROMPT = replace(
    BENCHMARK,
    name="llava-w-own-prompt",
    title="LLaVA-W (own prompt)",
    protocol="llava-w/own-prompt",
    judging=replace(BENCHMARK.judging, wording=lambda _: _OWN_WORDING) if BENCHMARK.judging else None,
    files=_FILES,
    notes=("judged with our own prompt; not comparable with LLaVA-W",),
)
