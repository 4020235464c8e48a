"""The guide "Your own data", followed literally: from a table and 40 photographs to numbers and an answer."""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest
from PIL import Image

from chats import make_chat
from documents import ROOT, blocks, commands
from tinyllava.cli import main
from tinyllava.evaluation.answers import read_predictions
from tinyllava.inference.chat import Chat

GUIDE = (ROOT / "docs/guides/own_data.md").read_text(encoding="utf-8")
NUMBERS = json.loads((ROOT / "docs/own-data-results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import own_data

        yield own_data


def make_small_model(folder: Path) -> Path:
    """A toy with the context of real models, so that the guide's commands need no more options."""
    chat = make_chat(folder, "llama", "siglip")
    chat.model.config.text_config.max_position_embeddings = 2048
    chat.processor.tokenizer.model_max_length = 2048
    chat.model.save_pretrained(folder / "checkpoint")
    chat.processor.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def test_the_drawn_photographs_are_of_many_looks_and_sizes(script, tmp_path: Path) -> None:
    script.write_mugs(tmp_path / "drawn")
    photos = [Image.open(path) for path in sorted((tmp_path / "drawn/photos").iterdir())]
    assert len(photos) == 40
    assert len({photo.size for photo in photos}) == 3
    assert len({photo.tobytes() for photo in photos}) == 40
    with (tmp_path / "drawn/mugs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80
    assert [",".join(row.values()) for row in rows[:2]] == blocks(GUIDE, "")[0].splitlines()[1:]


def test_its_commands_and_its_answer_over_http(
    script, tmp_path: Path, monkeypatch, capsys, port: str
) -> None:
    make_small_model(tmp_path)
    script.write_mugs(tmp_path / "mine")
    (tmp_path / "checkpoint").rename(tmp_path / "mine/checkpoint")
    monkeypatch.chdir(tmp_path / "mine")
    *local, install, serve = commands(GUIDE)
    assert tuple(local[: len(script.COMMANDS)]) == script.COMMANDS  # what was measured is what the guide says
    assert install == "pip install 'tinyllava[serve]'"
    printed = []
    for command in local:
        program, *arguments = shlex.split(command)
        assert program == "tinyllava"
        assert main(arguments) == 0, capsys.readouterr().err
        printed.append(capsys.readouterr().out)
    check, split, before, train, after, blind, compare, export = printed
    assert "mugs.csv: 80 records, 80 without a defect" in check
    assert "mugs-train.json: 60 records" in split
    assert "metric exact match: 10 answers (short answers" in before
    assert "metric yes or no: 10 answers" in before
    assert "finetune: 60 records: batch 4, 5 epochs (75 steps), rate 0.0005, LoRA rank 16" in train
    assert "own-mugs-held-out" in after
    assert "blind: every image replaced" in blind
    assert "n = 20 questions" in compare
    assert export
    by_image = {}
    for side in ("train", "held-out"):
        for record in json.loads(Path(f"mugs-{side}.json").read_text()):
            by_image.setdefault(Path(record["image"]).name, set()).add(side)
    assert len(by_image) == 40
    assert all(len(sides) == 1 for sides in by_image.values())

    numbers = script.read_numbers(Path())
    assert list(numbers) == list(NUMBERS) == ["before", "after", "after with blank images"]
    folders = [Path(f"evaluations/{name}/own-mugs-held-out") for name in ("before", "after")]
    given = [[one.answer for one in read_predictions(folder / "predictions.jsonl")] for folder in folders]
    assert given[0] != given[1]
    assert len(given[1]) == 20
    assert (folders[1] / "answers.html").read_text().count("<img src") == 20
    assert Path("mugs-for-transformers/model.safetensors").is_file()
    answer_over_http(serve, port)


def answer_over_http(serve: str, port: str) -> None:
    """Start the guide's server and run its Python against it."""
    words = shlex.split(serve.replace("8000", port))
    command = [sys.executable, "-m", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline().strip() == f"http://127.0.0.1:{port}", process.communicate()
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=600).status_code == 200
        (example,) = blocks(GUIDE, "python")
        code = [sys.executable, "-c", example.replace("8000", port)]
        done = subprocess.run(code, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        chat = Chat.open("runs/mugs/model")
        assert done.stdout.strip() == chat.ask("Is the mug full?", "photos/00.jpg", max_new_tokens=20) != ""
    finally:
        process.terminate()
        process.communicate()


def test_its_numbers_are_the_measured_ones() -> None:
    rows = [line.strip("| ").split(" | ") for line in GUIDE.splitlines() if line.startswith("| ")][1:]
    shown = {cells[0]: cells[1:] for cells in rows}
    for name, numbers in NUMBERS.items():
        low, high = numbers["interval"]
        assert shown[name] == [
            f"{numbers['value']:.0f} ({low:.0f} to {high:.0f})",
            f"{numbers['kind=short answers']:.0f}",
            f"{numbers['kind=yes or no']:.0f}",
        ]
    assert NUMBERS["after"]["value"] > NUMBERS["before"]["value"]
