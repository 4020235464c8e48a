"""The starter's page: its numbers, its confusions counted by hand, and the page in a browser."""

import json
from pathlib import Path

import pytest
from PIL import Image

from studies.report.chromium import open_page
from tinyllava.cli import COMMANDS
from tinyllava.evaluation.benchmark import Prediction
from tinyllava.starter.report import OTHER, ReportTable, RunFacts, confusion, draw_losses, write_page
from tinyllava.starter.run import next_commands

PHONE, DESKTOP = 390, 1280
ANSWERS = {  # truth and answer of each question, by kind
    "yes_no": [("yes", "yes"), ("no", "yes"), ("no", "no")],
    "colour": [("red", "red"), ("red", "blue"), ("blue", "blue"), ("blue", "a kind of blue"), ("red", "red")],
    "fruit": [("apple", "apple"), ("pear", "apple")],
}


@pytest.fixture
def answered(tmp_path: Path) -> tuple[list[Prediction], dict[str, str]]:
    predictions, truths = [], {}
    (tmp_path / "images").mkdir()
    for kind, pairs in ANSWERS.items():
        for number, (truth, answer) in enumerate(pairs):
            name = f"{kind}-{number}"
            Image.new("RGB", (40 + 30 * number, 50), (50 * number, 90, 90)).save(
                tmp_path / f"images/{name}.png"
            )
            truths[name] = truth
            predictions.append(
                Prediction(
                    benchmark="starter",
                    question_id=name,
                    image=f"{name}.png",
                    prompt=f"Which <{kind}>?",
                    answer=answer,
                    parsed=answer,
                    score=float(truth == answer),
                    category=kind,
                )
            )
    return predictions, truths


def test_confusions_are_counted_by_truth_and_answer(answered) -> None:
    predictions, truths = answered
    colours = confusion(predictions, truths, "colour")
    assert colours.truths == ("blue", "red")
    assert colours.answers == ("blue", "red", OTHER)
    assert colours.counts == ((1, 0, 1), (1, 2, 0))
    fruits = confusion(predictions, truths, "fruit")
    assert fruits.answers == ("apple", "pear")  # nothing else was said
    assert fruits.counts == ((1, 0), (1, 0))


def make_page(folder: Path, answered) -> Path:
    predictions, truths = answered
    cell = {"accuracy": 0.6, "interval": (0.31, 0.875), "count": 10}
    table: ReportTable = {kind: {"model": cell, "majority": cell} for kind in ("overall", *ANSWERS)}
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": n, "loss": 5 / n}) + "\n" for n in range(1, 40)))
    draw_losses({"pretrain": metrics, "finetune": metrics}, folder / "losses.png")
    run = RunFacts(
        title="A small model",
        facts={"training": "12 min"},
        commands={"Ask it": f"tinyllava chat {'/a/long/path' * 20}.png"},
    )
    return write_page(
        folder / "report.html",
        run,
        table,
        predictions,
        truths,
        images=folder / "images",
        losses=folder / "losses.png",
    )


def test_the_page_says_what_was_measured(answered, tmp_path: Path) -> None:
    text = make_page(tmp_path, answered).read_text(encoding="utf-8")
    assert "60.0%<small>31.0% to 87.5%</small>" in text
    assert "yes or no: 2 right, 1 wrong" in text
    assert "correct: blue" in text
    assert "Which &lt;colour&gt;?" in text  # nothing of a question is markup
    assert make_page(tmp_path, answered).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("width_px", [PHONE, DESKTOP])
def test_the_page_in_a_browser(width_px: int, answered, tmp_path: Path) -> None:
    seen = open_page(make_page(tmp_path, answered), tmp_path, width_px)
    assert seen.console == []
    assert len(seen.images) == len(answered[0]) + 1  # an image for every answer, and the losses
    assert min(seen.images) > 0
    assert (seen.width, seen.overflow) == (width_px, 0)
    assert seen.fetched == []


def test_the_next_commands_are_commands_and_the_first_two_use_the_model(tmp_path: Path) -> None:
    records = [{"image": f"{source}/1.png", "source": source} for source in ("easy_vqa", "grocery_store")]
    (tmp_path / "held_out.json").write_text(json.dumps(records))
    commands = next_commands(tmp_path / "model", tmp_path)
    assert all(command.split()[1] in COMMANDS for command in commands.values())
    photograph = tmp_path / "images/grocery_store/1.png"
    assert list(commands.values())[:2] == [
        f"tinyllava chat {photograph} --model {tmp_path / 'model'}",
        f"tinyllava serve {tmp_path / 'model'}",
    ]
