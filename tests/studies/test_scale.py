"""A part of the records: fixed, nested, with the same share of every source, and named as what it is."""

import json
import random
from collections import Counter

import pytest

from tinyllava.config import DataConfig
from tinyllava.data.records import read_records
from tinyllava.errors import ConfigError
from tinyllava.recipes.variants import variant
from tinyllava.studies.grid import change_run
from tinyllava.studies.paper import GRIDS
from tinyllava.studies.reproduce import choose_records, scale_grid, scale_run

SOURCES = {"coco/train2017": 3640, "gqa/images": 720, "vg/VG_100K": 860, "": 400}


def some_records() -> list[dict]:
    records = [
        {"id": f"{source}{n}", "conversations": [], **({"image": f"{source}/{n}.jpg"} if source else {})}
        for source, count in SOURCES.items()
        for n in range(count)
    ]
    random.Random(3).shuffle(records)
    return records


def source_of(record: dict) -> str:
    return record.get("image", "").rpartition("/")[0]


@pytest.mark.parametrize("scale", [0.02, 0.1, 0.5])
def test_every_source_keeps_its_share(scale):
    counts = Counter(map(source_of, choose_records(some_records(), scale)))
    assert counts == {source: round(scale * count) for source, count in SOURCES.items()}


def test_the_choice_is_fixed_and_a_smaller_one_lies_in_a_larger_one():
    records = some_records()
    chosen = choose_records(records, 0.02)
    shuffled = random.Random(9).sample(records, len(records))
    ids = {record["id"] for record in chosen}
    assert {record["id"] for record in choose_records(shuffled, 0.02)} == ids
    assert ids < {record["id"] for record in choose_records(records, 0.1)}
    assert [r["id"] for r in chosen] == [r["id"] for r in records if r["id"] in ids]  # the file's order
    assert sum(int(id_.removeprefix("gqa/images")) for id_ in ids if id_[0] == "g") not in (91, 92)


def test_a_source_never_vanishes():
    assert Counter(map(source_of, choose_records(some_records(), 0.0001))) == dict.fromkeys(SOURCES, 1)


def test_a_run_reads_the_part_and_the_grid_says_so(tmp_path, records):
    data = DataConfig(records=(str(records),), images=str(records.parent / "images"))
    run = change_run(variant("base-C-TL"), {"stages.pretrain.data": data, "stages.finetune.data": data})
    scaled = scale_run(run, 0.25, tmp_path)
    (path,) = scaled.stages["finetune"].data.records
    part = read_records(tmp_path / path, records.parent / "images")
    assert len(part.conversations) == round(9 * 0.25) + 1  # of nine with an image, and of three without
    assert scale_run(run, 0.25, tmp_path) == scaled
    assert len(json.loads((tmp_path / path).read_text())) == len(part.conversations)
    grid = scale_grid(GRIDS["figure-4"], 0.02)
    assert grid.name == "figure-4-scale-0.02"
    assert "2.00% of the data" in grid.title
    assert any("2.00%" in note for note in grid.notes)
    assert scale_grid(GRIDS["figure-4"], 1) is GRIDS["figure-4"]


@pytest.mark.parametrize("scale", [0, -1, 1.5])
def test_a_share_is_between_0_and_1(scale):
    with pytest.raises(ConfigError, match="--scale"):
        scale_grid(GRIDS["figure-4"], scale)
