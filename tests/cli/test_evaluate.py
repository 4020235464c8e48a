"""Evaluate, compare, look at data and chat from the command line, on POPE in its official files."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from chats import make_chat
from tinyllava.cli import main
from tinyllava.errors import ConfigError
from tinyllava.evaluation.results import load_results
from tinyllava.evaluation.score import refuse_other_weights
from tinyllava.parts.folders import default_name

SPLITS = ("adversarial", "popular", "random")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    chat = make_chat(folder, "llama")
    chat.model.save_pretrained(folder / "model")
    chat.processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    pope = folder / "pope"
    (pope / "val2014").mkdir(parents=True)
    for n in range(4):
        pixels = np.random.default_rng(n).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pope / "val2014" / f"{n}.jpg")
    (folder / "mmvet").mkdir()
    for split in SPLITS:
        records = [
            {
                "question_id": n + 1,
                "image": f"{n % 4}.jpg",
                "text": f"Is there a {split} {n} in the image?",
                "label": ("yes", "no")[n % 2],
            }
            for n in range(8)
        ]
        (pope / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


def test_evaluate_then_score_again_then_compare(model, data, tmp_path, capsys):
    arguments = [
        "evaluate",
        str(model),
        "--benchmarks",
        "pope",
        "--data",
        str(data),
        "--output",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(tmp_path / "results.json")
    assert any(line.startswith("pope (pope/mean-f1/llava-1.5): f1 ") for line in printed)
    assert "  partial set: 24 of 8,910 questions" in printed
    assert any(line.startswith("  accuracy ") and "adversarial f1 " in line for line in printed)
    (result,) = load_results(tmp_path / "results.json")
    assert (result.num_questions, result.num_images, result.dtype) == (24, 4, "float32")

    assert main([*arguments, "--blind"]) == 0
    capsys.readouterr()
    path = tmp_path / "pope-blind" / "predictions.jsonl"
    first, *rest = path.read_text().splitlines()
    flipped = json.loads(first)
    flipped.update(score=1 - flipped["score"], parsed={"yes": "no", "no": "yes"}[flipped["parsed"]])
    path.write_text("\n".join([json.dumps(flipped), *rest]) + "\n")
    assert (
        main(
            [
                "compare",
                str(tmp_path / "pope"),
                str(tmp_path / "pope-blind"),
                "--data",
                str(data),
                "--output",
                str(tmp_path / "flips.html"),
            ]
        )
        == 0
    )
    assert "n = 24" in capsys.readouterr().out
    page = (tmp_path / "flips.html").read_text()
    assert page.count("Is there a") == 1
    assert "data:image/jpeg;base64" in page

    for path in model.glob("*"):
        path.rename(path.with_name(path.name + ".away"))
    try:  # scoring again needs no model
        assert main([*arguments, "--score-only"]) == 0
    finally:
        for path in model.glob("*.away"):
            path.rename(path.with_name(path.name.removesuffix(".away")))
    assert load_results(tmp_path / "results.json")[-1].metrics == result.metrics


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_two_real_processes_give_the_same_predictions(model, data, tmp_path, by_torchrun):
    arguments = ["evaluate", str(model), "--benchmarks", "pope", "--data", str(data), "--output"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch = launch if by_torchrun else [sys.executable]
    gpus = [] if by_torchrun else ["--gpus", "2"]
    subprocess.run(
        [*launch, "-m", "tinyllava", *arguments, str(tmp_path / "two"), *gpus],
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    one, two = ((tmp_path / name / "pope/predictions.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    assert len(list((tmp_path / "two" / "pope").glob("answers-*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmarks", "popee"], "unknown benchmark 'popee'.*Did you mean 'pope'"),
        (["--benchmarks", "pope,gqa"], "no folder for gqa.*tinyllava data benchmarks gqa"),
        (["--benchmarks", "pope", "--judge-url", "http://localhost/v1"], "--judge-model"),
        (["--benchmarks", "pope", "--score-only"], "no answers found"),
        (
            ["--benchmarks", "mmvet", "--judge-url", "localhost/v1", "--judge-model", "m"],
            "must start with http:// or https://",
        ),
    ],
)
def test_wrong_requests_are_told_before_a_model_is_opened(data, tmp_path, capsys, arguments, message):
    asked = ["evaluate", "no-such-model", "--data", str(data), "--output", str(tmp_path), *arguments]
    assert main(asked) == 2
    assert re.search(message, capsys.readouterr().err)


def test_data_tells_what_is_missing(data, tmp_path, capsys):
    assert main(["data", "benchmarks"]) == 0
    assert "8,910 questions" in capsys.readouterr().out
    assert main(["data", "benchmarks", "pope", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("missing: ") == 4
    shutil.copytree(data / "pope", tmp_path / "pope")
    assert main(["data", "benchmarks", "pope", str(tmp_path / "pope")]) == 1
    assert "doubtful (4 of 500 files): val2014" in capsys.readouterr().out
    for n in range(4, 500):
        (tmp_path / "pope" / "val2014" / f"{n}.jpg").touch()
    assert main(["data", "benchmarks", "pope", str(tmp_path / "pope")]) == 0


def test_missing_images_are_told_before_the_first_question(model, data, tmp_path, capsys):
    shutil.copytree(data / "pope", tmp_path / "d" / "pope")
    for n in (1, 3):
        (tmp_path / "d" / "pope" / "val2014" / f"{n}.jpg").unlink()
    asked = ["evaluate", str(model), "--benchmarks", "pope", "--data", str(tmp_path / "d"), "--output"]
    assert main([*asked, str(tmp_path / "out")]) == 2
    assert re.search(r"val2014/1.jpg: no such (image|image); 2 of 4 are missing", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert main([*asked, str(tmp_path / "out"), "--blind", "--limit", "2"]) == 0


def test_a_broken_image_is_named_counted_and_told_by_the_exit_status(model, data, tmp_path, capsys):
    shutil.copytree(data / "pope", tmp_path / "d" / "pope")
    (tmp_path / "d" / "pope" / "val2014" / "1.jpg").write_bytes(b"no image")
    output = tmp_path / "out"
    asked = [
        "evaluate",
        str(model),
        "--benchmarks",
        "pope",
        "--data",
        str(tmp_path / "d"),
        "--output",
        str(output),
    ]
    for more in ([], ["--score-only"]):
        assert main([*asked, *more]) == 1
        printed = capsys.readouterr().out
        assert "  6 questions have no answer and count as wrong" in printed
        assert re.search(r"    2: 1\.jpg: not a known image format", printed)
        assert re.search(r"  unclear answers \(neither yes nor no; counted as yes\): \d+", printed)
    (result,) = load_results(output / "results.json")
    assert (result.num_missing, result.num_questions) == (6, 24)
    predictions = [
        json.loads(line) for line in (output / "pope" / "predictions.jsonl").read_text().splitlines()
    ]
    assert result.num_unclear == sum(not one["is_clear"] for one in predictions) > 0
    assert sum(one["answer"] == "" for one in predictions) == 6


def test_a_raised_limit_takes_the_place_of_results_of_other_data(model, data, tmp_path, capsys):
    asked = ["evaluate", str(model), "--benchmarks", "pope", "--data", str(data), "--output", str(tmp_path)]
    for more in (["--limit", "4"], ["--limit", "4", "--blind"]):
        assert main([*asked, *more]) == 0
    assert len(load_results(tmp_path / "results.json")) == 2
    capsys.readouterr()
    assert main([*asked, "--limit", "6"]) == 0
    assert re.search(
        r"dropped from .*results.json: .* \(blank images\), from other data", capsys.readouterr().out
    )
    assert [one.num_questions for one in load_results(tmp_path / "results.json")] == [6]
    assert main([*asked, "--limit", "6", "--blind"]) == 0
    assert [one.num_questions for one in load_results(tmp_path / "results.json")] == [6, 6]
    shutil.rmtree(tmp_path / "pope-blind")
    assert main([*asked, "--limit", "6", "--blind", "--bits", "4"]) == 2
    told = "on pope is of weights in float32, but this run has float32-4bit. Choose another --output"
    assert told in capsys.readouterr().err


def test_models_of_unknown_weights_are_told_by_their_names(model, data, tmp_path):
    asked = ("--benchmarks", "pope", "--data", str(data), "--limit", "3", "--output", str(tmp_path))
    assert main(["evaluate", str(model), *asked]) == 0
    path = tmp_path / "results.json"
    table = json.loads(path.read_text())
    table["results"][0]["weights"] = ""
    path.write_text(json.dumps(table))
    refuse_other_weights(tmp_path, "another", "", "float32-4bit")
    with pytest.raises(ConfigError, match="Choose another --output: a row of a table is one model"):
        refuse_other_weights(tmp_path, table["results"][0]["model"], "", "float32-4bit")


def test_a_model_is_told_by_its_weights_however_its_folder_is_written(
    model, data, tmp_path, capsys, monkeypatch
):
    shutil.copytree(model, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    asked = ("--benchmarks", "pope", "--data", str(data), "--limit", "3", "--output", "out")
    for name in ("m", "m/", "./m", str(tmp_path / "m")):
        assert main(["evaluate", name, *asked]) == 0
    shutil.move("m", "moved")
    assert main(["evaluate", "moved", *asked, "--blind"]) == 0
    results = load_results(tmp_path / "out/results.json")
    assert [one.model for one in results] == ["m", "m (blank images)"]
    assert len({one.weights for one in results}) == 1
    assert len((tmp_path / "out/pope/answers-000.jsonl").read_text().splitlines()) == 3
    template = tmp_path / "moved/chat_template.jinja"
    assert main(["evaluate", "moved", *asked, "--score-only"]) == 0
    template.write_text(template.read_text() + " ")  # it decides the answers as the weights do
    capsys.readouterr()
    for name, gist in (("moved", r"not of moved \(weights \w+, now"), ("elsewhere", r"not of elsewhere\. ")):
        assert main(["evaluate", name, *asked, "--score-only"]) == 2
        assert re.search(f"out/pope: has answers of m, {gist}", capsys.readouterr().err)
    shutil.move("moved", "m")
    shutil.rmtree("out/pope")
    capsys.readouterr()
    assert main(["evaluate", "m", *asked]) == 2
    assert re.search(
        r"results.json: the score of m on pope belongs to other weights \(", capsys.readouterr().err
    )


def test_the_default_folder_is_of_one_model_alone(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("a", "b"):
        shutil.copytree(model, tmp_path / run / "model")
    (tmp_path / "b/model/chat_template.jinja").write_text("{{ messages[0].content }}")
    names = []
    for run in ("a", "b"):
        names.append(default_name(tmp_path / run / "model"))
        main(["evaluate", f"{run}/model", "--benchmarks", "pope", "--data", str(data), "--limit", "1"])
    assert [name.partition("-")[0] for name in names] == ["a", "b"]
    assert {path.name for path in (tmp_path / "evaluations").iterdir()} == set(names)


def test_damaged_files_of_an_evaluation_have_a_way_out(model, data, tmp_path, capsys):
    asked = ["evaluate", str(model), "--benchmarks", "pope", "--data", str(data), "--limit", "3", "--output"]
    output = tmp_path / "out"
    assert main([*asked, str(output)]) == 0
    expected = load_results(output / "results.json")
    for text in ("{", "null", '{"version": 9}', '{"version": 1, "results": [[]]}', "\x00", ""):
        (output / "results.json").write_text(text)
        capsys.readouterr()
        assert main([*asked, str(output), "--score-only"]) == 0
        assert f"{output / 'results.json'}: damaged, moved to {output / 'results.json.damaged'}" in (
            capsys.readouterr().out
        )
        assert [one.metrics for one in load_results(output / "results.json")] == [expected[0].metrics]
    for text in ("{", "null", "{}", '{"model": 3, "dtype": []}'):
        (output / "pope/run.json").write_text(text)
        capsys.readouterr()
        assert main([*asked, str(output), "--score-only"]) == 2
        error = capsys.readouterr().err
        assert (
            f"run.json: damaged, so the model of these answers is unknown. Delete {output / 'pope'}" in error
        )
        assert "Traceback" not in error
    (output / "pope/run.json").unlink()
    assert main([*asked, str(output)]) == 2
    assert f"{output / 'pope'}: has answers, but no run.json names their model" in capsys.readouterr().err
    shutil.rmtree(output / "pope")
    assert main([*asked, str(output)]) == 0


def test_two_processes_never_answer_into_one_folder(model, data, tmp_path, capsys):
    asked = ["evaluate", str(model), "--benchmarks", "pope", "--data", str(data), "--output", str(tmp_path)]
    (tmp_path / "pope").mkdir()
    with FileLock(tmp_path / "pope/.lock"):
        assert main(asked) == 2
    assert f"{tmp_path / 'pope'}: another process is writing there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "-1"], "--limit is -1; it must be 0 or more"),
        (["--judge-url", "http://x/v1", "--reviews", "r"], "exclude each other"),
        (["--judge-timeout", "0"], "--judge-timeout must be above 0"),
        (["--judge-concurrent", "0"], "--judge-concurrent at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "no-such-model", "--data", "d", *options])
    assert message in capsys.readouterr().err


def test_chat_answers_once_and_in_turns(model, data, capsys, monkeypatch):
    image = str(data / "pope" / "val2014" / "0.jpg")
    base = ["chat", image, "--model", str(model), "--max-tokens", "8"]
    assert main([*base[:2], "Is there a dog?", *base[2:]]) == 0
    once = capsys.readouterr().out
    assert once.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("Is there a dog?\nWhat is it?\n\nnot asked\n"))
    assert main(base) == 0
    turns = capsys.readouterr().out
    assert turns.startswith(once)
    assert len(turns) > len(once)


@pytest.mark.parametrize("option", [("--max-tokens", "0"), ("--temperature", "-1")])
def test_chat_refuses_values_that_cannot_be(option, capsys):
    with pytest.raises(SystemExit):
        main(["chat", "cat.jpg", *option])
    assert "--max-tokens must be at least 1, and --temperature at least 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["chat", "cat.jpg"], "name a checkpoint folder with --model DIR."),
        (["serve"], "name a checkpoint folder with `tinyllava serve DIR`."),
    ],
)
def test_without_a_model_a_command_says_what_to_do(arguments, fix, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path))
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "`tinyllava starter`" in told
    assert fix in told
