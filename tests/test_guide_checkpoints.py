"""The guide to checkpoints in and out, followed literally: its commands, one after the other."""

import shlex
from pathlib import Path

import pytest

from documents import ROOT, commands
from layouts import make_adapter, make_checkpoint, make_toy, write_bench
from tinyllava.checkpoints.exporting.compare import example_image
from tinyllava.cli import main
from toys import make_language_model, make_vision_encoder

GUIDE = (ROOT / "docs" / "guides" / "checkpoints.md").read_text(encoding="utf-8")


def test_its_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = make_toy(tmp_path / "toy")
    write_bench(toy, tmp_path / "their-checkpoint", with_encoder=False)
    parts = {
        "llama": make_language_model(tmp_path / "llama", "llama"),
        "siglip": make_vision_encoder(tmp_path / "siglip", "siglip"),
    }
    make_checkpoint(parts, tmp_path / "small", "llama", "siglip")
    toy.vision_folder.rename(tmp_path / "their-encoder")
    example_image().save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    printed = {}
    for command in commands(GUIDE):
        program, *arguments = shlex.split(command)
        assert program == "tinyllava"
        if arguments[:2] == ["export", "./adapter"]:
            make_adapter(Path("mine"), Path("adapter"))
        assert main(arguments) == 0, capsys.readouterr().err
        printed[arguments[0], arguments[2]] = capsys.readouterr().out
    assert "TinyLLaVABench, whole model" in printed["import", "./mine"]
    assert "largest logit difference 0" in printed["export", "./for-transformers"]
    assert "GGUF of llama.cpp" in printed["import", "./from-llama-cpp"]
    assert "opened in llama.cpp" in printed["export", "./for-llama-cpp"]
    assert {"for-transformers", "for-vllm", "for-llama-cpp", "merged"} <= {
        path.name for path in tmp_path.iterdir()
    }
