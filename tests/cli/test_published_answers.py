"""Answers of LLaVA's scripts in its own folders, scored by the command that the guide gives."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import tinyllava
from evaluation import benchmark_files as files
from tinyllava.cli import main
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.results import Result, load_results

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "evaluate.md"
MODEL = "llava-v1.5-13b"


def commands() -> list[list[str]]:
    """The guide's commands with ``--answers``, split as a shell does."""
    text = GUIDE.read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        shlex.split(line)[1:]
        for line in text.splitlines()
        if line.startswith("tinyllava") and "--answers" in line
    ]


def llava_layout(root: Path) -> Path:
    """What eval.zip and the benchmarks' own files are laid out as, with a few questions each."""
    files.pope(root / "pope" / "coco")
    files.mme(root / "MME")
    files.scienceqa(root / "scienceqa")
    files.mmbench(root / "mmbench")
    files.llava_w(root / "llava-bench-in-the-wild")
    files.mmvet(root / "mmvet")  # its own zip; the answers are in mm-vet
    places = {
        "pope": "pope/answers",
        "mme": "MME/answers",
        "scienceqa": "scienceqa/answers",
        "mmbench": "mmbench/answers/mmbench_dev_20230712",
        "mmvet": "mm-vet/answers",
        "llava-w": "llava-bench-in-the-wild/answers",
    }
    for name, place in places.items():
        benchmark = BENCHMARKS[name]
        folder = root / ("mmvet" if name == "mmvet" else place.split("/")[0])
        lines = [
            {
                "question_id": q.meta.get("llava_id", q.id),
                "prompt": q.meta.get("llava_prompt", q.prompt),
                "text": q.target["answer"] if name == "mmbench" else str(q.target),
                "model_id": MODEL,
                "metadata": {},
            }
            for q in benchmark.load(folder)
        ]
        lines[0]["text"] = "none of it"
        files.write_lines(root / place / f"{MODEL}.jsonl", lines)
    grades = {
        key: {"model": ["gpt-4-0613"] * 3, "content": ["0.0", "0.5", "1.0"], "score": [0.0, 0.5, 1.0]}
        for key in files.MMVET
    }
    files.write_json(root / "mm-vet" / "results" / f"{MODEL}_gpt-4-grade-3runs.json", grades)
    reviews = [{"question_id": n, "content": "8 6", "tuple": [8, 6]} for n in range(4)]
    files.write_lines(root / "llava-bench-in-the-wild" / "reviews" / f"{MODEL}-eval1.jsonl", reviews)
    return root


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Result]:
    monkeypatch.chdir(tmp_path)
    llava_layout(tmp_path / "playground" / "data" / "eval")
    for command in commands():
        assert main(command) == 0
    results = load_results(tmp_path / "evaluations" / MODEL / "results.json")
    return {result.benchmark: result for result in results}


def test_the_guides_commands_score_llavas_answers(scored: dict[str, Result]) -> None:
    assert set(scored) == {"pope", "mme", "scienceqa", "mmbench", "mmvet", "llava-w"}
    # one answer of each is "none of it": for POPE a yes where yes is right
    values = {name: result.value for name, result in scored.items()}
    assert values == pytest.approx(
        {"pope": 100, "mme": 325, "scienceqa": 50, "mmbench": 50, "mmvet": 50, "llava-w": 75}
    )
    for result in scored.values():
        assert (result.model, result.dtype, result.decoding, result.num_missing) == (MODEL, "", {}, 0)
        assert f"answers from {MODEL}.jsonl" in result.notes
    assert (scored["mmvet"].judge, scored["llava-w"].judge) == ("gpt-4-0613", "gpt-4-0314")


def test_a_python_call_scores_them_as_the_commands_do(scored: dict[str, Result], tmp_path: Path) -> None:
    root = tmp_path / "playground" / "data" / "eval"
    called = tinyllava.score_answers(
        MODEL, root, benchmarks=["pope", "scienceqa"], answers=root, output=tmp_path / "called"
    )
    reviews = root / "mm-vet" / "results" / f"{MODEL}_gpt-4-grade-3runs.json"
    called |= tinyllava.score_answers(
        MODEL, root, benchmarks="mmvet", answers=root, reviews=reviews, output=tmp_path / "called"
    )
    assert set(called) == {"pope", "scienceqa", "mmvet"}
    for name, result in called.items():
        assert replace(result, date="") == replace(scored[name], date="")
    again = tinyllava.score_answers(MODEL, root, benchmarks="pope", output=tmp_path / "called")
    assert again["pope"].value == called["pope"].value  # the answers are there by now


def test_the_same_command_again_scores_again_and_other_answers_are_refused(
    scored: dict[str, Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = commands()[0]
    assert main(first) == 0
    path = tmp_path / "playground" / "data" / "eval" / "pope" / "answers" / f"{MODEL}.jsonl"
    path.write_text(path.read_text().replace("none of it", "no"))
    capsys.readouterr()
    assert main(first) == 2
    assert "has answers of a run with sha256 = " in capsys.readouterr().err


def test_what_cannot_be_found_or_done_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = llava_layout(tmp_path / "playground" / "data" / "eval")
    arguments = ["--data", str(root), "--benchmarks", "pope", "--answers", str(root)]
    assert main(["evaluate", "another", *arguments, "--score-only"]) == 2
    assert "answers of another to pope, found: none. Looked for pope.jsonl" in capsys.readouterr().err
    files.write_lines(root / "pope" / "answers" / MODEL / "merge.jsonl", [{}])
    assert main(["evaluate", MODEL, *arguments, "--score-only"]) == 2
    assert "expected one file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", MODEL, *arguments])
    assert "--answers needs --score-only" in capsys.readouterr().err


def test_an_answer_that_no_file_can_hold_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = llava_layout(tmp_path / "eval")
    path = root / "pope" / "answers" / f"{MODEL}.jsonl"
    path.write_text(path.read_text().replace("none of it", "x\\udce9"))
    asked = ["--data", str(root), "--benchmarks", "pope", "--score-only", "--answers", str(root)]
    assert main(["evaluate", MODEL, *asked]) == 2
    assert re.search(rf"{MODEL}.jsonl:1: .*an unpaired surrogate", capsys.readouterr().err)


def test_gqa_is_found_where_llava_has_it(tmp_path: Path) -> None:
    files.gqa(tmp_path / "gqa" / "data")
    (first, *_) = BENCHMARKS["gqa"].load(tmp_path / "gqa")
    assert first.conversation.images[0].path == tmp_path / "gqa" / "data" / "images" / "n161313.jpg"


def test_the_guides_table_is_that_of_its_file() -> None:
    document = json.loads((GUIDE.parents[1] / "published-scores.json").read_text(encoding="utf-8"))
    decimals = {True: "{:.1f}", False: "{:.2f}"}
    for row in document["scores"]:
        published, here = decimals[True].format(row["published"]), decimals[False].format(row["scored"])
        assert f"| {row['benchmark']} | {row['model']} | {published} | {here} |" in GUIDE.read_text()
        assert abs(row["published"] - row["scored"]) <= 0.051  # equal as printed there, to one decimal
