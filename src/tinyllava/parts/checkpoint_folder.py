"""What a checkpoint folder says of itself, before any weight is loaded; needs no torch.

Paper: section 3.1; run.json is what training leaves beside the weights, config.json describes the weights.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

from tinyllava.config import ModelConfig, run_from_json
from tinyllava.errors import CheckpointError
from tinyllava.parts.folders import describe_damage, read_config


def check_checkpoint(folder: Path) -> None:
    """Say what a folder lacks before anything is loaded from it.

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
        raise CheckpointError(f"{folder}: config.json says {layout}; bring it in with `tinyllava import`.")
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(read_config(folder, index.name).get("weight_map", {}).values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{folder}: weight files are missing: {', '.join(missing)}; copy the folder again."
        )
    for name in sorted(names):
        if why := describe_damage(folder / name):
            raise CheckpointError(f"{folder / name}: {why}.")
    _check_generation(folder)


def _check_generation(folder: Path) -> None:
    """Refuse a generation_config.json that is damaged, or under which no answer would end.

    The file may be missing: the ids of the tokenizer say the same.
    """
    name = "generation_config.json"
    if not (folder / name).exists():
        return
    end = read_config(folder, name).get("eos_token_id")
    ids = end if isinstance(end, list) else [end]
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(
            f"{folder / name}: eos_token_id = {end!r}: the id of the token that ends an answer, or a list of "
            "ids, is needed; copy the file again, or delete it: the tokenizer's token then ends an answer."
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
        read_config(folder, name)


def _why_there_is_none(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder; give that of a checkpoint."
    if (folder / "model" / "config.json").is_file():
        return f"a run folder; its checkpoint is {folder / 'model'}."
    return "no tinyllava checkpoint there (no config.json). Train one, or import one."


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
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def fingerprint(folder: Path) -> str:
    """Return a hash over the contents of weights and config: saved again, a checkpoint stays the same."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + [p for p in [folder / "config.json"] if p.exists()]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
