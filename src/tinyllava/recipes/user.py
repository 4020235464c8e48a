"""Runs by name, those of a user's own Python file included.

``my_recipe.py:NAME`` names a value of that file: a Run, a function that returns one, or a Recipe, to which
the parts are added as in a variant's name: ``my_recipe.py:NAME-Sig-Phi``.
"""

import runpy
import sys
from pathlib import Path

from tinyllava.config import ModelConfig, Run
from tinyllava.errors import ConfigError, TinyLlavaError, look_up
from tinyllava.recipes.recipe import Recipe
from tinyllava.recipes.variants import RECIPES, run_of, tuned_run, variant


def find_run(name: str, checkpoint: ModelConfig | None = None) -> Run:
    """Return the run of a variant's name or of ``FILE.py:NAME``.

    The file is executed: it is the user's own code.

    Args:
        checkpoint: parts of the checkpoint that the run starts from; beside them a recipe's name will do.

    Raises:
        UnknownNameError: no such variant, or no such value in the file.
        ConfigError: no such file, it fails, or the value is neither a run nor a recipe.
    """
    path, colon, rest = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        return tuned_run(RECIPES[name], checkpoint) if checkpoint and name in RECIPES else variant(name)
    public = {key: value for key, value in execute_file(Path(path)).items() if _is_usable(value)}
    key, _, parts = rest.partition("-")
    value = look_up(public, key, f"run or recipe in {path}")
    if isinstance(value, Recipe):
        if checkpoint and not parts:
            return tuned_run(value, checkpoint)
        return run_of(f"{value.name}-{parts}", RECIPES | {value.name: value})
    if parts:
        raise ConfigError(f"{name}: {key} is a whole run, it takes no parts; write {path}:{key}.")
    made = value() if callable(value) else value
    if not isinstance(made, Run):
        raise ConfigError(
            f"{name}: {key}() returned {type(made).__name__}; a tinyllava.config.Run is needed."
        )
    return made


def _is_usable(value: object) -> bool:
    """Whether a value of the user's file can name a run; what it imported from here is no candidate."""
    if isinstance(value, Run | Recipe):
        return True
    return callable(value) and getattr(value, "__module__", "") == USER_MODULE


USER_MODULE = "tinyllava_user_recipe"
"""Name that the code of a user's file runs under."""


def execute_file(path: Path) -> dict[str, object]:
    """Execute a Python file and return its names.

    As for the file that Python is started with, its folder is put on the import path: it can import what
    stands beside it, also from a function that is called later.

    Raises:
        ConfigError: the file is missing or raises; an error of ours comes through as it is.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe file.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(path), run_name=USER_MODULE)
    except TinyLlavaError:
        raise  # says itself what is wrong
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno}: {error.msg}.") from error
    except (ImportError, NameError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
