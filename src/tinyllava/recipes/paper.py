"""The paper's two recipes, and their forms with low-rank adapters.

Paper: section 4.1.2, Figure 3. ``base`` is adopted from LLaVA-1.5: warm-up, clipping, the schedule and AdamW
without weight decay are the defaults of ``tinyllava.config.Stage``. ``share`` follows ShareGPT4V.
Differs: the paper's models are all fine-tuned in full. Rank, alpha and rates of the adapters are those of
LLaVA-1.5's LoRA script, the dropout is TinyLLaVA Factory's.
"""

from dataclasses import replace

from tinyllava.config import FROZEN, FULL, Stage, Tune, from_layer, lora
from tinyllava.recipes.recipe import Recipe, mixture

BASE = Recipe(
    name="base",
    summary="pre-train the connector, then fine-tune connector and language model",
    stages={
        # During pre-training, we only update the connector and keep the rest of the model frozen ...
        "pretrain": Stage(
            data=mixture("LLaVA-1.5-558k"),
            template="caption",
            vision_encoder=FROZEN,
            connector=FULL,
            language_model=FROZEN,
            num_epochs=1,
            learning_rate=1e-3,
            global_batch_size=256,
        ),
        # ... in supervised fine-tuning the vision encoder stays frozen, connector and LLM are updated.
        "finetune": Stage(
            data=mixture("LLaVA-1.5-mix-665k"),
            vision_encoder=FROZEN,
            connector=FULL,
            language_model=FULL,
            num_epochs=1,
            learning_rate=2e-5,
            global_batch_size=128,
            group_by="modality_length",
        ),
    },
)


SHARE = Recipe(
    name="share",
    summary="base's connector, then pre-train all but the encoder's first 12 layers, then fine-tune as base",
    dataset="ShareGPT4V",
    stages={
        # The connector starts from the base's pretrained counterpart ...
        "pretrain": BASE.stages["pretrain"],
        # ... the first 12 layers of the vision encoder stay frozen and the rest of the model is updated ...
        "share_pretrain": Stage(
            data=mixture("ShareGPT4V-PT-1246k"),
            template="caption",
            vision_encoder=from_layer(12),
            connector=FULL,
            language_model=FULL,
            num_epochs=1,
            learning_rate=2e-5,
            global_batch_size=256,
        ),
        # ... and supervised fine-tuning is the same as in the base recipe.
        "finetune": replace(BASE.stages["finetune"], data=mixture("ShareGPT4V-mix-665k")),
    },
)

SHARE_FROZEN = replace(
    SHARE,
    name="share_frozen",
    summary="share with the whole vision encoder frozen, as in TinyLLaVA Factory's scripts",
    stages=SHARE.stages | {"share_pretrain": replace(SHARE.stages["share_pretrain"], vision_encoder=FROZEN)},
)


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
QLORA = _with_adapters("qlora", BASE, ADAPTERS_ON_4_BITS, "lora over a language model in 4 bits (NF4)")
QLORA_8_BITS = _with_adapters(
    "qlora8", BASE, ADAPTERS_ON_8_BITS, "lora over a language model in 8 bits, like Factory's qlora"
)
SHARE_LORA = _with_adapters("share_lora", SHARE, ADAPTERS, "share, with LoRA in fine-tuning")
