"""The paper's comparisons as grids (Figures 1 and 4 to 9, Tables 3 and A1), and the claims of its text.

Paper: section 4. Tables 1 and 2 list parts and data. They are printed, not run (``list_table_1``,
``list_table_2``). Each claim is one sentence of sections 4.2.1 to 4.2.3 or appendix B in this project's own
words, with the two sides of the comparison. "Significantly" and "slightly" are left to the intervals. If two
sides are called comparable, the smaller model may be lower by ``COMPARABLE`` points. The paper gives no
number for it and does not name the pairs of variants, so both are chosen here.
"""

import re
from collections.abc import Mapping, Sequence

from tinyllava.config import Run
from tinyllava.data.mixtures import MIXTURES
from tinyllava.errors import ConfigError, look_up
from tinyllava.evaluation.benchmarks import PAPER_BENCHMARKS
from tinyllava.parts.resolve import known_parts
from tinyllava.parts.user_code import run_code
from tinyllava.recipes.recipe import DATASETS
from tinyllava.recipes.variants import ABLATIONS, PREFIX, VARIANTS, is_own, variant
from tinyllava.studies.grid import Grid, GridCell
from tinyllava.studies.published import published_table
from tinyllava.studies.study import Claim


def _claims(source: str, axis: str, *rows: tuple[str, str, str, str, Mapping[str, str]]) -> tuple[Claim, ...]:
    """Build claims on one axis from (text, better, worse, benchmark, other labels)."""
    return tuple(
        Claim(
            text=text,
            source=source,
            better={axis: better, **others},
            worse={axis: worse, **others},
            benchmark=benchmark,
        )
        for text, better, worse, benchmark, others in rows
    )


COMPARABLE = 1.0
"""Points of a benchmark."""
_TL, _SLM, _PHI = ({"language_model": name} for name in ("TinyLlama", "StableLM-2", "Phi-2"))
_BASE = {"recipe": "base", "data": "LLaVA-1.5"}
_SHARE = {"recipe": "share", "data": "ShareGPT4V"}
_BEST = {"recipe": "share", "vision_encoder": "SigLIP", "language_model": "Phi-2"}
_OTHERS = "section 4.2.3, comparison with other LMMs"
_MOE = "MoE-LLaVA, 3.9B, 384 px"
_BEST_THAN_LLAVA = Claim(
    text="TinyLLaVA-share-Sig-Phi (3.1B) does better than LLaVA-1.5 (7B) on every benchmark.",
    source=_OTHERS,
    better=_BEST,
    rival="LLaVA-1.5, 7B, 336 px",
)


def _comparable(smaller: str, larger: str, text: str) -> Claim:
    """Build the claim that a smaller language model with the better data, recipe and encoder is on a par."""
    return Claim(
        text=f"With better data, recipe and encoder, a smaller variant is comparable to a larger: {text}.",
        source="section 4.2.3, comparison among variants",
        better={**_SHARE, "vision_encoder": "SigLIP", "language_model": smaller},
        worse={**_BASE, "vision_encoder": "CLIP", "language_model": larger},
        margin=COMPARABLE,
    )


CLAIMS: dict[str, tuple[Claim, ...]] = {
    "figure-4": _claims(
        "section 4.2.1, ablation of small-scale LLMs",
        "language_model",
        ("Phi-2 does better than TinyLlama on every benchmark.", "Phi-2", "TinyLlama", "", {}),
        ("Phi-2 does better than StableLM-2 on every benchmark.", "Phi-2", "StableLM-2", "", {}),
        ("Phi-2 is far ahead of TinyLlama on ScienceQA.", "Phi-2", "TinyLlama", "scienceqa", {}),
        ("Phi-2 is far ahead of StableLM-2 on ScienceQA.", "Phi-2", "StableLM-2", "scienceqa", {}),
        ("TinyLlama, the smallest, is slightly behind StableLM-2.", "StableLM-2", "TinyLlama", "", {}),
        ("On POPE, TinyLlama is ahead of StableLM-2.", "TinyLlama", "StableLM-2", "pope", {}),
    ),
    "figure-5": _claims(
        "section 4.2.1, ablation of vision encoders",
        "vision_encoder",
        ("SigLIP does better than CLIP.", "SigLIP", "CLIP", "", {}),
        ("SigLIP is well ahead of CLIP on TextVQA.", "SigLIP", "CLIP", "textvqa", {}),
        ("SigLIP is well ahead of CLIP on LLaVA-W.", "SigLIP", "CLIP", "llava-w", {}),
    ),
    "figure-6": _claims(
        "section 4.2.1, preliminary exploration of connectors",
        "connector",
        (
            "With about as many parameters, the MLP does better than the resampler.",
            "MLP",
            "Resampler",
            "",
            {},
        ),
    ),
    "figure-7": _claims(
        "section 4.2.2, ablation of data mixtures",
        "data",
        ("With TinyLlama, ShareGPT4V is better than LLaVA-1.5 overall.", "ShareGPT4V", "LLaVA-1.5", "", _TL),
        ("With TinyLlama, ShareGPT4V costs accuracy on POPE.", "LLaVA-1.5", "ShareGPT4V", "pope", _TL),
        ("With StableLM-2, ShareGPT4V is better on every benchmark.", "ShareGPT4V", "LLaVA-1.5", "", _SLM),
        ("With Phi-2, ShareGPT4V is better on every benchmark.", "ShareGPT4V", "LLaVA-1.5", "", _PHI),
    ),
    "figure-8": _claims(
        "section 4.2.2, ablation of training recipes",
        "recipe",
        ("On ShareGPT4V, share does better than base with every language model.", "share", "base", "", {}),
        ("With StableLM-2, share hallucinates more: POPE falls.", "base", "share", "pope", _SLM),
        ("With Phi-2, share hallucinates more: POPE falls.", "base", "share", "pope", _PHI),
        ("With TinyLlama, share does better on POPE as well.", "share", "base", "pope", _TL),
    ),
    "table-a1": (
        *_claims(
            "appendix B",
            "language_model",
            ("A larger language model does better: Phi-2 than StableLM-2.", "Phi-2", "StableLM-2", "", {}),
            ("A larger language model does better: Phi-2 than TinyLlama.", "Phi-2", "TinyLlama", "", {}),
            ("StableLM-2, too, does better than TinyLlama.", "StableLM-2", "TinyLlama", "", {}),
        ),
        Claim(
            text="More diverse data with the recipe made for it do better: share on ShareGPT4V than base on "
            "LLaVA-1.5.",
            source="appendix B",
            better=_SHARE,
            worse=_BASE,
        ),
        _comparable("StableLM-2", "Phi-2", "share-Sig-SLM (2.0B) to base-C-Phi (3.0B)"),
        _comparable("TinyLlama", "StableLM-2", "share-Sig-TL (1.5B) to base-C-SLM (1.9B)"),
    ),
    "figure-9": (_comparable("TinyLlama", "Phi-2", "share-Sig-TL (1.5B) to base-C-Phi (3.0B)"),),
    "table-3": (
        _BEST_THAN_LLAVA,
        Claim(
            text="TinyLLaVA-share-Sig-Phi (3.1B) does better overall than Qwen-VL (7B).",
            source="section 4.2.3, summary",
            better=_BEST,
            rival="Qwen-VL, 7B, 448 px",
        ),
        Claim(
            text="On VQAv2, TinyLLaVA-share-Sig-Phi (3.1B) is comparable to MoE-LLaVA (3.9B).",
            source=_OTHERS,
            better=_BEST,
            rival=_MOE,
            benchmark="vqav2",
            margin=COMPARABLE,
        ),
        Claim(
            text="On POPE, TinyLLaVA-share-Sig-Phi (3.1B) is ahead of MoE-LLaVA (3.9B).",
            source=_OTHERS,
            better=_BEST,
            rival=_MOE,
            benchmark="pope",
        ),
    ),
    "figure-1": (_BEST_THAN_LLAVA,),
}
"""Grid -> its claims. Labels are the names of Table 1, the connectors, the data sets and the recipes."""


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
