"""The guide to one's own parts, followed literally: file written, commands run, connector put in."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from documents import ROOT, blocks, commands
from tinyllava.cli import main
from tinyllava.parts.connectors import CONNECTORS
from tinyllava.parts.language import LANGUAGE_MODELS
from tinyllava.parts.vision import VISION_ENCODERS

GUIDE = (ROOT / "docs" / "guides" / "models.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in GUIDE.split("\n## ")[1:]}
CONNECTOR = SECTIONS.pop("A connector")
PIECES = [piece for section in SECTIONS.values() for piece in blocks(section, "python")]
COMMANDS = [line for section in SECTIONS.values() for line in commands(section)]


@pytest.fixture
def folder(tmp_path: Path, parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder: the guide's file and two local parts; the tables are put back afterwards."""
    before = [(table, dict(table)) for table in (CONNECTORS, LANGUAGE_MODELS, VISION_ENCODERS)]
    (tmp_path / "my_parts.py").write_text("\n\n".join(PIECES), encoding="utf-8")
    (tmp_path / "my-clip").symlink_to(parts["clip"])
    (tmp_path / "my-llama").symlink_to(parts["llama"])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for table, known in before:
        table.clear()
        table.update(known)


def test_there_is_a_section_for_each_kind_of_part() -> None:
    kinds = {"A local folder", "A vision encoder", "A language model", "A template", "A recipe"}
    assert kinds <= set(SECTIONS)
    assert all(blocks(SECTIONS[kind], "python") or commands(SECTIONS[kind]) for kind in kinds)


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


def test_its_connector_works_where_the_guide_puts_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src" / "tinyllava", tmp_path / "tinyllava")
    module, line, use = blocks(CONNECTOR, "python")
    package = tmp_path / "tinyllava" / "model" / "connectors"
    (package / "mean.py").write_text(module, encoding="utf-8")
    with (tmp_path / "tinyllava" / "parts" / "connectors.py").open("a", encoding="utf-8") as file:
        file.write(f"\n\n{line}")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (command,) = commands(CONNECTOR)
    program, *arguments = shlex.split(command)
    assert program == "tinyllava"
    printed = run("-c", "import sys, tinyllava.cli as c; sys.exit(c.main(sys.argv[1:]))", *arguments)
    assert "SigLIP + mean + Phi-2" in printed
    assert "1 of 729 patches" in printed
    run("-c", use)
