"""The starter's notebook: whole, and run cell by cell in its short form."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from documents import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "starter.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_of_the_format_and_holds_no_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert {frozenset(cell) for cell in NOTEBOOK["cells"]} == {
        frozenset({"cell_type", "metadata", "source"}),
        frozenset({"cell_type", "metadata", "source", "outputs", "execution_count"}),
    }
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in NOTEBOOK["cells"])
    assert all(ast.parse(code).body for code in CODE)
    assert sum('LENGTH = "default"' in code for code in CODE) == 1
    assert "(../starter.ipynb)" in (ROOT / "docs" / "guides" / "starter.md").read_text(encoding="utf-8")


@pytest.mark.starter
@pytest.mark.timeout(1800)
def test_the_notebook_runs_in_its_short_form(tmp_path: Path) -> None:
    """Minutes in an empty cache; where `tinyllava starter --short` is done, its run is taken."""
    program = "\n".join(CODE).replace('LENGTH = "default"', 'LENGTH = "short"')
    (tmp_path / "notebook.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "notebook.py"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [line.split()[0] for line in lines if "majority" in line and "blanked" in line]
    assert {"overall", "yes_no"} <= set(rows)
    assert all(lines[-3:])  # three answers
