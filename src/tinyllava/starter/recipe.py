"""The starter's run: the base recipe, sized for two CPU cores and twelve minutes.

Paper: section 4.1.2, base. The trained parts of each stage are the paper's. Batch sizes and learning rates
are for a set a thousand times smaller and were found by experiments (docs/log.md).
"""

from dataclasses import replace
from pathlib import Path

from tinyllava.config import DataConfig, Hardware, ModelConfig, Run, from_layer
from tinyllava.recipes.paper import BASE

SEED = 42
"""Of the connector's start, the order of records and the dropped features."""


def starter_model(language_model: Path, vision_encoder: Path) -> ModelConfig:
    """Return the starter's parts."""
    return ModelConfig(
        vision_encoder=str(vision_encoder),
        language_model=str(language_model),
        connector="slots",
        connector_options={"num_slots": 4, "dropout_percent": 50},
    )


def starter_run(
    model: ModelConfig, records: Path, output: Path, start_from: Path | None, seed: int = SEED
) -> Run:
    """Return the run on converted parts and written records: one epoch of each stage's file.

    Embeddings stay frozen in fine-tuning: a fifth of the parameters, and few of the words are trained on.

    Args:
        start_from: the checkpoint whose connector starts as words; None starts at random.
    """
    pretrain = replace(
        BASE.stages["pretrain"],
        data=_data(records, "pretrain"),
        learning_rate=2e-4,
        global_batch_size=16,
        group_by="length_windows",
    )
    finetune = replace(
        BASE.stages["finetune"],
        data=_data(records, "finetune"),
        language_model=from_layer(0),
        learning_rate=1e-4,
        global_batch_size=4,
        group_by="length_windows",
        separate_questions=True,
    )
    return Run(
        name="starter",
        recipe="base",
        model=model,
        stages={"pretrain": pretrain, "finetune": finetune},
        output=str(output),
        seed=seed,
        start_from=str(start_from or ""),
        # Saving takes longer than a step; what a kill can cost is a minute or two.
        hardware=Hardware(num_workers=0, cache_features=True, save_steps=100),
    )


def _data(records: Path, stage: str) -> DataConfig:
    return DataConfig(records=(str(records / f"{stage}.json"),), images=str(records / "images"))
