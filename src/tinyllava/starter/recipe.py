"""The starter's run: the base recipe at the size of two CPU cores and twelve minutes.

Paper: section 4.1.2, base. What is trained in which stage is the paper's; batch sizes and learning rates are
those of a set a thousand times smaller, found by trying (docs/log.md).
"""

from dataclasses import replace
from pathlib import Path

from tinyllava.config import DataConfig, Hardware, ModelConfig, Run
from tinyllava.recipes.paper import BASE


def starter_run(language_model: Path, vision_encoder: Path, records: Path, output: Path) -> Run:
    """Return the run on converted parts and written records: one epoch of each stage's file."""
    pretrain = replace(
        BASE.stages["pretrain"],
        data=_data(records, "pretrain"),
        learning_rate=5e-3,
        global_batch_size=16,
        group_by="length",
    )
    finetune = replace(
        BASE.stages["finetune"],
        data=_data(records, "finetune"),
        learning_rate=1e-4,
        global_batch_size=8,
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
        # Saving takes longer than a step; what a kill can cost is a minute or two.
        hardware=Hardware(num_workers=0, cache_features=True, save_steps=50),
    )


def _data(records: Path, stage: str) -> DataConfig:
    return DataConfig(records=(str(records / f"{stage}.json"),), images=str(records / "images"))
