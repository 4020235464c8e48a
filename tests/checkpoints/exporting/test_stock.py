"""Exported folders in the hands of transformers alone, and every reason for which there is none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from documents import blocks
from layouts import chat_logits, make_checkpoint, make_toy, write_factory
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.checkpoints.exporting.compare import example_image
from tinyllava.checkpoints.importing import import_checkpoint
from tinyllava.cli import main
from tinyllava.conversation import ask
from tinyllava.errors import CheckpointError
from tinyllava.inference.chat import Chat
from tinyllava.model.assemble import open_checkpoint


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize(
    ("language", "vision"),
    [("llama", "clip"), ("llama", "siglip"), ("stablelm", "siglip"), ("chatml", "clip")],
)
def test_transformers_alone_computes_the_same(
    parts: dict[str, Path], tmp_path: Path, language: str, vision: str, aspect: Any
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", language, vision, image_aspect=aspect)
    exported = export_checkpoint(checkpoint, tmp_path / "out", layout="llava")
    assert exported.largest_difference == 0.0
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert type(stock) is LlavaForConditionalGeneration
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert type(processor) is LlavaProcessor
    expected, logits = chat_logits(checkpoint, "How many?")
    content = [{"type": "image", "image": example_image()}, {"type": "text", "text": "How many?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, logits)
    mine, _ = open_checkpoint(checkpoint)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert (
        stock.generate(**prompt, max_new_tokens=5).tolist()
        == mine.generate(**prompt, max_new_tokens=5).tolist()
    )


def test_the_example_of_the_card_runs_with_transformers_alone(parts: dict[str, Path], tmp_path: Path) -> None:
    """As a reader would: a process of its own, the card's lines, an image file."""
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "siglip")
    export_checkpoint(checkpoint, tmp_path / "out", layout="llava", max_shard_size="60KB")
    example_image().save(tmp_path / "image.png")
    (example,) = blocks((tmp_path / "out" / "README.md").read_text(), "python")
    code = example.replace("image.jpg", "image.png").replace("max_new_tokens=64", "max_new_tokens=12")
    alone = f"{code}\nimport sys\nassert 'tinyllava' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", alone], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    mine = Chat.open(checkpoint).answer([ask("What is in the image?", tmp_path / "image.png")], 12)
    assert done.stdout.removesuffix("\n") == mine[0]


def test_an_exported_folder_comes_back_as_it_went(parts: dict[str, Path], tmp_path: Path) -> None:
    """Out to transformers' layout and in again: the same prompt, pixels and logits."""
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "siglip", image_aspect="pad")
    export_checkpoint(checkpoint, tmp_path / "out", layout="llava")
    report = import_checkpoint(tmp_path / "out", tmp_path / "back")
    assert report.notes == []  # its chat template has the marks that training needs
    (before, expected), (after, found) = (
        chat_logits(f, "How many?") for f in (checkpoint, tmp_path / "back")
    )
    assert before["input_ids"].tolist() == after["input_ids"].tolist()
    assert torch.equal(before["pixel_values"], after["pixel_values"])
    assert torch.equal(expected, found)


def test_the_missing_patch_of_factory_survives(tmp_path: Path) -> None:
    source = write_factory(make_toy(tmp_path, "llama", "siglip"), tmp_path / "source")
    import_checkpoint(source, tmp_path / "own")
    assert export_checkpoint(tmp_path / "own", tmp_path / "out", layout="vllm").largest_difference == 0.0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vision_feature_select_strategy"], config["image_seq_length"]) == ("default", 3)


def test_names_and_configs_are_what_vllm_reads(parts: dict[str, Path], tmp_path: Path) -> None:
    """The language model by its architecture, encoders below vision_model, the last layer's features."""
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "siglip")
    export_checkpoint(checkpoint, tmp_path / "out", layout="vllm", max_shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    beginnings = (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
    )
    assert {next((b for b in beginnings if name.startswith(b)), name) for name in index} == set(beginnings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["vision_config"]["num_hidden_layers"] == 4  # one more, of zeros, which -2 leaves out
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "full")
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert present >= {
        "generation_config.json",
        "chat_template.jinja",
        "processor_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "README.md",
    }
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md")
    )


def refused(checkpoint: Path, folder: Path, layout: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        export_checkpoint(checkpoint, folder, layout=layout)
    assert not folder.exists()
    assert not folder.with_name(folder.name + ".partial").exists()


def test_phi_2_and_other_connectors_are_refused_with_all_reasons(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "phi", "clip", connector="linear")
    refused(
        checkpoint,
        tmp_path / "out",
        "llava",
        r"(?s)connector 'linear'.*bias in the output head.*--format tinyllava",
    )


def change_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_more_prefix_tokens_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    change_config(checkpoint, num_prefix_tokens=5)
    refused(checkpoint, tmp_path / "out", "llava", "5 prefix tokens are dropped")


def test_cnn_encoders_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    change_config(checkpoint, encoder_kind="cnn")
    refused(checkpoint, tmp_path / "out", "llava", "'clip_vision_model': a CNN")


def test_encoders_that_vllm_does_not_have_are_refused(tmp_path: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    toy = make_toy(tmp_path)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 42,
        "patch_size": 14,
    }
    toy.encoder = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).eval()
    toy.encoder.save_pretrained(toy.vision_folder)
    side = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=side).save_pretrained(toy.vision_folder)
    source = write_factory(toy, tmp_path / "source", vision_model_name_or_path=str(toy.vision_folder))
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace("_tower.vision_model.", "_tower."): tensor for name, tensor in tensors.items()}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    import_checkpoint(source, tmp_path / "own")
    refused(
        tmp_path / "own",
        tmp_path / "out",
        "vllm",
        "'dinov2': vLLM's LLaVA supports clip_vision_model and siglip",
    )
    assert export_checkpoint(tmp_path / "own", tmp_path / "out", layout="llava").largest_difference == 0.0


@pytest.mark.parametrize(("what", "match"), [("head", "logits differ"), ("template", "token ids")])
def test_a_folder_that_answers_otherwise_is_not_left_behind(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, match: str
) -> None:
    import tinyllava.checkpoints.exporting as package
    from tinyllava.checkpoints.exporting.stock import write_stock

    def spoil(folder: Path, *rest: Any) -> None:
        write_stock(folder, *rest)
        if what == "head":
            tensors = load_file(folder / "model.safetensors")
            tensors["language_model.lm_head.weight"] += 0.01
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        else:
            (folder / "chat_template.jinja").write_text("<image>{{ messages[0].content[1].text }}")

    monkeypatch.setattr(package, "write_stock", spoil)
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    refused(checkpoint, tmp_path / "out", "llava", match)


def test_folders_that_are_no_checkpoint_or_no_target(parts: dict[str, Path], tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "out", "llava", "not a tinyllava checkpoint")
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    with pytest.raises(CheckpointError, match="is not empty"):
        export_checkpoint(checkpoint, checkpoint)
    with pytest.raises(CheckpointError, match="is not an adapter"):
        export_checkpoint(checkpoint, tmp_path / "out", base=checkpoint)


def test_command(parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    arguments = ["export", str(checkpoint), str(tmp_path / "out"), "--format", "llava", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    assert "largest logit difference 0" in capsys.readouterr().out
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint)])
    assert "give OUT, or --push OWNER/NAME" in capsys.readouterr().err


def test_help_comes_without_torch() -> None:
    code = (
        "import sys, contextlib\nfrom tinyllava.cli.export import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--push" in done.stdout
