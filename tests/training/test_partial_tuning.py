"""Section 3.2's theta' and phi': layers of encoder and language model in both stages, out of a file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllava.cli import main
from tinyllava.training.trainer import StageTrainer
from training_toys import make_captions

FILE = """
from dataclasses import replace

from tinyllava.config import FULL, DataConfig, Hardware, ModelConfig, Run, Stage, from_layer

first = Stage(
    data=DataConfig(records=({captions!r},), images={images!r}), template="caption", connector=FULL,
    learning_rate=1e-2, global_batch_size=4, max_length_tokens=256, max_steps=2, warmup_ratio=0.0,
)
partial = replace(
    first, vision_encoder=from_layer(2), language_model=from_layer(1), learning_rate=1e-3,
    vision_encoder_learning_rate=3e-4, language_model_learning_rate=2e-4,
)
mine = DataConfig(records=({records!r},), images={images!r})
finetune = replace(
    partial, template="", data=mine, vision_encoder=from_layer(1), connector_learning_rate=5e-4
)
MINE = Run(
    name="mine", model=ModelConfig(vision_encoder={encoder!r}, language_model={llm!r}),
    stages={{"connector": first, "pretrain": partial, "finetune": finetune}},
    report_to=(), hardware=Hardware(num_workers=0, device_batch_size=2, precision="fp32"),
)
"""


def test_layers_of_encoder_and_language_model_train_in_both_stages_at_their_rates(
    parts: dict[str, Path], records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[dict[str, float]] = []
    own = StageTrainer.create_optimizer

    def create_optimizer(self: StageTrainer, *args: Any) -> torch.optim.Optimizer:
        optimizer = own(self, *args)
        groups.append({group["component"]: group["lr"] for group in optimizer.param_groups})
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in self.model.parameters() if p.requires_grad}
        return optimizer

    monkeypatch.setattr(StageTrainer, "create_optimizer", create_optimizer)
    file = tmp_path / "mine.py"
    file.write_text(
        FILE.format(
            captions=str(make_captions(records)),
            records=str(records),
            images=str(records.parent / "images"),
            encoder=str(parts["clip"]),
            llm=str(parts["llama"]),
        )
    )
    assert main(["train", f"{file}:MINE", "--output", str(tmp_path / "run")]) == 0
    assert groups == [
        {"connector": 1e-2},
        {"vision_encoder": 3e-4, "connector": 1e-3, "language_model": 2e-4},
        {"vision_encoder": 3e-4, "connector": 5e-4, "language_model": 2e-4},
    ]
    for stage, first_layer in (("pretrain", 2), ("finetune", 1)):
        rows = json.loads((tmp_path / "run" / stage / "ledger.json").read_text())
        assert any(row["trained"] for row in rows if row["component"] == "vision_encoder")
        for row in rows:
            layer = row["name"].partition(".layers.")[2].partition(".")[0]
            first = {"vision_encoder": first_layer, "language_model": 1}.get(row["component"])
            expected = first is None or (layer != "" and int(layer) >= first)
            assert row["trained"] == expected == row["moved"], row["name"]
