"""A Python call reproduces as the command does, also with a connector and a benchmark of the user's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import grid_toys
import tinyllava
from tinyllava.cli import main
from tinyllava.studies.graph import save_node
from tinyllava.studies.reproduce import Choices, plan_grid
from tinyllava.studies.study import load_examples, load_scores
from tinyllava.studies.work import load_state

CONNECTOR = """
from torch import nn

class Mean(nn.Module):
    def __init__(self, vision_width, language_width, num_patches):
        super().__init__()
        self.linear = nn.Linear(vision_width, language_width)

    @staticmethod
    def num_tokens(num_patches):
        return 1

    def forward(self, features):
        return self.linear(features.mean(dim=1, keepdim=True))
"""
BENCHMARK = """
import json
from tinyllava.conversation import ask
from tinyllava.evaluation.benchmark import Benchmark, Grade
from tinyllava.evaluation.read import NeededFile
from tinyllava.evaluation.question import Question

def load(folder):
    return [
        Question(id=row["id"], conversation=ask(row["question"], folder / row["image"]), image=row["image"],
                 target=row["answer"])
        for row in json.loads((folder / "questions.json").read_text())
    ]

MINE = Benchmark(
    name="mine", title="My own", protocol="mine/any", split="test", metric="accuracy", num_questions=2,
    prompt="{question}", load=load, grade=lambda question, answer: Grade(answer, 1.0),
    files=(NeededFile(names=("questions.json",), purpose="questions", source="me"),),
)
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the starter's benchmark and one of the user's own."""
    grid_toys.write_benchmark(tmp_path / "benchmarks")
    (tmp_path / "my_connector.py").write_text(CONNECTOR)
    (tmp_path / "my_benchmark.py").write_text(BENCHMARK)
    mine = tmp_path / "benchmarks" / "mine"
    mine.mkdir()
    Image.new("RGB", (32, 32), "red").save(mine / "a.png")
    rows = [{"id": str(n), "question": f"Which {n}?", "image": "a.png", "answer": "red"} for n in range(2)]
    (mine / "questions.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_python_call_does_what_the_command_does_and_prints_nothing(places, parts, records, capfd):
    grid = str(grid_toys.write_grid(places, parts, records))
    chosen = {"benchmarks": "benchmarks", "only": ["MLP, low"], "limit": 4}
    done = tinyllava.reproduce(grid, **chosen)
    assert capfd.readouterr() == ("", "")
    assert done.is_complete
    assert done.report == Path("studies/toy/report.html")
    assert [(cell.label, cell.status) for cell in done.study.cells] == [("low", "done")]
    page = done.report.read_bytes()
    options = ["--benchmarks", "benchmarks", "--only", "MLP, low", "--limit", "4"]
    assert main(["reproduce", grid, *options]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "1 models: 2 stages and 1 evaluations (0 saved by sharing), 3 done."
    assert said[-1] == str(done.report)
    assert done.report.read_bytes() == page
    assert len(load_examples(done.report.parent)) == 2
    without = chosen | {"benchmarks": ""}
    assert tinyllava.reproduce(grid, **without).is_complete  # measured before; it has no examples
    assert not load_examples(done.report.parent)
    missing = tinyllava.reproduce(grid, **(without | {"limit": 2}))
    assert missing.incomplete == ("MLP, low",)
    assert not missing.is_complete


def test_a_grid_with_a_connector_and_a_benchmark_of_the_users_own(places, parts, records):
    grid = grid_toys.write_grid(places, parts, records)
    text = grid.read_text().replace('"starter-whole"', '"starter-whole", "my_benchmark.py:MINE"')
    grid.write_text(text.replace('"mlp"', '"my_connector.py:Mean"'))
    chosen = {"benchmarks": "benchmarks", "only": ["MLP, low"]}
    done = tinyllava.reproduce(str(grid), **chosen)
    assert done.is_complete
    assert done.study.benchmarks == ("starter-whole", "mine")
    assert done.study.cells[0].num_image_tokens == 1
    by_name = {result.benchmark: result for result in done.study.cells[0].results}
    assert (by_name["mine"].num_questions, by_name["mine"].metrics[0].value) == (2, 100.0)
    assert set(load_scores(done.report.parent)) == {"starter-whole", "mine"}
    assert "My own" in done.report.read_text()

    # Another version of the benchmark is another evaluation. A process that never read the grid does it.
    (places / "my_benchmark.py").write_text(BENCHMARK.replace('"mine/any"', '"mine/none"'))
    plan = plan_grid(str(grid), Choices(benchmarks="benchmarks", only=chosen["only"]))
    (todo,) = (need.node for need in plan.needs if need.status != "done")
    assert todo.name == "mine"
    task = places / "task.json"
    save_node(todo, task)
    environment = os.environ | {"RANK": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tinyllava.studies.work", str(task)]
    elsewhere = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert load_state(todo).status == "done"
    results = json.loads((todo.folder / "results.json").read_text())
    assert "mine/none" in json.dumps(results)


def test_the_files_of_a_users_benchmark_are_listed(places, capsys):
    assert main(["data", "benchmarks", "my_benchmark.py:MINE", "benchmarks/mine"]) == 0
    assert "mine (My own, test; 2 questions)" in capsys.readouterr().out
    (places / "benchmarks" / "mine" / "questions.json").unlink()
    assert main(["data", "benchmarks", "mine", "benchmarks/mine", "--with", "my_benchmark.py"]) == 1
    assert "questions.json" in capsys.readouterr().out
    assert main(["data", "benchmarks", "--with", "my_benchmark.py"]) == 0
    assert "My own, test: 2 questions" in capsys.readouterr().out
