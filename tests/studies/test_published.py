"""The published numbers, cell by cell, against the text of the paper."""

import re
from pathlib import Path

import pytest

from tinyllava.errors import UnknownNameError
from tinyllava.evaluation.benchmarks import PAPER_BENCHMARKS
from tinyllava.parts.language import LANGUAGE_MODELS
from tinyllava.parts.vision import VISION_ENCODERS
from tinyllava.recipes.variants import VARIANTS
from tinyllava.studies.published import ABSENT, TABLES, published_scores, published_table

TEXT = (Path(__file__).parent / "paper_tables.md").read_text(encoding="utf-8")
HEADS = {"VQA^{v2}": "vqav2", "GQA": "gqa", "SQA": "scienceqa", "VQA^T": "textvqa", "MM-Vet": "mmvet"}
HEADS |= {"POPE": "pope", "LLaVA-W": "llava-w", "MME": "mme", "MMB": "mmbench"}
# In the text, "SQA^I" is broken over two cells in the head of Table 3, and whole in that of Table A1.
HEAD_3 = "VQA^{v2} GQA SQA VQA^T MM-Vet POPE LLaVA-W MME MMB"


def plain(cell: str) -> str:
    """Take the marks of best and second best, of mathematics and of the reference from a cell."""
    cell = re.sub(r"</?u>|\$|\\underline|[{}^]", "", cell)
    return re.sub(r" \[\d+\]$", "", cell).replace(" *", "*").strip()


def paper_rows(title: str) -> list[list[str]]:
    lines = TEXT.partition(f"## {title}\n\n")[2].partition("\n\n")[0].splitlines()
    return [line.split("\t") for line in lines]


@pytest.mark.parametrize(
    ("name", "title", "num_cells"), [("table-3", "Table 3", 130), ("table-a1", "Table A1", 132)]
)
def test_every_cell_of_a_table_of_scores_is_the_papers(name: str, title: str, num_cells: int) -> None:
    rows = [[plain(cell) for cell in row] for row in paper_rows(title) if row[0]]
    table = published_table(name)
    assert sum(map(len, rows)) == num_cells
    assert [list(row) for row in table.rows] == rows
    assert list(table.columns[4:]) == [HEADS[head] for head in HEAD_3.split()][: len(rows[0]) - 4]
    assert set(table.protocols) == set(table.columns[4:]) <= set(PAPER_BENCHMARKS)


def test_tables_1_and_2_are_the_papers() -> None:
    parts = paper_rows("Table 1")
    assert [list(row[1:]) for row in published_table("table-1").rows] == [row[1:] for row in parts]
    data = paper_rows("Table 2")
    assert [list(row[1:]) for row in published_table("table-2").rows] == [row[1:] for row in data]
    assert len(parts) == 5
    assert len(data) == 4


def test_table_1_names_the_parts_that_the_package_has() -> None:
    known = {part.path for part in (*LANGUAGE_MODELS.values(), *VISION_ENCODERS.values())}
    assert {row[3] for row in published_table("table-1").rows} <= known


def test_the_twelve_variants_have_published_scores() -> None:
    twelve = [row[0].removeprefix("TinyLLaVA-") for row in published_table("table-a1").rows]
    assert set(twelve) <= set(VARIANTS)
    assert all(len(published_scores(name)) >= 7 for name in twelve)
    share = published_scores("share-Sig-Phi")
    assert len(share) == 9
    assert (share["textvqa"].value, share["textvqa"].table) == (59.1, "Table A1")
    assert (share["mme"].value, share["mme"].table) == (1464.9, "Table 3")
    assert published_scores("base-C-TL-ShareGPT4V") == published_scores("") == {}


def test_a_star_is_a_remark_and_a_dash_is_no_number() -> None:
    table = published_table("table-3")
    by_model = {(row[0], row[3]): row for row in table.rows}
    starred = table.score(by_model["MoE-LLaVA", "384"], "gqa")
    assert starred is not None
    assert (starred.value, starred.saw_training_images) == (62.6, True)
    assert table.score(by_model["Qwen-VL", "448"], "pope") is None
    assert sum(cell == ABSENT for row in table.rows for cell in row) == 5 + 3 + 4 + 2 + 2 + 3


def test_every_row_trained_anew_is_the_code_bases() -> None:
    """The README names parts by their paths, in the order encoder, language model, recipe."""
    table = published_table("factory")
    printed = paper_rows("Factory")
    assert [list(row[4:]) for row in table.rows] == [row[3:-1] for row in printed]  # the last: MMMU
    known = {part.path: name for name, part in (*LANGUAGE_MODELS.items(), *VISION_ENCODERS.items())}
    recipes = {"base": "base", "base&lora": "LoRA", "share": "share"}
    for row, (encoder, language_model, recipe, *_) in zip(table.rows, printed, strict=True):
        assert row[1] == known[encoder]
        assert row[2] == known.get(language_model, language_model.partition("/")[2].removesuffix("-Instruct"))
        assert row[3] == recipes[recipe]
        assert row[0].startswith(f"{row[3]}-{'Sig' if row[1] == 'SigLIP' else 'C'}-")
    assert "frozen" in table.about


def test_every_table_says_where_it_is_from() -> None:
    for name in TABLES:
        assert published_table(name).source.startswith("https://")
    with pytest.raises(UnknownNameError, match="table-a1"):
        published_table("table-a2")
