"""Keep other libraries' messages out of the way for as long as our own call runs, and no longer."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


@contextmanager
def without_messages_of(name: str) -> Iterator[None]:
    """Drop messages of the logger with that name inside the block.

    A filter, not a level: it costs microseconds, so it may stand around one product of a layer.
    """
    logger, silent = logging.getLogger(name), _Silent()
    logger.addFilter(silent)
    try:
        yield
    finally:
        logger.removeFilter(silent)


def quiet_bitsandbytes_import() -> AbstractContextManager[None]:
    """Return a block in which to import bitsandbytes, or what imports it: peft, and transformers' Trainer.

    On CPUs that multiply in bf16 it warns of a missing kernel, which nothing here uses.
    """
    return without_messages_of("bitsandbytes.backends.cpu.ops")


class _Silent(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return False
