"""Grids by name, those of a user's own Python file included: ``my_grid.py`` or ``my_grid.py:NAME``."""

from pathlib import Path

from tinyllava.errors import ConfigError
from tinyllava.grid.grid import Grid
from tinyllava.grid.paper import GRIDS
from tinyllava.lookup import look_up
from tinyllava.recipes.user import USER_MODULE, execute_file

STARTER = "starter"


def find_grid(name: str) -> Grid:
    """Return a grid of the paper, the starter's, or one of a user's file, which is executed.

    Raises:
        UnknownNameError: no such grid, or no such value in the file.
        ConfigError: the file is missing or fails, holds no grid, or several without one being named.
    """
    path, _, key = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    if path.endswith(".py"):
        return _from_file(path, key)
    if name == STARTER:
        from tinyllava.grid.starter import starter_grid

        return starter_grid()
    return look_up({**GRIDS, STARTER: None}, name.lower(), "grid") or GRIDS[name.lower()]


def _from_file(path: str, key: str) -> Grid:
    values = execute_file(Path(path))
    grids = {
        name: value
        for name, value in values.items()
        if isinstance(value, Grid) or (callable(value) and getattr(value, "__module__", "") == USER_MODULE)
    }
    if not key:
        named = [name for name, value in grids.items() if isinstance(value, Grid)]
        if len(named) != 1:
            raise ConfigError(
                f"{path}: it holds {len(named)} values of tinyllava.grid.grid.Grid "
                f"({', '.join(named) or 'none'}); name one: {path}:NAME."
            )
        key = named[0]
    value = look_up(grids, key, f"grid in {path}")
    made = value if isinstance(value, Grid) else value()
    if not isinstance(made, Grid):
        raise ConfigError(f"{path}:{key}() returned {type(made).__name__}; a Grid is needed.")
    return made
