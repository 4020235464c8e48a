"""The starter's run: the base recipe at the size of two CPU cores and twelve minutes.

Paper: section 4.1.2, base. What is trained in which stage is the paper's; batch sizes and learning rates are
those of a set a thousand times smaller, found by trying (docs/log.md).
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from tinyllava.config import DataConfig, Hardware, ModelConfig, Run
from tinyllava.recipes.base import BASE

Length = Literal["short", "default", "full"]

SHORT_STEPS = 6


def starter_run(
    language_model: Path, vision_encoder: Path, records: Path, output: Path, length: Length
) -> Run:
    """Return the run on converted parts and written records.

    Args:
        length: default is twelve minutes; short stops each stage at once (to see that all works); full
            goes on until the model no longer improves much.
    """
    pretrain = replace(
        BASE.stages["pretrain"],
        data=_data(records, "pretrain"),
        learning_rate=5e-3,
        global_batch_size=16,
        max_steps=SHORT_STEPS if length == "short" else 0,
        group_by="length",
    )
    finetune = replace(
        BASE.stages["finetune"],
        data=_data(records, "finetune"),
        learning_rate=3e-4,
        global_batch_size=8,
        max_steps=SHORT_STEPS if length == "short" else 0,
        group_by="length",
    )
    return Run(
        name="starter",
        recipe="base",
        model=ModelConfig(
            vision_encoder=str(vision_encoder),
            language_model=str(language_model),
            connector="pool",
            connector_options={"side": 2},
        ),
        stages={"pretrain": pretrain, "finetune": finetune},
        output=str(output),
        hardware=Hardware(device_batch_size=0, num_workers=0, cache_features=True),
    )


def _data(records: Path, stage: str) -> DataConfig:
    return DataConfig(records=(str(records / f"{stage}.json"),), images=str(records / "images"))
