"""Merge LoRA adapters into the tensors that they were trained on: W + B A alpha / r, in single precision.

Differs: peft merges modules of a model; here the adapters' names are of another class than ours, and every
tensor of them has to be accounted for.
"""

from math import sqrt
from pathlib import Path
from typing import Any

from tinyllava.checkpoints.importing.tensors import Tensors, read_file, refuse_left_over, whole
from tinyllava.errors import CheckpointError
from tinyllava.parts.folders import read_config

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
                f"{folder}: adapter_config.json has {key} = {config[key]!r}, which is not merged here; "
                "merge the adapter with peft where it was trained and import the whole model."
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
                f"{where}: adapter of {weight} {tuple(old.shape)}: A {tuple(down_matrix.shape)} and "
                f"B {tuple(up_matrix.shape)} do not fit it with rank {rank} = r; give the model that the "
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
