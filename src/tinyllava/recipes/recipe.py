"""The definition of a recipe: its stages and their dataset of Table 2, and its adaptation to few records.

Paper: section 4.1.2 and Table 2. Its fine-tuning has 665,000 records, and a batch of 128 would make a single
step of 100 records.
Differs: batch size, epochs, learning rate and rank follow from the number of records. The rest of the recipe
stays.
"""

from dataclasses import dataclass, replace

from tinyllava.config import COMPONENTS, DataConfig, Stage
from tinyllava.errors import look_up

DATASETS: dict[str, tuple[str, str]] = {
    "LLaVA-1.5": ("LLaVA-1.5-558k", "LLaVA-1.5-mix-665k"),
    "ShareGPT4V": ("ShareGPT4V-PT-1246k", "ShareGPT4V-mix-665k"),
}
"""Table 2: the pre-training and the fine-tuning mixture of each dataset."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training recipe: stages by name, in the order in which they run."""

    name: str
    summary: str
    stages: dict[str, Stage]
    dataset: str = "LLaVA-1.5"
    """The dataset of Table 2 that the recipe is meant for."""

    def on(self, dataset: str) -> dict[str, Stage]:
        """Return the stages with the recipe's own dataset exchanged for another one.

        A stage that reads another dataset than the recipe's own (share's connector) keeps it.

        Raises:
            UnknownNameError: no such dataset.
        """
        new = look_up(DATASETS, dataset, "dataset")
        exchange = dict(zip(DATASETS[self.dataset], new, strict=True))
        return {
            name: replace(
                stage,
                data=replace(
                    stage.data, records=tuple(exchange.get(record, record) for record in stage.data.records)
                ),
            )
            for name, stage in self.stages.items()
        }


def mixture(name: str) -> DataConfig:
    """Return the data of a stage that reads one mixture of Table 2."""
    return DataConfig(records=(name,))


WANTED_STEPS = 64
"""Optimizer steps that a stage should have: fewer hardly move it."""
MAX_EPOCHS = 5
"""More passes over the same few records are learnt by heart."""
_MIN_BATCH, _STEPS_PER_EPOCH = 4, 16
_NOISY_BATCH = 16
"""At batches up to this one the rates are halved: the mean of few samples is a noisy gradient."""
_RANKS = ((1024, 16), (8192, 64))
"""Largest number of records, and the rank of adapters for them: 128 would store them."""


def fit_to(stage: Stage, num_records: int) -> Stage:
    """Return a stage with batch, epochs, rates and ranks for that many records; for many, as it is.

    The batch is the largest power of two with 16 steps an epoch, at least 4 and at most the recipe's; epochs
    are as many as 64 steps take, at most 5.
    """
    if num_records >= WANTED_STEPS * stage.global_batch_size or stage.max_steps or num_records < 1:
        return stage
    wanted = min(max(num_records // _STEPS_PER_EPOCH, _MIN_BATCH), num_records, stage.global_batch_size)
    batch = 1 << (wanted.bit_length() - 1)
    epochs = min(MAX_EPOCHS, -(-WANTED_STEPS // -(-num_records // batch)))
    rank = next((rank for most, rank in _RANKS if num_records < most), 0)
    scale = 0.5 if batch <= _NOISY_BATCH else 1.0
    changes: dict[str, object] = {"learning_rate": stage.learning_rate * scale}
    for component in COMPONENTS:
        rate, tune = getattr(stage, f"{component}_learning_rate"), stage.tune(component)
        if rate is not None:
            changes[f"{component}_learning_rate"] = rate * scale
        if tune.kind == "lora" and 0 < rank < tune.rank:
            changes[component] = replace(tune, rank=rank, alpha=max(1, tune.alpha * rank // tune.rank))
    return replace(stage, global_batch_size=batch, num_epochs=float(epochs), **changes)  # type: ignore[arg-type]


def describe(stage: Stage, num_records: int) -> str:
    """Say how a stage trains on few records, in the words of its options."""
    ranks = [f"LoRA rank {stage.tune(c).rank}" for c in COMPONENTS if stage.tune(c).kind == "lora"]
    steps = stage.max_steps or max(1, round(-(-num_records // stage.global_batch_size) * stage.num_epochs))
    settings = [
        f"batch {stage.global_batch_size}",
        f"{stage.num_epochs:g} epochs ({steps:,} steps)",
        f"rate {stage.learning_rate:g}",
        *ranks,
    ]
    return f"{num_records:,} record{'s' * (num_records != 1)}: {', '.join(settings)}"
