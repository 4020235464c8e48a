"""The exceptions that a user of tinyllava meets: each says what is wrong, where, and what to do about it."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class TinyLlavaError(Exception):
    """Base of every error that a user can cause and mend; the command line prints it without a traceback."""


class UnknownNameError(TinyLlavaError, KeyError):
    """A name that stands in no table: an encoder, a language model, a connector, a variant, a benchmark."""

    __str__ = Exception.__str__  # KeyError would print the message as a quoted repr


class ConfigError(TinyLlavaError, ValueError):
    """A value of a configuration, or a combination of values, that cannot work."""


class DataError(TinyLlavaError, ValueError):
    """A record, a data file or a benchmark file that does not follow its format."""


class ImageError(DataError):
    """An image that is missing, cannot be decoded, or is not of a kind that the model can take."""


class CheckpointError(TinyLlavaError, ValueError):
    """A checkpoint folder that is incomplete, of an unknown layout, or does not fit what is asked of it."""


class PackageError(TinyLlavaError, OSError):
    """A public package that could not be fetched, or whose content is not the expected one."""


class OutputError(TinyLlavaError, OSError):
    """A file or folder that cannot be written: held by another process, read-only, or on a full disk."""


class TrainingError(TinyLlavaError, RuntimeError):
    """A training run that cannot go on: a loss that is not a number, a batch without a supervised token."""


class JudgeError(TinyLlavaError, RuntimeError):
    """A judge model that did not answer, or answered in a form that cannot be read."""


def look_up(table: Mapping[str, T], name: str, noun: str) -> T:
    """Return ``table[name]``.

    Raises:
        UnknownNameError: no such name; the message lists the known ones and the closest.
    """
    if name in table:
        return table[name]
    message = f"unknown {noun} {name!r}; known: {', '.join(table)}."
    by_lower = {known.lower(): known for known in table}
    close = get_close_matches(name.lower(), by_lower, n=1)
    if close:
        message += f" Did you mean {by_lower[close[0]]!r}?"
    raise UnknownNameError(message)
