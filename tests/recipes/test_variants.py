"""The recipes as section 4.1.2 words them, and the variants by name."""

from dataclasses import replace

import pytest

from tinyllava.config import FROZEN, FULL, Tune, run_from_json, to_json
from tinyllava.errors import UnknownNameError
from tinyllava.recipes.paper import BASE, SHARE, SHARE_FROZEN
from tinyllava.recipes.variants import RECIPES, VARIANTS, variant

# Table A1: language model, size in billions, resolution.
TABLE_A1 = {
    "base-C-TL": ("TinyLlama", "CLIP"),
    "base-Sig-TL": ("TinyLlama", "SigLIP"),
    "base-C-SLM": ("StableLM-2", "CLIP"),
    "base-Sig-SLM": ("StableLM-2", "SigLIP"),
    "base-C-Phi": ("Phi-2", "CLIP"),
    "base-Sig-Phi": ("Phi-2", "SigLIP"),
    "share-C-TL": ("TinyLlama", "CLIP"),
    "share-Sig-TL": ("TinyLlama", "SigLIP"),
    "share-C-SLM": ("StableLM-2", "CLIP"),
    "share-Sig-SLM": ("StableLM-2", "SigLIP"),
    "share-C-Phi": ("Phi-2", "CLIP"),
    "share-Sig-Phi": ("Phi-2", "SigLIP"),
}


def test_the_twelve_variants_are_the_rows_of_table_a1() -> None:
    assert tuple(TABLE_A1) == VARIANTS


@pytest.mark.parametrize("name", TABLE_A1)
def test_a_variant_has_the_parts_and_the_data_of_its_row(name: str) -> None:
    run = variant(name)
    assert (run.model.language_model, run.model.vision_encoder) == TABLE_A1[name]
    assert run.name == f"TinyLLaVA-{name}"
    assert variant(run.name) == run
    # "We trained base on the LLaVA-1.5 dataset and the share recipe on the ShareGPT4V dataset."
    records = {stage: value.data.records for stage, value in run.stages.items()}
    base = {"pretrain": ("LLaVA-1.5-558k",), "finetune": ("LLaVA-1.5-mix-665k",)}
    share = {
        "pretrain": ("LLaVA-1.5-558k",),
        "share_pretrain": ("ShareGPT4V-PT-1246k",),
        "finetune": ("ShareGPT4V-mix-665k",),
    }
    assert records == (base if name.startswith("base") else share)
    assert list(run.stages) == list(base if name.startswith("base") else share)


def test_base_is_what_section_4_1_2_says() -> None:
    pretrain, finetune = BASE.stages["pretrain"], BASE.stages["finetune"]
    assert (pretrain.vision_encoder, pretrain.connector, pretrain.language_model) == (FROZEN, FULL, FROZEN)
    assert (pretrain.num_epochs, pretrain.learning_rate, pretrain.global_batch_size) == (1, 1e-3, 256)
    assert (finetune.vision_encoder, finetune.connector, finetune.language_model) == (FROZEN, FULL, FULL)
    assert (finetune.num_epochs, finetune.learning_rate, finetune.global_batch_size) == (1, 2e-5, 128)
    assert (pretrain.template, finetune.template) == ("caption", "")


def test_share_is_what_section_4_1_2_says() -> None:
    first, second = SHARE.stages["pretrain"], SHARE.stages["share_pretrain"]
    assert first == BASE.stages["pretrain"]
    assert second.vision_encoder == Tune(kind="from_layer", first_layer=12)
    assert (second.connector, second.language_model) == (FULL, FULL)
    assert (second.num_epochs, second.learning_rate, second.global_batch_size) == (1, 2e-5, 256)
    same = replace(SHARE.stages["finetune"], data=BASE.stages["finetune"].data)
    assert same == BASE.stages["finetune"]


def test_the_factory_form_of_share_differs_in_the_frozen_encoder_only() -> None:
    share, frozen = SHARE.stages, SHARE_FROZEN.stages
    assert {name for name in share if share[name] != frozen[name]} == {"share_pretrain"}
    assert replace(share["share_pretrain"], vision_encoder=FROZEN) == frozen["share_pretrain"]


def test_data_and_connector_are_further_axes() -> None:
    run = variant("base-C-TL-ShareGPT4V-resampler")
    assert [s.data.records for s in run.stages.values()] == [
        ("ShareGPT4V-PT-1246k",),
        ("ShareGPT4V-mix-665k",),
    ]
    assert run.model.connector == "resampler"
    assert run.name == "TinyLLaVA-base-C-TL-ShareGPT4V-resampler"
    assert variant("base-C-TL-LLaVA-1.5-mlp") == variant("base-C-TL")
    # share's connector comes from the base recipe's own pre-training, whatever share itself reads
    on_llava = variant("share-C-TL-LLaVA-1.5")
    assert [s.data.records for s in on_llava.stages.values()] == [
        ("LLaVA-1.5-558k",),
        ("LLaVA-1.5-558k",),
        ("LLaVA-1.5-mix-665k",),
    ]


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("bas-C-TL", "'base'"),
        ("base-Sg-TL", "'Sig'"),
        ("base-C-TLl", "'TL'"),
        ("share", "share-Sig-Phi"),
        ("base-C-TL-resampl", "resampler"),
        ("base-C-TL-LLaVA-2", "LLaVA-1.5"),
    ],
)
def test_a_wrong_name_is_answered_with_the_known_ones(name: str, suggestion: str) -> None:
    with pytest.raises(UnknownNameError, match=suggestion):
        variant(name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_survives_json(recipe: str) -> None:
    run = variant(f"{recipe}-Sig-Phi")
    assert run_from_json(to_json(run)) == run
