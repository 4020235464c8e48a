"""The exceptions of tinyllava. Each message names what is wrong, where, and the fix."""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")


class TinyLlavaError(Exception):
    """Base of every error that a user can cause and fix; the command line prints it without a traceback."""


class UnknownNameError(TinyLlavaError, KeyError):
    """A name that is in no table: an encoder, a language model, a connector, a variant, a benchmark."""

    __str__ = Exception.__str__  # KeyError would print the message as a quoted repr


class ConfigError(TinyLlavaError, ValueError):
    """A value of a configuration, or a combination of values, that cannot work."""


class DataError(TinyLlavaError, ValueError):
    """A record, a data file or a benchmark file that does not follow its format."""


class ImageError(DataError):
    """An image that is missing, cannot be decoded, or is not of a kind that the model can take."""


class CheckpointError(TinyLlavaError, ValueError):
    """A checkpoint folder that is incomplete, of an unknown layout, or does not fit the request."""


class PackageError(TinyLlavaError, OSError):
    """A public package that could not be downloaded, or has unexpected content."""


class OutputError(TinyLlavaError, OSError):
    """A file or folder that cannot be written: locked by another process, read-only, or on a full disk."""


class TrainingError(TinyLlavaError, RuntimeError):
    """A training run that cannot continue: a loss that is NaN, a batch without a supervised token."""


class LostProcessError(TrainingError):
    """Another process of a run has ended, or does not answer."""


class JudgeError(TinyLlavaError, RuntimeError):
    """A judge model that did not answer, or answered in a form that cannot be read."""


class MissingExtraError(TinyLlavaError, ImportError):
    """A package of an extra that is not installed."""


def require(module: str, extra: str, purpose: str) -> None:
    """Check that a package of an extra is installed, before the work that needs it.

    Args:
        module: import name, such as ``matplotlib``.
        extra: the extra of this project that installs it.
        purpose: what it is used for, as in "draws the figures".

    Raises:
        MissingExtraError: it is not installed; the message has the command that installs it.
    """
    if find_spec(module) is None:
        raise MissingExtraError(
            f"{module}, which {purpose}, is not installed. Install it with: pip install 'tinyllava[{extra}]'"
        )


class Stopped(KeyboardInterrupt):
    """Ended by a signal, such as Ctrl-C; the work so far is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def first_line(message: object) -> str:
    """Return the first line of a library's error message."""
    return str(message).strip().partition("\n")[0]


def look_up(table: Mapping[str, T], name: str, noun: str) -> T:
    """Return ``table[name]``.

    Raises:
        UnknownNameError: unknown name; the message lists the known names and the closest one.
    """
    if name in table:
        return table[name]
    message = f"unknown {noun} {name!r}; known: {', '.join(table)}."
    by_lower = {known.lower(): known for known in table}
    close = get_close_matches(name.lower(), by_lower, n=1)
    if close:
        message += f" Did you mean {by_lower[close[0]]!r}?"
    raise UnknownNameError(message)
