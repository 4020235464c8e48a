"""Create the model that a run starts from, or rebuild a model from a stage's checkpoint.

Paper: section 3.2, where the stages of a run follow each other. A stage's checkpoint holds only what the
stage trains.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava.config import Run, run_from_json, to_json
from tinyllava.errors import CheckpointError
from tinyllava.files import find_damage, held, read_object
from tinyllava.model.assemble import assemble, open_checkpoint, save_model
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.quiet import (
    keeping_random_state,
    quiet_bitsandbytes_import,
    transformers_errors_only,
    without_loading_bars,
)
from tinyllava.model.token_rows import add_tokens
from tinyllava.model.tuning import apply_tuning, load_trained, merge_adapters, open_ledger, weights_digest
from tinyllava.parts.folders import is_stage_checkpoint, resolved
from tinyllava.parts.user_code import is_reference, recall_value

MANIFEST = "manifest.json"
"""File of a checkpoint that is written last: what it was made from, and every file's size and hash."""
STAGE_TENSORS = "trained.safetensors"
"""File of a finished stage with the tensors that it trained."""
RESUMED_TENSORS = "model.safetensors"
"""File of a checkpoint with the trained tensors; the Trainer loads it under this name."""
_WHOLE = "model"


def _set_seed(seed: int) -> None:
    with quiet_bitsandbytes_import():
        from transformers import set_seed  # here: it imports peft, which only training needs

    set_seed(seed)


def open_start(run: Run) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor]:
    """Return the model that a run's first stage starts from; it follows from the run's seed."""
    _set_seed(run.seed)
    # In fp32 whatever it was saved in: in half precision small updates are rounded away.
    model, processor = (
        open_checkpoint(run.start_from, dtype="float32") if run.start_from else assemble(run.model)
    )
    if run.model.add_tokens:
        add_tokens(model, processor, run.model.add_tokens)
    return model, processor


def describe_origin(
    run: Run, stage: str, before: Mapping[str, Path], beside: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of a checkpoint's manifest that is needed to rebuild its model.

    Args:
        stage: of the run, by name.
        before: folders of the finished stages before it, by name.
        beside: contents of the JSON files next to the weights, by name.
    """
    model = dataclasses.replace(
        run.model,
        vision_encoder=resolved(run.model.vision_encoder),
        language_model=resolved(run.model.language_model),
    )
    run = dataclasses.replace(run, model=model, start_from=resolved(run.start_from))
    return {
        "run": json.loads(to_json(run)),
        "stage": stage,
        "before": {name: str(folder.resolve()) for name, folder in before.items()},
        "beside": dict(beside),
    }


def whole_model(folder: str | Path) -> Path:
    """Return a folder that every command takes as a model; a stage's checkpoint gets its whole model once.

    Raises:
        CheckpointError: the checkpoint is damaged, or what it was trained on is no longer there.
    """
    folder = Path(folder)
    if not is_stage_checkpoint(folder):
        return folder
    whole = folder / _WHOLE
    with held(whole, is_folder=False, wait=True):
        if not (whole / "config.json").is_file():
            model, processor, run = build_stage_model(folder)
            beside = (read_object(folder / MANIFEST) or {}).get("beside", {})
            save_model(whole, model, processor, run, {"checkpoint": str(folder.resolve())}, beside)
    return whole


@keeping_random_state()
@without_loading_bars()
@transformers_errors_only()
def build_stage_model(checkpoint: Path) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor, Run]:
    """Do what the run did up to a checkpoint, with finished tensors in place of training; raise as above."""
    manifest = read_object(checkpoint / MANIFEST) or {}
    if damage := find_damage(checkpoint, manifest.get("files")):
        raise CheckpointError(f"{checkpoint}: {damage}. Use another checkpoint of the run.")
    run, wanted = run_from_json(json.dumps(manifest["run"]), str(checkpoint / MANIFEST)), manifest["stage"]
    names = (run.model.vision_encoder, run.model.language_model, run.model.connector, run.model.template)
    for name in filter(is_reference, names):
        recall_value(name, str(checkpoint))  # of a checkpoint nothing is run: the user has to name the code
    model, processor = open_start(run)
    for name, stage in run.stages.items():
        _set_seed(run.seed)
        apply_tuning(model, stage)
        if name == wanted:
            _check_start(checkpoint, manifest, model)
            load_trained(checkpoint / RESUMED_TENSORS, model)
        else:
            load_trained(_stage_tensors(checkpoint, name, manifest["before"]), model)
        merge_adapters(model)
        model.requires_grad_(False)
        if name == wanted:
            break
    return model.eval(), processor, run


def _check_start(
    checkpoint: Path, manifest: Mapping[str, Any], model: TinyLlavaForConditionalGeneration
) -> None:
    """Refuse a model that is not the one the stage began with."""
    if weights_digest(open_ledger(model), model) != manifest["identity"]["contents"]["weights"]:
        run = manifest["run"]
        source = run["start_from"] or f"{run['model']['vision_encoder']} and {run['model']['language_model']}"
        raise CheckpointError(
            f"{checkpoint}: holds only what its stage trains, and the rest has changed: the weights of "
            f"{source} or of an earlier stage. Put them back, or train again."
        )


def _stage_tensors(checkpoint: Path, name: str, before: Mapping[str, str]) -> Path:
    """Return the file with an earlier stage's tensors: where it was, or beside this stage."""
    places = [Path(before[name]), checkpoint.parent.parent / name]
    found = [place / STAGE_TENSORS for place in places if (place / STAGE_TENSORS).is_file()]
    if not found:
        raise CheckpointError(
            f"{checkpoint}: holds only what its stage trains, and {places[0] / STAGE_TENSORS} of the stage "
            "before is missing. Put it back, or train again."
        )
    return found[0]
