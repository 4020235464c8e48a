"""Open a checkpoint, or merge an adapter saved by peft into the checkpoint that it was trained on."""

from pathlib import Path
from typing import Any

import torch

from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import open_checkpoint
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.quiet import quiet_bitsandbytes_import
from tinyllava.parts.folders import check_checkpoint, describe_damage, read_config


def open_merged(
    folder: Path, base: str | Path | None, dtype: torch.dtype | str
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor, Path]:
    """Return model, processor and the folder that they came from; adapters are merged into the weights.

    Raises:
        CheckpointError: neither a checkpoint nor an adapter, or an adapter that does not fit its base.
    """
    base = base_of(folder, base)
    if base == folder:
        return *open_checkpoint(folder, dtype=dtype), folder
    with quiet_bitsandbytes_import():
        from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    model, processor = open_checkpoint(base, dtype=dtype)
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: the adapter does not fit {base}: {reason} Give the checkpoint that it was trained "
            "on: --base DIR."
        ) from error
    stored, taken = load_peft_weights(str(folder), device="cpu"), get_peft_model_state_dict(adapted)
    wrong = sorted(stored.keys() ^ taken.keys())
    if wrong:
        raise CheckpointError(
            f"{folder}: adapter tensors without a counterpart in {base}: {', '.join(wrong)}. Give the "
            "checkpoint that it was trained on: --base DIR."
        )
    merged: TinyLlavaForConditionalGeneration = adapted.merge_and_unload()
    merged.requires_grad_(False)
    return merged, processor, base


@torch.no_grad()
def fold_image_scale(model: TinyLlavaForConditionalGeneration) -> None:
    """Put the factor of image tokens into the MLP's last layer: other classes have no place for it."""
    if model.config.image_scale == 1:
        return
    last: Any = model.connector.linear_2
    for parameter in last.parameters():
        parameter *= model.config.image_scale
    model.config.image_scale = 1.0


def base_of(folder: Path, base: str | Path | None) -> Path:
    """Return the base checkpoint of an adapter, or the folder itself if it is a checkpoint.

    Args:
        base: as a user names it; None takes the one that the adapter names.

    Raises:
        CheckpointError: neither a checkpoint nor an adapter, or a base that cannot be below it.
    """
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise CheckpointError(
                f"--base {base}: {folder} is not an adapter (no adapter_config.json). Remove --base."
            )
        check_checkpoint(folder)
        return folder
    base = Path(base or _named_base(folder))
    _check_adapter(folder, base)
    return base


def _named_base(folder: Path) -> str:
    """Return the checkpoint that an adapter says it was trained on."""
    base = read_config(folder, "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder}: the adapter does not name its base checkpoint. Give --base DIR.")
    if not Path(base).is_dir():
        raise CheckpointError(
            f"{folder}: the adapter was trained on {base}, which does not exist. Give its folder: --base DIR."
        )
    return base


def _check_adapter(folder: Path, base: Path) -> None:
    """Refuse files that cannot be read, and an adapter that its run has merged into the base already."""
    read_config(folder, "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    if why := describe_damage(weights):
        raise CheckpointError(f"{weights}: {why}.")
    if base.name == "model" and base.resolve().parent in folder.resolve().parents:
        raise CheckpointError(
            f"{folder}: {base} is the result of the same run and already contains these adapters. "
            "Export it without them, or give the checkpoint that they were trained on: --base DIR."
        )
