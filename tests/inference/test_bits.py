"""Models that answer in 4 or 8 bits: close to the model, as the codes say, told apart, and stored so."""

import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from documents import ROOT, commands
from quantised_by_hand import read_weight
from served import save_toy
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.checkpoints.exporting.compare import example_logits
from tinyllava.cli import main
from tinyllava.errors import CheckpointError, ConfigError, MissingExtraError
from tinyllava.inference.chat import Chat
from tinyllava.model.assemble import open_checkpoint
from tinyllava.model.quantised import quantised_layers


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("bits"))


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.5), (8, 0.05)])
def test_only_the_language_model_is_held_and_its_logits_stay_close(
    toy: Path, bits: int, limit: float
) -> None:
    chat, plain = Chat.open(toy, bits=bits, device="cpu"), Chat.open(toy, device="cpu")
    held = quantised_layers(chat.model)
    linears = [n for n, m in plain.model.model.language_model.named_modules() if isinstance(m, nn.Linear)]
    assert {name.partition("language_model.")[2].removesuffix(".weight") for name in held} == set(linears)
    assert chat.dtype == f"float32-{bits}bit"
    assert plain.dtype == "float32"
    expected = example_logits(plain.model, plain.processor)
    found = example_logits(chat.model, chat.processor)
    assert 0 < (found - expected).pow(2).mean().sqrt() < limit * expected.std()
    for name, layer in held.items():  # by hand, the weights that the codes stand for
        plain.model.get_submodule(name.removesuffix(".weight")).weight.data = read_weight(layer)
    by_hand = example_logits(plain.model, plain.processor)
    inputs_are_rounded = {4: 1e-4, 8: 0.05}[bits]  # in 8 bits
    assert (found - by_hand).pow(2).mean().sqrt() < inputs_are_rounded * expected.std()


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_stored_so_and_opens_so(toy: Path, tmp_path: Path, bits: int) -> None:
    out = tmp_path / "out"
    assert main(["export", str(toy), str(out), "--bits", str(bits)]) == 0
    assert f"language model in {bits} bits; largest logit difference" in (out / "README.md").read_text()
    sizes = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert set(sizes) == {"model.safetensors", "quantised.safetensors"}
    assert sum(sizes.values()) < (toy / "model.safetensors").stat().st_size
    logged: list[str] = []
    listener = logging.StreamHandler()
    listener.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(listener)
    stored, made = Chat.open(out, device="cpu"), Chat.open(toy, bits=bits, device="cpu")
    logging.getLogger("transformers").removeHandler(listener)
    assert logged == []  # not that the quantised weights are missing
    assert stored.dtype == made.dtype
    expected = example_logits(made.model, made.processor)
    assert torch.equal(example_logits(stored.model, stored.processor), expected)
    model, _ = open_checkpoint(out)  # to train or to export: ordinary layers with the same weights
    assert quantised_layers(model) == {}
    for name, layer in quantised_layers(stored.model).items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).weight, layer.dequantise())
    with pytest.raises(ConfigError, match=f"stored in {bits} bits. Remove bits"):
        Chat.open(out, bits=12 - bits)
    export_checkpoint(out, tmp_path / "whole")
    assert not (tmp_path / "whole" / "quantised.safetensors").exists()


def test_the_card_has_the_difference_of_few_bits_and_a_damaged_file_of_codes_is_named(
    toy: Path, tmp_path: Path
) -> None:
    exported = export_checkpoint(toy, tmp_path / "out", bits=4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert exported.largest_difference
    assert f"in 4 bits; largest logit difference {exported.largest_difference:.2g} " in card
    assert f"| tinyllava | yes | logits within {exported.largest_difference:.2g} |" in card
    shutil.copyfile(toy / "model.safetensors", tmp_path / "out" / "quantised.safetensors")
    with pytest.raises(
        CheckpointError, match=r"quantised\.safetensors: not the quantised weights of this model"
    ):
        Chat.open(tmp_path / "out")


def test_chat_answers_in_bits_and_its_answers_are_told_apart(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, lines, output = tmp_path / "a.png", tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    Image.new("RGB", (40, 30), (200, 20, 20)).save(image)
    lines.write_text(json.dumps({"image": str(image), "question": "What?"}) + "\n")
    command = ["chat", "--file", str(lines), "--output", str(output), "--model", str(toy)]
    command += ["--max-tokens", "5", "--device", "cpu"]
    assert main([*command, "--bits", "4"]) == 0
    expected = Chat.open(toy, bits=4, device="cpu").ask("What?", image, max_new_tokens=5)
    assert json.loads(output.read_text())["answer"] == expected
    assert main(command) != 0
    assert (
        "has answers of a run with dtype = 'float32-4bit', but this run has 'float32'"
        in capsys.readouterr().err
    )


def test_serve_and_evaluate_open_the_model_so(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AskedError(Exception):
        pass

    def note(cls: type[Chat], folder: Path, **given: Any) -> Chat:
        raise AskedError(f"bits = {given['bits']}")

    monkeypatch.setattr(Chat, "open", classmethod(note))
    (tmp_path / "pope").mkdir()
    evaluate = ["evaluate", str(toy), "--data", str(tmp_path), "--benchmarks", "pope", "--device", "cpu"]
    for command in (["serve", str(toy), "--port", "0"], [*evaluate, "--output", str(tmp_path / "out")]):
        for bits in (4, 8):
            with pytest.raises(AskedError, match=f"bits = {bits}"):
                main([*command, "--bits", str(bits)])
    with pytest.raises(AskedError, match="bits = 16"):
        main(["serve", str(toy), "--port", "0"])


def test_the_guides_commands_run(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = commands((ROOT / "docs" / "guides" / "ship.md").read_text(encoding="utf-8"))
    ask, store = (line for line in guide if "--bits" in line)
    shutil.copytree(toy, tmp_path / "my-model")
    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(ask)[1:], "--max-tokens", "4"]) == 0
    assert main(shlex.split(store)[1:]) == 0
    assert Chat.open("in-4-bits", device="cpu").dtype == "float32-4bit"


def test_other_numbers_and_a_missing_package_are_refused(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="bits = 5: choose one of 4, 8, 16"):
        Chat.open(toy, bits=5)
    with pytest.raises(SystemExit):
        main(["export", str(toy), str(tmp_path / "out"), "--format", "onnx", "--bits", "4"])
    assert "--bits works only with --format tinyllava" in capsys.readouterr().err
    monkeypatch.setattr("tinyllava.errors.find_spec", lambda name: None)
    for call in (lambda: Chat.open(toy, bits=8), lambda: export_checkpoint(toy, tmp_path / "out", bits=4)):
        with pytest.raises(MissingExtraError, match=r"bitsandbytes, .*pip install 'tinyllava\[quantized\]'"):
            call()
