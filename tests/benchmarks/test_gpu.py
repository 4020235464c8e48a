"""The measurement of a GPU runs to its end at toy sizes, and its large shapes are those of the tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinyllava.config import ModelConfig, Run
from tinyllava.data.dataset import Examples, measure
from tinyllava.errors import ConfigError
from tinyllava.planning.plan import measured_speed, plan_parts
from tinyllava.recipes.paper import BASE

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.fixture
def training(gpu):
    import gpu_training

    return gpu_training


@pytest.mark.parametrize("name", ["C-TL", "Sig-Phi"])
def test_the_shapes_have_the_sizes_of_the_tables(training, monkeypatch, name):
    layout = training.LAYOUTS[name]
    monkeypatch.setattr(training, "DEVICE", torch.device("meta"))
    model, processor = training.build(layout)
    encoder, language = layout.parts
    run = Run(name="", model=ModelConfig(vision_encoder=encoder, language_model=language), stages={})
    parts = plan_parts(run)
    assert sum(p.numel() for p in model.parameters()) == parts.total
    assert processor.num_image_tokens == parts.num_image_tokens
    with torch.device("meta"):
        pixels = torch.zeros(1, 3, layout.side_px, layout.side_px)
    assert model.model.get_image_features(pixels).shape == (1, parts.num_image_tokens, parts.language.width)
    records = training.make_records("finetune", 2, 20)
    examples, _ = measure(Examples(conversations=records, processor=processor), 2048, ())
    against = training._against_plan(run, BASE.stages["finetune"], examples, 1.0)
    assert against["share_of_matmul_peak"] > 0
    assert against["estimated_bytes"] > 16 * parts.language_size.total  # weights, gradients and two moments


def test_training_answering_and_adapters_run(training, monkeypatch):
    monkeypatch.setattr("tinyllava.training.compiling.BACKEND", "aot_eager")
    forms = training.train_forms("tiny", 2)
    assert [stage["recomputed"] for stage in forms.values()] == [False, False, True]
    assert forms["packed"]["last_loss"] > 0
    trained = training.train("tiny", 8)
    assert set(trained) == {"pretrain", "finetune"}
    for stage in trained.values():
        assert stage["samples_per_second"] > 0
        assert stage["device_batch_size"] == 4
    assert training.qlora("tiny")["merged_differs"] < 1e-5


def test_tests_that_fail_are_an_error_with_their_names(gpu, tmp_path):
    (tmp_path / "test_it.py").write_text("def test_right(): pass\ndef test_wrong(): assert False\n")
    assert gpu.run_tests([f"{tmp_path / 'test_it.py'}::test_right"]) == {"passed": 1}
    with pytest.raises(RuntimeError, match=r"'failed': 1.*test_it\.py::test_wrong"):
        gpu.run_tests([str(tmp_path / "test_it.py")])


def test_the_command_writes_one_json_and_its_table(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py")]
    done = subprocess.run(
        [*command, "--tiny", "--parts", "decode", "--json-file", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert json.loads(done.stdout) == found
    assert found["parts"]["decode"]["batch 1"]["tokens_per_second"] > 0
    with pytest.raises(ConfigError, match="written with --tiny"):  # read by the plan, and not taken for speed
        measured_speed(path)
    shown = subprocess.run(
        [*command, "--table-of", str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert "| decode batch 1 tokens per second | " in shown


def test_the_page_has_the_table_of_the_last_measurement(gpu):
    docs = BENCHMARKS.parent / "docs"
    page, path = (docs / "guides/performance.md").read_text(), docs / "gpu-results.json"
    is_measured = path.exists()
    assert ("No GPU has been measured yet" in page) is not is_measured
    assert not is_measured or gpu.table(json.loads(path.read_text())) in page


def test_a_part_that_fails_is_named_and_the_limits_are_eight_minutes(gpu, monkeypatch):
    assert sum(limit for limit, _, _ in gpu.PARTS.values()) <= 480
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "error" in gpu.run_part("decode", tiny=True)
