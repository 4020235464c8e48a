"""What a recipe is: its stages, and the dataset of Table 2 that they read unless another is asked for.

Paper: section 4.1.2 and Table 2.
"""

from dataclasses import dataclass, replace

from tinyllava.config import DataConfig, Stage
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
