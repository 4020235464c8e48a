"""The data guide says what the code does: its table of defects, its bounds, its example."""

import json
import re
import shlex

import pytest
from PIL import Image

from data.test_hub import endpoint, hub  # noqa: F401 (fixtures)
from documents import ROOT, blocks, commands
from test_guide_own_data import make_small_model
from tinyllava.cli import main
from tinyllava.data.defects import DEFECTS
from tinyllava.data.images import MAX_PIXELS, MAX_SIDE_PX
from tinyllava.data.records import read_records

GUIDE = (ROOT / "docs/guides/data.md").read_text(encoding="utf-8")


def test_the_table_of_defects_is_the_codes():
    section = GUIDE.partition("## Defects")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert {name.strip("`"): meaning for name, meaning in rows} == DEFECTS


def test_the_bounds_of_an_image_are_the_codes():
    assert f"more than {MAX_PIXELS:,} pixels, or a side above {MAX_SIDE_PX:,}" in GUIDE


def test_the_example_is_a_good_record(tmp_path):
    [example] = blocks(GUIDE, "json")
    [record] = json.loads(example)
    (tmp_path / record["image"]).parent.mkdir(parents=True)
    (tmp_path / record["image"]).touch()
    (tmp_path / "my.json").write_text(example)
    [conversation] = read_records(tmp_path / "my.json", tmp_path).conversations
    assert len(conversation.messages) == 4


@pytest.mark.usefixtures("hub")
def test_its_commands_run_as_they_are(tmp_path, monkeypatch, capsys):
    """Word for word, also those in lists; the language model that is named has the toy's tokenizer here."""
    make_small_model(tmp_path).rename(tmp_path / "CHECKPOINT")
    rows = [(f"{number}.png", "Which beetle is it?", f"Number {number}") for number in range(12)]
    for number, (name, _, _) in enumerate(rows):
        Image.new("RGB", (30, 20), (20 * number, 80, 90)).save(tmp_path / name)
    table = "\n".join(",".join(row) for row in rows)
    (tmp_path / "my.csv").write_text(f"image,question,answer\n{table}\n")
    (tmp_path / "beetles.csv").write_text(f"Bild,Frage,Antwort\n{table}\n")
    (tmp_path / "my.txt").write_text("\n".join("|".join(row) for row in rows))
    records = [dict(zip(("image", "question", "answer"), row, strict=True)) for row in rows]
    for name in ("my.json", "general.json"):
        (tmp_path / name).write_text(json.dumps(records))
    (tmp_path / "mine.py").write_text(next(body for body in blocks(GUIDE, "python") if "def read(" in body))
    monkeypatch.chdir(tmp_path)
    found = commands(re.sub("(?m)^ +(?=```|tinyllava)", "", GUIDE))
    assert len(found) >= 11
    for command in found:
        words = shlex.split(command.replace("--language-model TinyLlama", "--language-model f"))
        assert words[0] == "tinyllava"
        output = ["--output", f"runs/{found.index(command)}"] if words[1] == "train" else []
        assert main([*words[1:], *output]) == 0, (command, capsys.readouterr().err)
    assert {path.name for path in tmp_path.glob("my-*.json")} == {"my-train.json", "my-held-out.json"}
    assert (tmp_path / "check.html").read_text().count("<img src") == len(rows)
