"""TinyLLaVA Factory: a single file, or a folder for each part, optionally with adapters.

Differs: its code drops the first feature of every encoder. In SigLIP that is a patch, which leaves 728 image
tokens instead of 729. An import reproduces this.
"""

from pathlib import Path
from typing import Any

from tinyllava.checkpoints.importing.connectors import (
    Found,
    factory_qformer,
    factory_resampler,
    name_connector,
)
from tinyllava.checkpoints.importing.parts import (
    Given,
    SourceParts,
    choose_template,
    find_part,
    read_aspect,
    scales_images,
)
from tinyllava.checkpoints.importing.tensors import (
    Tensors,
    has_weights,
    merge_lora,
    objects,
    read_adapter,
    read_folder,
    refuse_left_over,
    strip_wrapping,
    take,
    whole,
)
from tinyllava.errors import CheckpointError

_PREFIXES = {
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is of this kind; ours has the same model_type and other keys."""
    return config.get("model_type") == "tinyllava" and "llm_model_name_or_path" in config


def read(source: Path, config: dict[str, Any], given: Given) -> SourceParts:
    """Take a checkpoint of this kind apart.

    Raises:
        CheckpointError: two encoders, a connector that is not here, or a part that is missing.
    """
    where = str(source)
    if config.get("vision_model_name_or_path2"):
        raise CheckpointError(
            f"{where}: two vision encoders (vision_model_name_or_path2) cannot be imported."
        )
    strategy = config.get("vision_feature_select_strategy", "patch")
    if strategy not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy {strategy!r}; allowed: patch, cls_patch."
        )
    text_config, vision_config = objects(config, "text_config", "vision_config", where=where)
    tensors, form, notes = _read_tensors(source)
    text, vision, projector = (take(tensors, {prefix: ""}) for prefix in _PREFIXES.values())
    refuse_left_over(tensors, where)
    projector = {name.removeprefix("_connector."): tensor for name, tensor in projector.items()}
    connector = _connector(config, projector, where)
    family = str(text_config.get("model_type", "llama"))
    return SourceParts(
        kind=f"TinyLLaVA Factory, {form}",
        where=where,
        text_config=text_config,
        text=text,
        vision_config=vision_config,
        vision=vision,
        feature_layer=whole(config, "vision_feature_layer", -2, where),
        num_prefix_tokens=int(strategy == "patch"),
        connector=connector,
        scales_images=scales_images(text_config, None),
        image_aspect=read_aspect(config.get("image_aspect_ratio"), where),
        image_processor=_encoder_folder(config, given),
        tokenizer=_tokenizer_folder(source, config, given),
        has_older_tokens=not config.get("tokenizer_use_fast"),
        template=choose_template(given.template, family),
        vision_name=config.get("vision_model_name_or_path"),
        language_name=config["llm_model_name_or_path"],
        notes=tuple(notes),
    )


def _read_tensors(source: Path) -> tuple[Tensors, str, list[str]]:
    """Return all tensors under the single file's names, and the form that they had."""
    if has_weights(source):
        return read_folder(source), "one file", []
    missing = [name for name in _PREFIXES if not (source / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{source}: no weights, and no folders {', '.join(missing)}. Download the folder again."
        )
    tensors: Tensors = {}
    for name, prefix in _PREFIXES.items():
        tensors |= {
            prefix + key: tensor for key, tensor in strip_wrapping(read_folder(source / name)).items()
        }
    if not (source / "adapter_config.json").is_file():
        return tensors, "three folders", []
    adapter_config, adapter = read_adapter(source)
    merged = merge_lora(tensors, adapter_config, strip_wrapping(adapter), str(source))
    return tensors, "three folders with LoRA", [f"{len(merged)} weights merged with their adapters"]


def _connector(config: dict[str, Any], tensors: Tensors, where: str) -> Found:
    kind = str(config.get("connector_type"))
    if kind == "resampler":
        return factory_resampler(config, tensors, where)
    return factory_qformer(tensors, where) if kind == "qformer" else name_connector(kind, tensors, where)


def _encoder_folder(config: dict[str, Any], given: Given) -> Path | None:
    """Return a folder with the image processor, if the user gave one; the weights are the source's own."""
    reference = str(config.get("vision_model_name_or_path") or "")
    if given.vision_encoder is None and not Path(reference).is_dir():
        return None
    folder = find_part(given.vision_encoder, reference, option="--vision-encoder", noun="vision encoder")
    return folder if (folder / "preprocessor_config.json").is_file() else None


def _tokenizer_folder(source: Path, config: dict[str, Any], given: Given) -> Path:
    if given.language_model is None and (source / "tokenizer_config.json").is_file():
        return source
    reference = str(config.get("tokenizer_name_or_path") or config.get("llm_model_name_or_path") or "")
    return find_part(given.language_model, reference, option="--language-model", noun="tokenizer")
