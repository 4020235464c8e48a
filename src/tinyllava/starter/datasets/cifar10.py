"""CIFAR-10 for the starter: small photographs of ten kinds of animals and vehicles.

Paper: none; the public data set with its official split of 50,000 and 10,000 images.
Differs: a training image with the pixels of a test image is left out.
"""

from __future__ import annotations

import io
import json
import random
from typing import TYPE_CHECKING

from PIL import Image

from tinyllava.errors import PackageError
from tinyllava.starter.datasets.default import LabelledImage, Question, with_article

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE_PX = 32
NUM_TRAINING = 10_000

OBJECT_QUESTIONS = (
    "What is this?",
    "What is in the picture?",
    "What do you see here?",
    "Which animal or vehicle is it?",
    "Name what the photograph shows.",
)
YES_NO_QUESTIONS = (
    "Is this {a_name}?",
    "Is there {a_name} in the picture?",
    "Do you see {a_name}?",
    "Does the photograph show {a_name}?",
)


def read_cifar10(package: Path, num_training: int = NUM_TRAINING, seed: int = 0) -> list[LabelledImage]:
    """Read all 10,000 test images and a fixed random part of the 50,000 for training.

    Each is asked for by name once, and four times with yes and no, as often the one as the other; the kind
    asked for in a "no" is drawn at random from the other nine (POPE's random setting).

    Raises:
        PackageError: the images and the labels of the package do not agree in number.
    """
    folder = package / "package"
    generator = random.Random(seed)
    test = _rows(folder, ["test_batch"])
    training = _rows(folder, [f"data_batch_{part}" for part in range(1, 6)])
    held_out = {row.tobytes() for row in test}
    labels = {"test": _labels(folder, "test", len(test)), "train": _labels(folder, "train", len(training))}
    allowed = [number for number, row in enumerate(training) if row.tobytes() not in held_out]
    chosen = sorted(generator.sample(allowed, min(num_training, len(allowed))))
    return [
        *(_image("train", n, training[n], labels["train"][n], generator) for n in chosen),
        *(_image("test", n, row, labels["test"][n], generator) for n, row in enumerate(test)),
    ]


def _rows(folder: Path, names: list[str]) -> np.ndarray:
    """Return the images of the files as [number, 32, 32, 3]; each row of a file is one image."""
    import numpy as np

    parts = []
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            parts.append(np.asarray(image.convert("RGB")).reshape(-1, SIDE_PX, SIDE_PX, 3))
    return np.concatenate(parts)


def _labels(folder: Path, split: str, count: int) -> list[int]:
    labels: list[int] = json.loads((folder / f"{split}_lables.json").read_text(encoding="utf-8"))
    if len(labels) != count:
        raise PackageError(
            f"{folder}: {count} {split} images but {len(labels)} labels; delete it and run again"
        )
    return labels


def _image(
    split: str, number: int, pixels: np.ndarray, label: int, generator: random.Random
) -> LabelledImage:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return LabelledImage(
        name=f"cifar10/{split}/{number}.png",
        data=buffer.getvalue(),
        caption=with_article(CLASSES[label]),
        questions=tuple(_questions(CLASSES[label], generator)),
        is_held_out=split == "test",
    )


def _questions(name: str, generator: random.Random) -> Iterator[Question]:
    yield Question(kind="object", text=generator.choice(OBJECT_QUESTIONS), answer=name)
    others = [other for other in CLASSES if other != name]
    wordings = generator.sample(YES_NO_QUESTIONS, 4)  # no question comes twice
    for answer, wording in zip(("yes", "no") * 2, wordings, strict=True):
        named = name if answer == "yes" else generator.choice(others)
        text = wording.format(a_name=with_article(named))
        yield Question(kind="yes_no", text=text, answer=answer)
