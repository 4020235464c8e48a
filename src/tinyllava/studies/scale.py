"""A fixed part of a file of records, with the same share of every source: a grid tried at two percent.

Paper: none. Table 2's mixtures hold images of several sources in known shares; a smaller run keeps them.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyllava.config import DataConfig, Run
from tinyllava.data.mixtures import resolve
from tinyllava.data.records import read_raw
from tinyllava.errors import ConfigError
from tinyllava.files import sha256_of, write_text
from tinyllava.studies.grid import Grid


def choose_records(records: list[Any], scale: float) -> list[Any]:
    """Return of every source the share ``scale`` of its records, at least one, in the order of the file.

    The source is the first folder of the image's path; records without an image are one more. Of each, the
    records whose content hashes lowest are taken: a smaller share is a part of every larger one.
    """
    sources: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        sources[_source_of(record)].append(index)
    kept: list[int] = []
    for indices in sources.values():
        count = max(1, round(scale * len(indices)))
        kept += sorted(indices, key=lambda index: _hash_of(records[index]))[:count]
    return [records[index] for index in sorted(kept)]


def _source_of(record: Any) -> str:
    image = record.get("image") if isinstance(record, dict) else None
    first = image[0] if isinstance(image, list) and image else image
    folder, slash, _ = str(first or "").partition("/")
    return folder if slash else ("" if first else "(no image)")


def _hash_of(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def scale_grid(grid: Grid, scale: float) -> Grid:
    """Return the grid under a name that says at which part of the data it is run.

    Raises:
        ConfigError: not a share above 0 and at most 1.
    """
    if not 0 < scale <= 1:
        raise ConfigError(
            f"--scale {scale:g}: give a share of the records above 0 and at most 1, such as 0.02."
        )
    if scale == 1:
        return grid
    note = f"Trained on a fixed {scale:.2%} of the records of every source: not the paper's experiment."
    return replace(
        grid,
        name=f"{grid.name}-scale-{scale:g}",
        title=f"{grid.title}, at {scale:.2%} of the data",
        notes=(*grid.notes, note),
    )


def scale_run(run: Run, scale: float, folder: Path) -> Run:
    """Return the run on the chosen part of its records, which is written below ``folder`` if need be.

    Raises:
        DataError, ConfigError: a record file is missing or is not of its format.
    """
    stages = {
        name: replace(stage, data=_scale_data(stage.data, run.data_root, scale, folder))
        for name, stage in run.stages.items()
    }
    return replace(run, stages=stages)


def _scale_data(data: DataConfig, data_root: str, scale: float, folder: Path) -> DataConfig:
    files, roots = [], set()
    for source, images in resolve(data, data_root):
        path = folder / f"{source.stem}-{sha256_of(source)[:10]}-{scale:g}.json"
        if not path.exists():
            chosen = choose_records([record for _, record in read_raw(source)], scale)
            write_text(path, json.dumps(chosen, ensure_ascii=False))
        files.append(str(path))
        roots.add(str(images))
    if len(roots) > 1:
        raise ConfigError(
            f"data.records = {list(data.records)}: their images are in different folders "
            f"({', '.join(sorted(roots))}); scale them separately."
        )
    return replace(data, records=tuple(files), images=roots.pop())
