"""Write the starter's images and LLaVA-format JSON: captions, conversations and held-out questions.

Paper: section 4.1.2; captions serve pre-training, conversations serve supervised fine-tuning.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from tinyllava.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tinyllava.starter.datasets.default import LabelledImage, Question

Record = dict[str, Any]

DESCRIBE = "Describe the image."
DESCRIBE_EVERY = 3
"""In every third conversation the caption is one of the answers, so that pre-training is not forgotten."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How many records of one data set go into each stage; more than it has images repeats images."""

    captions: int
    conversations: int


Length = Literal["short", "default", "full"]

# Photographs are fewer and harder than drawn shapes, so they come again.
AMOUNTS: dict[Length, dict[str, Amount]] = {
    "short": {
        "easy_vqa": Amount(captions=32, conversations=16),
        "drawn": Amount(captions=16, conversations=8),
        "grocery_store": Amount(captions=48, conversations=24),
    },
    "default": {
        "easy_vqa": Amount(captions=500, conversations=600),
        "drawn": Amount(captions=300, conversations=400),
        "grocery_store": Amount(captions=800, conversations=600),
    },
    "full": {
        "easy_vqa": Amount(captions=1000, conversations=1700),
        "drawn": Amount(captions=400, conversations=900),
        "grocery_store": Amount(captions=1400, conversations=1400),
    },
}
"""One epoch of each. The default's are proportions: how much of them is trained follows the machine
(`starter/amounts.py`). Short only shows that all works; full trains longer."""


def records_key(amounts: Mapping[str, Amount]) -> str:
    """Return a digest of everything that determines the records: amounts, and the code that writes them.

    Record folders have it in their name, so that files of another version are never used.
    """
    digest = hashlib.sha256(repr(sorted(amounts.items())).encode())
    for name in ("records.py", "datasets/default.py", "datasets/drawn.py"):
        digest.update(Path(__file__).parent.joinpath(name).read_bytes())
    return digest.hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class RecordFiles:
    """Where the images and the three JSON files lie; `image` of a record is relative to `images`."""

    images: Path
    pretrain: Path
    finetune: Path
    held_out: Path


def write_records(
    images: Sequence[LabelledImage],
    folder: Path,
    amounts: Mapping[str, Amount],
    *,
    questions_per_conversation: int = 5,
    seed: int = 0,
) -> RecordFiles:
    """Write the images and the records of both sides, in an order that the seed fixes.

    Both stages begin with the same images of a data set, so that few have to be encoded. Conversations
    about an image that comes again ask its next questions. All held-out questions are written, one in a
    record, with their `kind` and `source`.

    Raises:
        DataError: an image is on both sides.
    """
    prove_disjoint(images)
    image_folder = folder / "images"
    for image in images:
        file = image_folder / image.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image.data)
    generator = random.Random(seed)
    captions: list[Record] = []
    conversations: list[Record] = []
    for source, amount in amounts.items():
        described = training_images(images, source, seed)
        captions += _captions(described, amount.captions)
        conversations += _conversations(
            described, amount.conversations, questions_per_conversation, generator
        )
    held_out = _single_questions(image for image in images if image.is_held_out)
    generator.shuffle(captions)
    generator.shuffle(conversations)
    return RecordFiles(
        images=image_folder,
        pretrain=_write(folder / "pretrain.json", captions),
        finetune=_write(folder / "finetune.json", conversations),
        held_out=_write(folder / "held_out.json", held_out),
    )


def prove_disjoint(images: Iterable[LabelledImage]) -> None:
    """Check by the hash of the decoded pixels that no image is in both training and held-out data.

    Raises:
        DataError: names the first two files that show the same image.
    """
    seen: dict[str, LabelledImage] = {}
    for image in images:
        with Image.open(io.BytesIO(image.data)) as opened:
            pixels = hashlib.sha256(opened.convert("RGB").tobytes()).hexdigest()
        other = seen.setdefault(pixels, image)
        if other.is_held_out != image.is_held_out:
            raise DataError(f"{other.name} and {image.name} are the same image, on both sides of the split")


def _write(file: Path, records: list[Record]) -> Path:
    file.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def _record(image: LabelledImage, number: int, turns: Iterable[tuple[str, str]]) -> Record:
    """Return a LLaVA record; the first question comes after the image."""
    conversation = []
    for index, (asked, answer) in enumerate(turns):
        value = f"<image>\n{asked}" if index == 0 else asked
        conversation += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    name = image.name.rpartition(".")[0]
    return {"id": f"{name}-{number}", "image": image.name, "conversations": conversation}


def training_images(images: Iterable[LabelledImage], source: str, seed: int = 0) -> list[LabelledImage]:
    """Return a data set's training images that have a caption, in the order in which they are used."""
    described = [
        image
        for image in images
        if image.source == source and not image.is_held_out and image.caption is not None
    ]
    random.Random(f"{seed} {source}").shuffle(described)
    return described


def _captions(images: Sequence[LabelledImage], count: int) -> list[Record]:
    return [
        _record(image, number // len(images), [(DESCRIBE, str(image.caption))])
        for number, image in enumerate(islice(cycle(images), count))
    ]


def _conversations(
    images: Sequence[LabelledImage], count: int, length: int, generator: random.Random
) -> list[Record]:
    """Ask `length` questions of each image, in a random order, and other ones in the next round."""
    records = []
    for number, image in enumerate(islice(cycle(images), count)):
        turn = number // len(images)
        asked = [(question.text, question.answer) for question in _choose(image, turn, length)]
        if number % DESCRIBE_EVERY == 0 and length > 2:
            asked[-1] = (DESCRIBE, str(image.caption))
        generator.shuffle(asked)
        records.append(_record(image, turn, asked))
    return records


def _choose(image: LabelledImage, turn: int, length: int) -> list[Question]:
    """Take a third of naming questions, of each kind in turn, and fill up with yes/no ones, new every turn.

    With a connector that starts from words names are learned from few questions; yes and no need more.
    """
    generator = random.Random(image.name)
    by_kind: dict[str, list[Question]] = {}
    for question in {question.text: question for question in image.questions}.values():
        by_kind.setdefault(question.kind, []).append(question)
    yes_no = by_kind.pop("yes_no", [])
    for wordings in by_kind.values():
        generator.shuffle(wordings)
    kinds = generator.sample(sorted(by_kind), len(by_kind))
    num_names = min(len(kinds), max(1, length // 3))
    names = []
    for number in range(turn * num_names, (turn + 1) * num_names):
        asked = by_kind[kinds[number % len(kinds)]]
        names.append(asked[number // len(kinds) % len(asked)])
    num_filled = min(len(yes_no), length - len(names))
    first = generator.randrange(len(yes_no) or 1) + turn * num_filled
    return [*names, *(yes_no[(first + n) % len(yes_no)] for n in range(num_filled))]


def _single_questions(images: Iterable[LabelledImage]) -> list[Record]:
    return [
        {
            **_record(image, number, [(question.text, question.answer)]),
            "kind": question.kind,
            "source": image.source,
        }
        for image in images
        for number, question in enumerate(image.questions)
    ]
