from collections.abc import Iterator
from pathlib import Path

import pytest

from served import Served, save_toy, serve


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served(toy: Path) -> Iterator[Served]:
    with serve(toy) as running:
        yield running
