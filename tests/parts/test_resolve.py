"""Names of parts become one value, or one error for each that cannot be had."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.file_download import repo_folder_name
from safetensors.torch import load_file

from tinyllava.config import ModelConfig
from tinyllava.errors import CheckpointError, ConfigError, UnknownNameError
from tinyllava.parts import templates
from tinyllava.parts.resolve import find_parts, known_parts, resolve
from tinyllava.parts.templates import as_published, read_template, template_names
from tinyllava.planning.sizes import language_model_size, vision_encoder_size
from training_toys import toy_run, write_run


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


def cache(folder: Path, repository: str, source: Path) -> None:
    """Put a folder into a cache of the hub, laid out by huggingface_hub's own rules."""
    place = folder / repo_folder_name(repo_id=repository, repo_type="model")
    commit = "0" * 40
    shutil.copytree(source, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)


def test_a_hub_path_is_a_part_out_of_the_cache(
    parts: dict[str, Path], records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path / "hub", "somebody/little-siglip", parts["siglip"])
    cache(tmp_path / "hub", "somebody/little-llama", parts["llama"])
    model = ModelConfig(vision_encoder="somebody/little-siglip", language_model="somebody/little-llama")
    run = toy_run(parts, records, tmp_path / "run", model=model)
    stages = {name: replace(stage, max_steps=1) for name, stage in run.stages.items()}
    named = write_run(replace(run, stages=stages), tmp_path)
    # A process of its own: the library reads these variables when it is imported.
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tinyllava", "train", named]
    trained = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    kept = load_file(tmp_path / "run" / "model" / "model.safetensors")
    published = load_file(parts["siglip"] / "model.safetensors")
    name = "encoder.layers.0.mlp.fc1.weight"
    (own,) = (value for key, value in published.items() if key.endswith(name))
    assert torch.equal(kept[f"model.vision_tower.{name}"], own)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found, folders = (
        resolve(ModelConfig(vision_encoder=encoder, language_model=language))
        for encoder, language in (
            (model.vision_encoder, model.language_model),
            (str(parts["siglip"]), str(parts["llama"])),
        )
    )
    hub = {"name": "little-siglip", "abbreviation": "little-siglip", "path": "somebody/little-siglip"}
    assert found.encoder == replace(folders.encoder, **hub)
    assert (found.language.name, found.language.path) == ("little-llama", "somebody/little-llama")
    assert vision_encoder_size(found.encoder) == vision_encoder_size(folders.encoder)
    assert language_model_size(found.language) == language_model_size(folders.language)
    with pytest.raises(CheckpointError, match="'somebody/nothing': no such folder here"):
        resolve(replace(model, language_model="somebody/nothing"))


def test_a_hub_path_in_the_tables_is_its_row() -> None:
    found = resolve(ModelConfig(vision_encoder="facebook/dinov2-large", language_model="microsoft/phi-2"))
    assert (found.encoder.name, found.language.name) == ("DINOv2", "Phi-2")


@pytest.mark.parametrize("name", template_names())
def test_a_template_is_one_text_whatever_its_parts_are_written_in(name: str) -> None:
    text = read_template(name)
    assert "include" not in text  # it is saved into checkpoints, which hold no other file of ours
    assert text.count("{%- macro said(content) -%}") == (name != "caption")
    assert text.count("{%- generation -%}") == text.count("{%- endgeneration -%}") == 1
    assert (as_published(text) != text) == (name not in ("chatml", "llama3"))
    written = (Path(templates.__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")
    assert "macro said" not in written  # said.part has it
