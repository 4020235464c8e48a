"""Every reason for which an import stops, and that it says what to do."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import layouts
import toys
from layouts import change_tensors, make_toy, write_bench, write_factory
from tinyllava.checkpoints.importing import Given, import_checkpoint
from tinyllava.checkpoints.importing.tensors import read_file, read_folder
from tinyllava.cli import main
from tinyllava.errors import CheckpointError, UnknownNameError


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write_bench(make_toy(tmp_path), tmp_path / "source", num_shards=1)


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    return write_factory(make_toy(tmp_path), tmp_path / "source")


def refused(source: Path, match: str, **given: Any) -> None:
    with pytest.raises(CheckpointError, match=match):
        import_checkpoint(source, source.parent / "out", given=Given(**given))
    assert not (source.parent / "out").exists()


def edit(source: Path, **changes: Any) -> None:
    path = source / "config.json"
    layouts.write_json(path, json.loads(path.read_text()) | changes)


WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.image_newline", "1 tensor without a counterpart in the model: model.image_newline"),
        (
            "model.layers.0.self_attn.q_proj.bias",
            "without a counterpart in the model: model.layers.0.self_attn.q_proj.bias",
        ),
        (
            "model.layers.9.mlp.up_proj.weight",
            "without a counterpart in the model: model.layers.9.mlp.up_proj.weight",
        ),
        ("model.vision_tower.vision_tower.vision_model.extra", "vision encoder: .*extra"),
        (
            "model.mm_projector.4.weight",
            "connector mlp .*1 tensor without a counterpart in the model: 4.weight",
        ),
        ("optimizer.state", "without a counterpart in the model: optimizer.state"),
    ],
)
def test_a_tensor_left_over(bench: Path, name: str, message: str) -> None:
    change_tensors(bench / WEIGHTS, add={name: torch.ones(2)})
    refused(bench, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            "language model: .*1 tensor missing: model.layers.1.mlp.up_proj",
        ),
        ("lm_head.weight", "language model: .*1 tensor missing: lm_head.weight"),
        ("model.mm_projector.2.bias", "connector mlp .*1 tensor missing: linear_2.bias"),
        (
            "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
            "encoder: .*1 tensor missing: .*pre_layrnorm.bias",
        ),
    ],
)
def test_a_tensor_that_is_missing(bench: Path, name: str, message: str) -> None:
    change_tensors(bench / WEIGHTS, remove=name)
    index = bench / "model.safetensors.index.json"
    weight_map = {k: v for k, v in json.loads(index.read_text())["weight_map"].items() if k != name}
    layouts.write_json(index, {"weight_map": weight_map})
    refused(bench, message)


def test_a_tensor_of_another_size(bench: Path) -> None:
    edit(bench, intermediate_size=48)
    refused(
        bench, r"6 tensors of the wrong shape: model.layers.0.mlp.down_proj.weight \[32, 64\], not \[32, 48\]"
    )


def test_constants_that_the_model_would_compute_otherwise(bench: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(bench / WEIGHTS, add={name: torch.tensor([1.0, 0.5, 0.1, 0.01])})
    refused(bench, f"the stored constant {name} does not match config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type = 'spatial_unpad'.*allowed: 'flat'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature = 'cls'; allowed"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'.*allowed: pad, square"),
        ({"mm_projector_type": "mlp3x_gelu"}, "connector 'mlp3x_gelu' cannot be imported; allowed: linear"),
        (
            {"mm_projector_type": "resampler"},
            r"connector bench_resampler .*without a counterpart in the model: 0.bias.*missing: layers",
        ),
        ({"mm_vision_select_layer": -9}, "feature layer -9 of 4 layers; allowed: 1 to 4"),
        (
            {"model_type": "tiny_llava_mamba"},
            "model_type 'tiny_llava_mamba', which is not a known layout. Known layouts: Tiny",
        ),
        ({"model_type": "tinyllava", "connector": "mlp"}, "is already a tinyllava checkpoint"),
        ({"tie_word_embeddings": True}, "ties the head to the embedding.*differ"),
    ],
)
def test_settings_of_tinyllavabench(bench: Path, changes: dict[str, Any], message: str) -> None:
    edit(bench, **changes)
    refused(bench, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_model_name_or_path2": "facebook/dinov2-large"}, "two vision encoders"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy 'cls'; allowed: patch"),
        ({"connector_type": "mof_mlp"}, "connector 'mof_mlp' cannot be imported"),
        ({"text_config": None}, "config.json has no text_config"),
        ({"text_config": {"model_type": "openelm"}}, "transformers has no language model 'openelm'"),
        (
            {"vision_config": {"model_type": "mamba_vision"}},
            "model_type 'mamba_vision' cannot be imported; allowed",
        ),
    ],
)
def test_settings_of_factory(factory: Path, changes: dict[str, Any], message: str) -> None:
    edit(factory, **changes)
    refused(factory, message)


def test_a_language_model_that_transformers_does_not_have(factory: Path) -> None:
    edit(factory, text_config={"model_type": "openelm"})
    refused(factory, "transformers has no language model 'openelm'", template="llama")


def test_parts_that_are_neither_here_nor_on_a_network(tmp_path: Path) -> None:
    source = write_bench(make_toy(tmp_path), tmp_path / "source", with_encoder=False)
    refused(source, r"needs its vision encoder: 'owner/not-there': no such folder here.*--vision-encoder DIR")
    refused(source, "--vision-encoder nowhere: no such folder", vision_encoder=Path("nowhere"))
    edit(source, mm_vision_tower=None)
    refused(source, r"does not name its vision encoder.*--vision-encoder DIR")
    with pytest.raises(
        CheckpointError, match="'owner/model': no such folder here, and it could not be downloaded"
    ):
        import_checkpoint("owner/model", tmp_path / "out")


def test_a_siglip_of_which_no_layer_was_removed_is_not_llava_nexts(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama", "siglip")
    source = write_bench(toy, tmp_path / "source", model_type="llava_llama", num_shards=1)
    last = {n: t for n, t in toy.vision.items() if ".layers.3." in n}
    whole = {f"model.vision_tower.vision_tower.{n}": t for n, t in last.items()}
    change_tensors(source / "model-00001-of-00001.safetensors", add=whole)
    (source / "model.safetensors.index.json").unlink()
    (source / "model-00001-of-00001.safetensors").rename(source / "model.safetensors")
    refused(source, "has all 4 layers of its SigLIP encoder")


def test_pickles_that_hold_more_than_tensors(factory: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harm",))

    (factory / "model.safetensors").unlink()
    torch.save({"weight": Harm()}, factory / "pytorch_model.bin")
    refused(factory, "contains Python objects, which could run code.*safetensors")
    (factory / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(), protocol=2))
    refused(factory, "pytorch_model.bin")
    assert not (tmp_path / "harm").exists()
    torch.save([torch.ones(1)], factory / "pytorch_model.bin")
    refused(factory, "expected tensors by name, found list")
    torch.save({"weight": torch.ones(1), "epoch": 3}, factory / "pytorch_model.bin")
    refused(factory, "entries that are not tensors: epoch")


def test_weight_files_that_are_incomplete(bench: Path) -> None:
    index = bench / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    layouts.write_json(index, {"weight_map": weight_map | {"model.new.weight": WEIGHTS}})
    refused(bench, "names tensors that no shard has: model.new.weight")
    save_file({"lm_head.weight": torch.ones(1)}, bench / "second.safetensors")
    layouts.write_json(index, {"weight_map": weight_map | {"lm_head.weight": "second.safetensors"}})
    refused(bench, "tensors that another shard has too: lm_head.weight")
    (bench / WEIGHTS).write_bytes(b"not safetensors at all")
    refused(bench, "cannot be read.*Download the file again")
    (bench / WEIGHTS).unlink()
    refused(bench, f"weight files are missing: {WEIGHTS}")
    index.unlink()
    refused(bench, "no weights; expected one of")
    with pytest.raises(CheckpointError, match="no weights"):
        read_folder(bench)


def test_folders_of_factory_that_are_incomplete(tmp_path: Path) -> None:
    source = write_factory(make_toy(tmp_path), tmp_path / "source", three_folders=True)
    (source / "connector").rename(tmp_path / "elsewhere")
    refused(source, "no weights, and no folders connector")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = True, which is not supported"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
        ({"r": 3}, r"do not fit it with rank 3 = r"),
    ],
)
def test_adapters_of_another_kind(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = write_adapter(tmp_path, **changes)
    refused(source, message)


def write_adapter(tmp_path: Path, **changes: Any) -> Path:
    source = write_factory(make_toy(tmp_path), tmp_path / "source", three_folders=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "modules_to_save": None}
    layouts.write_json(source / "adapter_config.json", config | changes)
    name = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    adapter = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    torch.save(adapter, source / "adapter_model.bin")
    return source


def test_adapters_with_tensors_left_over(tmp_path: Path) -> None:
    source = write_adapter(tmp_path)
    adapter = read_file(source / "adapter_model.bin")
    torch.save(
        adapter | {"base_model.model.other.lora_A.weight": torch.ones(2, 2)}, source / "adapter_model.bin"
    )
    refused(source, "adapter: 1 tensor without a counterpart in the model: other.lora_A.weight")
    (source / "adapter_model.bin").unlink()
    refused(source, "adapter_config.json without adapter_model.safetensors")


def test_a_tokenizer_that_does_not_open_or_fit(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    source = write_factory(toy, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    refused(source, r"its tokenizer cannot be opened.*--language-model DIR")
    large = json.loads((toy.language_folder / "tokenizer.json").read_text())
    vocab = large["model"]["vocab"]
    vocab |= {f"more{i}": len(vocab) + i for i in range(9)}
    layouts.write_json(source / "tokenizer.json", large)
    refused(source, r"tokens, but the embedding has only 463 rows.*--language-model DIR")


def test_an_image_processor_of_another_size(factory: Path, tmp_path: Path) -> None:
    other = toys.make_vision_encoder(tmp_path / "other", "clip", image_size_px=42)
    refused(
        factory,
        "makes images of 42 pixels, but the encoder needs 28.*--vision-encoder DIR",
        vision_encoder=other,
    )


def test_wrong_targets_and_names(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="is not empty"):
        import_checkpoint(bench, tmp_path / "full")
    with pytest.raises(UnknownNameError, match=r"unknown template 'lama'.*Did you mean 'llama'"):
        import_checkpoint(bench, tmp_path / "out", given=Given(template="lama"))
    (bench / "config.json").write_text("[]")
    refused(bench, "expected an object, found list")
    (bench / "config.json").write_text("{")
    refused(bench, "not JSON")
    (bench / "config.json").unlink()
    refused(bench, "has no config.json; give a Hugging Face model folder")


def test_command(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(bench), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "TinyLLaVABench, whole model" in printed
    assert "4 tokens per image" in printed
    assert "dropped: 16 tensors" in printed
    assert main(["import", str(bench), str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_help_comes_without_torch() -> None:
    code = (
        "import sys, contextlib\nfrom tinyllava.cli.import_ import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--vision-encoder" in done.stdout


def test_tensors_of_a_form_that_is_not_known_are_not_blamed_on_the_download(tmp_path: Path) -> None:
    """A file that arrived whole is the same the second time."""
    toy = make_toy(tmp_path, "llama", "clip")
    source = write_bench(toy, tmp_path / "source", num_shards=1, num_hidden_layers=3)
    with pytest.raises(
        CheckpointError, match=r"9 tensors missing: .*Compare both files .* the import does not"
    ):
        import_checkpoint(source, tmp_path / "out")
    source = write_bench(toy, tmp_path / "other", num_shards=1, intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"of the wrong shape: .*Compare both files") as caught:
        import_checkpoint(source, tmp_path / "out")
    assert "again" not in str(caught.value)
