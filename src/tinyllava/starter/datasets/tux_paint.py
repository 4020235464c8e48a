"""Tux Paint's stamps for the starter: cut-out photographs and drawings of objects, with captions.

The public collection has no split, so the hash of the pixels decides. Letters, signs and coins are left out,
because the starter's model cannot read.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from tinyllava.starter.datasets.default import LabelledImage, Question, with_article

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STAMPS = "usr/share/tuxpaint/stamps"
MAX_SIDE_PX = 256

# Folder -> what one would call each of its things.
GROUPS = {
    "animals/birds": "bird",
    "animals/fish": "fish",
    "animals/insects": "bug",
    "animals/mammals": "mammal",
    "animals/marsupials": "mammal",
    "clothes": "piece of clothing",
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "hobbies/music": "musical instrument",
    "household": "household item",
    "plants/flowers": "flower",
    "plants/trees": "tree",
    "town/houses": "building",
    "vehicles": "vehicle",
}
# What stands in a folder without being one of its things.
MISFILED = frozenset({"couple of wings", "pinecone", "shrimp", "tractor wheel", "train sign", "wheel"})
# "A (happy) lion!", "Some cherries.", "A pair of scissors": an article and at most four words.
_NAME = re.compile(r"(?:An?|Some)(?: pair of)?((?: [\w’'-]+){1,4})\s*$")

GROUP_QUESTIONS = (
    "What kind of thing is this?",
    "What sort of thing do you see?",
    "What kind of thing does the picture show?",
)
# They do not say the group, which the next question may be about.
STAMP_QUESTIONS = (
    "What exactly is it?",
    "What is it called?",
    "What is its name?",
    "Name exactly what you see.",
)
YES_NO_QUESTIONS = (
    "Is this {a_group}?",
    "Do you see {a_group}?",
    "Does the picture show {a_group}?",
    "Is there {a_group} in the picture?",
)


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """A stamp on white, its name, and its group."""

    data: bytes
    pixels_sha256: str
    name: str
    group: str

    @property
    def is_held_out(self) -> bool:
        """A quarter of the stamps, fixed by their pixels: equal images are on the same side."""
        return int(self.pixels_sha256[:2], 16) < 64


def read_tux_paint(package: Path, seed: int = 0) -> list[LabelledImage]:
    """Read the named stamps, a quarter of them held out.

    Each is asked for its group, and four times for yes and no, as often the one as the other. Its own name
    is asked for too, of held-out ones only if a training stamp has the same name.
    """
    generator = random.Random(seed)
    stamps: dict[str, tuple[str, Stamp]] = {}
    for file in sorted((package / STAMPS).rglob("*.png")):
        path = file.relative_to(package / STAMPS).as_posix()
        stamp = _read_stamp(file, path)
        if stamp is not None:
            stamps.setdefault(stamp.pixels_sha256, (path, stamp))
    learnt = {stamp.name for _, stamp in stamps.values() if not stamp.is_held_out}
    return [
        LabelledImage(
            name=f"tux_paint/{path}",
            data=stamp.data,
            caption=f"{with_article(stamp.group)}, {stamp.name}",
            questions=tuple(_questions(stamp, stamp.name in learnt, generator)),
            is_held_out=stamp.is_held_out,
        )
        for path, stamp in stamps.values()
    ]


def read_name(caption: str) -> str | None:
    """Return what the first sentence names: "A sea lion." -> "sea lion"; None where it tells more."""
    sentence = re.split(r"[.!]", re.sub(r"\(.*?\)|[“”\"]", "", caption))[0]
    found = _NAME.match(sentence.strip())
    return found[1].strip() if found else None


def _read_stamp(file: Path, path: str) -> Stamp | None:
    group = next((group for folder, group in GROUPS.items() if path.startswith(f"{folder}/")), None)
    text = file.with_suffix(".txt")
    if group is None or not text.is_file():
        return None
    lines = text.read_text(encoding="utf-8").splitlines()  # the first is English, further ones translate it
    name = read_name(lines[0]) if lines else None
    if name is None or name in MISFILED:
        return None
    image = _on_white(file)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    return Stamp(data=buffer.getvalue(), pixels_sha256=digest, name=name, group=group)


def _on_white(file: Path) -> Image.Image:
    """Lay the cut-out on white: the colours under its transparent part are hidden."""
    with Image.open(file) as image:
        stamp = image.convert("RGBA")
    stamp.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    paper = Image.new("RGBA", stamp.size, "white")
    return Image.alpha_composite(paper, stamp).convert("RGB")


def _questions(stamp: Stamp, is_learnt: bool, generator: random.Random) -> Iterator[Question]:
    yield Question(kind="group", text=generator.choice(GROUP_QUESTIONS), answer=stamp.group)
    if is_learnt:
        yield Question(kind="stamp", text=generator.choice(STAMP_QUESTIONS), answer=stamp.name)
    others = sorted(set(GROUPS.values()) - {stamp.group})
    wordings = generator.sample(YES_NO_QUESTIONS, 4)  # no question comes twice
    for answer, wording in zip(("yes", "no") * 2, wordings, strict=True):
        named = stamp.group if answer == "yes" else generator.choice(others)
        yield Question(kind="yes_no", text=wording.format(a_group=with_article(named)), answer=answer)
