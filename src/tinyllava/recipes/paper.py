"""The paper's two recipes, their LoRA variants, and the different settings of published code.

Paper: section 4.1.2, Figure 3. ``base`` is adopted from LLaVA-1.5: warm-up, clipping, the schedule and AdamW
without weight decay are the defaults of ``tinyllava.config.Stage``. ``share`` follows ShareGPT4V. Section
4.1.2 gives rates, batches, epochs and the trained parts; the rest is the choice of each code base.
Differs: the paper's models are all fine-tuned in full. Rank, alpha and rates of the adapters are those of
LLaVA-1.5's LoRA script, and the dropout is TinyLLaVA Factory's. docs/recipes.md explains every setting of
published code. None of these is a default here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from tinyllava.config import FROZEN, FULL, Aspect, Code, Run, Stage, Tune, from_layer, lora
from tinyllava.errors import look_up
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


@dataclass(frozen=True, kw_only=True)
class PublishedCode:
    """The settings of one code base that differ from the paper's."""

    source: str
    max_length_tokens: int
    precision: Literal["bf16", "fp16"]
    image_aspect: Aspect
    loss_norm: Literal["global", "micro"] = "micro"
    max_length_of: Mapping[str, int] = field(default_factory=dict)
    """Length by recipe, where it is not the same for all."""


PUBLISHED: dict[str, PublishedCode] = {
    "llava": PublishedCode(
        source="LLaVA-1.5 scripts", max_length_tokens=2048, precision="bf16", image_aspect="pad"
    ),
    "bench": PublishedCode(
        source="TinyLLaVABench scripts", max_length_tokens=3072, precision="fp16", image_aspect="pad"
    ),
    "factory": PublishedCode(
        source="TinyLLaVA Factory scripts",
        max_length_tokens=2048,
        precision="fp16",
        image_aspect="square",
        max_length_of=dict.fromkeys(("share", "share_frozen", "lora", "share_lora", "qlora", "qlora8"), 3072),
    ),
}


def as_published(run: Run, code: str) -> Run:
    """Return a run with the settings of one code base; its turns, token ids and head are reproduced too.

    Raises:
        UnknownNameError: no such code base.
    """
    chosen = look_up(PUBLISHED, code, "published code")
    length = chosen.max_length_of.get(run.recipe, chosen.max_length_tokens)
    return replace(
        run,
        name=f"{run.name}-as-{code}",
        model=replace(
            run.model, code=cast("Code", code), image_aspect=chosen.image_aspect, transparency="drop"
        ),
        stages={
            name: replace(stage, max_length_tokens=length, loss_norm=chosen.loss_norm)
            for name, stage in run.stages.items()
        },
        hardware=replace(run.hardware, precision=chosen.precision),
    )
