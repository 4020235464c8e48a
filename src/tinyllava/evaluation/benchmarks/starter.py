"""The starter's held-out questions, as a tenth benchmark on images that everybody can download.

Paper: none; the starter's own images (easy-VQA and the Grocery Store photographs, official test splits).
``starter`` is a fixed sample of 1,500 questions, ``starter-small`` 750 of them, ``starter-whole`` all
questions.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tinyllava.conversation import ImageRef, ask
from tinyllava.errors import DataError
from tinyllava.evaluation.benchmark import Benchmark, Grade
from tinyllava.evaluation.metrics.choices import parse_pope, says_yes_or_no
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.read import read_text

FILE = "held_out.json"
QUOTAS = {
    ("easy_vqa", "yes_no"): 500,
    ("easy_vqa", "shape"): 150,
    ("easy_vqa", "colour"): 150,
    ("grocery_store", "yes_no"): 400,
    ("grocery_store", "fruit"): 200,
    ("grocery_store", "variety"): 100,
}
"""Questions of the fixed sample, by data set and kind; 100 of a kind that an option added."""
SMALL_SHARE = 0.5
"""Part of each quota that the small sample takes."""


def load(folder: Path) -> list[Question]:
    """Read all held-out questions from a folder with ``held_out.json`` and ``images``.

    Raises:
        DataError: the file is missing, or a record of it has another form.
    """
    path = folder / FILE
    try:
        return [_question(record, folder) for record in json.loads(read_text(path))]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: unexpected record format ({error!r}). Run `tinyllava starter` again."
        ) from error


def _question(record: dict, folder: Path) -> Question:  # type: ignore[type-arg]
    asked, answered = record["conversations"]
    image = ImageRef(path=folder / "images" / record["image"], name=record["image"])
    text = asked["value"].replace("<image>", "").strip()
    return Question(
        id=record["id"],
        conversation=ask(text, image, id=record["id"]),
        image=record["image"],
        target=answered["value"],
        category=record["kind"],
        groups=(f"kind={record['kind']}", f"source={record['source']}"),
    )


def load_sample(folder: Path, share: float = 1.0) -> list[Question]:
    """Read the fixed sample: of each data set and kind the questions whose ids hash lowest."""
    strata: dict[tuple[str, str], list[Question]] = defaultdict(list)
    for question in load(folder):
        source = question.groups[1].removeprefix("source=")
        strata[source, question.category].append(question)
    chosen: list[Question] = []
    for key, questions in sorted(strata.items()):
        chosen += sorted(questions, key=_hash_of)[: round(share * QUOTAS.get(key, 100))]
    return sorted(chosen, key=lambda question: question.image)


def _hash_of(question: Question) -> str:
    return hashlib.sha256(question.id.encode()).hexdigest()


def grade(question: Question, answer: str) -> Grade:
    """Find yes or no in the answer as POPE does; compare a name whole, whatever its case and final period."""
    parsed = parse_pope(answer) if question.category == "yes_no" else answer.strip().rstrip(".").lower()
    is_clear = question.category != "yes_no" or says_yes_or_no(answer)
    return Grade(parsed, float(parsed == question.target.lower()), is_clear)


def majority_answers(questions: Sequence[Question], training_answers: Sequence[str]) -> dict[str, str]:
    """Answer every question with the most frequent training answer among those that its kind allows."""
    counts = Counter(training_answers)
    allowed: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        allowed[question.category].add(question.target)
    best = {kind: max(sorted(answers), key=counts.__getitem__) for kind, answers in allowed.items()}
    return {question.id: best[question.category] for question in questions}


BENCHMARK = Benchmark(
    name="starter",
    title="Starter",
    protocol="starter/names-exact-yes-no-pope",
    split="held-out sample",
    metric="accuracy",
    num_questions=sum(QUOTAS.values()),
    prompt="{question}",
    load=load_sample,
    grade=grade,
    unclear="empty, or neither yes nor no to a yes/no question",
    max_new_tokens=16,
)
WHOLE = replace(BENCHMARK, name="starter-whole", split="held-out", load=load, num_questions=0)
SMALL = replace(
    BENCHMARK,
    name="starter-small",
    split="held-out sample of 750",
    load=partial(load_sample, share=SMALL_SHARE),
    num_questions=sum(round(SMALL_SHARE * quota) for quota in QUOTAS.values()),
)
