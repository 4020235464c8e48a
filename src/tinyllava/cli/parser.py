"""The argument parser that the commands share: defaults in the help, a suggestion for a misspelt option."""

import argparse
import re
from difflib import get_close_matches
from typing import NoReturn


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and says each default that a help text does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.option_strings and action.default not in (None, "", False, [], argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if has_default and "default" not in text else text


class CommandParser(argparse.ArgumentParser):
    """The parser of ``tinyllava NAME``.

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
