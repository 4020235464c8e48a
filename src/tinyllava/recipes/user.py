"""Runs by name, those of a user's own Python file included.

``my_recipe.py:NAME`` names a value of that file: a Run, a function that returns one, or a Recipe, to which
the parts are added as in a variant's name: ``my_recipe.py:NAME-Sig-Phi``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava.config import ModelConfig, Run, run_from_json
from tinyllava.errors import ConfigError, look_up
from tinyllava.parts.resolve import CODE_FIELDS
from tinyllava.parts.user_code import is_reference, recall_value, run_code
from tinyllava.recipes.recipe import Recipe
from tinyllava.recipes.variants import PREFIX, RECIPES, run_of, tuned_run, variant


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
        raise ConfigError(f"{name}: {key} is a complete run without parts in its name; write {path}:{key}.")
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
