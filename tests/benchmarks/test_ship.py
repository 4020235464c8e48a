"""The comparison of runtimes runs on a toy: each opens what was exported and gives the same answer.

`serve`, Node and Chromium, which take long to start, are compared in tests/serving and in test_web.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import exporting_toys

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ship.py"
EXACT = ("PyTorch, fp32", "llama.cpp, f16", "ONNX Runtime, fp32", "OpenVINO, fp32")


def test_each_runtime_has_a_row_and_gives_our_answer(tmp_path: Path) -> None:
    model = exporting_toys.make(tmp_path, "llama")
    only = "^llama.cpp, f16|Runtime, fp32|OpenVINO, fp32"
    command = [sys.executable, str(SCRIPT), str(model), "--tiny", "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    same = {name: answers for name, *_, answers in rows}
    assert same == dict.fromkeys(EXACT, "1 of 1")
    assert all(re.fullmatch(r"\d+\.\d\d s", first) for _, _, first, *_ in rows)
    assert all(rate == "not measurable" or float(rate) > 0 for *_, rate, _ in rows)
