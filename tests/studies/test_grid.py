"""Grids as values: the paper's, a user's own, and what the options make of them."""

from dataclasses import replace

import pytest

from grid_toys import write_grid
from tinyllava.cli import reproduce
from tinyllava.errors import ConfigError, UnknownNameError
from tinyllava.recipes.variants import ABLATIONS, VARIANTS, variant
from tinyllava.studies.grid import change_run, cross, exchange_parts, select_cells
from tinyllava.studies.paper import CLAIMS, GRIDS, find_grid, list_table_1, list_table_2


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_figure_has_the_cells_of_its_ablation(name):
    grid = find_grid(name)
    wanted = {
        (panel, label): run for panel, runs in ABLATIONS[name].panels.items() for label, run in runs.items()
    }
    assert {(cell.panel, cell.label): cell.run for cell in grid.cells} == wanted
    assert len(grid.benchmarks) == 9


@pytest.mark.parametrize("name", CLAIMS)
def test_each_side_of_a_claim_is_a_cell_of_its_grid(name):
    grid = find_grid(name)
    for claim in grid.claims:
        for side in (claim.better, claim.worse):
            assert any(side.items() <= cell.labels.items() for cell in grid.cells), claim.text


def test_table_a1_has_the_twelve_variants_with_their_published_numbers():
    assert [cell.published for cell in GRIDS["table-a1"].cells] == list(VARIANTS)
    assert len(GRIDS["table-a1"].benchmarks) == 7


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Figure 4", "figure-4"),
        ("figure8", "figure-8"),
        ("fig. 6", "figure-6"),
        ("FIGURE-1", "figure-1"),
        ("A1", "table-a1"),
        ("table-A1", "table-a1"),
        ("Table 3", "table-3"),
    ],
)
def test_a_name_is_taken_as_the_paper_writes_it(written, name):
    assert find_grid(written) is GRIDS[name]


def test_a_listed_table_is_printed_and_an_unknown_name_is_told_all_names(capsys):
    reproduce.main(["Table 1"])
    assert "StableLM-2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="table-2 is a list, not a grid"):
        find_grid("table-2")
    with pytest.raises(UnknownNameError, match=r"known: figure-1, .*figure-9, table-1, .*table-a1, starter"):
        find_grid("figure-40")


def test_what_the_paper_did_not_print_has_no_published_name():
    cells = {cell.label: cell.published for cell in GRIDS["figure-6"].cells}
    assert cells == {"MLP": "base-C-TL", "Resampler": ""}


def test_tables_1_and_2_stand_beside_what_is_resolved():
    (_, *parts), (_, *data) = list_table_1(), list_table_2()
    assert [(row[1], row[2] == row[4]) for row in parts] == [
        ("TinyLlama", True),
        ("StableLM-2", True),
        ("Phi-2", True),
        ("CLIP", True),
        ("SigLIP", True),
    ]
    assert [row[3] for row in data] == ["558k", "665k", "1246k", "665k"]
    for row in data:  # the printed amount is ours in thousands
        assert round(int(str(row[4]).replace(",", "")) / 1000) == int(str(row[3]).removesuffix("k"))


def test_a_user_writes_a_grid_in_the_same_form(tmp_path, parts, records):
    path = write_grid(tmp_path, parts, records, seeds=(1, 2))
    grid = find_grid(str(path))
    assert grid == find_grid(f"{path}:TOY")
    assert grid.panels == ("MLP", "Linear")
    assert [(cell.panel, cell.label) for cell in grid.cells] == [
        ("MLP", "low"),
        ("MLP", "high"),
        ("Linear", "low"),
        ("Linear", "high"),
    ]
    rates = [cell.run.stages["finetune"].learning_rate for cell in grid.cells]
    assert rates == [1e-4, 1e-3, 1e-4, 1e-3]
    assert {cell.run.stages["pretrain"].learning_rate for cell in grid.cells} == {1e-3}
    with pytest.raises(UnknownNameError, match="Did you mean 'TOY'"):
        find_grid(f"{path}:TOYS")
    path.write_text(path.read_text() + "\nOTHER = TOY\n")
    with pytest.raises(ConfigError, match="has 2 values"):
        find_grid(str(path))
    path.write_text("def make():\n    return 3\n")
    with pytest.raises(ConfigError, match="returned int; it must return a Grid"):
        find_grid(f"{path}:make")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.projector": "mlp"}, "unknown field 'projector'; known: vision_encoder"),
        ({"stages.fintune.learning_rate": 1}, "unknown key 'fintune'; known: pretrain, finetune"),
        ({"seed.x": 1}, "cannot find 'x' in 42"),
    ],
)
def test_a_path_that_is_not_there_is_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        change_run(variant("base-C-TL"), changes)


def test_recipe_and_data_set_are_exchanged_before_single_values():
    changes = {"stages.finetune.learning_rate": 1e-5, "recipe": "share", "model.vision_encoder": "SigLIP"}
    run = change_run(variant("base-C-TL"), changes)
    wanted = variant("share-Sig-TL").stages
    assert run.stages["share_pretrain"] == wanted["share_pretrain"]
    assert run.stages["finetune"] == replace(wanted["finetune"], learning_rate=1e-5)
    other = change_run(variant("base-C-TL"), {"dataset": "ShareGPT4V"})
    assert other.stages == variant("base-C-TL-ShareGPT4V").stages


def test_cells_are_chosen_by_id_subplot_or_label():
    grid = GRIDS["figure-4"]
    assert len(select_cells(grid, ["*Phi*"]).cells) == 2
    assert len(select_cells(grid, ["CLIP"]).cells) == 3
    assert [cell.id for cell in select_cells(grid, ["base-C-TL", "base-Sig-*"]).cells] == [
        "base-C-TL",
        "base-Sig-TL",
        "base-Sig-SLM",
        "base-Sig-Phi",
    ]
    with pytest.raises(UnknownNameError, match="matches no cell of figure-4; known: base-C-TL"):
        select_cells(grid, ["base-C-Qwen"])


def test_parts_that_stand_in_are_named_everywhere(parts):
    grid = exchange_parts(GRIDS["figure-4"], {"TinyLlama": str(parts["llama"])})
    cell = grid.cells[0]
    assert cell.label == cell.labels["language_model"] == "TinyLlama (here llama)"
    assert cell.run.model.language_model == str(parts["llama"])
    assert cell.published == ""
    assert grid.cells[1] == GRIDS["figure-4"].cells[1]
    assert grid.axes["language_model"][0] == "TinyLlama (here llama)"
    assert next(claim.text for claim in grid.claims if "TinyLlama" in str(claim)) == (
        "Phi-2 does better than TinyLlama (here llama) on every benchmark."
    )
    for claim in grid.claims:  # still about cells that there are
        assert any(claim.worse.items() <= cell.labels.items() for cell in grid.cells)
    (best, *_) = exchange_parts(GRIDS["table-3"], {"Phi-2": str(parts["llama"])}).claims
    assert best.text.endswith("on every benchmark. With Phi-2 (here llama).")
    with pytest.raises(UnknownNameError, match="known: CLIP, Phi-2, SigLIP"):
        exchange_parts(GRIDS["figure-4"], {"Llama": "x"})


def test_a_panel_has_to_be_an_axis():
    with pytest.raises(ConfigError, match="panel 'x' is not an axis"):
        cross(name="g", title="g", base=variant("base-C-TL"), axes={}, benchmarks=(), panel="x")


def test_the_starter_varies_one_axis_in_each_panel(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path))
    grid = find_grid("starter")
    assert len(grid.panels) == 4
    for panel in grid.panels:
        labels = [cell.labels for cell in grid.cells if cell.panel == panel]
        varied = {axis for axis in grid.axes if len({place[axis] for place in labels}) > 1}
        assert len(varied) == 1
    for claim in grid.claims:
        (axis,) = claim.better
        assert {claim.better[axis], claim.worse[axis]} <= set(grid.axes[axis])
