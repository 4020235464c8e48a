"""Folders with a file cut short or a value gone: the file is named, with what to do about it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyllava.config import ModelConfig
from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.parts.folders import check_checkpoint
from tinyllava.parts.language import find_language_model
from tinyllava.parts.vision import find_vision_encoder


def cut(name: str) -> Callable[[Path], None]:
    """Leave the first thirty bytes of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:30]) and None


def without(key: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))

    return drop


def pointer(name: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / name).write_bytes(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 9\n"
        )

    return put


PARTS = {
    "llm config": ("phi", cut("config.json"), r"config\.json: not JSON .*; download the folder again"),
    "llm tokenizer": ("phi", cut("tokenizer_config.json"), r"tokenizer_config\.json: not JSON"),
    "llm value": ("phi", without("num_attention_heads"), r"config\.json: lacks 'num_attention_heads'"),
    "llm weights": ("phi", cut("model.safetensors"), r"model\.safetensors: is truncated"),
    "llm pointer": ("phi", pointer("model.safetensors"), r"model\.safetensors: is a pointer of Git LFS"),
    "encoder config": ("siglip", cut("config.json"), r"config\.json: not JSON"),
    "encoder weights": ("siglip", cut("model.safetensors"), r"model\.safetensors: is truncated"),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_damaged_part_is_named(parts: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, damage, message = PARTS[case]
    folder = tmp_path / "part"
    shutil.copytree(parts[kind], folder)
    find = find_vision_encoder if kind == "siglip" else find_language_model
    assert find(str(folder)).path == str(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        find(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_checkpoints_settings_cut_short(parts: dict[str, Path], tmp_path: Path, name: str) -> None:
    config = ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts["llama"]))
    assemble(config)[0].save_pretrained(tmp_path, max_shard_size="60KB")
    check_checkpoint(tmp_path)
    cut(name)(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name}: not JSON .*; download the folder again"):
        check_checkpoint(tmp_path)


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def holding(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


SETTINGS = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
CHECKPOINTS = {
    **{
        f"no {name}": (gone(name), rf"{name}: missing or empty; copy the folder again")
        for name in (
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        )
    },
    **{f"cut {name}": (cut(name), rf"{name}: not JSON") for name in SETTINGS},
    "empty template": (holding("chat_template.jinja", ""), r"chat_template\.jinja: missing or empty"),
    "broken template": (holding("chat_template.jinja", "{% for"), r"chat_template\.jinja: no chat template"),
    "foreign tokenizer": (holding("tokenizer.json", "{}"), r"its tokenizer or image processor cannot be op"),
}


GENERATION = {
    "cut": (cut("generation_config.json"), r"generation_config\.json: not JSON"),
    "list": (holding("generation_config.json", "[2]"), r"generation_config\.json: expected an object"),
    "no end": (holding("generation_config.json", "{}"), r"eos_token_id = None: .* or delete it"),
    "word": (holding("generation_config.json", '{"eos_token_id": ["</s>"]}'), r"eos_token_id = \['</s>'\]"),
}


@pytest.fixture(scope="module")
def checkpoint(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["llama"]))
    for part in assemble(config):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", GENERATION)
def test_damaged_settings_of_generation_are_named(checkpoint: Path, tmp_path: Path, case: str) -> None:
    damage, message = GENERATION[case]
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    damage(folder)
    for look in (check_checkpoint, open_checkpoint):
        with pytest.raises(CheckpointError, match=message) as caught:
            look(folder)
        assert str(folder) in str(caught.value)


def test_without_settings_of_generation_the_tokenizers_ids_do(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    gone("generation_config.json")(folder)
    with_file, processor = open_checkpoint(checkpoint)
    without, _ = open_checkpoint(folder)
    settings = [model.generation_config.to_diff_dict() for model in (with_file, without)]
    for values in settings:
        values.pop("_from_model_config", None)
    assert settings[0] == settings[1]
    assert without.generation_config.eos_token_id == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_damaged_file_of_the_processor_is_named(parts: dict[str, Path], tmp_path: Path, case: str) -> None:
    damage, message = CHECKPOINTS[case]
    config = ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["llama"]))
    model, processor = assemble(config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    open_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
