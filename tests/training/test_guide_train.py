"""The training guide's commands on one's own data, run as they are written, with toys for what they name."""

import json
import re
import shlex
from pathlib import Path

import pytest

from conftest import make_records
from documents import ROOT, commands
from tinyllava.cli import main
from tinyllava.config import Hardware
from tinyllava.training.run import train
from training_toys import toy_run

GUIDE = (ROOT / "docs/guides/train.md").read_text(encoding="utf-8")
SECTIONS = (
    "Validation",
    "Trackers",
    "Checkpoints as models",
    "New tokens",
    "Schedules, optimizers and chosen layers",
)
_TOY = "--hardware.num-workers 0 --finetune.max-steps 2 --finetune.max-length-tokens 256"


def section(name: str) -> str:
    """Return a section of the guide, up to the next heading."""
    found = re.search(rf"^##+ {re.escape(name)}\n(.*?)(?=^##)", GUIDE, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]


@pytest.fixture(scope="module")
def place(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the guide's files: records with images beside them, a run that keeps a checkpoint."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("my", "test"):
        path = make_records(folder / name, 20)
        records = json.loads(path.read_text())
        for record in records:
            if "image" in record:
                record["image"] = str(path.parent / "images" / record["image"])
        (folder / f"{name}.json").write_text(json.dumps(records))
    hardware = Hardware(num_workers=0, precision="fp32", save_steps=1, keep_checkpoints=1)
    run = toy_run(parts, folder / "my/records.json", folder / "runs/my-run", hardware=hardware)
    train(run)
    [checkpoint] = (folder / "runs/my-run/finetune").glob("checkpoint-*")
    checkpoint.rename(checkpoint.with_name("checkpoint-200"))
    next((folder / "my/images").glob("*.png")).rename(folder / "image.png")
    return folder


CASES = [(name, command) for name in SECTIONS for command in commands(section(name))]


@pytest.mark.parametrize(("name", "command"), CASES, ids=[f"{n}: {c[:70]}" for n, c in CASES])
def test_a_command_of_the_guide_runs(place: Path, tmp_path: Path, monkeypatch, capsys, name, command):
    monkeypatch.chdir(place)
    make_records(place / "my", 20)  # with the image that the fixture took
    command = command.replace("CHECKPOINT", "runs/my-run/model").replace("FOLDER", str(tmp_path / "new"))
    command = command.replace("20 21 22 23", "0 1")  # a toy has two layers
    words = shlex.split(command)
    assert words[0] == "tinyllava"
    options = [*_TOY.split(), "--output", str(tmp_path / "run")] if words[1] == "train" else []
    assert main([*words[1:], *options]) == 0
    if name == "Validation":
        assert "held-out loss" in capsys.readouterr().out
        assert (tmp_path / "run/finetune/stage.json").is_file()
    if name == "Trackers":
        assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    if name == "New tokens":
        tokens = (tmp_path / "run/model/tokenizer.json").read_text()
        assert "<loc_0>" in tokens
