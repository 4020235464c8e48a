"""The exceptions that a user of tinyllava meets: each says what is wrong, where, and what to do about it."""


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
    """A picture that is missing, cannot be decoded, or is not of a kind that the model can take."""


class CheckpointError(TinyLlavaError, ValueError):
    """A checkpoint folder that is incomplete, of an unknown layout, or does not fit what is asked of it."""


class PackageError(TinyLlavaError, OSError):
    """A public package that could not be fetched, or whose content is not the expected one."""


class TrainingError(TinyLlavaError, RuntimeError):
    """A training run that cannot go on: a loss that is not a number, a batch without a supervised token."""


class JudgeError(TinyLlavaError, RuntimeError):
    """A judge model that did not answer, or answered in a form that cannot be read."""
