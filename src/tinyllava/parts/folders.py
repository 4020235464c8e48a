"""The files of a model folder: its JSON settings, and what may stand in a file in place of what should."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from tinyllava.errors import CheckpointError
from tinyllava.files import parse_json

_HEAD_BYTES = 512


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a folder's config.json, or another file of settings.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = folder / name
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder}: no {name} there; give a Hugging Face model folder.") from error
    except ValueError as error:
        why = describe_damage(path) or f"not JSON ({error}); fetch the folder again"
        raise CheckpointError(f"{path}: {why}.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: expected an object, found {type(config).__name__}; fetch the folder again."
        )
    return config


def describe_damage(path: Path) -> str:
    """Say what a file is that cannot be read, with the fix; empty if nothing is known to be wrong with it.

    Told are: a pointer of Git LFS, a web page, an empty file, weights that are cut short.
    """
    if not path.is_file():
        return "is missing; fetch it again"
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return "is empty; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, perhaps an error message of the server; fetch it again, logged in if need be"
    if path.suffix == ".bin" and head.startswith(b"PK") and not is_zipfile(path):
        return f"is cut short: its end is not among its {path.stat().st_size:,} bytes; fetch it again"
    return _cut_short(path) if path.suffix == ".safetensors" else ""


def _cut_short(path: Path) -> str:
    """Compare a safetensors file's size with the one that follows from its head."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head_bytes = int.from_bytes(file.read(8), "little")
        if file.read(1) != b"{":
            return ""
        file.seek(8)
        if 8 + head_bytes > size:
            expected = 8 + head_bytes
        else:
            try:
                tensors = json.loads(file.read(head_bytes))
                ends = [value["data_offsets"][1] for key, value in tensors.items() if key != "__metadata__"]
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                return ""
            expected = 8 + head_bytes + max(ends, default=0)
    if size >= expected:
        return ""
    return f"is cut short: {size:,} of at least {expected:,} bytes; fetch it again"


def check_weight_files(folder: Path) -> None:
    """Name the weight file of a folder that is not what it should be; whether all are there is not looked at.

    Raises:
        CheckpointError: one is damaged.
    """
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for path in sorted(folder.glob(pattern)):
            if why := describe_damage(path):
                raise CheckpointError(f"{path}: {why}.")


def check_new_folder(folder: Path) -> None:
    """Say before long work that its result would have no place.

    Raises:
        CheckpointError: the folder is a file or below one, or has something in it.
    """
    if folder.is_dir():
        if any(folder.iterdir()):
            raise CheckpointError(f"{folder}: is not empty; name a new folder.")
        return
    in_the_way = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if in_the_way is not None and not in_the_way.is_dir():
        raise CheckpointError(f"{folder}: {in_the_way} is a file; name a new folder.")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a place to write into that is called ``folder`` at the end; what stops leaves nothing behind.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError  # here: what only reads settings starts faster without it

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error}); nothing is left of it. Make room, or name another place."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
