"""Settings of the published code where they differ from the paper or go beyond it, as named options.

Paper: section 4.1.2 says rates, batches, epochs and what is trained; the rest is each code base's choice.
Differs: docs/recipes.md explains every row. None of these is a default here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from tinyllava.config import Aspect, Code, Run
from tinyllava.errors import look_up


@dataclass(frozen=True, kw_only=True)
class PublishedCode:
    """What one code base sets beside the paper's settings."""

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
