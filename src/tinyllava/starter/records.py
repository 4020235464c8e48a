"""Write the starter's pictures and LLaVA-format JSON: captions, conversations and held-out questions.

Paper: section 4.1.2; captions serve pre-training, conversations serve supervised fine-tuning.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from tinyllava.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tinyllava.starter.pictures import Picture

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RecordFiles:
    """Where the pictures and the three JSON files lie; `image` of a record is relative to `images`."""

    images: Path
    pretrain: Path
    finetune: Path
    held_out: Path


def write_records(
    pictures: Sequence[Picture], folder: Path, *, questions_per_conversation: int = 4, seed: int = 0
) -> RecordFiles:
    """Write every picture once and the records of both sides, in a shuffled order that the seed fixes.

    A held-out record asks one question and carries its `kind` and `source`; a conversation for fine-tuning
    carries the `kinds` of its questions, in their order.

    Raises:
        DataError: a picture stands on both sides.
    """
    prove_disjoint(pictures)
    files = RecordFiles(
        images=folder / "images",
        pretrain=folder / "pretrain.json",
        finetune=folder / "finetune.json",
        held_out=folder / "held_out.json",
    )
    for picture in pictures:
        file = files.images / picture.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture.data)
    generator = random.Random(seed)
    training = [picture for picture in pictures if not picture.is_held_out]
    held_out = [picture for picture in pictures if picture.is_held_out]
    _write(files.pretrain, _captions(training), generator)
    _write(files.finetune, _conversations(training, questions_per_conversation, generator), generator)
    _write(files.held_out, _single_questions(held_out), generator)
    return files


def prove_disjoint(pictures: Iterable[Picture]) -> None:
    """Check by the hash of the decoded pixels that no picture is both trained on and held out.

    Raises:
        DataError: names the first two files that show the same picture.
    """
    seen: dict[str, Picture] = {}
    for picture in pictures:
        with Image.open(io.BytesIO(picture.data)) as image:
            pixels = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        other = seen.setdefault(pixels, picture)
        if other.is_held_out != picture.is_held_out:
            raise DataError(f"{other.name} and {picture.name} are one picture on both sides of the split")


def _write(file: Path, records: list[Record], generator: random.Random) -> None:
    generator.shuffle(records)
    file.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")


def _record(picture: Picture, number: int, turns: Iterable[tuple[str, str]]) -> Record:
    """Return a LLaVA record; the first question stands behind the picture."""
    conversation = []
    for index, (asked, answer) in enumerate(turns):
        value = f"<image>\n{asked}" if index == 0 else asked
        conversation += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    name = picture.name.rpartition(".")[0]
    return {"id": f"{name}-{number}", "image": picture.name, "conversations": conversation}


def _captions(pictures: Iterable[Picture]) -> list[Record]:
    described = [(picture, picture.caption) for picture in pictures if picture.caption is not None]
    return [_record(picture, 0, [("Describe the picture.", caption)]) for picture, caption in described]


def _conversations(pictures: Iterable[Picture], length: int, generator: random.Random) -> list[Record]:
    """Spread the questions of a picture over conversations of at most `length`, in a random order."""
    records = []
    for picture in pictures:
        questions = list({question.text: question for question in picture.questions}.values())
        generator.shuffle(questions)
        for start in range(0, len(questions), length):
            part = questions[start : start + length]
            turns = [(question.text, question.answer) for question in part]
            kinds = [question.kind for question in part]
            records.append({**_record(picture, start // length, turns), "kinds": kinds})
    return records


def _single_questions(pictures: Iterable[Picture]) -> list[Record]:
    return [
        {
            **_record(picture, number, [(question.text, question.answer)]),
            "kind": question.kind,
            "source": picture.source,
        }
        for picture in pictures
        for number, question in enumerate(picture.questions)
    ]
