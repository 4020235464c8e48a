"""Folders of transformers' own LlavaForConditionalGeneration, with the tensor names of every version."""

from pathlib import Path
from typing import Any

import torch

from tinyllava.checkpoints.importing.connectors import Found
from tinyllava.checkpoints.importing.parts import Given, SourceParts, scales_images
from tinyllava.checkpoints.importing.tensors import Tensors, objects, read_folder, refuse_left_over, take
from tinyllava.errors import CheckpointError
from tinyllava.parts.folders import read_config

# The first names are those until transformers 4.51 and of the hub's files, then those of 4.52 and later.
_TEXT = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
_VISION = {"vision_tower.": "", "model.vision_tower.": ""}
_CONNECTOR = {"multi_modal_projector.": "", "model.multi_modal_projector.": ""}


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is of this kind."""
    parts = "text_config" in config and "vision_config" in config
    return config.get("model_type") in ("llava", "llava_next", "llava_onevision") and parts


def read(source: Path, config: dict[str, Any], given: Given) -> SourceParts:
    """Take a checkpoint of this kind apart.

    Raises:
        CheckpointError: a setting of the stock class that has no counterpart here, or a part that is missing.
    """
    where = str(source)
    if config["model_type"] != "llava":
        raise CheckpointError(
            f"{where}: model_type {config['model_type']!r} cuts an image into tiles, which is not supported "
            "yet; allowed: 'llava'."
        )
    layer, strategy = (
        config.get("vision_feature_layer", -2),
        config.get("vision_feature_select_strategy", "default"),
    )
    allowed = {
        "vision_feature_layer (one layer)": isinstance(layer, int),
        "projector_hidden_act ('gelu')": config.get("projector_hidden_act", "gelu") == "gelu",
        "multimodal_projector_bias (true)": config.get("multimodal_projector_bias", True) is True,
        "vision_feature_select_strategy (default, full)": strategy in ("default", "full"),
    }
    for setting, holds in allowed.items():
        if not holds:
            name = setting.partition(" ")[0]
            raise CheckpointError(
                f"{where}: {name} = {config[name]!r} cannot be imported; allowed: {setting}."
            )
    text_config, vision_config = objects(config, "text_config", "vision_config", where=where)
    tensors = read_folder(source)
    text, vision, connector = take(tensors, _TEXT), take(tensors, _VISION), take(tensors, _CONNECTOR)
    refuse_left_over(tensors, where)
    own_template = None if given.template else _own_template(source)
    return SourceParts(
        kind="stock LLaVA of transformers",
        where=where,
        text_config=text_config | {"tie_word_embeddings": _is_tied(config, text)},
        text=text,
        vision_config=vision_config,
        vision=vision,
        feature_layer=layer,
        num_prefix_tokens=int(strategy == "default"),
        connector=Found(name="mlp", tensors=connector),
        scales_images=scales_images(text_config, config.get("transformers_version")),
        image_aspect="square",
        image_processor=source if _has_image_processor(source) else given.vision_encoder,
        tokenizer=given.language_model or source,
        is_published=False,
        has_older_tokens=False,
        template=own_template or given.template,
        image_token_id=config.get("image_token_index", config.get("image_token_id")),
        vision_name=vision_config.get("_name_or_path"),
        language_name=text_config.get("_name_or_path"),
        notes=(
            "the source's own chat template works for inference only; to train the model, give --template",
        )
        if own_template and "endgeneration" not in own_template
        else (),
    )


def _is_tied(config: dict[str, Any], text: Tensors) -> bool:
    """Whether the head shares the embedding; two different tensors mean no, whichever flag says otherwise."""
    head, embedding = text.get("lm_head.weight"), text.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        return False
    return bool(config["text_config"].get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def _has_image_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


def _own_template(folder: Path) -> str | None:
    """Return the chat template of a folder, in whichever file its version of transformers wrote it."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_config(folder, name).get("chat_template")
            if isinstance(template, str):
                return template
    return None
