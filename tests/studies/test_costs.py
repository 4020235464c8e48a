"""What a plan says of time: reckoned for GPUs by hand, corrected by what finished nodes took, summed once."""

import pytest

from grid_toys import write_grid
from tinyllava.errors import UnknownNameError
from tinyllava.planning.plan import plan_run
from tinyllava.studies.graph import Graph, Places, expand
from tinyllava.studies.grid import Costs
from tinyllava.studies.needs import Machine, cell_rows, explain_costs, plan_graph, plan_rows, summarise
from tinyllava.studies.paper import GRIDS, find_grid
from tinyllava.studies.work import State, save_state


@pytest.fixture
def toy(tmp_path, parts, records) -> Graph:
    """Two connectors times two rates: ten nodes; each stage is one epoch of 12 records."""
    return expand(find_grid(str(write_grid(tmp_path, parts, records))), Places(runs=tmp_path / "runs"))


@pytest.fixture
def figure(tmp_path) -> Graph:
    return expand(GRIDS["figure-8"], Places(runs=tmp_path))


def test_stages_are_reckoned_as_their_run_is_planned(figure):
    machine = Machine(gpu="H100-80G", num_gpus=4)
    needs = {need.node.id: need for need in plan_graph(figure, machine=machine)}
    cell = figure.cells[1]  # share-C-TL
    plan = plan_run(cell.cell.run, gpu="H100-80G", num_gpus=4)
    assert [needs[id_].seconds for id_ in cell.stages] == [stage.hours * 3600 for stage in plan.stages]
    assert {need.basis for need in needs.values()} == {"computed"}


def test_an_evaluation_is_reckoned_as_a_pass_over_image_and_text(figure):
    needs = {need.node.id: need for need in plan_graph(figure)}
    cell = figure.cells[0]  # CLIP with TinyLlama
    gqa = next(needs[id_] for id_ in cell.evaluations if needs[id_].node.name == "gqa")
    # By hand: 576 image tokens and 64 of text through 22 layers of 44M weights, the image through CLIP's
    # 304M; attention and the head add less than a third.
    weights = 12_578 * (2 * 22 * 44e6 * 640 + 2 * 304e6 * 577) / (8 * 312e12 * 0.32)
    assert weights < gqa.seconds < 1.33 * weights


def test_a_model_and_the_whole_are_summed_and_shared_stages_count_once(toy):
    for id_, node in toy.nodes.items():
        seconds = {"pretrain": 60.0, "finetune": 30.0, "starter-whole": 10.0}[node.name]
        if id_ in toy.cells[0].nodes:
            save_state(node, State(status="done", seconds=seconds))
    needs = plan_graph(toy)
    heads, *models, total = cell_rows(needs, toy)
    assert heads == ("model", "pretrain", "finetune", "evaluations", "in all")
    assert models[0] == ("MLP, low", "60 s", "30 s", "10 s", "2 min")  # 100 s
    assert models[3] == ("Linear, high", "60 s", "30 s", "10 s", "2 min")  # alike
    assert total == ("all, each node once", "2 min", "2 min", "40 s", "5 min")  # 120, 120, 40: two pretrain
    bases = [need.basis for need in needs if need.status != "done"]
    assert set(bases) == {"extrapolated"}
    assert "remaining: 3 min, one node at a time" in summarise(needs, toy)  # 60 + 3 x 30 + 3 x 10
    assert [line.split(":")[0] for line in explain_costs(needs, Machine())] == ["measured", "extrapolated"]


def test_gpus_that_are_asked_for_go_before_what_was_measured(figure):
    for id_ in figure.cells[0].stages:
        save_state(figure.nodes[id_], State(status="done", seconds=5.0))
    asked = {need.node.id: need for need in plan_graph(figure, machine=Machine(num_gpus=4))}
    alike = {need.node.id: need for need in plan_graph(figure)}
    other = figure.cells[2].stages[0]  # the same stage with a larger language model
    assert asked[other].basis == "computed"
    assert alike[other].basis == "extrapolated"
    ratio = alike[other].seconds / 5.0
    reckoned = asked[other].seconds / plan_graph(figure, machine=Machine(num_gpus=4))[0].cost.seconds
    assert ratio == pytest.approx(reckoned, rel=0.01)  # larger by as much as it computes more
    with pytest.raises(UnknownNameError, match="unknown GPU 'A1000'"):
        plan_graph(figure, machine=Machine(gpu="A1000"))


def test_costs_of_the_grid_are_taken_by_sample_and_question(toy):
    costs = Costs(seconds_per_sample={"pretrain": 0.5, "finetune": 2.0}, seconds_per_node=5.0)
    needs = plan_graph(toy, costs)
    assert [need.seconds for need in needs[:3]] == [11.0, 29.0, 5.0]  # 12 records
    assert needs[0].basis == "estimated"


def test_the_plan_has_a_row_for_a_models_evaluations_and_says_when_nothing_is_known(figure, toy):
    rows = plan_rows(plan_graph(figure))
    assert sum("9 benchmarks" in str(row[0]) for row in rows) == 6
    assert len(rows) == 1 + 15 + 6
    assert explain_costs(plan_graph(toy), Machine()) == [
        "Times are unknown until the first nodes have finished."
    ]
