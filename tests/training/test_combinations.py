"""Every pair of settings of a run, in two processes and in one: the weights are equal.

A covering set: each combination holds as many pairs as possible that none before it holds. It takes minutes
(``pytest -m combinations``).
"""

import dataclasses
import itertools
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import toys
from processes import in_ranks
from tinyllava.config import FROZEN, FULL, Hardware, ModelConfig, Run, Stage, Validation, from_layer, lora
from tinyllava.planning.check import find_problems
from tinyllava.training.run import train
from training.test_distributed import make_records
from training_toys import toy_run

SETTINGS: dict[str, tuple[Any, ...]] = {
    "sharding": ("none", "gradients", "all"),
    "precision": ("fp32", "bf16"),
    "packing": (False, True),
    "compile": (False, True),
    "gradient_checkpointing": (False, True),
    "cache_features": (False, True),
    "num_workers": (0, 1),
    "device_batch_size": (1, 2),
    "encoder": ("clip", "siglip", "dino"),
    "llm": ("llama", "phi"),
    "projector": ("linear", "mlp", "resampler"),
    "vision_encoder": (FROZEN, FULL, from_layer(1), lora(2)),
    "language_model": (FROZEN, FULL, from_layer(1), lora(2), lora(2, bits=8), lora(2, bits=4)),
    "optimizer": ("adamw", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit"),
    "group_by": ("none", "length", "modality_length", "length_windows"),
    "loss_norm": ("global", "micro"),
    "separate_questions": (False, True),
    "add_tokens": ((), ("<loc_0>",)),
    "validation": ("none", "last", "best", "answers"),
    "records": ("images", "mixed", "odd"),
}
Combination = Mapping[str, Any]
Pair = tuple[tuple[str, int], tuple[str, int]]


def make_run(chosen: Combination, parts: Mapping[str, Path], records: Path, folder: Path) -> Run:
    """The run of a combination: one stage of three steps."""
    hardware = {
        field.name: chosen[field.name] for field in dataclasses.fields(Hardware) if field.name in chosen
    }
    stage = {field.name: chosen[field.name] for field in dataclasses.fields(Stage) if field.name in chosen}
    toy = toy_run(parts, records, folder, llm=chosen["llm"], encoder=chosen["encoder"])
    limit = f"{records},limit=7" if chosen["records"] == "odd" else str(records)
    data = dataclasses.replace(toy.stages["finetune"].data, records=(limit,))
    validation = Validation()
    if chosen["validation"] != "none":
        result = "best" if chosen["validation"] == "best" else "last"
        answers = int(chosen["validation"] == "answers")
        validation = Validation(held_out=str(records), every_steps=1, num_answers=answers, result=result)
    rate = 1e-2 if chosen["optimizer"] == "sgd" else 1e-3
    finetune = dataclasses.replace(
        toy.stages["finetune"],
        **stage | {"validation": validation, "learning_rate": rate},
        data=data,
        max_steps=3,
    )
    options = {"num_queries": 4} if chosen["projector"] == "resampler" else {}
    model: ModelConfig = dataclasses.replace(
        toy.model, connector=chosen["projector"], connector_options=options, add_tokens=chosen["add_tokens"]
    )
    return dataclasses.replace(toy, model=model, stages={"finetune": finetune}, hardware=Hardware(**hardware))


def pairs_of(chosen: Mapping[str, int]) -> set[Pair]:
    return set(itertools.combinations(sorted(chosen.items()), 2))


def draw(is_allowed: Callable[[Mapping[str, int]], bool]) -> Iterator[Combination]:
    """Draw combinations until they hold every pair that is allowed; the same ones each time.

    Args:
        is_allowed: of numbers of values by setting, where the other settings have their first values.
    """
    chance = random.Random(0)
    numbers = {name: list(range(len(values))) for name, values in SETTINGS.items()}
    every = (
        pair
        for some in itertools.combinations(sorted(SETTINGS), 2)
        for pair in itertools.combinations([(name, n) for name in some for n in numbers[name]], 2)
        if pair[0][0] != pair[1][0]
    )
    missing = {pair for pair in every if is_allowed(dict(pair))}
    num_vain = 0
    while missing and num_vain < 9:
        chosen = dict(chance.choice(sorted(missing)))
        for name in chance.sample(list(SETTINGS), len(SETTINGS)):
            values = [chosen[name]] if name in chosen else chance.sample(numbers[name], len(numbers[name]))
            values.sort(key=lambda value, name=name: -len(pairs_of(chosen | {name: value}) & missing))
            found = next((value for value in values if is_allowed(chosen | {name: value})), None)
            if found is None:
                break
            chosen[name] = found
        else:
            missing -= pairs_of(chosen)
            num_vain = 0
            yield {name: SETTINGS[name][number] for name, number in chosen.items()}
            continue
        num_vain += 1
    assert not missing, f"no combination has {sorted(missing)}"


def differ(one: Mapping[str, Tensor], two: Mapping[str, Tensor], *, is_exact: bool) -> float:
    """Return the largest difference of two models' weights; of the means of tensors where they are rounded.

    AdamW moves a weight by the rate whatever the size of its gradient, so that one whose gradient is rounding
    alone may move either way. In bf16 these are some weights of a tensor, and with moments in 8 bits one
    whose moment lies between two codes: a tenth of the rate bounds the mean. In fp32 it is the encoder's key
    biases: a softmax takes no notice of them, so that their gradient is zero.
    """
    assert one.keys() == two.keys()
    idle = re.compile(r"vision_tower.*(k_proj|key)\.bias$")
    differences = [(one[name] - two[name]).abs() for name in one if not idle.search(name)]
    return max((values.max() if is_exact else values.mean()).item() for values in differences)


@pytest.mark.combinations
@pytest.mark.timeout(7200)
def test_every_pair_of_settings_gives_the_weights_of_one_process(parts, tmp_path):
    parts = parts | {"dino": toys.make_dino(tmp_path / "dino")}
    paths = {"images": make_records(tmp_path / "images", set())}
    paths["mixed"] = paths["odd"] = make_records(tmp_path / "mixed", {1, 4, 6})
    first = dict.fromkeys(SETTINGS, 0)

    def run_of(chosen: Combination, folder: Path) -> Run:
        return make_run(chosen, parts, paths[chosen["records"]], folder / "run")

    def is_allowed(some: Mapping[str, int]) -> bool:
        chosen = {name: SETTINGS[name][number] for name, number in (first | some).items()}
        if chosen["loss_norm"] == "micro" and chosen["records"] == "odd":
            return (
                False  # a mean of micro-batches depends on how the last, smaller ones fall on the processes
            )
        return not find_problems(run_of(chosen, tmp_path), num_ranks=2)

    failed = []
    for number, chosen in enumerate(draw(is_allowed), 1):
        runs = [run_of(chosen, tmp_path / f"{number}-{name}") for name in ("one", "two")]
        said = tmp_path / f"said-{number}"
        begun = time.monotonic()
        ends = [
            in_ranks(ranks, lambda _, run=run: train(run), said)
            for ranks, run in zip((1, 2), runs, strict=True)
        ]
        difference = float("nan")
        is_exact = chosen["precision"] == "fp32" and chosen["optimizer"] != "adamw_8bit"
        if ends == [[0], [0, 0]]:
            one, two = (load_file(run.folder / "model/model.safetensors") for run in runs)
            difference = differ(one, two, is_exact=is_exact)
        print(f"{number}: {ends} {difference:.1e} {time.monotonic() - begun:.1f} s {chosen}", flush=True)
        if not difference < (1e-5 if is_exact else 1e-4):
            messages = "".join(path.read_text() for path in tmp_path.glob(f"said-{number}-*"))
            failed.append(f"{number}: {ends} {difference} {chosen}\n{messages}")
    assert not failed, "\n".join(failed)
