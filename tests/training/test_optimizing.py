"""Schedules are their formulas behind one warm-up, optimizers train and resume, adapters sit where asked."""

import dataclasses
from math import cos, pi

import pytest
from safetensors.torch import load_file

from tinyllava.config import OPTIMIZERS, SCHEDULES, Hardware, Run, lora
from tinyllava.errors import ConfigError
from tinyllava.model.assemble import assemble
from tinyllava.model.tuning import apply_tuning
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer, make_schedule
from training_toys import toy_run

FORMULAS = {
    "cosine": (lambda done: 0.5 * (1 + cos(pi * done)), {}),
    "linear": (lambda done: 1 - done, {}),
    "constant": (lambda done: 1.0, {}),
    "cosine_with_restarts": (lambda done: 0.5 * (1 + cos(pi * (2 * done % 1))), {"num_cycles": 2}),
    "cosine_with_min_lr": (lambda done: 0.1 + 0.9 * 0.5 * (1 + cos(pi * done)), {"min_lr_rate": 0.1}),
    "polynomial": (lambda done: (1 - 1e-4) * (1 - done) ** 2 + 1e-4, {"power": 2}),
    "inverse_sqrt": (lambda done: (1 + done * 20 / 5) ** -0.5, {"timescale": 5}),
    "warmup_stable_decay": (
        lambda done: 1.0 if done < 0.5 else 0.5 * (1 + cos(pi * (2 * done - 1))),
        {"num_decay_steps": 10},
    ),
}


def finetune(parts, records, output, **changes) -> Run:
    hardware = Hardware(num_workers=0, device_batch_size=2, precision="fp32", save_steps=2)
    run = toy_run(parts, records, output, hardware=hardware)
    stage = dataclasses.replace(run.stages["finetune"], num_epochs=1, **changes)
    return dataclasses.replace(run, stages={"finetune": stage})


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_its_formula_behind_the_warm_up(parts, records, tmp_path, name):
    formula, options = FORMULAS[name]
    run = finetune(parts, records, tmp_path, schedule=name, schedule_options=options, learning_rate=1e-3)
    factor = make_schedule(run.stages["finetune"], 25, 5)
    assert [factor(step) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    expected = [formula((step - 5) / 20) for step in range(5, 25)]
    assert [factor(step) for step in range(5, 25)] == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("paged")])
def test_an_optimizer_trains_and_resumes_bit_by_bit(parts, records, tmp_path, monkeypatch, name):
    rate = 1e-2 if name == "sgd" else 1e-4
    runs = [
        finetune(parts, records, tmp_path / folder / "run", optimizer=name, learning_rate=rate)
        for folder in ("whole", "broken")
    ]
    train(runs[0])
    step, calls = StageTrainer.training_step, iter(range(9))

    def breaking(self, *args, **kwargs):
        if next(calls) == 4:  # in the third of three steps, behind the checkpoint of the second
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", breaking)
        with pytest.raises(KeyboardInterrupt):
            train(runs[1])
    train(runs[1])
    whole, broken = (load_file(run.folder / "finetune/trained.safetensors") for run in runs)
    assert whole.keys() == broken.keys()
    assert all((whole[key] == broken[key]).all() for key in whole)


def adapted(parts, records, tmp_path, **options) -> set[str]:
    run = finetune(parts, records, tmp_path, language_model=lora(2, **options))
    model, _ = assemble(run.model)
    apply_tuning(model, run.stages["finetune"])
    found = (name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad)
    return {name.partition("language_model.")[2] for name in found if "language_model" in name}


def test_adapters_sit_on_the_chosen_layers_and_modules(parts, records, tmp_path):
    every = adapted(parts, records, tmp_path)
    assert adapted(parts, records, tmp_path, layers=(1,)) == {n for n in every if n.startswith("layers.1.")}
    two = adapted(parts, records, tmp_path, modules=("q_proj", "mlp.down_proj"))
    assert two == {n for n in every if n.endswith((".q_proj", ".mlp.down_proj"))}
    assert len(two) == 4
    both = adapted(parts, records, tmp_path, layers=(0,), modules=("v_proj",))
    assert both == {"layers.0.self_attn.v_proj"}
    with pytest.raises(
        ConfigError, match=r"modules = 'Wqkv': no linear layer's name ends with it; known: down_proj"
    ):
        adapted(parts, records, tmp_path, modules=("Wqkv",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "step"}, "schedule = 'step': unknown; known: cosine, linear, constant"),
        ({"schedule": "warmup_stable_decay"}, "warmup_stable_decay needs num_decay_steps"),
        ({"optimizer": "adam"}, "optimizer = 'adam': unknown; known: adamw, adafactor"),
        ({"language_model": lora(2, layers=(2,))}, "language_model.layers = [2]: must be from 0 to 1"),
        ({"connector": lora(2, layers=(0,))}, "connector.layers = (0,): this component has no numbered"),
    ],
)
def test_a_name_or_layer_that_is_not_there_is_refused_at_once(parts, records, tmp_path, changes, said):
    with pytest.raises(ConfigError) as caught:
        train(finetune(parts, records, tmp_path / "run", **changes))
    assert said in str(caught.value)
