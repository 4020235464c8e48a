"""The guide to one's own parts, followed literally in a folder of its own: files written, commands run."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from documents import ROOT, blocks, commands
from tinyllava.cli import main
from tinyllava.config import ModelConfig
from tinyllava.errors import ConfigError
from tinyllava.evaluation.checkpoint import find_benchmarks
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.parts.language import LANGUAGE_MODELS
from tinyllava.parts.resolve import resolve
from tinyllava.parts.user_code import run_code
from tinyllava.parts.vision import VISION_ENCODERS
from training_toys import toy_run, write_run

GUIDE = (ROOT / "docs" / "guides" / "models.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in GUIDE.split("\n## ")[1:]}
FILES = {
    "An encoder class": "my_encoder.py",
    "A connector": "my_connector.py",
    "A template": "my_template.py",
    "A benchmark": "my_benchmark.py",
}
PIECES = [piece for name, text in SECTIONS.items() if name not in FILES for piece in blocks(text, "python")]
COMMANDS = [line for section in SECTIONS.values() for line in commands(section)]


@pytest.fixture
def folder(tmp_path: Path, parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder: the guide's files and two local parts; the tables are put back afterwards."""
    before = [(table, dict(table)) for table in (LANGUAGE_MODELS, VISION_ENCODERS)]
    (tmp_path / "my_parts.py").write_text("\n\n".join(PIECES), encoding="utf-8")
    for section, name in FILES.items():
        (tmp_path / name).write_text("\n\n".join(blocks(SECTIONS[section], "python")), encoding="utf-8")
    (tmp_path / "my-clip").symlink_to(parts["clip"])
    (tmp_path / "my-llama").symlink_to(parts["llama"])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for table, known in before:
        table.clear()
        table.update(known)


def test_there_is_a_section_for_each_kind_of_part() -> None:
    kinds = {"A local folder", "A vision encoder", "A language model", "A recipe", "A saved run", *FILES}
    assert kinds <= set(SECTIONS)
    assert all(name in SECTIONS[section] for section, name in FILES.items())


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    assert program == "tinyllava"
    try:
        status = main(arguments)
    except SystemExit as stop:  # how --options ends
        status = stop.code
    assert not status
    assert capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_its_parts_are_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "my_parts.py:MINE"]) == 0
    printed = capsys.readouterr().out
    assert "DINOv2-small + mlp + Qwen3-4B" in printed
    assert "256 of 256 patches" in printed
    assert "4,022,468,096" in printed
    assert main(["show", "my_parts.py:GENTLE-Sig-Phi"]) == 0
    assert "from layer 20" in capsys.readouterr().out
    assert main(["show", "base-Sig-Phi-my_connector.py:Mean"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 729 patches" in printed
    assert f"{1152 * 2560 + 2560:,}" in printed  # the connector's parameters, counted


def own_model(folder: Path) -> ModelConfig:
    return ModelConfig(
        vision_encoder=str(folder / "my-clip"),
        language_model=str(folder / "my-llama"),
        connector="my_connector.py:Mean",
        connector_options={"parts": 4},
        template="my_template.py:PLAIN",
    )


def test_a_model_of_its_parts_answers_and_its_checkpoint_says_what_code_it_needs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = assemble(own_model(folder))
    assert model.config.num_image_tokens == processor.num_image_tokens == 4
    assert processor.chat_template.startswith("{%- for message in messages -%}")
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    assert json.loads((folder / "saved" / "config.json").read_text())["connector"] == "my_connector.py:Mean"
    opened, _ = open_checkpoint(folder / "saved")
    kept = dict(model.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in opened.named_parameters())

    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    chat = ["chat", "red.png", "What?", "--model", "saved", "--max-tokens", "3"]
    refused = run_command(*chat)
    assert refused.returncode == 2
    assert "saved: needs your code 'my_connector.py:Mean'" in refused.stderr
    assert "add --with my_connector.py" in refused.stderr
    assert "Traceback" not in refused.stderr
    answered = run_command(*chat, "--with", "my_connector.py")
    assert answered.returncode == 0, answered.stderr


def test_a_model_with_its_encoder_class_is_trained_asked_and_exported_where_it_fits(
    folder: Path, parts: dict[str, Path], records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(vision_encoder="my_encoder.py:STRIPES", language_model="my-llama")
    run = toy_run(parts, records, folder / "run", model=model)
    stages = {name: dataclasses.replace(stage, max_steps=1) for name, stage in run.stages.items()}
    assert main(["train", write_run(dataclasses.replace(run, stages=stages), folder)]) == 0
    trained = json.loads((folder / "run" / "model" / "config.json").read_text())
    assert (trained["vision_config"]["model_type"], trained["num_patches"]) == ("stripes", 16)
    untouched = load_file(folder / "my-stripes" / "model.safetensors")["convolution.weight"]
    kept = load_file(folder / "run" / "model" / "model.safetensors")
    assert torch.equal(kept["model.vision_tower.convolution.weight"], untouched)  # the base recipe freezes it

    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    chat = ["chat", "red.png", "What?", "--model", "run/model", "--max-tokens", "3"]
    shutil.copytree("run/model", "bare", ignore=shutil.ignore_patterns("run.json"))  # nothing names the code
    bare = ["bare" if one == "run/model" else one for one in chat]
    both = f"from tinyllava.cli import main; assert [main({chat}), main({bare})] == [2, 2]"
    refused = subprocess.run([sys.executable, "-c", both], capture_output=True, text=True, check=False)
    assert refused.returncode == 0, refused.stderr
    assert "run/model: needs your code 'my_encoder.py:STRIPES'" in refused.stderr
    assert "add --with my_encoder.py" in refused.stderr
    assert "bare: its vision encoder is of type 'stripes'" in refused.stderr
    assert "--with FILE.py" in refused.stderr
    assert main([*chat, "--with", "my_encoder.py"]) == 0
    capsys.readouterr()
    for name in ("llava", "vllm", "gguf"):
        assert main(["export", "run/model", f"out-{name}", "--format", name]) == 2
        assert "encoder 'stripes'" in capsys.readouterr().err
        assert not (folder / f"out-{name}").exists()


def run_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tinyllava", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.usefixtures("folder")
def test_its_benchmark_is_found_and_grades(tmp_path: Path) -> None:
    rows = [{"id": 1, "question": "Which colour?", "image": "a.png", "answer": "red"}]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "questions.json").write_text(json.dumps(rows))
    benchmarks = find_benchmarks("my_benchmark.py:MINE")
    questions = benchmarks["mine"].load(tmp_path / "mine")
    scored = benchmarks["mine"].score(questions, {"1": "Red."})
    assert scored.metrics[0].value == 100.0
    assert list(find_benchmarks("mine")) == ["mine"]  # by its own name, now that its code has run


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import torch\n\nx = 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("class Mean:\n    pass\n", "is not a connector"),
        ("def (", "line 1"),
        ("X = 1", "unknown name in"),
    ],
)
def test_an_error_in_a_users_file_names_file_and_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "bad_connector.py").write_text(text)
    model = ModelConfig(
        vision_encoder="CLIP", language_model="TinyLlama", connector=f"{tmp_path}/bad_connector.py:Mean"
    )
    with pytest.raises((ConfigError, LookupError), match="bad_connector") as caught:
        resolve(model)
    assert says in str(caught.value)


def test_a_value_of_a_module_is_named_with_dots(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "connectors.py").write_text((folder / "my_connector.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    model = ModelConfig(
        vision_encoder="CLIP", language_model="TinyLlama", connector="my_package.connectors:Mean"
    )
    assert resolve(model).num_image_tokens == 1


def test_a_saved_run_is_shown_again_and_runs_no_code_that_was_not_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "base-C-TL", "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)
    (folder / "run.json").write_text(json.dumps(saved))
    assert main(["show", "run.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == saved
    (folder / "other.py").write_text("from my_connector import Mean\n")
    saved["model"]["connector"] = "other.py:Mean"
    (folder / "run.json").write_text(json.dumps(saved))
    assert main(["show", "run.json"]) == 2
    assert "needs your code 'other.py:Mean'" in capsys.readouterr().err
    assert main(["show", "run.json", "--with", "other.py"]) == 0


def test_code_runs_once(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text("VALUE = object()\n")
    assert run_code(str(tmp_path / "counted.py"))["VALUE"] is run_code(str(tmp_path / "counted.py"))["VALUE"]
