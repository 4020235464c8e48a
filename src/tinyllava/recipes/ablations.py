"""The ablations of Figures 4 to 8 as values: which runs each panel compares.

Paper: section 4.2.1 (Figures 4-6) and 4.2.2 (Figures 7 and 8). Everything but the axis under study is equal.
"""

from dataclasses import dataclass

from tinyllava.config import Run
from tinyllava.parts.language import find_language_model
from tinyllava.parts.vision import find_vision_encoder
from tinyllava.recipes.base import BASE
from tinyllava.recipes.variants import make_run, variant

ENCODERS, LANGUAGES = ("C", "Sig"), ("TL", "SLM", "Phi")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One figure: panels by title, and in each the runs that it compares, by the legend's label."""

    figure: int
    axis: str
    """What differs between the runs of a panel."""
    panels: dict[str, dict[str, Run]]

    @property
    def runs(self) -> list[Run]:
        """Every run of the figure once."""
        return list({run.name: run for panel in self.panels.values() for run in panel.values()}.values())


_LANGUAGE_NAME = {short: find_language_model(short).name for short in LANGUAGES}
_ENCODER_NAME = {short: find_vision_encoder(short).name for short in ENCODERS}

ABLATIONS: dict[str, Ablation] = {
    "figure-4": Ablation(
        figure=4,
        axis="language model",
        panels={
            _ENCODER_NAME[v]: {_LANGUAGE_NAME[f]: variant(f"base-{v}-{f}") for f in LANGUAGES}
            for v in ENCODERS
        },
    ),
    "figure-5": Ablation(
        figure=5,
        axis="vision encoder",
        panels={
            _LANGUAGE_NAME[f]: {_ENCODER_NAME[v]: variant(f"base-{v}-{f}") for v in ENCODERS}
            for f in LANGUAGES
        },
    ),
    "figure-6": Ablation(
        figure=6,
        axis="connector",
        panels={
            "CLIP, TinyLlama": {
                "MLP": variant("base-C-TL"),
                # "under a similar parameter setting": 6.6 M parameters here, 6.3 M in the MLP
                "Resampler": make_run(
                    BASE, "C", "TL", connector="resampler", connector_options={"width": 640, "num_layers": 1}
                ),
            }
        },
    ),
    "figure-7": Ablation(
        figure=7,
        axis="training data",
        panels={
            _LANGUAGE_NAME[f]: {
                "LLaVA-1.5": variant(f"base-C-{f}"),
                "ShareGPT4V": variant(f"base-C-{f}-ShareGPT4V"),
            }
            for f in LANGUAGES
        },
    ),
    "figure-8": Ablation(
        figure=8,
        axis="training recipe",
        panels={
            _LANGUAGE_NAME[f]: {"base": variant(f"base-C-{f}-ShareGPT4V"), "share": variant(f"share-C-{f}")}
            for f in LANGUAGES
        },
    ),
}
