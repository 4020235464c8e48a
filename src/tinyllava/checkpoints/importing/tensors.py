"""Read the weights of a third-party folder in any form, tensors only, and merge LoRA adapters into them.

Differs: a pickle is opened only with ``weights_only=True``, which builds tensors and calls nothing. peft
merges modules of a model. Here the adapters have the names of another class, so each tensor is matched by
name.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tinyllava.errors import CheckpointError
from tinyllava.parts.folders import describe_damage, read_config

Tensors = dict[str, Tensor]

# The forms in which a folder holds its weights, the preferred first.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model."""
    return any((folder / name).is_file() for name in (*_INDEXES, *_SINGLES))


def read_folder(folder: Path) -> Tensors:
    """Read all tensors of a model folder.

    Raises:
        CheckpointError: no weights, a shard that is missing, or one without a tensor of the index.
    """
    for name in _INDEXES:
        if (folder / name).is_file():
            return _read_shards(folder, name)
    for name in _SINGLES:
        if (folder / name).is_file():
            return read_file(folder / name)
    raise CheckpointError(f"{folder}: no weights; expected one of {', '.join((*_INDEXES, *_SINGLES))}.")


def _read_shards(folder: Path, index: str) -> Tensors:
    weight_map = read_config(folder, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{folder / index}: weight_map (the file of each tensor) is missing or malformed. Download the "
            "file again."
        )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: weight files are missing: {', '.join(missing)}. Download the folder again."
        )
    tensors: Tensors = {}
    for file in files:
        shard = read_file(folder / file)
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{folder / file}: tensors that another shard has too: {', '.join(twice)}. Download the "
                "folder again."
            )
        tensors.update(shard)
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise CheckpointError(
            f"{folder}: {index} names tensors that no shard has: {', '.join(absent)}. Download the folder "
            "again."
        )
    return tensors


def read_file(path: Path) -> Tensors:
    """Read the tensors of one file, whose format follows from the end of its name.

    Raises:
        CheckpointError: it cannot be read, or holds something other than named tensors.
    """
    if why := describe_damage(path):
        raise CheckpointError(f"{path}: {why}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{path}: is damaged, or contains Python objects, which could run code when opened. Only "
            "tensors are read. Download the file again, or convert it to safetensors if you trust it."
        ) from error
    except (OSError, RuntimeError, SafetensorError, EOFError, ValueError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read ({why}). Download the file again.") from error
    return _only_tensors(path, values)


def _only_tensors(path: Path, values: Any) -> Tensors:
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path}: expected tensors by name, found {type(values).__name__}.")
    others = [str(name) for name, value in values.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path}: entries that are not tensors: {', '.join(others)}.")
    return {str(name): value for name, value in values.items()}


def take(tensors: Tensors, prefixes: Mapping[str, str]) -> Tensors:
    """Move the tensors that start with one of the prefixes out of ``tensors``, and return them renamed."""
    taken: Tensors = {}
    for name in list(tensors):
        for old, new in prefixes.items():
            if name.startswith(old):
                taken[new + name.removeprefix(old)] = tensors.pop(name)
                break
    return taken


def drop(tensors: Tensors, pattern: str) -> list[str]:
    """Remove the tensors whose name has a match of the pattern and return their names."""
    dropped = sorted(name for name in tensors if re.search(pattern, name))
    for name in dropped:
        del tensors[name]
    return dropped


def refuse_left_over(names: Iterable[str], where: str) -> None:
    """Stop at tensors that have no place in the model.

    Raises:
        CheckpointError: lists them all.
    """
    left = sorted(names)
    if left:
        raise CheckpointError(
            f"{where}: {count(left)} without a counterpart in the model: {', '.join(left)}."
        )


def count(names: Iterable[str]) -> str:
    """Return the number of tensors in words."""
    number = len(list(names))
    return "1 tensor" if number == 1 else f"{number:,} tensors"


def whole(config: dict[str, Any], name: str, default: int | None, where: str) -> int:
    """Return a whole number; ``default`` replaces a setting that is absent or null.

    Raises:
        CheckpointError: another type of value, or no value where there is no default.
    """
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(
            f"{where}: {name} = {value!r}; expected a whole number. Download the file again."
        )
    return value


def objects(config: dict[str, Any], *names: str, where: str) -> list[dict[str, Any]]:
    """Return the settings of several parts.

    Raises:
        CheckpointError: some are missing or of another form; all of them are listed.
    """
    values = [config.get(name) for name in names]
    absent = [name for name, value in zip(names, values, strict=True) if not isinstance(value, dict)]
    if absent:
        raise CheckpointError(
            f"{where}: config.json has no {' and no '.join(absent)}, the settings of a part. Download the "
            "folder again."
        )
    return [value for value in values if isinstance(value, dict)]


# Settings of peft that change what an adapter computes, with the value that means "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
}
_PREFIX = "base_model.model."


def read_adapter(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Return the settings of an adapter and its tensors.

    Raises:
        CheckpointError: the files are missing, or the adapter is of a kind that is not merged here.
    """
    config = read_config(folder, "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: peft_type {config.get('peft_type')!r}; only LORA can be merged.")
    for key, unused in _UNUSED.items():
        if config.get(key) not in unused:
            raise CheckpointError(
                f"{folder}: adapter_config.json has {key} = {config[key]!r}, which is not supported. Merge "
                "the adapter with peft where it was trained, and import the merged model."
            )
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return config, read_file(folder / name)
    raise CheckpointError(
        f"{folder}: adapter_config.json without adapter_model.safetensors or adapter_model.bin."
    )


def merge_lora(tensors: Tensors, config: dict[str, Any], adapter: Tensors, where: str) -> list[str]:
    """Add an adapter to ``tensors`` and return the names of the weights that it changed.

    Raises:
        CheckpointError: an adapter tensor that is half of nothing, or whose weight does not exist.
    """
    rank = whole(config, "r", None, f"{where}: adapter_config.json")
    alpha = whole(config, "lora_alpha", None, f"{where}: adapter_config.json")
    left = {_plain(name): tensor for name, tensor in adapter.items()}
    merged = []
    for name in sorted(left):
        module = name.removesuffix(".lora_A.weight")
        up, weight = f"{module}.lora_B.weight", f"{module}.weight"
        if module == name or up not in left or weight not in tensors:
            continue
        down_matrix, up_matrix, old = left.pop(name).float(), left.pop(up).float(), tensors[weight]
        if down_matrix.shape != (rank, old.shape[1]) or up_matrix.shape != (old.shape[0], rank):
            raise CheckpointError(
                f"{where}: adapter of {weight} {tuple(old.shape)}: A {tuple(down_matrix.shape)} and B "
                f"{tuple(up_matrix.shape)} do not fit it with rank {rank} = r. Give the model that the "
                "adapters were trained on: --language-model DIR."
            )
        scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
        tensors[weight] = (old.float() + scale * (up_matrix @ down_matrix)).to(old.dtype)
        merged.append(weight)
    refuse_left_over(left, f"{where}: adapter")
    return merged


def _plain(name: str) -> str:
    """Return an adapter's name without peft's wrapping and adapter name."""
    return (
        name.removeprefix(_PREFIX)
        .replace(".lora_A.default.", ".lora_A.")
        .replace(".lora_B.default.", ".lora_B.")
    )


def strip_wrapping(tensors: Tensors) -> Tensors:
    """Return tensors that were saved from inside peft's wrapper under the names of the model itself."""
    return {
        name.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor for name, tensor in tensors.items()
    }
