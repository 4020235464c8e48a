"""A folder of images, labelled by their folders or file names, or described in ``.txt`` files next to them.

A ``metadata.csv``, ``.jsonl`` or ``.parquet`` in the folder, as on the Hub, takes precedence.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllava.conversation import IMAGE_SUFFIXES
from tinyllava.errors import DataError
from tinyllava.files import files_below, found_below

_RECORDS = (".csv", ".tsv", ".xlsx", ".parquet", ".jsonl")
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NUMBER = re.compile(r"[ _.\-]*\(?\d+\)?$")
_CAMERA = ("", "img", "dsc", "dscn", "dscf", "pxl", "image", "photo", "picture", "screenshot", "frame")


def is_image_folder(folder: Path) -> bool:
    """Whether a folder has images in it or in its folders; deeper ones may be those of a root of mixtures."""
    if not folder.is_dir():
        return False
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return True
    if any((folder / name).is_file() for name in METADATA):
        return True
    return any(_is_shown(path, folder) for pattern in ("*", "*/*") for path in found_below(folder, pattern))


def read_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for each image, in the order of their names.

    Raises:
        DataError: no image in it, folders in folders that could both be a label, or a description that is not
            UTF-8.
    """
    _refuse_other_data(folder)
    paths = sorted(path for path in files_below(folder, links=True) if _is_shown(path, folder))
    if not paths:
        raise DataError(f"{folder}: no image in this folder. Give a folder of images, or a record file.")
    if all(path.parent == folder and not _label_of(path.stem) for path in paths) and not any(
        path.with_suffix(".txt").is_file() for path in paths
    ):
        raise DataError(
            f"{folder}: no image in this folder has a label or a caption. Put images into folders named "
            "by their labels, name the files by them (beetle_1.jpg), or write captions into .txt files next "
            "to them."
        )
    for path in paths:
        name = path.relative_to(folder).as_posix()
        row: dict[str, Any] = {"video" if path.suffix.lower() in VIDEOS else "image": name}
        beside = path.with_suffix(".txt")
        if beside.is_file():
            row["caption"] = _read(beside)
        elif path.parent != folder:
            row["label"] = _folder_label(path, folder)
        else:
            row["label"] = _label_of(path.stem)
        yield f"file {name}", row


def _refuse_other_data(folder: Path) -> None:
    """Reject a folder with other data about its images: a record file next to them, or splits."""
    record = next((path.name for path in found_below(folder, "*") if path.suffix.lower() in _RECORDS), "")
    if record:
        raise DataError(
            f"{folder}: has the record file {record}. Give that file, or move it out of the folder."
        )
    splits = [
        path.name for path in found_below(folder, "*") if path.is_dir() and not _is_of_system(path.name)
    ]
    if len(splits) > 1 and {name.lower() for name in splits} <= _SPLITS:
        named = " or ".join(str(folder / split) for split in splits)
        raise DataError(f"{folder}: has the splits {', '.join(splits)}. Give one of them: {named}.")


def _is_of_system(name: str) -> bool:
    """Whether a system hides a file or folder of this name: thumbnails, notebooks' copies, waste baskets."""
    return name.startswith((".", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE"))


def _is_shown(path: Path, folder: Path) -> bool:
    if path.suffix.lower() not in (*IMAGE_SUFFIXES, *VIDEOS):
        return False
    return not any(_is_of_system(part) for part in path.relative_to(folder).parts)


def _folder_label(path: Path, folder: Path) -> str:
    """Return the folder that names an image.

    Raises:
        DataError: it lies in several folders: some programs take the first as the label, and some the last.
    """
    labels = path.relative_to(folder).parts[:-1]
    if len(labels) > 1:
        raise DataError(
            f"{path}: its label could be {labels[0]!r} or {labels[-1]!r}. Put images one folder deep "
            f"({labels[-1]}/{path.name}), give a folder in {folder}, or write a "
            "table with the columns image and label."
        )
    return labels[0]


def _label_of(stem: str) -> str:
    """Return the name of an image without its number; empty for the names that cameras give."""
    label = _NUMBER.sub("", stem)
    return "" if label.lower().strip("_- ") in _CAMERA else label


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: was removed while its folder was read. Run the same command again."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
