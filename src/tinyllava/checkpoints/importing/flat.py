"""TinyLLaVABench, LLaVA-1.5 and LLaVA-NeXT: encoder and connector among the language model's tensors.

There are three forms: the whole model; the connector of stage 1 (``mm_projector.bin``), which needs the
language model; and LoRA adapters with ``non_lora_trainables.bin``, which need the model that they were
trained on. TinyLLaVABench declares the head without a bias and loads every Phi-2 that way, so its models have
none.
Differs: TinyLLaVABench decides the form by the folder's name. Here config.json and the tensors decide.
"""

from pathlib import Path
from typing import Any

from tinyllava.checkpoints.importing.connectors import Found, bench_resampler, name_connector
from tinyllava.checkpoints.importing.parts import (
    Given,
    SourceParts,
    choose_template,
    find_base,
    find_part,
    read_aspect,
    scales_images,
)
from tinyllava.checkpoints.importing.tensors import (
    Tensors,
    drop,
    has_weights,
    merge_lora,
    read_adapter,
    read_file,
    read_folder,
    refuse_left_over,
    strip_wrapping,
    take,
    whole,
)
from tinyllava.errors import CheckpointError
from tinyllava.model.tokenizer import has_tokenizer
from tinyllava.parts.families import VISION_FAMILIES
from tinyllava.parts.folders import read_config

# config.json's model_type, and the family of transformers that the language model belongs to.
_BENCH = {
    "tiny_llava": "llama",
    "tiny_llava_phi": "phi",
    "tiny_llava_stablelm": "stablelm",
    "tiny_llava_qwen": "qwen2",
}
_LLAVA = {
    "llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
}  # fmt: skip
_VISION_TYPES = [
    name.removesuffix(ending)
    for name, family in VISION_FAMILIES.items()
    for ending in ("", "_vision_model")
    if family.image_processor  # CLIP and SigLIP, alone or with their text half
]
_VISION_NAMES = {"vision_model.": "", "": ""}
_TOWER = {"model.vision_tower.vision_tower.": ""}
_CONNECTOR = {"model.mm_projector.": ""}
_HEAD_BIAS = r"^lm_head\.bias$"
_FIRST_OF_ENCODER = "embeddings.patch_embedding.weight"
# Names that StableLM's first code gave to settings of transformers' class.
_OLD_KEYS = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is of this kind."""
    return config.get("model_type") in {**_BENCH, **_LLAVA} and "mm_projector_type" in config


def read(source: Path, config: dict[str, Any], given: Given) -> SourceParts:
    """Take a checkpoint of this kind apart; ``source`` is its folder or the file of a connector.

    Raises:
        CheckpointError: a setting of the original code without counterpart here, or a missing part.
    """
    folder = source if source.is_dir() else source.parent
    is_bench = config["model_type"] in _BENCH
    family = {**_BENCH, **_LLAVA}[config["model_type"]]
    _refuse_options(config, str(source))
    tensors, base, form, notes = _read_tensors(source, config, given)
    text = take(tensors, {name: name for name in _text_prefixes(tensors)})
    dropped = drop(text, _HEAD_BIAS) if is_bench else []
    vision = take(tensors, _TOWER)
    connector = _connector(config, take(tensors, _CONNECTOR), str(source), is_bench)
    refuse_left_over(tensors, str(source))

    encoder = _encoder_folder(folder, config, given)
    vision_config = read_config(encoder)
    vision_config = vision_config.get("vision_config") or vision_config
    from_source = any(name.endswith(_FIRST_OF_ENCODER) for name in vision)
    if not from_source:  # a LoRA run saves the layers that it tuned, and nothing else of the encoder
        tower, num_tuned = read_folder(encoder), len(vision)
        dropped += drop(tower, r"^(text_model|text_projection|visual_projection|logit_)")
        if num_tuned:
            tower, vision = take(tower, _VISION_NAMES), take(vision, _VISION_NAMES)
            refuse_left_over(vision.keys() - tower.keys(), f"{source}: tuned vision encoder")
            notes.append(f"vision encoder: {num_tuned} tuned tensors of the source over {encoder}")
        vision = tower | vision
    is_siglip = "siglip" in vision_config.get("model_type", "siglip")
    code = "TinyLLaVABench" if is_bench else _llava_code(config, is_siglip=is_siglip)
    num_siglip = _num_siglip_layers(vision_config, vision if from_source else None) if is_siglip else 0
    if not is_bench:
        _refuse_whole_siglip(vision_config, num_siglip, str(source))
    return SourceParts(
        kind=f"{code}, {form}",
        where=str(source),
        text_config={_OLD_KEYS.get(key, key): value for key, value in config.items()}
        | {"model_type": family},
        text=text,
        has_head_bias=not is_bench,
        vision_config=vision_config,
        vision=vision,
        # SigLIP there is its layers without the last, whatever the config's feature layer says; a checkpoint
        # that holds the encoder holds exactly the layers that were used.
        num_vision_layers=num_siglip,
        feature_layer=whole(config, "mm_vision_select_layer", -2, str(source)),
        scales_images=scales_images({"model_type": family}, None),
        num_prefix_tokens=0 if is_siglip or config.get("mm_vision_select_feature") == "cls_patch" else 1,
        connector=connector,
        image_aspect=read_aspect(config.get("image_aspect_ratio"), str(source)),
        image_processor=encoder if (encoder / "preprocessor_config.json").is_file() else None,
        tokenizer=_tokenizer_folder(folder, base, given),
        template=choose_template(given.template, family if family != "qwen2" or is_bench else ""),
        chatml="qwen" if family == "qwen2" else "chatml",
        vision_name=config.get("mm_vision_tower"),
        dropped=tuple(dropped),
        notes=(f"vision encoder: {'weights of the source' if from_source else encoder}", *notes),
    )


def _llava_code(config: dict[str, Any], *, is_siglip: bool) -> str:
    """Return which of LLaVA's two releases wrote a checkpoint: the first has Llama and CLIP alone."""
    return "LLaVA-NeXT" if is_siglip or config["model_type"] not in ("llava", "llava_llama") else "LLaVA-1.5"


def _refuse_whole_siglip(vision_config: dict[str, Any], num_layers: int, where: str) -> None:
    if num_layers == vision_config.get("num_hidden_layers", 12):
        raise CheckpointError(
            f"{where}: has all {num_layers} layers of its SigLIP encoder, but LLaVA-NeXT's code removes the "
            "last one. Other code wrote this checkpoint, so its feature layer is unknown and it cannot be "
            "imported."
        )


def _connector(config: dict[str, Any], tensors: Tensors, where: str, is_bench: bool) -> Found:
    kind = str(config["mm_projector_type"])
    if is_bench and kind == "resampler":
        return bench_resampler(config, tensors, where)
    return name_connector(kind, tensors, where)


def _refuse_options(config: dict[str, Any], where: str) -> None:
    if config.get("mm_use_im_start_end"):
        raise CheckpointError(
            f"{where}: mm_use_im_start_end = true (marks around an image) cannot be imported."
        )
    if config.get("mm_resampler_type"):
        raise CheckpointError(
            f"{where}: mm_resampler_type = {config['mm_resampler_type']!r} reduces the features of an "
            "image, which is not supported; allowed: null."
        )
    if config.get("mm_patch_merge_type") not in (None, "flat"):
        raise CheckpointError(
            f"{where}: mm_patch_merge_type = {config['mm_patch_merge_type']!r} joins the tiles of an image, "
            "which is not supported yet; allowed: 'flat'."
        )
    if config.get("mm_vision_select_feature") not in (None, "patch", "cls_patch"):
        raise CheckpointError(
            f"{where}: mm_vision_select_feature = {config['mm_vision_select_feature']!r}; "
            "allowed: patch, cls_patch."
        )


def _read_tensors(
    source: Path, config: dict[str, Any], given: Given
) -> tuple[Tensors, Path | None, str, list[str]]:
    """Return all tensors under the flat names, the base model's folder if one was needed, and the form."""
    noun = "language model"
    if source.is_dir() and (source / "adapter_config.json").is_file():
        adapter_config, adapter = read_adapter(source)
        reference = str(adapter_config.get("base_model_name_or_path") or "")
        base = find_base(given.language_model, reference, config, noun=noun)
        tensors = read_folder(base) | strip_wrapping(read_file(source / "non_lora_trainables.bin"))
        merged = merge_lora(tensors, adapter_config, strip_wrapping(adapter), str(source))
        return tensors, base, "LoRA", [f"{len(merged)} weights merged with their adapters onto {base}"]
    file = source / "mm_projector.bin" if source.is_dir() else source
    if file.is_file() and not (source.is_dir() and has_weights(source)):
        base = find_base(given.language_model, str(config.get("_name_or_path") or ""), config, noun=noun)
        return read_folder(base) | read_file(file), base, "connector of stage 1", [f"language model: {base}"]
    return read_folder(source), None, "whole model", []


def _text_prefixes(tensors: Tensors) -> list[str]:
    joined = ("model.vision_tower.", "model.mm_projector.", "model.image_newline")
    return [
        name for name in tensors if name.startswith(("model.", "lm_head.")) and not name.startswith(joined)
    ]


def _encoder_folder(folder: Path, config: dict[str, Any], given: Given) -> Path:
    """Return the folder with the encoder's config: given, inside the checkpoint, or named by it."""
    if given.vision_encoder is None:
        for inner in sorted(path.parent for path in folder.glob("*/config.json")):
            if read_config(inner).get("model_type") in _VISION_TYPES:
                return inner
    reference = str(config.get("mm_vision_tower") or "")
    return find_part(given.vision_encoder, reference, option="--vision-encoder", noun="vision encoder")


def _num_siglip_layers(vision_config: dict[str, Any], vision: Tensors | None) -> int:
    if vision is None:
        return int(vision_config.get("num_hidden_layers", 12)) - 1
    return 1 + max(
        int(name.split("encoder.layers.")[1].split(".")[0]) for name in vision if "encoder.layers." in name
    )


def _tokenizer_folder(folder: Path, base: Path | None, given: Given) -> Path:
    return given.language_model or (folder if has_tokenizer(folder) or base is None else base)
