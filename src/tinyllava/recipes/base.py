"""The base recipe, adopted from LLaVA-1.5.

Paper: section 4.1.2, Figure 3. Warm-up, clipping, the schedule and AdamW without weight decay are LLaVA-1.5's
and the defaults of ``tinyllava.config.Stage``.
"""

from tinyllava.config import FROZEN, FULL, Stage
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
