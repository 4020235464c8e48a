"""The roofline: its products against measured ones, its bytes against counts by hand, and a toy run."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tinyllava.planning.speed import GPUS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
H100 = GPUS["H100-80G"]
MEASURED = """
1 4096 4096 4096 783.3
2 4096 1024 4096 750.6
2 4096 4096 2048 763.0
4 1024 2048 2048 712.7
1 2048 2048 2048 632.0
2 2048 4096 1024 678.7
4 4096 512 1024 589.0
4 4096 4096 512 619.9
4 4096 4096 256 503.9
1 4096 2048 512 447.0
1 4096 4096 256 392.2
4 1024 1024 2048 626.1
1 1024 2048 2048 524.3
"""
"""Products [m, k] x [k, n] in bf16, b times: b, m, n, k, and TFLOP/s as XLA's authors measured them on an
H100."""


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import roofline_costs

    return roofline_costs


@pytest.mark.parametrize("line", MEASURED.strip().splitlines())
def test_products_take_as_long_as_measured_ones(costs, line):
    batch, rows, columns, inner, speed = map(float, line.split())
    seconds = costs.product_seconds(H100, rows, columns, inner, batch)
    assert 2 * batch * rows * columns * inner / seconds == pytest.approx(speed * 1e12, rel=0.1)


def run(costs, compiled):
    """Backward through a layer: y = relu(x w1) * 2 + 1, z = y w2."""
    with FakeTensorMode():
        x, first, second = (torch.empty(4096, 4096, requires_grad=True) for _ in range(3))
        roofline = costs.Roofline(H100, compiled=compiled)
        with roofline:
            roofline.enter("layer")
            z = (torch.relu(x @ first) * 2 + 1) @ second
            roofline.leave(z)
            roofline.is_backward = True
            roofline.enter("layer")
            z.backward(torch.empty_like(z))
            roofline.leave(())
            roofline.finish(t.grad for t in (x, first, second))
    return roofline


def test_bytes_and_operations_are_those_counted_by_hand(costs):
    matrix, product = 4096 * 4096 * 4, 2.0 * 4096**3
    eager, compiled = run(costs, False), run(costs, True)
    for found in (eager, compiled):
        assert found.flops == 6 * product  # forward 2, backward 2 for each
        assert sum(c.bytes for c in found.costs.values() if c.flops) == 6 * 3 * matrix
    other = [sum(c.bytes for c in found.costs.values() if not c.flops) for found in (eager, compiled)]
    # Eager: relu, * 2 and + 1 read and write; backward of * 2 too, that of relu reads two and writes one.
    assert other[0] == (3 * 2 + 2 + 3) * matrix
    # One kernel forward; one backward, which reads the gradient and what relu was made from.
    assert other[1] == (2 + 3) * matrix
    assert compiled.seconds < eager.seconds


def test_a_toy_model_is_measured_in_all_forms(costs, tmp_path, capsys):
    import roofline

    path = tmp_path / "found.json"
    roofline.main(tiny=True, costs=2, json_file=path)
    found = json.loads(path.read_text())
    assert set(found) == {f"tiny {stage} {form}" for stage in roofline.BASE.stages for form in roofline.FORMS}
    for stage in roofline.BASE.stages:
        kept, recomputed, compiled = (
            found[f"tiny {stage} packed {form}"] for form in ("eager", "eager, recomputed", "compiled")
        )
        assert recomputed["executed_flops"] > kept["executed_flops"] == compiled["executed_flops"]
        assert compiled["kernels"] < kept["kernels"] < recomputed["kernels"]
        assert compiled["samples_per_second"] > kept["samples_per_second"]
    assert "decoder layer" in capsys.readouterr().out
