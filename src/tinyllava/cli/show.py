"""``tinyllava show``: print the tables of parts, recipes and data, or estimate the cost of a variant."""

from collections.abc import Callable, Sequence

from tinyllava.cli.parser import CommandParser
from tinyllava.data.mixtures import MIXTURES
from tinyllava.parts.connectors import CONNECTORS
from tinyllava.parts.language import LANGUAGE_MODELS
from tinyllava.parts.templates import read_template, template_names
from tinyllava.parts.vision import VISION_ENCODERS
from tinyllava.planning.speed import GPUS
from tinyllava.recipes.paper import PUBLISHED
from tinyllava.recipes.variants import RECIPES, VARIANTS, variant

_HELP = """
Print a table, or estimate what training a variant takes. Downloads nothing.

  tinyllava show encoders | language-models | connectors | templates
  tinyllava show recipes | variants | data | gpus
  tinyllava show share-Sig-Phi
      sizes, tokens, steps, memory, hours on eight A100
  tinyllava show base-C-TL --gpu RTX-4090 --gpus 1
      the same on another machine
  tinyllava show share-Sig-Phi --code factory
      with the settings of published code
  tinyllava show share-Sig-Phi --json
      the resolved config, as a run saves it
"""

Rows = list[Sequence[object]]


def main(arguments: list[str]) -> int:
    """Print; return 0."""
    parser = CommandParser("show", _HELP)
    parser.add_argument("what", nargs="?", default="", help="table, variant, or FILE.py:NAME")
    parser.add_argument("--gpu", default="A100-80G", help=f"GPU type: {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs")
    parser.add_argument("--code", default="", help=f"settings of published code: {', '.join(PUBLISHED)}")
    parser.add_argument("--json", action="store_true", help="print only the resolved config")
    parser.add_argument(
        "--measured", default="", help="JSON of benchmarks/gpu.py, to estimate hours by its speed"
    )
    known = parser.parse_args(arguments)
    if not known.what:
        print(_HELP.strip())
    elif known.what in TABLES:
        print(format_table(TABLES[known.what]()))
    else:
        from tinyllava.cli.show_plan import show_run

        options = {"code": known.code, "as_json": known.json, "measured": known.measured}
        print(show_run(known.what, gpu=known.gpu, num_gpus=known.gpus, **options))
    return 0


def format_table(rows: Rows) -> str:
    """Return rows as aligned columns, the first row as their heads."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _encoders() -> Rows:
    return [
        ("name", "short", "parameters", "image", "patches", "width", "licence", "path"),
        *(
            (
                e.name,
                e.abbreviation,
                f"{e.num_parameters:,}",
                f"{e.image_size_px} px",
                e.num_patches(),
                e.width,
                e.licence,
                e.path,
            )
            for e in VISION_ENCODERS.values()
        ),
    ]


def _language_models() -> Rows:
    return [
        ("name", "short", "parameters", "positions", "template", "licence", "path"),
        *(
            (
                m.name,
                m.abbreviation,
                f"{m.num_parameters:,}",
                f"{m.context_tokens:,}",
                m.template,
                m.licence,
                m.path,
            )
            for m in LANGUAGE_MODELS.values()
        ),
    ]


def _connectors() -> Rows:
    rows = [
        (name, ", ".join(f"{key}={value}" for key, value in c.options.items()), c.summary)
        for name, c in CONNECTORS.items()
    ]
    return [("name", "options", "description"), *rows]


def _templates() -> Rows:
    used: dict[str, list[str]] = {}
    for language in LANGUAGE_MODELS.values():
        used.setdefault(language.template, []).append(language.name)
    rows = []
    for name in template_names():
        comment = read_template(name).partition("{#-")[2].partition("-#}")[0]
        rows.append((name, ", ".join(used.get(name, [])), " ".join(comment.split())))
    return [("name", "language models", "description"), *rows]


def _recipes() -> Rows:
    rows = [(name, r.dataset, ", ".join(r.stages), r.summary) for name, r in RECIPES.items()]
    return [("name", "dataset", "stages", "description"), *rows]


def _variants() -> Rows:
    rows = []
    for name in VARIANTS:
        model = variant(name).model
        rows.append(
            (name, model.vision_encoder, model.language_model, RECIPES[name.partition("-")[0]].dataset)
        )
    return [("name", "vision encoder", "language model", "dataset"), *rows]


def _data() -> Rows:
    rows = [
        (
            m.name,
            m.stage,
            f"{m.num_samples:,}",
            f"{m.size_bytes / 1e9:.2f} GB",
            m.records,
            m.images or ".",
            m.licence,
            m.source,
        )
        for m in MIXTURES.values()
    ]
    head = (
        "name",
        "stage",
        "records",
        "file size",
        "record file under the data root",
        "images",
        "licence",
        "source",
    )
    return [head, *rows]


def _gpus() -> Rows:
    rows = [
        (
            name,
            f"{gpu.memory_bytes / 2**30:.0f} GiB",
            "bf16" if gpu.has_bf16 else "fp16",
            f"{gpu.half_flops / 1e12:.0f}",
            f"{gpu.fp32_flops / 1e12:.0f}",
            gpu.precision("auto"),
        )
        for name, gpu in GPUS.items()
    ]
    return [("name", "memory", "half", "peak TFLOP/s in half", "in fp32", "precision 'auto'"), *rows]


TABLES: dict[str, Callable[[], Rows]] = {
    "encoders": _encoders,
    "language-models": _language_models,
    "connectors": _connectors,
    "templates": _templates,
    "recipes": _recipes,
    "variants": _variants,
    "data": _data,
    "gpus": _gpus,
}
