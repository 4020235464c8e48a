"""Recipes and runs of a user's own file."""

import sys
from pathlib import Path

import pytest

from tinyllava.errors import ConfigError, UnknownNameError
from tinyllava.recipes.variants import find_run, variant

FILE = """
from dataclasses import replace
from tinyllava.config import FULL
from tinyllava.recipes.paper import BASE
from tinyllava.recipes.recipe import Recipe
from tinyllava.recipes.variants import make_run, variant

finetune = replace(BASE.stages["finetune"], vision_encoder=FULL)
OPEN = replace(BASE, name="open", stages=BASE.stages | {"finetune": finetune})
RUN = make_run(OPEN, "Sig", "TL")

def long_run():
    return replace(variant("base-C-TL"), name="long")

def no_run():
    return 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_recipe.py"
    path.write_text(FILE)
    return path


def test_a_recipe_takes_its_parts_from_the_name(file: Path) -> None:
    run = find_run(f"{file}:OPEN-C-Phi-ShareGPT4V")
    assert run.stages["finetune"].vision_encoder.kind == "full"
    assert run.stages["finetune"].data.records == ("ShareGPT4V-mix-665k",)
    assert (run.name, run.model.language_model) == ("TinyLLaVA-open-C-Phi-ShareGPT4V", "Phi-2")


def test_a_run_and_a_function_that_returns_one(file: Path) -> None:
    assert find_run(f"{file}:RUN") == find_run(f"{file}:OPEN-Sig-TL")
    assert find_run(f"{file}:long_run").name == "long"


def test_a_variant_needs_no_file() -> None:
    assert find_run("share-Sig-Phi") == variant("share-Sig-Phi")


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("OPN-C-TL", UnknownNameError, "Did you mean 'OPEN'"),
        ("make_run", UnknownNameError, "known: BASE, OPEN, RUN, long_run, no_run"),
        ("OPEN", UnknownNameError, "RECIPE-ENCODER-LLM"),
        ("RUN-C-TL", ConfigError, "complete run"),
        ("no_run", ConfigError, "returned int"),
    ],
)
def test_what_is_wrong_is_said(file: Path, name: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        find_run(f"{file}:{name}")


@pytest.mark.parametrize(
    ("text", "says"), [("def (", "line 1"), ("import nowhere_to_be_found", "nowhere_to_be")]
)
def test_a_file_that_fails_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        find_run(f"{path}:X")
    with pytest.raises(ConfigError, match="no such file"):
        find_run(f"{tmp_path / 'none.py'}:X")


def test_a_file_imports_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python does for a file that it is started with; a grid's file is executed by the same code."""
    (tmp_path / "rates_of_mine.py").write_text("RATE = 3e-5\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from rates_of_mine import RATE\n"
        "from tinyllava.recipes.variants import variant\n"
        "MINE = replace(variant('base-C-TL'), name=str(RATE))\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert find_run(f"{tmp_path / 'mine.py'}:MINE").name == "3e-05"
