"""The share recipe, after ShareGPT4V, and the form of it that TinyLLaVA Factory's scripts run.

Paper: section 4.1.2, Figure 3.
"""

from dataclasses import replace

from tinyllava.config import FROZEN, FULL, Stage, from_layer
from tinyllava.recipes.base import BASE
from tinyllava.recipes.recipe import Recipe, mixture

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
    summary="share with the whole vision encoder frozen, as TinyLLaVA Factory's scripts have it",
    stages=SHARE.stages | {"share_pretrain": replace(SHARE.stages["share_pretrain"], vision_encoder=FROZEN)},
)
