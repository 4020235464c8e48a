"""The data guide says what the code does: its table of defects, its bounds, its example."""

import json

from documents import ROOT, blocks
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
