"""Data sets in library formats: WebDataset's tar files, and folders saved by the library ``datasets``.

Both are read without those libraries: the first as tar files of samples, the second as Arrow streams with a
state.json.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllava.conversation import IMAGE_SUFFIXES
from tinyllava.data.readers.folder import VIDEOS
from tinyllava.errors import DataError
from tinyllava.files import parse_json, read_object

_ROWS_AT_ONCE = 64
_TEXTS = {"txt": "caption", "caption": "caption", "cls": "label"}
"""What a member of a sample that is text says, by the end of its name."""


def is_datasets_folder(folder: Path) -> bool:
    """Whether a folder was written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_datasets_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a folder of the library ``datasets``.

    Raises:
        DataError: it has several splits, or a file of it is missing or damaged.
    """
    import pyarrow as pa

    splits = (read_object(folder / "dataset_dict.json") or {}).get("splits")
    if splits:
        named = " or ".join(str(folder / split) for split in splits)
        raise DataError(f"{folder}: has the splits {', '.join(splits)}. Give one of them: {named}.")
    state = read_object(folder / "state.json") or {}
    index = 0
    try:
        for entry in state["_data_files"]:
            with pa.memory_map(str(folder / entry["filename"])) as mapped:
                stream = pa.ipc.open_stream(mapped)
                names = label_names(stream.schema)
                for batch in stream:
                    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                        for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                            yield f"record {index}", name_labels(row, names)
                            index += 1
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: cannot be read as a folder of datasets ({error}). Write it again with save_to_disk."
        ) from error


def label_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of the classes of each column of numbers, as the hub's files keep them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: list(feature["names"])
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError):
        return {}


def name_labels(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """Return a row with the name of a class in place of its number."""
    named = {
        column: known[row[column]]
        for column, known in names.items()
        if isinstance(row.get(column), int) and 0 <= row[column] < len(known)
    }
    return {**row, **named} if named else row


def read_tar(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a WebDataset: files of one name are one sample.

    An image is bytes; ``.json`` is the record, ``.txt`` a caption, ``.cls`` a label.

    Raises:
        DataError: the archive is damaged, or a text of it is not UTF-8 or not JSON.
    """
    name = ""
    sample: dict[str, Any] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, end = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != name and sample:
                    yield f"sample {name}", sample
                    sample = {}
                if key != name:
                    _refuse_scattered(path, key, seen)
                name = key
                file = archive.extractfile(member)
                assert file is not None  # it is a file
                _add(sample, end.lower(), file.read(), f"{path}: {member.name}")
    except tarfile.TarError as error:
        raise DataError(f"{path}: cannot be read as a tar file ({error}). Download it again.") from error
    if sample:
        yield f"sample {name}", sample


def _refuse_scattered(path: Path, key: str, seen: set[str]) -> None:
    """Raise DataError for a sample that was there before; otherwise note that it is."""
    if key in seen:
        raise DataError(
            f"{path}: sample {key} is in two places. Write the files of a sample one after the other, as "
            "`tar --sort=name` does."
        )
    seen.add(key)


def _add(sample: dict[str, Any], end: str, data: bytes, where: str) -> None:
    suffix = f".{end.rpartition('.')[2]}"
    if suffix in IMAGE_SUFFIXES:
        sample.setdefault("images", []).append(data)
        sample.pop("image", None)  # the path that the record had in its own world
    elif suffix in VIDEOS:
        sample["video"] = where.rpartition(": ")[2]
    elif suffix == ".json" or end in _TEXTS:
        try:
            text = data.decode("utf-8-sig").strip()
            value = parse_json(text) if suffix == ".json" else {_TEXTS[end]: text}
        except ValueError as error:
            raise DataError(f"{where}: cannot be read ({error}). Fix this member.") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: not a JSON object. Write one record into it.")
        if "images" in sample:
            value.pop("image", None)
            value.pop("images", None)
        sample.update(value)
    else:
        sample[end] = where
