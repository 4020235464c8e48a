"""The scripts that measure evaluation run to their end and print what the guide shows; no time is tested."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from processes import run_script

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ratios_and_equal_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import over_published

    output = run_script(
        BENCHMARKS / "evaluate.py",
        "--shape",
        "vqav2",
        "--depth",
        "0.05",
        "--images",
        "2",
        "--sample",
        "2",
        "--clock",
        "cpu",
        "--json",
        str(tmp_path / "found.json"),
        said=tmp_path / "said",
    )
    found = over_published(json.loads((tmp_path / "found.json").read_text()))
    assert found["same_answers"] == found["sample"] == 2
    assert found["questions_per_second"] > 0
    assert "answers equal to one at a time: 2 of 2" in output
    assert re.search(r"over the published loop: \d+\.\dx", output)
    assert re.search(r"share of the limit: \d+%", output)


@pytest.mark.parametrize("answerer", ["stand-in", "model"])
def test_memory_counts_every_question(answerer: str) -> None:
    row = run("evaluate_memory.py", "--sizes", "60", "--answerer", answerer).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "60"
    assert float(cells[3].replace(",", "")) >= float(cells[2].replace(",", "")) > 0
