"""The guide to one's own parts, followed literally: its examples run one after the other."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from documents import ROOT, blocks
from tinyllava.cli import main
from tinyllava.connectors import CONNECTORS, build_connector, num_tokens
from tinyllava.language_models import LANGUAGE_MODELS
from tinyllava.vision_encoders import VISION_ENCODERS

EXAMPLES = blocks((ROOT / "docs" / "guides" / "models.md").read_text(encoding="utf-8"), "python")


@pytest.fixture
def followed() -> Iterator[dict[str, Any]]:
    """The names that the examples leave behind; the tables are put back afterwards."""
    before = [(table, set(table)) for table in (CONNECTORS, LANGUAGE_MODELS, VISION_ENCODERS)]
    names: dict[str, Any] = {"__name__": "guide"}
    for example in EXAMPLES:
        exec(compile(example, "docs/guides/models.md", "exec"), names)
    yield names
    for table, known in before:
        for name in set(table) - known:
            del table[name]


def test_the_examples_hold(followed: dict[str, Any]) -> None:
    assert "DINOv2-small" in VISION_ENCODERS
    assert "Qwen3-4B" in LANGUAGE_MODELS
    assert followed["SMALL"].model.language_model == "SmolLM2-360M"


def test_the_connector_is_built_by_its_name(
    followed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ModuleType("tinyllava.connectors.mean")
    file.Mean = followed["Mean"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, file.__name__, file)
    module = build_connector("mean", vision_width=8, language_width=16, num_patches=4, options={})
    assert sum(p.numel() for p in module.parameters()) == CONNECTORS["mean"].num_parameters(8, 16, {})
    assert num_tokens("mean", 4, {}) == 1


def test_the_recipe_file_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my_recipe.py"
    file.write_text(EXAMPLES[-1])
    assert main(["show", f"{file}:GENTLE-Sig-Phi"]) == 0
    assert "from layer 20" in capsys.readouterr().out
    assert main(["show", f"{file}:SMALL"]) == 0
    assert "SmolLM2-360M" in capsys.readouterr().out
