"""Change process-wide state only while a call of this package runs.

Messages and bars of other libraries are suppressed, and the random state is restored. Each is a context
manager, and also works as a decorator.
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging


@contextmanager
def without_messages_of(name: str) -> Iterator[None]:
    """Drop messages of the logger with that name inside the block.

    A filter, not a level: it costs microseconds, so it may surround one product of a layer.
    """
    logger, silent = logging.getLogger(name), _Silent()
    logger.addFilter(silent)
    try:
        yield
    finally:
        logger.removeFilter(silent)


class _Silent(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return False


def quiet_bitsandbytes_import() -> AbstractContextManager[None]:
    """Return a block for importing bitsandbytes, or a package that imports it (peft, transformers' Trainer).

    On CPUs that multiply in bf16 it warns of a missing kernel, which nothing here uses.
    """
    return without_messages_of("bitsandbytes.backends.cpu.ops")


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hide transformers' bars for loading and writing weights; those of downloads from the hub stay."""
    previous = transformers_logging.set_tqdm_hook(_hidden_bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _hidden_bar(make: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    return make(*args, **{**options, "disable": True})


@contextmanager
def transformers_errors_only() -> Iterator[None]:
    """Let transformers log errors alone, where its warnings are about what is done on purpose."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Give the caller's random numbers back as they were: those of Python, NumPy and torch."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
