"""Training is looked at as a command shows it; that a library call is silent is a test of its own."""

from collections.abc import Iterator

import pytest

from tinyllava.data.reporting import reporting


@pytest.fixture(autouse=True)
def shown() -> Iterator[None]:
    with reporting(is_shown=True):
        yield
