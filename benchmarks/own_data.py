"""The guide "Your own data" with a real model: 40 drawn photographs, answered before and after training.

Draws the images and their table into a folder, runs the guide's commands there and writes their numbers.
The model of ``docs/own-data-results.json`` is the starter's.

    python benchmarks/own_data.py STARTER/run/model --output docs/own-data-results.json
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tinyllava.cli import main as run_command
from tinyllava.evaluation.results import Result, load_results

MUGS = {"Brick": (178, 52, 40), "Forest": (52, 118, 66), "Ocean": (44, 82, 168), "Sunrise": (232, 178, 48)}
NUM_IMAGES = 40
TRAIN = (
    "tinyllava train lora --from ./checkpoint --data mugs-train.json --output runs/mugs "
    "--finetune.learning-rate 5e-4"
)
COMMANDS = (
    "tinyllava data check mugs.csv",
    "tinyllava data split mugs.csv --held-out 25%",
    "tinyllava evaluate ./checkpoint --data mugs-held-out.json --output evaluations/before",
    TRAIN,
    "tinyllava evaluate ./runs/mugs/model --data mugs-held-out.json --output evaluations/after",
    "tinyllava evaluate ./runs/mugs/model --data mugs-held-out.json --output evaluations/after --blind",
    "tinyllava compare evaluations/before evaluations/after --data mugs-held-out.json",
)
"""The guide's commands, up to its numbers."""


def draw_mug(colour: tuple[int, int, int], is_full: bool, seed: int) -> Image.Image:
    """Return a photograph of a mug, full of coffee or empty: light, place, size and grain differ."""
    chance = np.random.default_rng(seed)
    width, height = ((160, 120), (120, 160), (144, 144))[seed % 3]
    light = (
        np.linspace(150, 220, height)[:, None, None] * np.array([1, 0.97, 0.92]) * chance.uniform(0.8, 1.1)
    )
    wall = np.broadcast_to(light, (height, width, 3))
    image = Image.fromarray(np.clip(wall, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    x, y = width / 2 + chance.uniform(-8, 8), height / 2 + chance.uniform(-8, 8)
    size = min(width, height) * chance.uniform(0.36, 0.44)
    body = tuple(int(min(255, value * chance.uniform(0.9, 1.1))) for value in colour)

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
        return x + size * left, y + size * top, x + size * right, y + size * bottom

    pen.ellipse(box(0.5, -0.4, 1.15, 0.4), outline=body, width=int(size * 0.16))
    pen.rounded_rectangle(box(-0.8, -0.8, 0.8, 0.9), radius=size * 0.2, fill=body)
    pen.ellipse(box(-0.8, -1.1, 0.8, -0.5), fill=tuple(int(value * 0.7) for value in body))
    pen.ellipse(box(-0.68, -1.0, 0.68, -0.58), fill=(52, 30, 18) if is_full else (240, 236, 228))
    grain = chance.normal(0, 6, (height, width, 3))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(1)))
    return Image.fromarray(np.clip(blurred + grain, 0, 255).astype(np.uint8))


def write_mugs(folder: Path) -> None:
    """Write ``photos`` and ``mugs.csv``: two questions about each image."""
    (folder / "photos").mkdir(parents=True)
    rows = []
    for number in range(NUM_IMAGES):
        name, is_full = list(MUGS)[number % len(MUGS)], number // len(MUGS) % 2 == 0
        path = f"photos/{number:02}.jpg"
        draw_mug(MUGS[name], is_full, number).save(folder / path, quality=90)
        rows.append((path, "Which of our mugs is this?", name))
        rows.append((path, "Is the mug full?", "yes" if is_full else "no"))
    with (folder / "mugs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "question", "answer"), *rows])


def read_numbers(folder: Path) -> dict[str, dict[str, object]]:
    """Return the score of each evaluation with its interval, and its numbers by kind."""
    numbers = {}
    for name in ("before", "after"):
        for result in load_results(folder / f"evaluations/{name}/results.json"):
            blind = " with blank images" if result.model.endswith("(blank images)") else ""
            numbers[f"{name}{blind}"] = _numbers_of(result)
    return numbers


def _numbers_of(result: Result) -> dict[str, object]:
    headline = result.metric_named(result.metric)
    values = {
        one.name: round(one.value, 2) for one in result.metrics if one.name.startswith(("kind", "base"))
    }
    return {
        "value": round(headline.value, 2),
        "interval": headline.interval,
        "questions": result.num_questions,
    } | values


def main() -> None:
    """Run the guide's commands and write their numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--folder", type=Path, help="new folder to work in (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="JSON to write (default: printed)")
    known = parser.parse_args()
    model, output = known.model.resolve(), known.output and known.output.resolve()
    folder = known.folder or Path(tempfile.mkdtemp())
    write_mugs(folder)
    os.chdir(folder)
    Path("checkpoint").symlink_to(model)
    for command in COMMANDS:
        print(f"$ {command}", flush=True)
        if run_command(shlex.split(command)[1:]) != 0:
            raise SystemExit(f"failed: {command}")
    text = json.dumps(read_numbers(Path()), indent=2) + "\n"
    output.write_text(text) if output else print(text)
    if known.folder is None:
        os.chdir("/")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
