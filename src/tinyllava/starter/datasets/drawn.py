"""Shapes drawn anew for training: the names of easy-VQA in other shades, sizes, places and backgrounds.

Paper: none. Easy-VQA's images have eight exact colours on pale tints, and a model that was trained on them
alone names other shades wrongly (docs/log.md). Nothing here is held out.
"""

from __future__ import annotations

import colorsys
import io
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from tinyllava.starter.datasets.default import SHAPES, LabelledImage, balanced_questions, with_article

NUM_IMAGES = 1400
SIDES_PX = (48, 64, 64, 96, 128, 160)
"""Half or more of a random image's sides are near easy-VQA's 64 pixels."""
OVERSAMPLING = 4
Colour = tuple[int, int, int]
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Shades:
    """What is called by one colour's name: ranges of hue in degrees, saturation and value in [0, 1]."""

    hue: Range
    saturation: Range
    value: Range


# Names keep apart: no orange, cyan, purple or pink, which easy-VQA has no word for.
SHADES: dict[str, Shades] = {
    "black": Shades(hue=(0, 360), saturation=(0, 0.3), value=(0, 0.13)),
    "blue": Shades(hue=(212, 248), saturation=(0.65, 1), value=(0.5, 1)),
    "brown": Shades(hue=(-2, 32), saturation=(0.55, 0.8), value=(0.32, 0.66)),
    "gray": Shades(hue=(0, 360), saturation=(0, 0.05), value=(0.33, 0.68)),
    "green": Shades(hue=(90, 145), saturation=(0.6, 1), value=(0.4, 1)),
    "red": Shades(hue=(-8, 6), saturation=(0.82, 1), value=(0.78, 1)),
    "teal": Shades(hue=(170, 188), saturation=(0.7, 1), value=(0.35, 0.65)),
    "yellow": Shades(hue=(49, 64), saturation=(0.65, 1), value=(0.85, 1)),
}
PAPER = Shades(hue=(0, 360), saturation=(0, 0.12), value=(0.88, 1))
"""Of the background, which is pure white in every fourth image."""


def draw_shapes(count: int = NUM_IMAGES, seed: int = 0) -> list[LabelledImage]:
    """Return drawn training images with a caption and questions like those of easy-VQA, the same for a seed.

    Every pair of shape and colour comes equally often.
    """
    generator = random.Random(seed)
    names = [(shape, colour) for shape in SHAPES for colour in SHADES]
    images = []
    for number in range(count):
        shape, colour = names[number % len(names)]
        image = _draw(shape, _shade(SHADES[colour], generator), generator)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        caption = with_article(f"{colour} {shape}")
        images.append(
            LabelledImage(
                name=f"drawn/train/{number}.png",
                data=buffer.getvalue(),
                caption=caption,
                questions=tuple(balanced_questions(caption, generator)),
                is_held_out=False,
            )
        )
    return images


def _shade(shades: Shades, generator: random.Random) -> Colour:
    hue, saturation, value = (
        generator.uniform(*span) for span in (shades.hue, shades.saturation, shades.value)
    )
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw(shape: str, colour: Colour, generator: random.Random) -> Image.Image:
    """Draw one shape anywhere, an eighth to nine tenths of the image's side wide; half with soft edges."""
    side = generator.choice(SIDES_PX)
    scale = generator.choice((1, OVERSAMPLING))
    paper = (255, 255, 255) if generator.random() < 0.25 else _shade(PAPER, generator)
    image = Image.new("RGB", (side * scale, side * scale), paper)
    width = generator.uniform(0.12, 0.9)
    ratio = 1.0 if shape == "circle" else generator.uniform(0.5, 1.6)
    height = min(0.95, max(0.1, width * ratio))
    left, top = generator.uniform(0, 1 - width), generator.uniform(0, 1 - height)
    box = [side * scale * part for part in (left, top, left + width, top + height)]
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "rectangle":
        pen.rectangle(box, fill=colour)
    else:
        apex = box[0] + (box[2] - box[0]) * generator.uniform(0.3, 0.7)
        pen.polygon([(apex, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    return image.resize((side, side), Image.Resampling.BOX)
