"""``tinyllava reproduce`` on toy parts: from a grid file to the page, after a kill, what it says before."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest

import grid_toys
from processes import start
from tinyllava.cli import main
from tinyllava.studies.study import load_examples, load_scores, load_study
from training_toys import signalled_at


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with the benchmark."""
    grid_toys.write_benchmark(tmp_path / "benchmarks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def times(folder: Path) -> dict[str, int]:
    """When the tensors of each stage were written."""
    return {path.parent.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/trained.*")}


def test_a_grid_is_run_reused_and_drawn(places, parts, records, capfd):
    grid = str(grid_toys.write_grid(places, parts, records))
    assert main(["reproduce", grid, "--only", "low", "--benchmarks", "benchmarks"]) == 0
    page = Path(capfd.readouterr().out.splitlines()[-1])
    assert page == Path("studies/toy/report.html")
    assert "A toy" in page.read_text()
    first = times(places)
    assert len(first) == 4
    assert main(["reproduce", grid, "--benchmarks", "benchmarks"]) == 0
    assert {name: times(places)[name] for name in first} == first  # reused, not trained again
    assert len(times(places)) == 6
    study = load_study(page.parent)
    assert [cell.status for cell in study.cells] == ["done"] * 4
    assert [[stage.reused for stage in cell.stages] for cell in study.cells] == [
        [False, False],
        [True, False],
        [False, False],
        [True, False],
    ]
    cell = study.cells[0]
    papers = json.loads(next(places.glob("runs/pretrain-*/pretrain/stage.json")).read_text())
    assert [len(stage.losses) for stage in cell.stages] == [3, 3]
    assert set(cell.stages[0].num_trained_parameters) == {"connector"}
    assert set(cell.stages[1].num_trained_parameters) == {"connector", "language_model"}
    assert cell.num_image_tokens == 4
    assert papers["key"] in {cell.stages[0].key for cell in study.cells}
    assert cell.results[0].num_questions == 6
    assert set(load_scores(page.parent)["starter-whole"].scores) == {one.id for one in study.cells}
    examples = load_examples(page.parent)
    assert len(examples) == 3  # one of each image
    assert all((page.parent / example.image).is_file() for example in examples)
    again = page.read_bytes()
    assert main(["reproduce", grid, "--benchmarks", "benchmarks"]) == 0
    assert page.read_bytes() == again


def test_what_could_not_be_run_for_want_of_data_is_named_at_the_end_too(places, parts, records, capfd):
    grid = str(grid_toys.write_grid(places, parts, records))
    assert main(["reproduce", grid, "--only", "low"]) == 1  # trained; there are no questions
    *_, said, page = capfd.readouterr().out.splitlines()
    assert said.startswith("incomplete: 2 of 2 models need the files listed as missing above (")
    assert "MLP" in said
    assert [cell.status for cell in load_study(Path(page).parent).cells] != ["done"] * 2


def test_a_grid_that_is_killed_goes_on_and_loses_no_finished_stage(places, parts, records):
    grid = str(grid_toys.write_grid(places, parts, records, epochs=6))
    command = ["reproduce", grid, "--only", "MLP", "--benchmarks", str(places / "benchmarks")]
    command += ["--runs", str(places / "runs"), "--output", str(places / "study")]
    killed = start(partial(signalled_at, "finetune", 4, signal.SIGKILL, lambda: main(command)))
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    before = times(places)
    assert [name.split("-")[0] for name in before] == ["pretrain"]
    assert main(command) == 0
    after = times(places)
    assert {name: after[name] for name in before} == before
    assert len(after) == 3
    steps = [
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in places.glob("runs/*/*/metrics.jsonl")
    ]
    assert steps == [list(range(1, 19))] * 3  # no step lost, none twice
    assert [cell.status for cell in load_study(places / "study").cells] == ["done"] * 2


def test_the_plan_says_what_is_shared_and_what_is_missing(places, capsys):
    assert main(["reproduce", "figure-4", "--plan", "--gpus", "4"]) == 0
    shown = capsys.readouterr().out
    assert "6 models: 12 stages and 54 evaluations" in shown
    assert "text_files/blip_laion_cc_sbu_558k.json" in shown
    assert "`tinyllava data benchmarks pope DIR`" in shown
    assert not (places / "runs").exists()  # a plan leaves nothing behind
    assert main(["reproduce", "figure-4"]) == 2
    assert "nothing can run: missing " in capsys.readouterr().err


def test_the_starters_plan_knows_its_time_before_anything_is_fetched(places, monkeypatch, capsys):
    monkeypatch.setenv("TINYLLAVA_CACHE", str(places / "empty"))
    assert main(["reproduce", "starter", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "missing" not in shown
    assert "unknown duration" not in shown
    lines = [line.split() for line in shown.splitlines() if "vision_encoder: Lite2, 224 px, seed 0" in line]
    # 1,000 captions in batches of 16 and 224 conversations in batches of 8
    assert [line[line.index("do") + 1] for line in lines[:2]] == ["63", "90"]
    assert "Missing starter models and images are downloaded first (time not included)." in shown
    assert not (places / "empty").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["figure-44"], "Did you mean 'figure-4'"),
        (["figure-4", "--only", "x"], "matches no cell of figure-4"),
        (["figure-4", "--seeds", "a"], "give integers separated by commas"),
        (["figure-4", "--scale", "2"], "--scale 2"),
        (["figure-4", "--part", "TinyLlama"], "give NAME=VALUE"),
        (["figure-4", "--judge-url", "http://x/v1"], "--judge-url and --judge-model go together"),
        (["none.py"], "no such file"),
    ],
)
def test_what_is_wrong_is_said(arguments, says, capsys):
    assert main(["reproduce", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["table-1", "table-2"])
def test_tables_1_and_2_are_printed(name, capsys):
    assert main(["reproduce", name]) == 0
    assert len(capsys.readouterr().out.splitlines()) in (7, 6)


def test_questions_without_an_answer_are_named_and_end_it_with_1(places, parts, records, capfd):
    (places / "benchmarks/starter-whole/images/0.png").write_bytes(b"no image")
    grid = str(grid_toys.write_grid(places, parts, records))
    status = main(["reproduce", grid, "--only", "low", "--benchmarks", "benchmarks"])
    said, errors = capfd.readouterr()
    assert status == 1, errors
    assert "questions without an answer, counted as wrong: " in said
    assert said.count(": 2 of starter-whole") == 2
