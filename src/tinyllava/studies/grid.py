"""The definition of a grid: the runs of a comparison, each with its place on every axis.

Paper: the ablations of section 4.2; only the axis under study varies.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from tinyllava.config import Run
from tinyllava.errors import ConfigError, UnknownNameError, look_up
from tinyllava.recipes.recipe import Recipe
from tinyllava.recipes.variants import RECIPES
from tinyllava.studies.study import Claim

Changes = Mapping[str, Any]
"""Dotted path into a run (``model.connector``, ``stages.finetune.learning_rate``) -> value; ``recipe`` takes
a ``Recipe`` or its name and ``dataset`` a data set of Table 2."""


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """One model of a grid, before seeds: where the report shows it, and the run that makes it."""

    id: str
    panel: str
    label: str
    labels: Mapping[str, str]
    """Axis -> label, for every axis of the grid."""
    run: Run
    published: str = ""
    """Variant whose published numbers are shown beside (``base-C-TL``)."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured times of the machine that a grid is meant for, used to estimate its duration."""

    seconds_per_sample: Mapping[str, float] = field(default_factory=dict)
    """By stage."""
    seconds_per_question: float = 0.0
    seconds_per_node: float = 0.0
    """Opening the model, reading records, saving."""
    num_records: Mapping[str, int] = field(default_factory=dict)
    """By record file, of those that are written only when the grid is run."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A comparison: its cells, the seeds of each, the benchmarks that all are measured on."""

    name: str
    title: str
    axes: Mapping[str, tuple[str, ...]]
    """Name of an axis -> its labels."""
    cells: tuple[GridCell, ...]
    benchmarks: tuple[str, ...]
    seeds: tuple[int, ...] = (42,)
    paper: str = ""
    """Place in the paper: ``Figure 4``."""
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()
    keep_models: bool = True
    """Keep the checkpoint of every cell; otherwise only the trained tensors of its stages stay."""
    limit: int = 0
    """Ask only the first questions of each benchmark; 0 means all."""
    costs: Costs = Costs()
    fetches: str = ""
    """What is fetched and written when it is run, if it is not here; "" where the user brings everything."""

    def __post_init__(self) -> None:
        ids = [cell.id for cell in self.cells]
        for cell in self.cells:
            if ids.count(cell.id) > 1:
                raise ConfigError(f"grid {self.name!r}: two cells have the id {cell.id!r}; rename one.")
            for axis in self.axes:
                if cell.labels.get(axis) not in self.axes[axis]:
                    raise ConfigError(
                        f"grid {self.name!r}, cell {cell.id!r}: label {cell.labels.get(axis)!r} is not on "
                        f"axis {axis!r}; known: {', '.join(self.axes[axis])}."
                    )
        if not self.seeds:
            raise ConfigError(f"grid {self.name!r}: seeds is empty; give at least one.")

    @property
    def panels(self) -> tuple[str, ...]:
        """Titles of the subplots, in the order of the cells."""
        return tuple(dict.fromkeys(cell.panel for cell in self.cells))


def cross(
    *,
    name: str,
    title: str,
    base: Run,
    axes: Mapping[str, Mapping[str, Changes]],
    benchmarks: Sequence[str],
    panel: str = "",
    seeds: Sequence[int] = (42,),
    **values: Any,
) -> Grid:
    """Return the grid of every combination of labels.

    Args:
        base: the run that the labels change.
        axes: axis -> label -> what that label changes in the run.
        panel: axis whose labels are the subplots; empty puts everything into one.
        values: further fields of ``Grid``.

    Raises:
        ConfigError: a path that a run does not have, or a panel that is no axis.
    """
    if panel and panel not in axes:
        raise ConfigError(f"grid {name!r}: panel {panel!r} is not an axis; known: {', '.join(axes)}.")
    cells = []
    for labels in product(*axes.values()):
        place = dict(zip(axes, labels, strict=True))
        changes: dict[str, Any] = {}
        for axis, label in place.items():
            changes |= axes[axis][label]
        shown = [label for axis, label in place.items() if axis != panel]
        cells.append(
            GridCell(
                id=", ".join(labels),
                panel=place.get(panel, title),
                label=", ".join(shown),
                labels=place,
                run=change_run(base, changes),
            )
        )
    return Grid(
        name=name,
        title=title,
        axes={axis: tuple(labels) for axis, labels in axes.items()},
        cells=tuple(cells),
        benchmarks=tuple(benchmarks),
        seeds=tuple(seeds),
        **values,
    )


def change_run(run: Run, changes: Changes) -> Run:
    """Return a run with values changed by dotted path; recipe and data set are exchanged first.

    Raises:
        ConfigError: there is no such field.
        UnknownNameError: no such recipe or data set.
    """
    rest = dict(changes)
    if "recipe" in rest or "dataset" in rest:
        named = rest.pop("recipe", run.recipe)
        recipe = named if isinstance(named, Recipe) else look_up(RECIPES, named, "recipe")
        stages = recipe.on(rest.pop("dataset")) if "dataset" in rest else recipe.stages
        run = replace(run, recipe=recipe.name, stages=stages)
    for path, value in rest.items():
        run = _changed(run, path.split("."), value, path)
    return run


def _changed(node: Any, keys: list[str], value: Any, path: str) -> Any:
    """Return a copy of a dataclass or dict in which the value at a path is another one."""
    key, *rest = keys
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        known = [one.name for one in dataclasses.fields(node)]
        if key not in known:
            raise ConfigError(f"{path}: unknown field {key!r}; known: {', '.join(known)}.")
        return replace(node, **{key: _changed(getattr(node, key), rest, value, path) if rest else value})
    if isinstance(node, dict):
        if rest and key not in node:
            raise ConfigError(f"{path}: unknown key {key!r}; known: {', '.join(node)}.")
        return {**node, key: _changed(node[key], rest, value, path) if rest else value}
    raise ConfigError(f"{path}: cannot find {key!r} in {node!r}, which has no fields.")


def select_cells(grid: Grid, patterns: Sequence[str]) -> Grid:
    """Keep the cells of which the id, the panel or a label matches one of the patterns (``*Phi*``).

    Raises:
        UnknownNameError: a pattern that matches nothing.
    """
    if not patterns:
        return grid
    kept: set[str] = set()
    for pattern in patterns:
        found = {
            cell.id
            for cell in grid.cells
            if any(fnmatchcase(name, pattern) for name in (cell.id, cell.panel, *cell.labels.values()))
        }
        if not found:
            raise UnknownNameError(
                f"--only {pattern!r} matches no cell of {grid.name}; "
                f"known: {', '.join(cell.id for cell in grid.cells)}."
            )
        kept |= found
    return replace(grid, cells=tuple(cell for cell in grid.cells if cell.id in kept))


def exchange_parts(grid: Grid, parts: Mapping[str, str]) -> Grid:
    """Put other parts, mostly smaller ones, in the place of named ones; every label and title says so.

    Args:
        parts: name of an encoder or language model in the runs -> the name or folder that replaces it.

    Raises:
        UnknownNameError: no run has a part of that name.
    """
    for name, other in parts.items():
        models = [cell.run.model for cell in grid.cells]
        known = sorted({m.vision_encoder for m in models} | {m.language_model for m in models})
        if name not in known:
            raise UnknownNameError(f"--part {name}={other}: not used by any run; known: {', '.join(known)}.")
        marked = f"{name} (here {other.rstrip('/').rpartition('/')[2]})"
        axes = {a: tuple(marked if one == name else one for one in labels) for a, labels in grid.axes.items()}
        cells = tuple(_exchange(cell, name, other, marked) for cell in grid.cells)
        claims = tuple(_exchange_in_claim(claim, name, marked) for claim in grid.claims)
        note = f"{name} is replaced with {other}."
        grid = replace(grid, axes=axes, cells=cells, claims=claims, notes=(*grid.notes, note))
    return grid


def _exchange_in_claim(claim: Claim, name: str, marked: str) -> Claim:
    """Return the claim about the replacement, so that it is tested on the cells that are run."""
    better, worse = (
        {axis: marked if label == name else label for axis, label in side.items()}
        for side in (claim.better, claim.worse)
    )
    if (better, worse) == (claim.better, claim.worse):
        return claim
    text = claim.text.replace(name, marked) if name in claim.text else f"{claim.text} With {marked}."
    return replace(claim, better=better, worse=worse, text=text)


def _exchange(cell: GridCell, name: str, other: str, marked: str) -> GridCell:
    model = cell.run.model
    changed = replace(
        model,
        vision_encoder=other if model.vision_encoder == name else model.vision_encoder,
        language_model=other if model.language_model == name else model.language_model,
    )
    if changed == model:
        return cell
    return replace(
        cell,
        panel=cell.panel.replace(name, marked),
        label=cell.label.replace(name, marked),
        labels={axis: marked if label == name else label for axis, label in cell.labels.items()},
        run=replace(cell.run, model=changed),
        published="",  # those numbers are of another model
    )
