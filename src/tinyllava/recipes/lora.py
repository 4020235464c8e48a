"""The recipes with low-rank adapters on the language model in place of its full fine-tuning.

Differs: the paper's models are all fine-tuned in full; rank, alpha and rates are those of LLaVA-1.5's LoRA
script, the dropout TinyLLaVA Factory's.
"""

from dataclasses import replace

from tinyllava.config import Stage, Tune, lora
from tinyllava.recipes.base import BASE
from tinyllava.recipes.recipe import Recipe
from tinyllava.recipes.share import SHARE

ADAPTERS = lora(rank=128, alpha=256, dropout=0.05)
ADAPTERS_ON_4_BITS = replace(ADAPTERS, bits=4)
ADAPTERS_ON_8_BITS = replace(ADAPTERS, bits=8)


def _with_adapters(name: str, recipe: Recipe, adapters: Tune, summary: str) -> Recipe:
    """Replace the fine-tuning of a recipe by adapters at ten times its rate; the connector keeps its own."""
    finetune = recipe.stages["finetune"]
    adapted: Stage = replace(
        finetune, language_model=adapters, learning_rate=2e-4, connector_learning_rate=finetune.learning_rate
    )
    return replace(recipe, name=name, summary=summary, stages=recipe.stages | {"finetune": adapted})


LORA = _with_adapters("lora", BASE, ADAPTERS, "base, with LoRA on the language model in fine-tuning")
QLORA = _with_adapters("qlora", BASE, ADAPTERS_ON_4_BITS, "lora over a language model held in 4 bits (NF4)")
QLORA_8_BITS = _with_adapters(
    "qlora8", BASE, ADAPTERS_ON_8_BITS, "lora over 8 bits, as Factory's of that name"
)
SHARE_LORA = _with_adapters("share_lora", SHARE, ADAPTERS, "share, with LoRA in fine-tuning")
