"""The paper's own comparisons as grids: Figures 1 and 4 to 9, Tables 3 and A1.

Paper: section 4. Tables 1 and 2 list parts and data; they are printed, not run
(``tinyllava.studies.listings``).
"""

from tinyllava.config import Run
from tinyllava.evaluation.benchmarks import PAPER_BENCHMARKS
from tinyllava.recipes.ablations import ABLATIONS
from tinyllava.recipes.recipe import DATASETS
from tinyllava.recipes.variants import PREFIX, VARIANTS, variant
from tinyllava.studies.claims import CLAIMS
from tinyllava.studies.grid import Grid, GridCell

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
