"""Expansion: equal stages stand once, different ones never share a node."""

import os
import shutil
from dataclasses import replace

import pytest

from grid_toys import write_grid
from tinyllava.errors import UnknownNameError
from tinyllava.studies.graph import SEED, Places, _part_digest, expand, load_node, save_node
from tinyllava.studies.grid import change_run
from tinyllava.studies.paper import GRIDS, find_grid


def test_equal_stages_stand_once_and_an_evaluation_once(tmp_path, parts, records):
    grid = find_grid(str(write_grid(tmp_path, parts, records, seeds=(1, 2))))
    graph = expand(grid, Places(runs=tmp_path / "runs"))
    kinds = [node.name for node in graph.nodes.values()]
    assert len(graph.cells) == 8
    assert kinds.count("pretrain") == 4  # one for each connector and seed, for two fine-tunings each
    assert kinds.count("finetune") == kinds.count("starter-whole") == 8
    order = list(graph.nodes)
    assert all(order.index(node.after) < order.index(id_) for id_, node in graph.nodes.items() if node.after)
    first = graph.cells[0]
    assert graph.cells_of(first.stages[0]) == ["MLP, low, seed 1", "MLP, high, seed 1"]
    assert graph.cells_of(first.stages[1]) == ["MLP, low, seed 1"]
    assert list(graph.nodes[first.stages[1]].run.stages) == ["pretrain", "finetune"]
    assert list(graph.nodes[first.stages[0]].run.stages) == ["pretrain"]


def test_figures_share_their_models():
    graphs = {name: expand(grid, Places()) for name, grid in GRIDS.items()}
    nodes = {name: set(graph.nodes) for name, graph in graphs.items()}
    assert nodes["figure-4"] == nodes["figure-5"]  # Figure 5 is inherited from Figure 4
    assert nodes["figure-1"] <= nodes["table-3"]
    share = {cell.id: cell for cell in graphs["figure-8"].cells}["share-C-TL"]
    base = {cell.id: cell for cell in graphs["figure-4"].cells}["base-C-TL"]
    assert share.stages[0] == base.stages[0]  # the connector starts from the base's pre-trained counterpart
    assert len({*share.stages, *base.stages}) == 4
    stages = [node for node in graphs["table-a1"].nodes.values() if node.kind == "stage"]
    assert (
        len(stages) == 6 + 6 + 2 * 6
    )  # six connectors, six base models, six with share's two further stages


@pytest.mark.parametrize(
    "change",
    [
        {"model.connector": "linear"},
        {"model.image_aspect": "square"},
        {"seed": 7},
        {"hardware.precision": "fp32"},
        {"stages.pretrain.learning_rate": 2e-3},
        {"stages.pretrain.data.skip": ("too_long",)},
        {"start_from": "elsewhere"},
    ],
)
def test_what_decides_a_stage_is_in_its_key(change):
    grid = GRIDS["figure-6"]
    cell = grid.cells[0]
    other = replace(cell, run=change_run(cell.run, change))
    seeds = (change.get("seed", 42),)
    nodes = [
        set(expand(replace(grid, cells=(one,), seeds=seeds if one is other else (42,)), Places()).nodes)
        for one in (cell, other)
    ]
    assert not nodes[0] & nodes[1]


def test_later_stages_and_the_machine_leave_a_stage_alone():
    grid = GRIDS["figure-6"]
    cell = grid.cells[0]
    changes = {"stages.finetune.learning_rate": 1e-5, "hardware.num_workers": 9, "name": "other"}
    other = replace(cell, run=change_run(cell.run, changes))
    graph = expand(replace(grid, cells=(cell, replace(other, id="other"))), Places())
    first, second = graph.cells
    assert first.stages[0] == second.stages[0]
    assert first.stages[1] != second.stages[1]


def test_records_and_parts_are_known_by_content(tmp_path, parts, records):
    from tinyllava.studies.graph import _data_digests

    copy = tmp_path / "copy.json"
    copy.write_bytes(records.read_bytes())
    images = str(records.parent / "images")
    assert _data_digests((str(copy),), images, (), "") == _data_digests((str(records),), images, (), "")
    changed = tmp_path / "changed.json"
    changed.write_bytes(records.read_bytes() + b" ")
    assert _data_digests((str(changed),), images, (), "") != _data_digests((str(records),), images, (), "")
    assert _part_digest(str(parts["llama"])) != _part_digest(str(parts["phi"]))


def test_files_that_change_while_the_process_runs_are_read_again(tmp_path, parts, records):
    from tinyllava.studies.collect import _read_ledger
    from tinyllava.studies.graph import _data_digests
    from tinyllava.studies.needs import _count_records

    path, part = tmp_path / "records.json", tmp_path / "part"
    shutil.copytree(parts["llama"], part)
    seen = []
    for text in ("[{}]", "[1]", "[{}, {}]"):  # the second as many records, the third as none before
        path.write_text(text)
        (part / "config.json").write_text(text)
        images = str(records.parent / "images")
        digests = _data_digests((str(path),), images, (), "")
        seen.append((_count_records(path), _read_ledger(path), digests, _part_digest(str(part))))
    assert [count for count, *_ in seen] == [1, 1, 2]
    assert [ledger for _, ledger, *_ in seen] == [[{}], [1], [{}, {}]]
    assert len({str(digests) for _, _, digests, _ in seen}) == 3
    assert len({digest for *_, digest in seen}) == 3


def test_parts_that_differ_in_a_weight_have_other_keys(tmp_path, parts):
    (original, trained) = (tmp_path / name for name in ("original", "trained"))
    for folder in (original, trained):
        shutil.copytree(parts["llama"], folder)
    before = _part_digest(str(trained))
    assert before == _part_digest(str(original))  # a copy is the same part
    weights = trained / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert _part_digest(str(trained)) != before


def test_each_seed_can_start_from_a_checkpoint_of_its_own():
    grid = GRIDS["figure-6"]
    cells = tuple(replace(cell, run=replace(cell.run, start_from=f"start-{SEED}")) for cell in grid.cells)
    graph = expand(replace(grid, cells=cells, seeds=(3, 4)), Places())
    starts = {(cell.seed, graph.nodes[cell.stages[0]].run.start_from) for cell in graph.cells}
    assert starts == {(3, "start-3"), (4, "start-4")}


def test_a_file_that_stays_is_read_once(tmp_path):
    from tinyllava.studies.graph import read_once

    (tmp_path / "a").write_text("1")
    calls = []
    read = read_once(lambda path: calls.append(path) or path.read_text())
    assert [read(tmp_path / "a"), read(tmp_path / "a")] == ["1", "1"]
    assert len(calls) == 1
    os.utime(tmp_path / "a", ns=(1, 1))
    read(tmp_path / "a")
    assert len(calls) == 2


def test_a_node_is_read_back_as_it_was(tmp_path, parts, records):
    grid = find_grid(str(write_grid(tmp_path, parts, records)))
    graph = expand(grid, Places(runs=tmp_path, benchmarks={"starter-whole": "here"}))
    for node in graph.nodes.values():
        save_node(node, tmp_path / "task.json")
        assert load_node(tmp_path / "task.json") == node


def test_limit_and_judge_have_folders_of_their_own():
    grid, judge = GRIDS["figure-9"], {"url": "http://x/v1", "model": "gpt", "key": "K"}
    plain = {n.folder for n in expand(grid, Places()).nodes.values() if n.kind == "evaluation"}
    few = {
        n.folder for n in expand(replace(grid, limit=5), Places()).nodes.values() if n.kind == "evaluation"
    }
    judged = {n.folder for n in expand(grid, Places(judge=judge)).nodes.values() if n.kind == "evaluation"}
    assert not plain & few
    assert not plain & judged


def test_an_unknown_benchmark_is_named():
    with pytest.raises(UnknownNameError, match="Did you mean 'pope'"):
        expand(replace(GRIDS["figure-6"], benchmarks=("popee",)), Places())
