"""The paper's own comparisons as grids: Figures 1 and 4 to 9, Tables 3 and A1.

Paper: section 4. Tables 1 and 2 list parts and data; they are printed, not run
(``list_table_1``, ``list_table_2``).
"""

import re
from collections.abc import Sequence

from tinyllava.config import Run
from tinyllava.data.mixtures import MIXTURES
from tinyllava.errors import ConfigError, look_up
from tinyllava.evaluation.benchmarks import PAPER_BENCHMARKS
from tinyllava.parts.resolve import known_parts
from tinyllava.parts.user_code import run_code
from tinyllava.recipes.recipe import DATASETS
from tinyllava.recipes.user import is_own
from tinyllava.recipes.variants import ABLATIONS, PREFIX, VARIANTS, variant
from tinyllava.studies.claims import CLAIMS
from tinyllava.studies.grid import Grid, GridCell
from tinyllava.studies.published import published_table

AXES = ("language_model", "vision_encoder", "connector", "data", "recipe")
_CONNECTORS = {"mlp": "MLP", "resampler": "Resampler"}
_DATASET_OF = {pair[1]: name for name, pair in DATASETS.items()}
_TITLES = {
    "figure-4": "Ablation of small-scale LLMs",
    "figure-5": "Ablation of vision encoders",
    "figure-6": "Exploration of connectors",
    "figure-7": "Ablation of training data",
    "figure-8": "Ablation of training recipes",
}
_TABLE_A1_BENCHMARKS = ("vqav2", "gqa", "scienceqa", "textvqa", "mmvet", "pope", "llava-w")


def place_of(run: Run) -> dict[str, str]:
    """Return the place of a run of Table 1's parts and Table 2's data on the five axes."""
    last = list(run.stages.values())[-1]
    return {
        "language_model": run.model.language_model,
        "vision_encoder": run.model.vision_encoder,
        "connector": _CONNECTORS.get(run.model.connector, run.model.connector),
        "data": _DATASET_OF[last.data.records[0]],
        "recipe": run.recipe,
    }


def _cell(run: Run, panel: str, label: str) -> GridCell:
    name = run.name.removeprefix(PREFIX)
    return GridCell(
        id=name,
        panel=panel,
        label=label,
        labels=place_of(run),
        run=run,
        published=name if name in VARIANTS else "",
    )


def _grid(name: str, title: str, paper: str, cells: list[GridCell], benchmarks: tuple[str, ...]) -> Grid:
    axes = {axis: tuple(dict.fromkeys(cell.labels[axis] for cell in cells)) for axis in AXES}
    return Grid(
        name=name,
        title=title,
        paper=paper,
        axes=axes,
        cells=tuple(cells),
        benchmarks=benchmarks,
        claims=CLAIMS.get(name, ()),
    )


def _ablation(name: str) -> Grid:
    ablation = ABLATIONS[name]
    cells = [
        _cell(run, panel, label) for panel, runs in ablation.panels.items() for label, run in runs.items()
    ]
    return _grid(name, _TITLES[name], f"Figure {ablation.figure}", cells, tuple(PAPER_BENCHMARKS))


def _of_variants(
    name: str, title: str, paper: str, variants: tuple[str, ...], benchmarks: tuple[str, ...]
) -> Grid:
    cells = [_cell(variant(one), "TinyLLaVA", one) for one in variants]
    return _grid(name, title, paper, cells, benchmarks)


GRIDS: dict[str, Grid] = {
    **{name: _ablation(name) for name in ABLATIONS},
    "table-a1": _of_variants(
        "table-a1", "The TinyLLaVA variants", "Table A1", VARIANTS, _TABLE_A1_BENCHMARKS
    ),
    "table-3": _of_variants(
        "table-3", "Beside other LMMs", "Table 3", ("share-C-Phi", "share-Sig-Phi"), tuple(PAPER_BENCHMARKS)
    ),
    "figure-1": _of_variants(
        "figure-1", "TinyLLaVA-3.1B and LLaVA-1.5-7B", "Figure 1", ("share-Sig-Phi",), tuple(PAPER_BENCHMARKS)
    ),
    "figure-9": _of_variants(
        "figure-9",
        "Answers of a smaller and a larger variant",
        "Figure 9",
        ("share-Sig-TL", "base-C-Phi"),
        ("llava-w", "mmvet"),
    ),
}
"""By the name that ``tinyllava reproduce`` takes. Figure 9 does not name its two models; here a smaller
variant with the better data, recipe and encoder stands beside a larger one, as its caption has it."""


Rows = list[Sequence[object]]


def list_table_1() -> Rows:
    """Return the parts of Table 1: as printed, and with our path and number of parameters."""
    rows: Rows = [("part", "name", "path printed", "size printed", "path here", "parameters here")]
    for kind, name, abbreviation, path, size in published_table("table-1").rows:
        encoder, language = known_parts(abbreviation, abbreviation)
        part = encoder if kind == "Vision encoder" else language
        assert part is not None
        rows.append((kind, name, path, size, part.path, f"{part.num_parameters:,}"))
    return rows


def list_table_2() -> Rows:
    """Return the data of Table 2: as printed, and with our number of records."""
    rows: Rows = [("data set", "stage", "source", "samples printed", "records here", "without an image")]
    for dataset, stage, source, size in published_table("table-2").rows:
        mixture = MIXTURES[source]
        rows.append((dataset, stage, source, size, f"{mixture.num_samples:,}", f"{mixture.num_text_only:,}"))
    return rows


LISTINGS = {"table-1": list_table_1, "table-2": list_table_2}
"""Name that ``tinyllava reproduce`` takes -> the rows, the first one being the heads."""


STARTER = "starter"
LISTED = ("table-1", "table-2")
"""Tables that are printed (``tinyllava.studies.paper``)."""
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
        raise ConfigError(f"{name} is a list, not a grid of runs. `tinyllava reproduce {name}` prints it.")
    return GRIDS[name]


def _order(name: str) -> tuple[bool, str]:
    return name == STARTER, name


def _from_file(path: str, key: str) -> Grid:
    values = run_code(path)
    grids = {name: value for name, value in values.items() if is_own(value, values, Grid)}
    if not key:
        named = [name for name, value in grids.items() if isinstance(value, Grid)]
        if len(named) != 1:
            raise ConfigError(
                f"{path}: has {len(named)} values of tinyllava.studies.grid.Grid "
                f"({', '.join(named) or 'none'}). Choose one with {path}:NAME."
            )
        key = named[0]
    value = look_up(grids, key, f"grid in {path}")
    made = value() if callable(value) else value
    if not isinstance(made, Grid):
        raise ConfigError(f"{path}:{key}() returned {type(made).__name__}; it must return a Grid.")
    return made
