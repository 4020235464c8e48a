"""Grids by name, those of a user's own Python file included: ``my_grid.py`` or ``my_grid.py:NAME``."""

import re
from pathlib import Path

from tinyllava.errors import ConfigError, look_up
from tinyllava.recipes.user import USER_MODULE, execute_file
from tinyllava.studies.grid import Grid
from tinyllava.studies.paper import GRIDS

STARTER = "starter"
LISTED = ("table-1", "table-2")
"""Tables that are printed (``tinyllava.studies.listings``)."""
_SPELLED = re.compile(r"(figure|fig\.?|table)[ _-]*(a?\d+)")


def spell_name(name: str) -> str:
    """Return the name as it is kept: ``Figure 4`` is ``figure-4``, ``A1`` is ``table-a1``."""
    lower = name.strip().lower()
    if lower in (STARTER, "a1"):
        return {"a1": "table-a1"}.get(lower, lower)
    found = _SPELLED.fullmatch(lower)
    return f"{'table' if found[1] == 'table' else 'figure'}-{found[2]}" if found else name


def find_grid(name: str) -> Grid:
    """Return a grid of the paper, the starter's, or one of a user's file, which is executed.

    Raises:
        UnknownNameError: no such grid, or no such value in the file.
        ConfigError: the file is missing or fails, holds no grid, or several without one being named.
    """
    name = spell_name(name)
    path, _, key = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    if path.endswith(".py"):
        return _from_file(path, key)
    if name == STARTER:
        from tinyllava.studies.starter import starter_grid

        return starter_grid()
    known = dict.fromkeys(sorted([*GRIDS, *LISTED, STARTER], key=_order))
    look_up(known, name, "grid")
    if name in LISTED:
        raise ConfigError(f"{name} lists what exists and is not run: `tinyllava reproduce {name}` prints it.")
    return GRIDS[name]


def _order(name: str) -> tuple[bool, str]:
    return name == STARTER, name


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
                f"{path}: it holds {len(named)} values of tinyllava.studies.grid.Grid "
                f"({', '.join(named) or 'none'}); name one: {path}:NAME."
            )
        key = named[0]
    value = look_up(grids, key, f"grid in {path}")
    made = value if isinstance(value, Grid) else value()
    if not isinstance(made, Grid):
        raise ConfigError(f"{path}:{key}() returned {type(made).__name__}; a Grid is needed.")
    return made
