"""Colours that the starter's model names for 96 circles that are in no data set: other greens, sizes, papers.

Eight of Pillow's named colours, four backgrounds, three places and sizes. Training images drawn anew
(``tinyllava.starter.datasets.drawn``) have random shades instead; none of these is among them.

    python benchmarks/starter_drawings.py STARTER/run/model
"""

import argparse
from collections import Counter
from itertools import product

from PIL import Image, ImageDraw

from tinyllava import Chat

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
PAPERS = ((235, 235, 235), (255, 255, 255), (230, 240, 235), (225, 235, 240))
BOXES = ((16, 16, 44, 44), (10, 20, 30, 40), (30, 8, 56, 34))
QUESTION = "What color is the shape?"


def main() -> None:
    """Ask for all colours; print how many are right, and which are not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="", help="checkpoint folder (default: the starter's)")
    chat = Chat.open(parser.parse_args().model)
    answers: Counter[tuple[str, str]] = Counter()
    for paper, colour, box in product(PAPERS, COLOURS, BOXES):
        image = Image.new("RGB", (64, 64), paper)
        ImageDraw.Draw(image).ellipse(box, fill=colour)
        answers[colour, chat.ask(QUESTION, image).strip().rstrip(".").lower()] += 1
    num_right = sum(count for (colour, answer), count in answers.items() if colour == answer)
    print(f"{num_right} of {answers.total()} colours right")
    for (colour, answer), count in answers.most_common():
        if colour != answer:
            print(f"{colour} was called {answer} {count} times")


if __name__ == "__main__":
    main()
