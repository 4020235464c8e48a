"""The files of a model folder: its JSON settings, and the faults that are detected in them."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from tinyllava.config import ModelConfig, run_from_json
from tinyllava.errors import CheckpointError, first_line
from tinyllava.files import found_below, held, parse_json, sha256_of, whole_folder
from tinyllava.parts.untrusted import SETTINGS, check_settings, check_weight_map
from tinyllava.parts.user_code import is_reference, recall_value

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
        raise CheckpointError(f"{folder}: has no {name}; give a Hugging Face model folder.") from error
    except ValueError as error:
        why = describe_damage(path) or f"not JSON ({error}); download the folder again"
        raise CheckpointError(f"{path}: {why}.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: expected an object, found {type(config).__name__}; download the folder again."
        )
    return config


def describe_damage(path: Path) -> str:
    """Describe a file that cannot be read, with the fix; empty if no damage is found.

    Told are: a pointer of Git LFS, a web page, an empty file, weights that are cut short.
    """
    if not path.is_file():
        return "is missing; download it again"
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return "is empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "is a web page, possibly an error message of the server; log in if needed, and download it again"
        )
    if path.suffix == ".bin" and head.startswith(b"PK") and not is_zipfile(path):
        return (
            f"is truncated: its {path.stat().st_size:,} bytes do not include the end of the file; download "
            "it again"
        )
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
    return f"is truncated: {size:,} of at least {expected:,} bytes; download it again"


def local_folder(name: str | Path) -> Path:
    """Return the folder of that path; for a name on the hub (``owner/name``) download it, once.

    Raises:
        CheckpointError: the hub has no such repository for this user, or cannot be reached.
    """
    if isinstance(name, Path) or Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Path(name)
    return download(name, only=("*.json", "*.safetensors", "*.jinja", "*.model"))


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def download(name: str, *, only: Sequence[str] = (), without: Sequence[str] = ()) -> Path:
    """Return the folder of a hub repository, downloaded unless it is in the cache.

    Args:
        name: ``owner/name``.
        only: patterns of the files that are needed; empty means all.
        without: patterns of files that are not needed.

    Raises:
        CheckpointError: the hub has no such repository for this user, or cannot be reached.
    """
    from httpx2 import HTTPError  # what the hub's client is built on
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=list(only) or None, ignore_patterns=list(without) or None)
        )
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{name!r}: no such folder here, and it could not be downloaded from the hub "
            f"({type(error).__name__}: {reason}). Check the name and the network; a private model needs "
            "`hf auth login`."
        ) from error


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of a repository on the hub: ``owner/name``."""
    return _HUB_NAME.fullmatch(name) is not None


def check_weight_files(folder: Path) -> None:
    """Reject a folder with a damaged weight file. Whether all files exist is not checked.

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
            raise CheckpointError(f"{folder}: is not empty; choose a new folder.")
        return
    in_the_way = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if in_the_way is not None and not in_the_way.is_dir():
        raise CheckpointError(f"{folder}: {in_the_way} is a file; choose a new folder.")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a place to write into that is called ``folder`` at the end; an interrupted write leaves nothing.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
        OutputError: another process writes it.
    """
    from safetensors import SafetensorError  # here: what only reads settings starts faster without it

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}); choose another folder.") from error
    with held(folder, is_folder=False):
        try:
            with whole_folder(folder) as partial:
                yield partial
                if folder.exists():
                    folder.rmdir()  # what came into it meanwhile is not replaced
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: cannot be written ({error}). The incomplete folder was removed. Free some disk "
                "space, or choose another folder."
            ) from error


def resolved(path: str) -> str:
    """Return a path in one spelling. Other values, such as a part's name, are returned unchanged."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def is_stage_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a stage, which holds only the tensors that the stage trains."""
    return all((folder / name).is_file() for name in ("trainer_state.json", "manifest.json"))


def check_checkpoint(folder: Path) -> None:
    """Reject an incomplete folder before anything is loaded from it.

    Raises:
        CheckpointError: no folder, no config, another kind of model, a weight file that is not there, or
            settings of generation that cannot be read or name no end.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: {_why_there_is_none(folder)}")
    config = read_config(folder)
    kind = config.get("model_type")
    if kind != "tinyllava" or "connector_type" in config:  # TinyLLaVA Factory has the same model_type
        layout = (
            f"model_type {kind!r}, not 'tinyllava'"
            if kind != "tinyllava"
            else "connector_type, which is Factory's"
        )
        raise CheckpointError(f"{folder}: config.json has {layout}; convert it with `tinyllava import`.")
    if is_reference(connector := str(config.get("connector", ""))):
        recall_value(connector, str(folder))  # of a checkpoint nothing is run: the user has to name the code
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = check_weight_map(index, read_config(folder, index.name))
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{folder}: weight files are missing: {', '.join(missing)}; copy the folder again."
        )
    for name in sorted(names):
        if why := describe_damage(folder / name):
            raise CheckpointError(f"{folder / name}: {why}.")
    num_tensors = sum(_count_tensors(folder / name) for name in names)
    for name in SETTINGS:
        if (folder / name).is_file():
            check_settings(folder / name, read_config(folder, name), num_tensors)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: adapters of a model in another folder; merge them with "
            "`tinyllava export`, or remove this file."
        )
    for name in ("vision_config", "text_config"):
        if not isinstance(config.get(name), dict):
            raise CheckpointError(
                f"{folder / 'config.json'}: {name} = {config.get(name)!r}: must be an object; copy the file "
                "again."
            )
    _check_generation(folder)


def _count_tensors(path: Path) -> int:
    """Return how many tensors the head of a safetensors file names; 0 if it cannot be read."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        try:
            return len(json.loads(file.read(min(num_bytes, path.stat().st_size))))
        except (ValueError, TypeError, RecursionError):
            return 0


def _check_generation(folder: Path) -> None:
    """Refuse a generation_config.json that is damaged, or under which no answer would end.

    The file may be missing: the ids of the tokenizer say the same.
    """
    name = "generation_config.json"
    if not (folder / name).exists():
        return
    settings = read_config(folder, name)
    for key in ("bos_token_id", "pad_token_id"):
        if settings.get(key) is not None and type(settings[key]) is not int:
            raise CheckpointError(
                f"{folder / name}: {key} = {settings[key]!r}: must be the id of a token; copy the file again."
            )
    end = settings.get("eos_token_id")
    ids = end if isinstance(end, list) else [end]
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(
            f"{folder / name}: eos_token_id = {end!r}: must be the id of the token that ends an answer, or "
            "a list of ids. Copy the file again, or delete it to use the tokenizer's end token."
        )


def check_processor_files(folder: Path) -> None:
    """Name the file of tokenizer, image processor or template that is missing or damaged.

    Raises:
        CheckpointError: one is.
    """
    settings = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in (*settings, "chat_template.jinja"):
        path = folder / name
        if not path.is_file() or not path.stat().st_size:
            raise CheckpointError(f"{path}: missing or empty; copy the folder again.")
    for name in settings:
        check_settings(folder / name, read_config(folder, name))


def _why_there_is_none(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder; give a checkpoint folder."
    if (folder / "model" / "config.json").is_file():
        return f"a run folder; its checkpoint is {folder / 'model'}."
    return "not a tinyllava checkpoint (no config.json). Train one, or import one."


def recorded_model(folder: Path) -> ModelConfig:
    """Return the parts of a checkpoint: names out of its run.json, its own connector.

    What was imported has no run.json: encoder and language model then are what its config calls them, or
    empty.

    Raises:
        CheckpointError: see ``check_checkpoint``.
        ConfigError: run.json is damaged.
    """
    check_checkpoint(folder)
    config = read_config(folder)
    path = folder / "run.json"
    model = (
        run_from_json(path.read_text(encoding="utf-8"), str(path)).model
        if path.is_file()
        else ModelConfig(
            vision_encoder=str(config.get("vision_config", {}).get("_name_or_path", "")),
            language_model=str(config.get("text_config", {}).get("_name_or_path", "")),
        )
    )
    processor = folder / "processor_config.json"
    settings = read_config(folder, processor.name) if processor.is_file() else {}
    return replace(
        model,
        image_aspect=settings.get("image_aspect", model.image_aspect),
        transparency=settings.get("transparency", "drop"),
        connector=str(config.get("connector", "mlp")),
        connector_options=dict(config.get("connector_options") or {}),
    )


def saved_dtype(folder: Path) -> str:
    """Return the type of a checkpoint's weights by its config, such as float32.

    Raises:
        CheckpointError: see ``check_checkpoint``.
    """
    check_checkpoint(folder)
    return str(read_config(folder).get("dtype") or "float32")


def recorded_name(folder: Path) -> str:
    """Return the name of the run that a checkpoint came from; without a run.json, the folder's."""
    path = folder / "run.json"
    if path.is_file():
        return run_from_json(path.read_text(encoding="utf-8"), str(path)).name
    return short_name(folder)


def short_name(folder: Path) -> str:
    """Return the name of a checkpoint's folder, or that of the run around it if it is just ``model``."""
    place = folder.resolve()
    return place.parent.name if place.name == "model" and place.parent.name else place.name


_ANSWERING = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
)
"""Files beside the weights that an answer depends on."""


def fingerprint(folder: Path) -> str:
    """Return a hash over a checkpoint's contents, the same after a copy or a move; empty if there is none."""
    paths = found_below(folder, "*.safetensors") + [folder / name for name in _ANSWERING]
    try:
        found = [(str(path.resolve()), path.stat()) for path in paths if path.is_file()]
        return _hash_files(tuple((p, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in found))
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: was removed while it was read. Run it again.") from error


@lru_cache(maxsize=8)  # gigabytes are not read again for each benchmark
def _hash_files(stamps: tuple[tuple[str, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in stamps:
        digest.update(f"{Path(path).name} {sha256_of(Path(path))}\n".encode())
    return digest.hexdigest()[:16] if stamps else ""


def default_name(folder: Path) -> str:
    """Return a name for results of a checkpoint, from its run or folder and its content."""
    name, content = short_name(folder), fingerprint(folder)
    return f"{name}-{content[:8]}" if content else name
