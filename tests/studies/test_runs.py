"""The table of runs, filters, and differences, on run folders in the form that training leaves."""

import json
from pathlib import Path

import pytest

from tinyllava.cli import main
from tinyllava.config import to_json
from tinyllava.errors import DataError
from tinyllava.recipes.variants import variant
from tinyllava.studies.grid import change_run
from tinyllava.studies.runs import diff_runs, filter_runs, find_runs, run_rows


def write_run(folder: Path, changes: dict, torch: str, score: float | None) -> None:
    folder.mkdir(parents=True)
    run = change_run(variant("base-C-TL"), changes)
    (folder / "run.json").write_text(to_json(run))
    (folder / "environment.json").write_text(json.dumps({"torch": torch, "devices": ["cpu"]}))
    (folder / "pretrain").mkdir()
    (folder / "pretrain" / "stage.json").write_text(json.dumps({"key": "k", "last_loss": 2.5}))
    (folder / "model").mkdir()
    (folder / "model" / "run.json").write_text(to_json(run))
    if score is not None:
        metric = {"name": "f1", "value": score, "num_questions": 3}
        result = {"benchmark": "pope", "metric": "f1", "metrics": [metric]}
        path = folder / "evaluation" / "pope" / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"version": 1, "results": [result]}))


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs that differ in seed, connector, a rate and the version of torch."""
    write_run(tmp_path / "runs" / "a", {}, "2.12.0", 81.5)
    changes = {"seed": 7, "model.connector": "linear", "stages.finetune.learning_rate": 1e-5}
    write_run(tmp_path / "runs" / "b", changes, "2.13.0", None)
    return tmp_path / "runs"


def test_the_table_has_a_row_for_each_run_and_none_for_its_checkpoint(runs):
    head, *rows = run_rows(find_runs(runs))
    assert (head[1], head[-1]) == ("recipe", "pope")
    assert rows == [
        ("a", "base", "CLIP", "mlp", "TinyLlama", "42", "1 of 2 here", "2.500", "81.50"),
        ("b", "base", "CLIP", "linear", "TinyLlama", "7", "1 of 2 here", "2.500", "-"),
    ]


def test_scores_of_blank_images_and_of_a_part_of_the_questions_are_told_apart(runs):
    metric = {"name": "f1", "value": 60.0, "num_questions": 3}
    amount = {"num_questions": 100, "num_missing": 1, "num_expected": 8910}
    blind = {"benchmark": "pope", "metric": "f1", "metrics": [metric], "model": "m (blank images)"}
    part = {"benchmark": "pope", "metric": "f1", "metrics": [metric], "model": "m", **amount}
    for name, listed in (("a/evaluation/pope", [blind]), ("a/short", [part]), ("b", [part])):
        path = runs / name / "results.json"
        known = json.loads(path.read_text())["results"] if path.exists() else []
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"version": 1, "results": [*known, *listed]}))
    head, a, b = run_rows(find_runs(runs))
    assert head[-2:] == ("pope", "pope-blind")
    assert a[-2:] == ("81.50", "60.00")  # neither the blank images' nor a part's takes its place
    assert b[-2:] == ("60.00 (100 of 8,910, 1 unanswered)", "-")
    assert ("questions.pope", "-", "100 of 8,910, 1 unanswered") in diff_runs(*find_runs(runs))


def test_runs_are_filtered_by_settings(runs):
    found = find_runs(runs)
    assert [run.folder.name for run in filter_runs(found, ["model.connector=lin*"])] == ["b"]
    assert [run.folder.name for run in filter_runs(found, ["seed=42", "connector=mlp"])] == ["a"]
    assert filter_runs(found, ["seed=42", "connector=linear"]) == []
    with pytest.raises(DataError, match="no run has a setting 'sed'"):
        filter_runs(found, ["sed=1"])
    with pytest.raises(DataError, match=r"'sed'; did you mean 'seed'\?"):
        filter_runs(found, ["sed=1"])
    with pytest.raises(DataError, match="give PATH=VALUE"):
        filter_runs(found, ["seed"])


@pytest.mark.parametrize(
    ("condition", "names"),
    [
        ("pope>80", ["a"]),
        ("score.pope >= 81.5", ["a"]),
        ("pope<80", []),
        ("loss.pretrain<=2.5", ["a", "b"]),
        ("learning_rate<1.5e-5", ["b"]),
        ("seed!=42", ["b"]),
        ("vision_encoder=CLIP", ["a", "b"]),  # the folder's name, and that of Table 1
        ("vision_encoder=*/CLIP", ["a"]),
        ("recipe=base", ["a", "b"]),
    ],
)
def test_runs_are_filtered_by_scores_losses_and_names_of_parts(runs, condition, names):
    path = runs / "a" / "run.json"
    values = json.loads(path.read_text())
    values["model"]["vision_encoder"] = "/parts/CLIP"
    path.write_text(json.dumps(values))
    assert [run.folder.name for run in filter_runs(find_runs(runs), [condition])] == names


def test_a_comparison_of_what_is_no_number_is_refused(runs):
    for condition in ("connector>3", "pope>much"):
        with pytest.raises(DataError, match="compares numbers"):
            filter_runs(find_runs(runs), [condition])


def test_two_runs_differ_in_what_was_changed_and_nothing_else(runs):
    first, second = find_runs(runs)
    assert diff_runs(first, second)[1:] == [
        ("model.connector", "mlp", "linear"),
        ("stages.finetune.learning_rate", "2e-05", "1e-05"),
        ("seed", "42", "7"),
        ("environment.torch", "2.12.0", "2.13.0"),
        ("score.pope", "81.5", "-"),
    ]
    assert len(diff_runs(first, first)) == 1


def test_the_command_prints_them(runs, capsys):
    assert main(["runs", str(runs), "--where", "seed=7"]) == 0
    assert "linear" in (shown := capsys.readouterr().out)
    assert "mlp" not in shown
    assert main(["runs", "--diff", str(runs / "a"), str(runs / "b")]) == 0
    assert "environment.torch" in capsys.readouterr().out
    assert main(["runs", str(runs / "a" / "pretrain")]) == 2
    assert "no run folder (with a run.json) found" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["null", "[]", "{", '{"results": [3]}', '{"stages": 3}', ""])
@pytest.mark.parametrize("name", ["run.json", "environment.json", "pretrain/stage.json", "results.json"])
def test_damaged_files_of_one_run_leave_the_others_listed(runs: Path, name: str, text: str) -> None:
    damaged = min(path for path in runs.iterdir() if path.is_dir())
    (damaged / name).parent.mkdir(exist_ok=True)
    (damaged / name).write_text(text)
    rows = run_rows(find_runs(runs))
    names = {row[0] for row in rows[1:]}
    assert {path.name for path in runs.iterdir() if path.is_dir() and path != damaged} <= names
    assert (damaged.name in names) == (name != "run.json")
