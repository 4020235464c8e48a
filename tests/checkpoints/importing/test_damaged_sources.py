"""Sources as they arrive after a download that went wrong: each error names the file and the fix."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layouts import Toy, bench_config, make_toy, write_bench, write_factory, write_json
from tinyllava.cli import main

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4983497056\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"
WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda source: (source / name).write_bytes(content) and None


def halve(name: str) -> Callable[[Path], None]:
    return lambda source: put(name, (source / name).read_bytes()[: (source / name).stat().st_size // 2])(
        source
    )


def change(**changes: Any) -> Callable[[Path], None]:
    """Change settings of config.json; None takes one away."""

    def edit(source: Path) -> None:
        config = json.loads((source / "config.json").read_text()) | changes
        write_json(source / "config.json", {key: value for key, value in config.items() if value is not None})

    return edit


def refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *expected: str, arguments: Any = ()
) -> None:
    out = tmp_path / "out"
    assert main(["import", str(source), str(out), *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert [text for text in expected if text not in message] == [], message
    assert "Traceback" not in message
    assert sorted(path.name for path in tmp_path.glob("out*")) == []


BENCH = {
    "pointer": (put(WEIGHTS, LFS), WEIGHTS, "is a pointer of Git LFS", "`git lfs pull`"),
    "page as weights": (put(WEIGHTS, PAGE), WEIGHTS, "is a web page", "download it again"),
    "cut weights": (halve(WEIGHTS), WEIGHTS, "is truncated: ", " of at least ", "download it again"),
    "no weights": (put(WEIGHTS, b""), WEIGHTS, "is empty", "download it again"),
    "page as config": (put("config.json", PAGE), "config.json: is a web page", "download it again"),
    "pointer as tokenizer": (put("tokenizer.json", LFS), "tokenizer.json: is a pointer of Git LFS"),
    "page as index": (put(INDEX, PAGE), f"{INDEX}: is a web page"),
    "empty index": (put(INDEX, b"{}"), f"{INDEX}: weight_map (the file of each tensor) is missing"),
    "list as index": (put(INDEX, b'{"weight_map": ["a"]}'), f"{INDEX}: weight_map"),
    "page as encoder's config": (put("some_tower/config.json", PAGE), "some_tower/config.json: is a web"),
    "heads": (change(num_attention_heads=5), "source: config.json of the language model", "heads (5)"),
    "layers": (change(num_hidden_layers="two"), "config.json of the language model", "'num_hidden_layers'"),
    "feature layer": (change(mm_vision_select_layer="last"), "mm_vision_select_layer = 'last'; expected"),
}


FOLDERS = {
    "pointer": (put("connector/pytorch_model.bin", LFS), "connector/pytorch_model.bin: is a pointer of Git"),
    "page": (put("connector/pytorch_model.bin", PAGE), "connector/pytorch_model.bin: is a web page"),
    "cut": (halve("connector/pytorch_model.bin"), "connector/pytorch_model.bin: is truncated"),
    "junk": (put("connector/pytorch_model.bin", b"junk" * 99), "connector/pytorch_model.bin: is damaged, or"),
    "text": (change(text_config=[1]), "config.json has no text_config"),
    "vision": (change(vision_config="x", text_config=1), "no text_config and no vision_config"),
    "layer": (change(vision_feature_layer=[-2]), "vision_feature_layer = [-2]; expected a whole number"),
    "queries": (change(connector_type="resampler", num_queries="many"), "num_queries = 'many'; expected a"),
}


@pytest.mark.parametrize(
    ("layout", "damage"), [("bench", name) for name in BENCH] + [("three folders", name) for name in FOLDERS]
)
def test_a_damaged_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, damage: str
) -> None:
    toy, source = make_toy(tmp_path), tmp_path / "source"
    if layout == "bench":
        write_bench(toy, source, num_shards=1)
    else:
        write_factory(toy, source, three_folders=True)
    spoil, *expected = (BENCH if layout == "bench" else FOLDERS)[damage]
    spoil(source)
    refused(source, tmp_path, capsys, *expected)


def spoil_tensors(source: Path, spoil: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(source / WEIGHTS)
    spoil(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / INDEX).unlink()
    (source / WEIGHTS).unlink()


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    tensors["model.layers.1.extra"] = torch.ones(3)
    del tensors["model.norm.weight"]


def reshape_connector(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.mm_projector.0.weight"] = torch.ones(3, 3)


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


def break_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


TENSORS = {
    "all faults of a part at once": (
        reshape,
        "language model",
        "1 tensor without a counterpart in the model: model.layers.1.extra",
        "1 tensor missing: model.norm.weight",
        "model.layers.1.mlp.up_proj.weight [3, 3], not [64, 32]",
    ),
    "connector": (reshape_connector, "connector mlp", "linear_1.weight [3, 3], not [32, 32]"),
    "codes": (quantise, "1 tensor of type torch.int8", "quantised", "lm_head.weight"),
    "not a number": (break_numbers, "1 tensor with values that are NaN or infinite", "norm.weight"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_every_tensor_that_does_not_fit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    spoil, *expected = TENSORS[fault]
    source = write_bench(make_toy(tmp_path), tmp_path / "source", num_shards=1)
    spoil_tensors(source, spoil)
    refused(source, tmp_path, capsys, *expected)


def test_weights_beyond_the_range_of_the_type_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_bench(make_toy(tmp_path), tmp_path / "source", num_shards=1)
    spoil_tensors(source, lambda tensors: tensors["model.norm.weight"].mul_(1e6))
    refused(source, tmp_path, capsys, "norm.weight", "--dtype", arguments=("--dtype", "float16"))
    assert main(["import", str(source), str(tmp_path / "out")]) == 0


def write_stage_1(toy: Toy, folder: Path) -> Path:
    write_json(folder / "config.json", bench_config(toy))
    torch.save({f"model.mm_projector.{n}": t for n, t in toy.connector.items()}, folder / "mm_projector.bin")
    return folder


def test_a_lora_folder_without_its_other_file_or_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = make_toy(tmp_path)
    source = write_stage_1(toy, tmp_path / "source")
    parts = ("--language-model", toy.language_folder, "--vision-encoder", toy.vision_folder)
    write_json(source / "adapter_config.json", {"peft_type": "LORA"})
    save_file({"x": torch.ones(1)}, source / "adapter_model.safetensors")
    refused(source, tmp_path, capsys, "non_lora_trainables.bin: is missing", arguments=parts)
    (source / "mm_projector.bin").rename(source / "non_lora_trainables.bin")
    refused(source, tmp_path, capsys, "adapter_config.json: r = None; expected", arguments=parts)
    put("adapter_model.safetensors", LFS)(source)
    refused(source, tmp_path, capsys, "adapter_model.safetensors: is a pointer of Git LFS", arguments=parts)


def test_places_that_cannot_be_written_are_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["import", str(tmp_path), str(place)]) == 2
        assert f"{tmp_path / 'file'} is a file; choose a new folder" in capsys.readouterr().err


def test_a_stopped_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyllava.checkpoints.importing import import_checkpoint
    from tinyllava.model.processing import TinyLlavaProcessor

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    source = write_bench(make_toy(tmp_path), tmp_path / "source")
    monkeypatch.setattr(TinyLlavaProcessor, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.glob("out*")) == []
