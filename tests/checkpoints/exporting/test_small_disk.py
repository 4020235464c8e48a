"""A disk that is really too small for what import and export write: one line says so, and nothing is left."""

import sys
from pathlib import Path

import pytest

from layouts import make_checkpoint
from small_disk import run_on_small_disk

PROGRAM = """
import pathlib, sys
from tinyllava.cli import main
status = main(sys.argv[2:])
print("left:", [path.name for path in pathlib.Path(sys.argv[1]).iterdir()])
sys.exit(status)
"""


@pytest.mark.parametrize("layout", ["tinyllava", "llava"])
def test_an_export_to_a_full_disk(parts: dict[str, Path], tmp_path: Path, layout: str) -> None:
    checkpoint, disk = make_checkpoint(parts, tmp_path / "own", "llama", "clip"), tmp_path / "disk"
    command = ["export", str(checkpoint), str(disk / "out"), "--format", layout]
    done = run_on_small_disk(disk, "100k", sys.executable, "-c", PROGRAM, disk, *command)
    assert done.returncode == 2, done.stderr
    assert f"error: {disk / 'out'}: cannot be written" in done.stderr
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "left: []" in done.stdout


def test_an_import_to_a_full_disk(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, disk = make_checkpoint(parts, tmp_path / "own", "llama", "clip"), tmp_path / "disk"
    stock = tmp_path / "stock"
    done = run_on_small_disk(
        tmp_path / "any",
        "1m",
        sys.executable,
        "-m",
        "tinyllava",
        "export",
        checkpoint,
        stock,
        "--format",
        "llava",
    )
    assert done.returncode == 0, done.stderr
    command = ["import", str(stock), str(disk / "mine"), "--template", "llama"]
    done = run_on_small_disk(disk, "100k", sys.executable, "-c", PROGRAM, disk, *command)
    assert done.returncode == 2, done.stderr
    assert f"error: {disk / 'mine'}: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert "left: []" in done.stdout
