"""Figures 4 to 8 as values: each panel varies one axis and nothing else."""

from dataclasses import asdict, replace

import pytest

from tinyllava.config import Run
from tinyllava.recipes.paper import PUBLISHED, as_published
from tinyllava.recipes.variants import ABLATIONS, RECIPES, variant

# What each figure's caption says it varies, as the fields of a run that may differ inside a panel.
VARIED = {
    "figure-4": {"model.language_model"},
    "figure-5": {"model.vision_encoder"},
    "figure-6": {"model.connector", "model.connector_options"},
    "figure-7": {"data"},
    "figure-8": {"recipe"},
}


def differing(one: Run, other: Run) -> set[str]:
    """The axes in which two runs differ."""
    found = {f"model.{key}" for key, value in asdict(one.model).items() if value != asdict(other.model)[key]}
    found |= {"recipe"} if one.recipe != other.recipe else set()
    without = [
        [replace(stage, data=stage.data.__class__()) for stage in run.stages.values()] for run in (one, other)
    ]
    if one.recipe == other.recipe:
        assert without[0] == without[1]
        found |= {"data"} if one.stages != other.stages else set()
    return found


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_panel_varies_one_axis(name: str) -> None:
    for panel in ABLATIONS[name].panels.values():
        first, *others = panel.values()
        assert others
        for other in others:
            assert differing(first, other) == VARIED[name]


def test_figure_4_trains_six_variants_and_figure_5_inherits_them() -> None:
    four, five = ABLATIONS["figure-4"], ABLATIONS["figure-5"]
    assert len(four.runs) == 6
    assert {run.name for run in four.runs} == {run.name for run in five.runs}
    assert list(four.panels) == ["CLIP", "SigLIP"]
    assert list(five.panels) == ["TinyLlama", "StableLM-2", "Phi-2"]


@pytest.mark.parametrize("code", PUBLISHED)
@pytest.mark.parametrize("recipe", RECIPES)
def test_published_settings_leave_what_the_paper_says_alone(code: str, recipe: str) -> None:
    run = variant(f"{recipe}-Sig-Phi")
    published = as_published(run, code)
    for name, stage in published.stages.items():
        own = run.stages[name]
        assert stage.loss_norm == "micro"
        assert replace(stage, loss_norm=own.loss_norm, max_length_tokens=own.max_length_tokens) == own
    assert published.name.endswith(f"-as-{code}")


def test_bench_has_the_length_that_exceeds_phi() -> None:
    assert as_published(variant("base-Sig-Phi"), "bench").stages["finetune"].max_length_tokens == 3072
    assert as_published(variant("base-Sig-Phi"), "factory").stages["finetune"].max_length_tokens == 2048
    assert as_published(variant("share-Sig-Phi"), "factory").stages["finetune"].max_length_tokens == 3072
