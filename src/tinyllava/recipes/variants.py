"""The variants by name: recipe, vision encoder and language model, optionally with data and connector.

Paper: section 4.2.3 for the names, Table A1 for the twelve.

``my_recipe.py:NAME`` names a value of that file: a Run, a function that returns one, or a Recipe, to which
the parts are added as in a variant's name: ``my_recipe.py:NAME-Sig-Phi``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from tinyllava.config import ModelConfig, Run, run_from_json
from tinyllava.errors import ConfigError, UnknownNameError, look_up
from tinyllava.parts.connectors import CONNECTORS
from tinyllava.parts.language import LANGUAGE_MODELS
from tinyllava.parts.resolve import CODE_FIELDS
from tinyllava.parts.user_code import is_reference, recall_value, run_code
from tinyllava.parts.vision import VISION_ENCODERS
from tinyllava.recipes.paper import BASE, LORA, QLORA, QLORA_8_BITS, SHARE, SHARE_FROZEN, SHARE_LORA
from tinyllava.recipes.recipe import DATASETS, Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (BASE, SHARE, SHARE_FROZEN, LORA, SHARE_LORA, QLORA, QLORA_8_BITS)
}
PREFIX = "TinyLLaVA-"
VARIANTS: tuple[str, ...] = tuple(
    f"{recipe}-{encoder}-{language}"
    for recipe, language, encoder in product(("base", "share"), ("TL", "SLM", "Phi"), ("C", "Sig"))
)
"""The rows of Table A1, in its order."""


def variant(name: str) -> Run:
    """Return the run of a variant: ``[TinyLLaVA-]RECIPE-ENCODER-LLM[-DATASET][-CONNECTOR]``.

    ``share-Sig-Phi`` is a row of Table A1, ``base-C-TL-ShareGPT4V`` a bar of Figure 7 and
    ``base-C-TL-resampler`` one of Figure 6. Encoder and language model are abbreviations of their tables.

    Raises:
        UnknownNameError: the name has another form, or a part of it is not known.
    """
    return run_of(name, RECIPES)


def run_of(name: str, recipes: Mapping[str, Recipe]) -> Run:
    """Return the run of a variant's name whose recipe is in a table; raises as ``variant``."""
    parts = name.removeprefix(PREFIX).split("-", 3)
    if len(parts) < 3:
        alone = " A recipe alone needs --from CHECKPOINT." if parts == [name] and name in recipes else ""
        raise UnknownNameError(
            f"unknown variant {name!r}; a name is RECIPE-ENCODER-LLM[-DATASET][-CONNECTOR], "
            f"such as {VARIANTS[-1]!r}; see `tinyllava show variants`.{alone}"
        )
    recipe = look_up(recipes, parts[0], "recipe")
    dataset, connector = _split_further_axes(parts[3] if len(parts) > 3 else "", name)
    return make_run(recipe, parts[1], parts[2], dataset=dataset, connector=connector)


def make_run(
    recipe: Recipe,
    vision_encoder: str,
    language_model: str,
    *,
    dataset: str = "",
    connector: str = "mlp",
    connector_options: Mapping[str, int] | None = None,
) -> Run:
    """Return the run of a recipe with the given parts. Its name has the choices that differ from the recipe.

    Args:
        vision_encoder: an abbreviation of the table of vision encoders, or two, joined by a plus sign.
        language_model: an abbreviation of the table of language models.
        dataset: of Table 2; empty means the recipe's own.
    """
    dataset = dataset or recipe.dataset
    encoders = {encoder.abbreviation: encoder.name for encoder in VISION_ENCODERS.values()}
    languages = {language.abbreviation: language.name for language in LANGUAGE_MODELS.values()}
    _say_abbreviation(encoders, vision_encoder.split("+"), "vision encoder")
    _say_abbreviation(languages, [language_model], "language model")
    short = connector.rpartition(":")[2]
    further = [dataset] * (dataset != recipe.dataset) + [short] * (connector != "mlp")
    return Run(
        name=PREFIX + "-".join([recipe.name, vision_encoder, language_model, *further]),
        recipe=recipe.name,
        model=ModelConfig(
            vision_encoder="+".join(
                look_up(encoders, short, "vision encoder") for short in vision_encoder.split("+")
            ),
            language_model=look_up(languages, language_model, "language model"),
            connector=connector,
            connector_options=dict(connector_options or {}),
        ),
        stages=recipe.on(dataset),
    )


def _say_abbreviation(names: Mapping[str, str], parts: Sequence[str], noun: str) -> None:
    """Refuse a part's full name, right or nearly so, where its abbreviation is meant."""
    by_name = {name.lower().replace("-", ""): short for short, name in names.items()}
    for part in parts:
        close = get_close_matches(part.lower(), by_name, n=1, cutoff=0.8)
        if part not in names and close:
            short = by_name[close[0]]
            raise UnknownNameError(
                f"unknown {noun} {part!r}; in a variant name, write {short!r} for {names[short]}."
            )


def tuned_run(recipe: Recipe, model: ModelConfig) -> Run:
    """Return the run of a recipe on the parts of a checkpoint."""
    return Run(name=PREFIX + recipe.name, recipe=recipe.name, model=model, stages=recipe.on(recipe.dataset))


def _split_further_axes(rest: str, name: str) -> tuple[str, str]:
    """Take ``[DATASET][-CONNECTOR]`` apart."""
    for dataset in ("", *DATASETS):
        if dataset and rest != dataset and not rest.startswith(f"{dataset}-"):
            continue
        connector = rest.removeprefix(dataset).removeprefix("-") or "mlp"
        if connector in CONNECTORS or is_reference(connector):
            return dataset, connector
    known = ", ".join([*DATASETS, *CONNECTORS])
    raise UnknownNameError(f"unknown dataset or connector {rest!r} in {name!r}; known: {known}.")


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


_LANGUAGE_NAME = {language.abbreviation: language.name for language in LANGUAGE_MODELS.values()}
_ENCODER_NAME = {encoder.abbreviation: encoder.name for encoder in VISION_ENCODERS.values()}

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


def find_run(name: str, checkpoint: ModelConfig | None = None) -> Run:
    """Return the run of a variant's name, ``FILE.py:NAME``, ``package.module:NAME`` or a saved run.json.

    The file is run: it is the user's own code.

    Args:
        checkpoint: parts of the checkpoint that the run starts from; beside them a recipe's name will do.

    Raises:
        UnknownNameError: no such variant, or no such value in the file.
        ConfigError: no such file, it fails, or the value is neither a run nor a recipe.
    """
    if name.endswith(".json"):
        return _saved_run(Path(name))
    path, colon, rest = name.rpartition(":")
    is_variant = name.removeprefix(PREFIX).partition("-")[0] in RECIPES and not Path(path).is_file()
    if not colon or is_variant or not is_reference(f"{path}:{rest.partition('-')[0]}"):
        return tuned_run(RECIPES[name], checkpoint) if checkpoint and name in RECIPES else variant(name)
    values = run_code(path)
    public = {key: value for key, value in values.items() if is_own(value, values, Run | Recipe)}
    key, _, parts = rest.partition("-")
    value = look_up(public, key, f"run or recipe in {path}")
    if isinstance(value, Recipe):
        if checkpoint and not parts:
            return tuned_run(value, checkpoint)
        return run_of(f"{value.name}-{parts}", RECIPES | {value.name: value})
    if parts:
        raise ConfigError(
            f"{name}: {key} is a complete run, which takes no parts in its name; write {path}:{key}."
        )
    made = value() if callable(value) else value
    if not isinstance(made, Run):
        raise ConfigError(
            f"{name}: {key}() returned {type(made).__name__}; it must return a tinyllava.config.Run."
        )
    return made


def _saved_run(path: Path) -> Run:
    """Return a run that was saved; code that it names has to be named with ``--with``."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give the run.json of a run folder.")
    run = run_from_json(path.read_text(encoding="utf-8"), str(path))
    for reference in code_of(run):
        recall_value(reference, str(path))
    return run


def code_of(run: Run) -> list[str]:
    """Return the references of a run to a user's code: parts of its model, templates of its stages."""
    named = [str(getattr(run.model, name)) for name in CODE_FIELDS]
    named += [stage.template for stage in run.stages.values()]
    return list(dict.fromkeys(filter(is_reference, named)))


def is_own(value: object, values: Mapping[str, object], kinds: Any) -> bool:
    """Whether a value of a user's code is of these kinds, or a function of its own that may return one.

    What the code imported from elsewhere is no candidate.
    """
    if isinstance(value, kinds):
        return True
    return callable(value) and getattr(value, "__module__", "") == values["__name__"]
