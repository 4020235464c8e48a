"""ScienceQA: school questions with two to five choices; the paper reports those with an image (test).

Paper: appendix A, ScienceQA-IMG; the column SQA-I of Tables 3 and A1 is the accuracy over questions with an
image.
Differs: an unanswered question is wrong in both numbers. LLaVA's script drops it from the second.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tinyllava.conversation import ImageRef
from tinyllava.data.readers.columns import LETTER
from tinyllava.evaluation.benchmark import (
    Benchmark,
    Grade,
    Prediction,
    Summary,
    mean_of,
    mean_scores,
    write_export,
)
from tinyllava.evaluation.metrics.choices import parse_scienceqa
from tinyllava.evaluation.question import Question, QuestionList, no_source
from tinyllava.evaluation.read import (
    ImageFiles,
    NeededFile,
    Record,
    find_parquet,
    read_entries,
    read_json,
    read_parquet,
    unpack_image,
)

BODY = "{context}{question}\n{options}"
PROMPT = f"{BODY}\n{LETTER}"
LETTERS = "ABCDE"
_GRADES = {str(grade): "1 to 6" if grade <= 6 else "7 to 12" for grade in range(1, 13)}
SITE = "https://github.com/lupantech/ScienceQA"
LICENCE = "CC BY-NC-SA 4.0"


def load(folder: Path) -> list[Question]:
    """Read the test split of the official files, or of a parquet mirror (whose rows then serve as ids)."""
    questions = QuestionList()
    for question_id, record, image in _read_records(folder):
        choices = record.texts("choices")
        if not 2 <= len(choices) <= len(LETTERS):
            record.fail(f"field 'choices' has {len(choices)} entries; it must have 2 to 5.")
        if record.integer("answer") not in range(len(choices)):
            record.fail(
                f"field 'answer' is {record.integer('answer')}; there are choices 0 to {len(choices) - 1}."
            )
        hint = record.text("hint").strip()
        body = BODY.format(
            context=f"Context: {hint}\n" if hint else "",
            question=record.text("question"),
            options="\n".join(
                f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
            ),
        )
        text = f"{body.replace('  ', ' ').strip()}\n{LETTER}"  # blanks as LLaVA's conversion leaves them
        questions.add(
            record,
            id=question_id,
            text=text,
            image=image,
            target=LETTERS[record.integer("answer")],
            category="image" if image else "text",
            groups=_groups(record, hint, image),
            meta={"llava_prompt": f"<image>\n{text}"} if image else None,  # its script counts these words
        )
    return questions.finish(folder / "problems.json")


def _groups(record: Record, hint: str, image: ImageRef | None) -> tuple[str, ...]:
    """Return the official groups: a question with a hint and an image counts in both contexts."""
    grade = record.text("grade").removeprefix("grade")
    if grade not in _GRADES:
        record.fail(f"field 'grade' is {record.text('grade')!r}; it must be one of grade1 to grade12.")
    contexts = [name for name, has in (("image", image), ("text", hint)) if has] or ["none"]
    return (
        *(f"context={name}" for name in contexts),
        f"grades={_GRADES[grade]}",
        f"subject={record.text('subject')}",
        f"topic={record.text('topic')}",
    )


def _read_records(folder: Path) -> Iterator[tuple[str, Record, ImageRef | None]]:
    if (folder / "problems.json").exists():
        problems, images = read_entries(folder / "problems.json"), ImageFiles(folder / "images" / "test")
        splits = read_json(folder / "pid_splits.json")
        for question_id in splits.texts("test"):
            if question_id not in problems:
                splits.fail(f"id {question_id!r} of the split 'test' is not in {folder / 'problems.json'}.")
            image = problems[question_id].field("image")
            yield question_id, problems[question_id], images[f"{question_id}/{image}"] if image else None
        return
    shards = find_parquet(folder, "test")
    if not shards:
        raise no_source(folder, "scienceqa", "problems.json", "parquet shards (test)")
    for number, record in enumerate(read_parquet(shards)):
        has_image = record.field("image") is not None
        name = f"{number}.png"
        yield str(number), record, unpack_image(record, "image", folder, name) if has_image else None


def grade(question: Question, answer: str) -> Grade:
    """Compare letters; a letter beyond the choices is no letter of this question and so wrong."""
    parsed = parse_scienceqa(answer)
    return Grade(parsed, float(parsed == question.target), bool(parsed))


def summarise(predictions: Sequence[Prediction]) -> Summary:
    """Return the accuracy over questions with an image, over all, and over the official groups."""
    with_image = [prediction for prediction in predictions if prediction.category == "image"]
    return {"image_accuracy": [mean_of(with_image)], **mean_scores(predictions)}


def export_results(
    questions: Sequence[Question], answers: Mapping[str, str], folder: Path, out: Path
) -> Sequence[Path]:
    """Write the file that the official evaluate_acc.py reads: the number of the choice by id, -1 for none."""
    if not (folder / "problems.json").exists():
        return ()  # a parquet mirror has lost the ids
    letters = {question.id: parse_scienceqa(answers.get(question.id, "")) for question in questions}
    results = {key: LETTERS.find(letter) if letter else -1 for key, letter in letters.items()}
    outputs = {question.id: answers.get(question.id, "") for question in questions}
    document = json.dumps({"results": results, "outputs": outputs}, ensure_ascii=False)
    return write_export(out / "scienceqa_results.json", document)


BENCHMARK = Benchmark(
    name="scienceqa",
    title="SQA-I",
    protocol="scienceqa/llava-1.5",
    split="test",
    metric="image_accuracy",
    num_questions=4_241,
    prompt=PROMPT,
    load=load,
    grade=grade,
    unclear="no letter",
    summarise=summarise,
    unit="questions with an image",
    unit_of=lambda prediction: prediction.question_id if prediction.category == "image" else None,
    max_new_tokens=1024,
    export=export_results,
    files=(
        NeededFile(
            names=("problems.json", "**/*test*.parquet"),
            purpose="questions with answers",
            source=SITE,
            licence=LICENCE,
        ),
        NeededFile(
            names=("pid_splits.json", "**/*test*.parquet"),
            purpose="the 4,241 ids of the split",
            source=SITE,
            licence=LICENCE,
        ),
        NeededFile(
            names=("images/test", "**/*test*.parquet"),
            purpose="2,017 images, images/test/{id}/image.png",
            num_files=2_017,
            source=SITE,
            licence=LICENCE,
        ),
    ),
)
