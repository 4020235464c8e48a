"""Open a checkpoint of ours, or merge an adapter that peft saved into the one that it was trained on."""

from pathlib import Path
from typing import Any

import torch

from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import open_checkpoint
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor


def open_merged(
    folder: Path, base: str | Path | None, dtype: torch.dtype | str
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor, Path]:
    """Return model, processor and the folder that they came from; adapters are merged into the weights.

    Raises:
        CheckpointError: neither a checkpoint nor an adapter, or an adapter that does not fit its base.
    """
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise CheckpointError(
                f"--base {base}: {folder} is no adapter (no adapter_config.json); leave it out."
            )
        return *open_checkpoint(folder, dtype=dtype), folder
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    base = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"{folder}: the adapter does not name the checkpoint below it; give --base DIR."
        )
    model, processor = open_checkpoint(base, dtype=dtype)
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: the adapter does not fit {base}: {error}") from error
    stored, taken = load_peft_weights(str(folder), device="cpu"), get_peft_model_state_dict(adapted)
    wrong = sorted(stored.keys() ^ taken.keys())
    if wrong:
        raise CheckpointError(
            f"{folder}: adapter tensors without a counterpart in {base}: {', '.join(wrong)}."
        )
    merged: TinyLlavaForConditionalGeneration = adapted.merge_and_unload()
    merged.requires_grad_(False)
    return merged, processor, Path(base)
