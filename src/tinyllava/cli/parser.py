"""Shared by all commands: the argument parser, and the default model."""

import argparse
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tinyllava.config import DataConfig
from tinyllava.parts.folders import check_checkpoint, is_stage_checkpoint

if TYPE_CHECKING:
    from tinyllava.evaluation.own_data import ReadingSettings


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and says each default that a help text does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.option_strings and action.default not in (None, "", False, [], argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if has_default and "default" not in text else text


class CommandParser(argparse.ArgumentParser):
    """The parser of ``tinyllava NAME``: defaults in the help, a suggestion for a misspelt option.

    Args:
        description: what the command does, with examples; its lines stay as they are, so at most 80 columns.
    """

    def __init__(self, name: str, description: str) -> None:
        super().__init__(
            prog=f"tinyllava {name}", description=description.strip("\n"), formatter_class=_Formatter
        )

    def error(self, message: str) -> NoReturn:
        """Print usage and message, with the closest option for each that does not exist; exit with 2."""
        if message.startswith("unrecognized arguments:"):
            for word in message.split():
                option = word.partition("=")[0]
                close = get_close_matches(option, re.findall(r"--[\w-]+", self.format_help()), n=1)
                if option.startswith("--") and close:
                    message += f". Did you mean {close[0]}?"
        super().error(message)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how record files are read."""
    parser.add_argument("--images", default="", help="base folder of image paths (default: that of the file)")
    parser.add_argument(
        "--column", action="append", default=[], help="column of a table, as question=NAME (repeatable)"
    )
    parser.add_argument("--reader", default="", help="your own reader of the file, as FILE.py:NAME")
    parser.add_argument(
        "--keep-image-places",
        action="store_true",
        help="leave images where LLaVA's records have <image> (default: before the text of their turn)",
    )
    parser.add_argument("--allow-urls", action="store_true", help="download images at http(s) addresses")
    parser.add_argument("--skip", action="append", default=[], help="defect to skip and count (repeatable)")


def own_data(known: argparse.Namespace, *files: str, skip: tuple[str, ...] = ()) -> DataConfig:
    """Return record files as those options say to read them."""
    return DataConfig(
        records=files,
        images=known.images,
        columns=tuple(known.column),
        reader=known.reader,
        keep_image_places=known.keep_image_places,
        allow_urls=known.allow_urls,
        skip=skip,
    )


def reading_settings(known: argparse.Namespace) -> "ReadingSettings":
    """Return the values of these options in the form that the evaluation of own questions takes."""
    return {
        "images": known.images,
        "columns": tuple(known.column),
        "reader": known.reader,
        "allow_urls": known.allow_urls,
        "keep_places": known.keep_image_places,
        "skip": tuple(known.skip),
    }


def check_model(name: str | Path) -> Path:
    """Return the folder of a model; of a stage's checkpoint, that of its whole model, which is built once.

    Raises:
        CheckpointError: the folder is no checkpoint, or one that cannot be built.
    """
    folder = Path(name)
    if is_stage_checkpoint(folder):
        from tinyllava.model.rebuild import whole_model  # here: other folders are looked at without torch

        folder = whole_model(folder)
    check_checkpoint(folder)
    return folder


def add_bits(parser: argparse.ArgumentParser) -> None:
    """Add --bits, which commands that open a model for answers have."""
    parser.add_argument(
        "--bits",
        type=int,
        choices=(4, 8, 16),
        default=16,
        help="hold the language model's linear layers in 4 or 8 bits (needs tinyllava[quantized])",
    )


def find_model(name: str, option: str) -> Path:
    """Return the checkpoint folder: the given one, or the starter's.

    Args:
        option: how the command takes a folder, for the message.

    Raises:
        CheckpointError: the folder is no checkpoint, or there is no model yet.
    """
    if name:
        return check_model(name)
    from tinyllava.data.packages import find_default_model  # here: most commands need no package

    return find_default_model(f"name a checkpoint folder with {option}")
