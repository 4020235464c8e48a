"""Names of parts become one value, or one error for each that cannot be had."""

from pathlib import Path

import pytest

from tinyllava.config import ModelConfig
from tinyllava.errors import CheckpointError, ConfigError, UnknownNameError
from tinyllava.parts.resolve import find_parts, known_parts, resolve


def test_names_become_parts_that_fit_each_other() -> None:
    parts = resolve(
        ModelConfig(
            vision_encoder="Sig",
            language_model="Phi-2",
            connector="pixel_shuffle",
            connector_options={"block": 9},
        )
    )
    assert (parts.encoder.name, parts.connector.name, parts.language.name) == (
        "SigLIP",
        "pixel_shuffle",
        "Phi-2",
    )
    assert (parts.num_patches, parts.num_image_tokens, parts.template.name) == (729, 9, "phi")
    assert dict(parts.connector_options) == {"block": 9}


def test_a_template_of_the_config_goes_before_the_language_models_own() -> None:
    model = ModelConfig(vision_encoder="CLIP", language_model="TinyLlama", template="chatml")
    assert resolve(model).template.name == "chatml"
    assert "<|im_start|>" in resolve(model).template.text


def test_folders_are_parts_too(parts: dict[str, Path]) -> None:
    found = resolve(ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts["llama"])))
    assert (found.encoder.path, found.language.path) == (str(parts["clip"]), str(parts["llama"]))
    assert (found.encoder.family, found.language.family) == ("clip_vision_model", "llama")


def test_every_part_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    found = find_parts(
        ModelConfig(vision_encoder="CLOP", language_model=str(tmp_path), connector="mlq", template="phy")
    )
    assert {name: type(error) for name, error in found.errors.items()} == {
        "vision_encoder": UnknownNameError,
        "language_model": CheckpointError,
        "connector": UnknownNameError,
        "template": UnknownNameError,
    }
    with pytest.raises(ConfigError, match=r"model\.vision_encoder: empty"):
        resolve(ModelConfig(vision_encoder="", language_model="TinyLlama"))


def test_rows_of_the_tables_are_known_by_name_abbreviation_and_path() -> None:
    encoder, language = known_parts("google/siglip-so400m-patch14-384", "TL")
    assert encoder is not None
    assert language is not None
    assert (encoder.name, language.name) == ("SigLIP", "TinyLlama")
    both, _ = known_parts("DINOv2+SigLIP", "")
    assert both is not None
    assert len(both.members) == 2
    assert known_parts("nowhere/nothing", "nothing") == (None, None)
