"""Import checkpoints of other layouts: TinyLLaVABench, TinyLLaVA Factory, LLaVA, stock transformers, GGUF."""

import dataclasses
import json
from pathlib import Path

import torch

from tinyllava.checkpoints.importing import factory, flat, gguf, stock
from tinyllava.checkpoints.importing.build import ImportReport, build
from tinyllava.checkpoints.importing.parts import Given, SourceParts, download_source
from tinyllava.errors import CheckpointError
from tinyllava.model.quiet import keeping_random_state, transformers_errors_only, without_loading_bars
from tinyllava.parts.folders import check_new_folder, read_config, written_whole
from tinyllava.parts.templates import read_template

__all__ = ["Given", "ImportReport", "import_checkpoint", "read_parts"]

_KINDS = (
    "TinyLLaVABench, TinyLLaVA Factory, LLaVA-1.5, LLaVA-NeXT without tiles, transformers' LLaVA, a pair of "
    "GGUF files"
)


@keeping_random_state()
@without_loading_bars()
@transformers_errors_only()  # what the loader would warn of is an error here, and said as one
def import_checkpoint(
    source: str | Path, folder: str | Path, *, given: Given | None = None, dtype: torch.dtype | None = None
) -> ImportReport:
    """Read a checkpoint of another layout and write it as a self-contained tinyllava checkpoint.

    Args:
        source: its folder, a connector file, one of two GGUF files, or its name on the Hub.
        folder: where to write; it must not exist, or be empty.
        given: local folders of parts that the source only names, and a template to use instead.
        dtype: type of the weights; None keeps the widest of the source's types, which is lossless.

    Raises:
        CheckpointError: the layout is unknown, a part is not available, or tensors are left over or missing.
    """
    folder, given = Path(folder), given or Given()
    check_new_folder(folder)
    if given.template:
        read_template(given.template)  # a wrong name is said before gigabytes are read
    parts = read_parts(source, given)
    model, processor, report = build(parts, dtype)
    if parts.num_language_rows:
        model.config.num_language_rows = parts.num_language_rows
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        text = json.dumps(dataclasses.asdict(report), indent=2) + "\n"
        (partial / "import.json").write_text(text, encoding="utf-8")
    return report


def read_parts(source: str | Path, given: Given) -> SourceParts:
    """Recognise a checkpoint by its config.json, or its ending .gguf, and take it apart.

    Raises:
        CheckpointError: no checkpoint, or of an unknown kind.
    """
    path = Path(source) if Path(source).exists() else download_source(str(source))
    if gguf.recognises(path):
        return gguf.read(path, given)
    if given.mmproj is not None:
        raise CheckpointError(
            f"--mmproj {given.mmproj}: {path} is not a GGUF file. Give the language model's .gguf, or leave "
            "--mmproj out."
        )
    config = read_config(_config_folder(path))
    for kind in (flat, factory, stock):
        if kind.recognises(config):
            parts: SourceParts = kind.read(path, config, given)
            return parts
    model_type = config.get("model_type")
    if model_type == "tinyllava":
        raise CheckpointError(f"{path}: is already a tinyllava checkpoint and needs no import.")
    raise CheckpointError(
        f"{path}: config.json has model_type {model_type!r}, which is not a known layout. Known layouts: "
        f"{_KINDS}."
    )


def _config_folder(path: Path) -> Path:
    """Return the folder of the config.json: the source, or for a file the nearest above it that has one."""
    places = (path,) if path.is_dir() else (path.parent, path.parent.parent)
    return next((place for place in places if (place / "config.json").is_file()), places[0])
