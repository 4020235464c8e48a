"""Wrong configs: each is named with its field, its value and the fix, and all of them at once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import toys
from tinyllava.config import (
    FROZEN,
    FULL,
    DataConfig,
    Hardware,
    Run,
    Stage,
    Tune,
    Validation,
    from_layer,
    lora,
)
from tinyllava.errors import ConfigError
from tinyllava.parts.connectors import CONNECTORS, num_tokens
from tinyllava.parts.vision import VISION_ENCODERS
from tinyllava.planning.check import check, find_problems
from tinyllava.recipes.paper import SHARE, as_published
from tinyllava.recipes.variants import RECIPES, VARIANTS, variant

RUN = variant("share-Sig-Phi")


def model(**changes: Any) -> Run:
    return replace(RUN, model=replace(RUN.model, **changes))


def finetune(**changes: Any) -> Run:
    return replace(RUN, stages=RUN.stages | {"finetune": replace(RUN.stages["finetune"], **changes)})


def hardware(**changes: Any) -> Run:
    return replace(RUN, hardware=replace(RUN.hardware, **changes))


def alone(name: str, **changes: Any) -> Run:
    """The fine-tuning of a variant without the stage before it."""
    run = variant(name)
    return replace(run, stages={"finetune": replace(run.stages["finetune"], **changes)})


# A wrong run, and what its one problem must say: the field, then the fix.
WRONG: dict[str, tuple[Run, str, str]] = {
    "encoder": (model(vision_encoder="SigLIPP"), "model.vision_encoder: unknown", "Did you mean 'SigLIP"),
    "llm": (model(language_model="Phi2"), "model.language_model: unknown", "Did you mean 'Phi-2'"),
    "connector": (model(connector="mlp2"), "model.connector: unknown", "Did you mean 'mlp'"),
    "option": (model(connector_options={"block": 2}), "no option 'block'", "known: none"),
    "grid": (
        model(connector="pixel_shuffle", connector_options={"block": 2}),
        "model.connector_options: ",
        "choose one of [1, 3, 9, 27]",
    ),
    "side": (model(image_size_px=336), "model.image_size_px = 336", "leave it at 0"),
    "template": (model(template="ph"), "model.template: unknown template 'ph'", "known: caption, chatml"),
    "caption": (model(template="caption"), "model.template = 'caption'", "Use it for a stage"),
    "tokenizer": (model(template="chatml"), "= 'chatml': writes <|im_end|>", "empty ('phi')"),
    "llama3": (model(template="llama3"), "writes <|eot_id|>", "empty ('phi')"),
    "positions": (finetune(max_length_tokens=3072), "= 3072: Phi-2 has 2048", "at most 2048"),
    "no room": (finetune(max_length_tokens=768), "one image takes 729 tokens", "raise it to 793"),
    "no data": (finetune(data=DataConfig()), "finetune.data.records: empty", "Table 2"),
    "mixture": (
        finetune(data=DataConfig(records=("LLaVA-1.5-665k",))),
        "finetune.data: unknown mixture",
        "Did you mean 'LLaVA-1.5-mix-665k'",
    ),
    "skip": (
        finetune(data=replace(RUN.stages["finetune"].data, skip=("dirty",))),
        "skip 'dirty'",
        "known: malformed",
    ),
    "stage template": (finetune(template="captoin"), "finetune.template = 'captoin'", "known: caption"),
    "text only": (finetune(template="caption"), "40,688 records without an image", "template empty"),
    "rank": (finetune(language_model=Tune(kind="lora", alpha=8)), "model.rank = 0", "at least 1"),
    "dropout": (finetune(language_model=lora(8, dropout=1.5)), "language_model.dropout = 1.5", "below 1"),
    "no lora": (finetune(language_model=Tune(kind="full", bits=4)), "bits = 4: only valid", "kind to 'lora'"),
    "connector bits": (finetune(connector=lora(8, bits=4)), "connector.bits = 4: a", "set bits to 16"),
    "layer": (finetune(vision_encoder=from_layer(26)), "vision_encoder.first_layer = 26", "0 to 25"),
    "llm layer": (finetune(language_model=from_layer(32)), "language_model.first_layer = 32", "0 to 31"),
    "connector layer": (finetune(connector=from_layer(1)), "no numbered layers", "full or frozen"),
    "nothing": (finetune(connector=FROZEN, language_model=FROZEN), "connector: frozen", "train at least one"),
    "useless rate": (
        finetune(vision_encoder_learning_rate=1e-6),
        "the component is frozen",
        "remove the rate",
    ),
    "rate": (finetune(learning_rate=20), "learning_rate = 20: must be above 0", "at most 1"),
    "batch": (finetune(global_batch_size=0), "global_batch_size = 0", "above 0"),
    "warm-up": (finetune(warmup_ratio=1.0), "warmup_ratio = 1.0", "below 1"),
    "norm": (finetune(max_grad_norm=-1.0), "max_grad_norm = -1.0", "not be negative"),
    "no source": (
        replace(RUN, stages={name: RUN.stages[name] for name in ("share_pretrain", "finetune")}),
        "share_pretrain.connector: pre-training",
        "'pretrain' stage before it",
    ),
    "cache": (
        hardware(cache_features=True),
        "share_pretrain.vision_encoder: trained",
        "cache_features False",
    ),
    "compiled in 4 bits": (
        replace(finetune(language_model=lora(8, bits=4)), hardware=Hardware(compile=True)),
        "compile: not with weights in 4 bits",
        "set hardware.compile False",
    ),
    "sharding in fp16": (hardware(sharding="all", precision="fp16"), "sharding = 'all': fp16", "to bf16"),
    "sharding and answers": (
        replace(
            hardware(sharding="gradients"),
            stages={
                "pretrain": replace(
                    RUN.stages["pretrain"], template="", validation=Validation(held_out="10%", num_answers=2)
                )
            },
        ),
        "validation.num_answers = 2: with hardware.sharding = 'gradients'",
        "set it to 0",
    ),
    "sharding and an optimizer": (
        replace(
            hardware(sharding="all"),
            stages={"pretrain": replace(RUN.stages["pretrain"], optimizer="adafactor")},
        ),
        "optimizer = 'adafactor': hardware.sharding = 'all' cannot shard its state",
        "choose adamw, sgd, adagrad, rmsprop",
    ),
    "workers": (hardware(num_workers=-1), "hardware.num_workers = -1", "not be negative"),
    "stages": (replace(RUN, stages={}), "stages: empty", "BASE.stages"),
    "name": (replace(RUN, name=""), "name: empty", "names the run folder"),
    "tracker": (replace(RUN, report_to=("tensorbord",)), "report_to = 'tensorbord'", "known: tensorboard"),
    "output": (
        replace(RUN, start_from="runs/a/model", output="runs/a"),
        "output = runs/a",
        "choose another folder",
    ),
    "alpha": (finetune(language_model=Tune(kind="lora", rank=8)), "model.alpha = 0: lora", "twice the rank"),
    "device batch": (
        hardware(device_batch_size=200),
        "128: smaller than hardware.device",
        "lower the device batch size",
    ),
    "seed": (replace(RUN, seed=-1), "seed = -1", "from 0 to 4294967295"),
    "large seed": (replace(RUN, seed=2**32), "seed = 4294967296", "from 0 to 4294967295"),
    "epochs": (finetune(num_epochs=0.0), "num_epochs = 0.0: must be above 0", "at most"),
    "negative side": (
        model(image_size_px=-14),
        "model.image_size_px = -14",
        "0 means the size of the encoder",
    ),
    "convolutions": (
        alone("base-EN2-Phi", vision_encoder=lora(8)),
        "kind = 'lora': this component has no linear",
        "full or frozen",
    ),
    "new connector frozen": (
        alone("base-C-TL", connector=FROZEN),
        "connector: new and frozen",
        "train it here",
    ),
    "new connector adapted": (
        alone("base-C-TL", connector=lora(8)),
        "connector has no trained weights",
        "choose full",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_named_with_its_fix(case: str) -> None:
    run, problem, fix = WRONG[case]
    problems = find_problems(run, on_this_machine=False)
    assert len(problems) == 1
    assert problem in problems[0]
    assert fix in problems[0]


def test_all_problems_come_at_once() -> None:
    """Every case that can stand beside the others, in one run."""
    changes: dict[str, Any] = {
        "max_length_tokens": 3072,
        "language_model": lora(0, alpha=1),
        "vision_encoder": from_layer(99),
        "warmup_ratio": 2.0,
        "max_grad_norm": -1.0,
        "weight_decay": -1.0,
        "learning_rate": -1.0,
        "num_epochs": 0.0,
        "global_batch_size": 4,
        "connector_learning_rate": 7.0,
        "template": "captoin",
        "max_steps": -1,
        "data": DataConfig(records=("LLaVA",), skip=()),
    }
    run = replace(
        finetune(**changes),
        name="",
        seed=-1,
        report_to=("tensorbord",),
        output="runs/x",
        start_from="runs/x/model",
        model=replace(RUN.model, image_size_px=100, template="chatml", connector_options={"depth": 2}),
        hardware=replace(RUN.hardware, device_batch_size=8, cache_features=True, save_steps=-1),
    )
    problems = find_problems(run, on_this_machine=False)
    assert len(problems) >= 20
    with pytest.raises(ConfigError) as caught:
        check(run, on_this_machine=False)
    text = str(caught.value)
    assert f"{len(problems)} problem(s)" in text
    assert all(problem in text for problem in problems)


@pytest.mark.parametrize(
    "name", [*VARIANTS, *(f"{recipe}-C-SLM" for recipe in RECIPES), "base-C-TL-ShareGPT4V"]
)
def test_the_papers_runs_are_right(name: str) -> None:
    check(variant(name), on_this_machine=False)


@pytest.mark.parametrize("encoder", [encoder.abbreviation for encoder in VISION_ENCODERS.values()])
@pytest.mark.parametrize("language", ["Qwen3_0.6B", "Smol360M", "Gemma", "Llama1B"])
def test_further_parts_go_with_each_other(encoder: str, language: str) -> None:
    check(variant(f"base-{encoder}-{language}"), on_this_machine=False)


def test_share_needs_layers_that_a_cnn_does_not_have() -> None:
    with pytest.raises(ConfigError, match="no numbered layers"):
        check(variant("share-CNX-TL"), on_this_machine=False)


def test_the_published_length_is_too_long_for_phi_and_tinyllama_only() -> None:
    for language, num_problems in (("Phi", 2), ("TL", 2), ("SLM", 0)):
        problems = find_problems(
            as_published(variant(f"base-Sig-{language}"), "bench"), on_this_machine=False
        )
        assert len([p for p in problems if "3072" in p]) == len(problems) == num_problems


def test_a_checkpoint_is_a_source() -> None:
    stages: dict[str, Stage] = {name: SHARE.stages[name] for name in ("share_pretrain", "finetune")}
    check(replace(RUN, stages=stages, start_from="runs/other/model"), on_this_machine=False)


@pytest.fixture
def toy_run(tmp_path: Path) -> Run:
    """A run on toy parts in folders, with a record file: nothing is wrong with it."""
    records = tmp_path / "records.json"
    records.write_text("[]")
    stage = Stage(
        data=DataConfig(records=(str(records),)),
        learning_rate=1e-3,
        global_batch_size=6,
        language_model=FULL,
        max_length_tokens=512,
    )
    return replace(
        RUN,
        stages={"finetune": stage},
        model=replace(
            RUN.model,
            vision_encoder=str(toys.make_vision_encoder(tmp_path / "encoder", "siglip")),
            language_model=str(toys.make_language_model(tmp_path / "llm", "phi")),
        ),
    )


def change(run: Run, **changes: Any) -> Run:
    return replace(run, stages={"finetune": replace(run.stages["finetune"], **changes)})


MACHINE: dict[str, tuple[Callable[[Run], Run], str]] = {
    "file": (
        lambda run: change(run, data=DataConfig(records=("gone.json",))),
        "gone.json: no such record file",
    ),
    "root": (lambda run: change(run, data=DataConfig(records=("LLaVA-1.5-558k",))), "needs data_root"),
    "divide": (
        lambda run: replace(run, hardware=replace(run.hardware, device_batch_size=4)),
        "by 1 rank(s) x hardware.device_batch_size = 4; device batches that fit: 1, 2, 3, 6",
    ),
    "start": (lambda run: replace(run, start_from="gone"), "start_from: gone: no such folder"),
    "fp16": (
        lambda run: replace(run, hardware=replace(run.hardware, precision="fp16")),
        "needs a CUDA device",
    ),
    "tf32": (
        lambda run: replace(run, hardware=replace(run.hardware, precision="tf32")),
        "needs an NVIDIA GPU since Ampere (A100); choose auto or fp32",
    ),
    "tracker": (lambda run: replace(run, report_to=("dvclive",)), "'dvclive': not installed"),
}


def test_a_run_on_folders_is_right(toy_run: Run) -> None:
    check(toy_run)


@pytest.mark.parametrize("case", MACHINE)
def test_what_the_machine_lacks_is_said(toy_run: Run, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    change_run, says = MACHINE[case]
    with pytest.raises(ConfigError) as caught:
        check(change_run(toy_run))
    assert says in str(caught.value)


def test_ranks_that_do_not_divide_the_batch(toy_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="global_batch_size = 6: not divisible by 4 ranks"):
        check(toy_run)


@pytest.mark.parametrize(
    ("connector", "options", "message"),
    [
        ("pool", {"side": 99}, "connector pool: 576 patches form a grid of 24 x 24"),
        ("pixel_shuffle", {"block": 7}, "connector pixel_shuffle: a grid of 576 patches"),
        ("resampler", {"num_queries": 0}, "connector resampler: option num_queries = 0: must be at least 1"),
        ("slots", {"dropout_percent": -1}, "option dropout_percent = -1: must be at least 0"),
        ("slots", {"dropout_percent": 100}, "option dropout_percent = 100: must be at most 99"),
    ],
)
def test_an_error_of_a_connector_names_that_connector(connector, options, message):
    with pytest.raises(ConfigError, match=message):
        num_tokens(CONNECTORS[connector], 576, options)
