"""Hours of a stage: against published ones, against the roofline's script, and by a GPU's measurement."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from tinyllava.cli import main
from tinyllava.config import Sharding
from tinyllava.config import lora as lora_of
from tinyllava.errors import ConfigError
from tinyllava.planning.memory import count_trained
from tinyllava.planning.plan import measured_speed, plan_parts, plan_run
from tinyllava.planning.sizes import language_model_size
from tinyllava.planning.speed import GPUS, REACHED, checkpoint_seconds, count_exchange, rooflines, utilisation
from tinyllava.recipes.paper import as_published
from tinyllava.recipes.variants import variant

REPORTED = {"Sig-TL": (2.5, 6.5), "Sig-SLM": (2.6, 7.5), "Sig-Phi": (5.0, 14.0), "C-Phi": (4.0, 13.0)}
"""Hours of both stages on 4 x A100-40G with recomputed activations, as users of Factory report them."""


@pytest.mark.parametrize("sharding", ["none", "all"])
@pytest.mark.parametrize("name", REPORTED)
def test_hours_are_within_a_quarter_of_those_that_factory_reports(name: str, sharding: Sharding) -> None:
    """The runs divided everything, with DeepSpeed (ZeRO-3)."""
    run = as_published(variant(f"base-{name}"), "factory")
    run = replace(run, hardware=replace(run.hardware, gradient_checkpointing=True, sharding=sharding))
    hours = [stage.hours for stage in plan_run(run, gpu="A100-40G", num_gpus=4).stages]
    assert hours == pytest.approx(REPORTED[name], rel=0.25)


def test_hours_of_share_are_within_a_quarter_of_the_reported_36() -> None:
    run = as_published(variant("share_frozen-Sig-Phi"), "factory")
    run = replace(run, hardware=replace(run.hardware, gradient_checkpointing=True))
    plan = plan_run(run, gpu="A100-40G", num_gpus=4)
    assert sum(stage.hours for stage in plan.stages) == pytest.approx(36, rel=0.25)


@pytest.mark.parametrize(
    ("width", "layers", "mlp", "reported"), [(4096, 32, 11_008, 3.5), (5120, 40, 13_824, 5.5)]
)
def test_hours_are_within_a_quarter_of_those_that_llava_reports(
    width: int, layers: int, mlp: int, reported: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pre-training of the 7B and 13B models on 8 x A100-80G."""
    run = variant("base-C-TL")
    run = replace(run, hardware=replace(run.hardware, gradient_checkpointing=True))
    parts = plan_parts(run)
    heads = {"num_heads": width // 128, "num_kv_heads": width // 128}
    language = replace(parts.language, width=width, num_layers=layers, mlp_width=mlp, **heads)
    large = replace(parts, language=language, language_size=language_model_size(language))
    monkeypatch.setattr("tinyllava.planning.plan.plan_parts", lambda run: large)
    assert plan_run(run).stages[0].hours == pytest.approx(reported, rel=0.25)


def test_shares_of_the_peak_are_those_of_the_roofline() -> None:
    """On the GPU and at the width that the roofline was made for, nothing is scaled."""
    balance = GPUS["H100-80G"].balance("bf16")
    for name in ("C-TL", "Sig-Phi"):
        parts = plan_parts(variant(f"base-{name}"))
        for stage in ("pretrain", "finetune"):
            for compiled, recomputed in ((False, False), (True, True)):
                form = ("eager", "compiled")[compiled] + ", recomputed" * recomputed
                found = rooflines()[f"{name} {stage} packed {form}"]
                seconds = found["product_seconds"] + found["memory_seconds"]
                share = utilisation(
                    parts,
                    is_trained=stage == "finetune",
                    balance=balance,
                    compiled=compiled,
                    recomputed=recomputed,
                )
                assert share == pytest.approx(REACHED[stage] * found["executed_flops"] / seconds / 989e12)


@pytest.mark.parametrize("name", ["C-TL", "Sig-Phi"])
def test_divided_stages_are_planned_by_the_roofline_of_their_form_and_the_exchange(name: str) -> None:
    """Its entry has the larger device batch of divided stages; what moves is counted as its script does."""
    run = variant(f"base-{name}")
    run = replace(run, hardware=replace(run.hardware, compile=True, sharding="gradients"))
    parts, gpu = plan_parts(run), GPUS["H100-80G"]
    found = rooflines()[f"{name} finetune packed compiled, sharded"]
    share = found["executed_flops"] / (found["product_seconds"] + found["memory_seconds"]) / 989e12
    _, planned = plan_run(run, gpu="H100-80G").stages
    assert planned.utilisation == pytest.approx(REACHED["finetune"] * share)

    exchange = count_exchange(parts, run.stages["finetune"], "gradients", 8, is_half=True)
    assert exchange.sent / (0.8 * gpu.link) == pytest.approx(found["exchange"], rel=0.01)
    assert exchange.copied / (0.85 * gpu.bandwidth) == pytest.approx(
        found["copies for the exchange"], rel=0.01
    )
    size, connector = parts.language_size, parts.connector_size.total
    first_and_last = 8 * (size.outer + connector + size.layers[0])  # four bytes, gathered and reduced
    assert exchange.exposed == pytest.approx(7 / 8 * first_and_last)

    form, load = planned.forms["as the recipe"], planned.load
    assert load is not None
    assert planned.seconds is not None
    computing = load.flops / (8 * 989e12 * planned.utilisation)
    num_batches = load.num_steps * form.accumulation
    waiting = num_batches * (exchange.exposed / (0.8 * gpu.link) + exchange.copied / (0.85 * gpu.bandwidth))
    updating = load.num_steps * 40 * sum(planned.trained.values()) / 8 / (0.85 * gpu.bandwidth)
    assert planned.seconds.computing == pytest.approx(computing + waiting + updating)
    slow = replace(gpu, link=gpu.link / 100)  # the exchange takes longer than the computation beside it
    assert exchange.seconds(slow, 0.1) == pytest.approx(
        exchange.sent / (0.8 * slow.link) - 0.1 + exchange.copied / (0.85 * gpu.bandwidth)
    )


def test_frozen_weights_are_gathered_twice_where_they_are_divided() -> None:
    run = variant("base-C-TL")
    parts, pretrain = plan_parts(run), run.stages["pretrain"]
    size, connector = parts.language_size, parts.connector_size.total
    assert count_exchange(parts, pretrain, "gradients", 2, is_half=True).sent == connector * 8 / 2
    halves = 2 * (size.outer + 2 * sum(size.layers))  # bytes: the layers forward and backward, others once
    found = count_exchange(parts, pretrain, "all", 2, is_half=True)
    assert found.sent == (connector * 8 + halves) / 2
    assert found.exposed == (connector * 8 + 2 * size.outer + 2 * size.layers[0]) / 2
    lora = replace(pretrain, language_model=lora_of(8))
    adapters = count_trained(size, lora.language_model)
    assert count_exchange(parts, lora, "all", 2, is_half=True).sent == found.sent + adapters * 12 / 2
    codes = replace(pretrain, language_model=lora_of(8, bits=4))  # which are whole everywhere
    sent = count_exchange(parts, codes, "all", 2, is_half=True).sent
    assert sent == (connector * 8 + adapters * 12) / 2


def test_hours_are_those_of_the_divided_form_where_only_that_fits() -> None:
    run = variant("base-Sig-Phi")
    pretrain, finetune = plan_run(run, gpu="A100-40G", num_gpus=4).stages
    assert (pretrain.proposed, finetune.proposed) == ("as the recipe", "sharding gradients")
    divided = replace(run, hardware=replace(run.hardware, sharding="gradients"))
    expected = plan_run(divided, gpu="A100-40G", num_gpus=4).stages[1]
    assert expected.proposed == "as the recipe"
    assert (finetune.hours, finetune.utilisation) == (expected.hours, expected.utilisation)


def test_the_roofline_in_the_package_is_that_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import roofline

    assert set(rooflines()) == {
        f"{name} {stage} {form}"
        for name in ("C-TL", "Sig-Phi")
        for stage in roofline.BASE.stages
        for form in roofline.FORMS
    }
    form = roofline.Form(packs=True, compiled=True, recomputed=False)
    found = roofline.measure_stage("C-TL", "pretrain", form).summary()
    assert found == pytest.approx(rooflines()[f"C-TL pretrain {form}"], rel=0.01)


def test_time_besides_computing_is_counted() -> None:
    run = variant("base-Sig-Phi")
    stages = plan_run(run, gpu="A100-80G").stages
    for stage in stages:
        assert stage.seconds is not None
        waited = stage.checkpoint_bytes * (10 / 3e9 + 1 / 1e9)  # ten copies, and the writing of the last
        assert stage.seconds.checkpoints == pytest.approx(waited, rel=0.1)
        assert stage.hours * 3600 == stage.seconds.total > stage.seconds.computing + stage.seconds.start_up
        assert stage.seconds.images == 0
    unchecked = replace(run, hardware=replace(run.hardware, check_images=False))
    seconds = plan_run(unchecked, gpu="A100-80G").stages[0].seconds
    assert seconds is not None
    assert stages[0].seconds is not None
    assert stages[0].seconds.start_up - seconds.start_up == pytest.approx(558_128 * 5e-3 / 64)
    slow = replace(run, hardware=replace(run.hardware, num_workers=1))
    waiting = plan_run(slow, gpu="H200").stages[0].seconds
    assert waiting is not None
    assert waiting.images + waiting.computing == pytest.approx(max(558_128 / 190 / 8, waiting.computing))


def test_a_stage_waits_for_what_is_not_written_when_the_next_checkpoint_comes() -> None:
    assert checkpoint_seconds(6e9, 10, computing=600) == pytest.approx(10 * 2 + 6)
    assert checkpoint_seconds(6e9, 10, computing=20) == pytest.approx(10 * 2 + 9 * (6 - 2) + 6)
    assert checkpoint_seconds(6e9, 0, computing=20) == 0


def write_measured(path: Path, share: float, **changes: object) -> Path:
    """Write a file as ``benchmarks/gpu.py`` does, at a share of the roofline's speed."""
    parts: dict[str, dict[str, object]] = {}
    for name, stage in product(("C-TL", "Sig-Phi"), ("pretrain", "finetune")):
        found = rooflines()[f"{name} {stage} packed eager"]
        speed = found["executed_flops"] / (found["product_seconds"] + found["memory_seconds"])
        measured = {"recomputed": False, "mfu": share * speed / 989e12}
        parts.setdefault(f"train {name}", {})[stage] = measured
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "tiny": False, "parts": parts} | changes))
    return path


def test_a_measurement_takes_the_place_of_the_published_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_measured(tmp_path / "gpu.json", 0.9)
    reached = measured_speed(path)
    assert reached == pytest.approx({"pretrain": 0.9, "finetune": 0.9})
    run = variant("base-C-TL")
    before, after = plan_run(run), plan_run(run, reached=reached)
    for stage, faster in zip(before.stages, after.stages, strict=True):
        assert faster.utilisation / stage.utilisation == pytest.approx(0.9 / REACHED[stage.name])
    assert main(["show", "base-C-TL", "--measured", str(path)]) == 0
    assert f"speed as measured in {path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiny": True}, "written with --tiny"),
        ({"device": "cpu"}, "measured on cpu; known are V100-32G"),
        ({"parts": {"train C-TL": {"error": "out of memory"}}}, "no share of the peak of pretrain"),
    ],
)
def test_a_measurement_that_says_nothing_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write_measured(tmp_path / "gpu.json", 0.9, **changes)
    with pytest.raises(ConfigError, match=message):
        measured_speed(path)
    with pytest.raises(ConfigError, match="nothing that it names"):
        measured_speed(tmp_path / "missing.json")


def test_compiled_layers_are_planned_as_faster() -> None:
    run = variant("base-C-TL")
    compiled = replace(run, hardware=replace(run.hardware, compile=True))
    for stage, faster in zip(plan_run(run).stages, plan_run(compiled).stages, strict=True):
        assert not faster.forms["as the recipe"].checkpointing
        assert 1.2 < faster.utilisation / stage.utilisation < 1.8
