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


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How many records of one data set go into each stage; more than it has images repeats images."""

    captions: int
    conversations: int


Length = Literal["short", "default", "full"]

# One epoch of each; photographs are fewer and harder than drawn shapes, so they come again.
AMOUNTS: dict[Length, dict[str, Amount]] = {
    "short": {
        "easy_vqa": Amount(captions=48, conversations=24),
        "grocery_store": Amount(captions=48, conversations=24),
    },
    "default": {
        "easy_vqa": Amount(captions=1200, conversations=410),
        "grocery_store": Amount(captions=1800, conversations=374),
    },
    "full": {
        "easy_vqa": Amount(captions=2800, conversations=3400),
        "grocery_store": Amount(captions=4400, conversations=2600),
    },
}
"""Default is twelve minutes on two CPU cores without bf16; short only shows that all works; full trains on
two to eight times as much."""


def records_key(amounts: Mapping[str, Amount]) -> str:
    """Return a digest of what decides the records: amounts, and the code that draws and writes them.

    Record folders bear it in their name, so that what another version wrote is never taken for one's own.
    """
    digest = hashlib.sha256(repr(sorted(amounts.items())).encode())
    for name in ("records.py", "datasets/default.py"):
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
    questions_per_conversation: int = 2,
    seed: int = 0,
) -> RecordFiles:
    """Write the images and the records of both sides, in an order that the seed fixes.

    Both stages begin with the same images of a data set, so that few have to be encoded. Conversations
    about an image that comes again ask its next questions. All held-out questions are written, one in a
    record, with their `kind` and `source`.

    Raises:
        DataError: an image stands on both sides.
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
        training = [p for p in images if p.source == source and not p.is_held_out]
        generator.shuffle(training)
        training.sort(key=lambda image: image.caption is None)  # described ones serve both stages
        captions += _captions(training, amount.captions)
        conversations += _conversations(training, amount.conversations, questions_per_conversation, generator)
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
    """Check by the hash of the decoded pixels that no image is both trained on and held out.

    Raises:
        DataError: names the first two files that show the same image.
    """
    seen: dict[str, LabelledImage] = {}
    for image in images:
        with Image.open(io.BytesIO(image.data)) as opened:
            pixels = hashlib.sha256(opened.convert("RGB").tobytes()).hexdigest()
        other = seen.setdefault(pixels, image)
        if other.is_held_out != image.is_held_out:
            raise DataError(f"{other.name} and {image.name} are one image on both sides of the split")


def _write(file: Path, records: list[Record]) -> Path:
    file.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def _record(image: LabelledImage, number: int, turns: Iterable[tuple[str, str]]) -> Record:
    """Return a LLaVA record; the first question stands behind the image."""
    conversation = []
    for index, (asked, answer) in enumerate(turns):
        value = f"<image>\n{asked}" if index == 0 else asked
        conversation += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    name = image.name.rpartition(".")[0]
    return {"id": f"{name}-{number}", "image": image.name, "conversations": conversation}


def _captions(images: Iterable[LabelledImage], count: int) -> list[Record]:
    described = [(image, image.caption) for image in images if image.caption is not None]
    return [
        _record(image, number // len(described), [("Describe the picture.", caption)])
        for number, (image, caption) in enumerate(islice(cycle(described), count))
    ]


def _conversations(
    images: Sequence[LabelledImage], count: int, length: int, generator: random.Random
) -> list[Record]:
    """Ask up to `length` questions of each image, in a random order, and other ones in the next round."""
    described = [image for image in images if image.caption is not None]
    records = []
    for number, image in enumerate(islice(cycle(described), count)):
        part = _choose(image, number // len(described), length)
        generator.shuffle(part)
        if number % 2 and any(question.kind == "variety" for question in part):
            # "Which kind of apple?" names the fruit, so where it comes first the fruit is not asked for.
            part = [question for question in part if question.kind != "fruit"]
            part.sort(key=lambda question: question.kind != "variety")
        else:
            part.sort(key=lambda question: question.kind == "variety")
        turns = [(question.text, explain(question, image)) for question in part]
        records.append(_record(image, number // len(described), turns))
    return records


def _choose(image: LabelledImage, turn: int, length: int) -> list[Question]:
    """Take as many naming questions as yes/no ones, of the kinds in turn; other ones every time.

    Yes and no need the names to be right, and left to chance most questions would be of that kind.
    """
    generator = random.Random(f"{image.name} 0")
    questions = list({question.text: question for question in image.questions}.values())
    generator.shuffle(questions)
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    yes_no = by_kind.pop("yes_no", [])
    kinds = sorted(by_kind)
    generator.shuffle(kinds)
    num_names = min(len(kinds), max(1, length // 2))
    names = []
    for number in range(turn * num_names, (turn + 1) * num_names):
        asked = by_kind[kinds[number % len(kinds)]]
        names.append(asked[number // len(kinds) % len(asked)])
    start = turn * (length - len(names)) % max(1, len(yes_no))
    return [*names, *yes_no[start:], *yes_no[:start]][:length]


def explain(question: Question, image: LabelledImage) -> str:
    """Return the answer that is trained: a name as it is, yes or no behind what the image shows.

    A model that says first what it sees has only words left to compare; one that has to answer at once
    learns yes and no many times more slowly (docs/log.md). Held-out answers stay as the data set has them.
    """
    return f"{image.caption}, so {question.answer}" if question.kind == "yes_no" else question.answer


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
