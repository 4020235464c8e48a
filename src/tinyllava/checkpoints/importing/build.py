"""Build a model from the parts of a checkpoint, and account for every tensor: none left over, none invented.

Paper: section 3.1. The encoder is cut at its feature layer, as in ``assemble``; cut layers are listed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from tinyllava.checkpoints.importing.parts import SourceParts, hub_name, load_processor, recognise_template
from tinyllava.checkpoints.importing.tensors import Tensors, count, drop
from tinyllava.errors import CheckpointError, ConfigError
from tinyllava.model.assemble import (
    greedy_generation,
    make_config,
    make_room_for_image_token,
    published_image_scale,
)
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.connectors import build_connector
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.parts.connectors import find_connector, num_tokens, resolve_options
from tinyllava.parts.families import VISION_FAMILIES
from tinyllava.parts.language import SIZES, LanguageModel, describe_config
from tinyllava.parts.resolve import Parts
from tinyllava.parts.templates import Template
from tinyllava.parts.vision import VisionEncoder

_LAYER = re.compile(r"(?:^|\.)encoder\.layers?\.(\d+)\.")
_WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Settings of old configs that transformers moves to their new place by itself.
_MOVED = {
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What happened to the tensors of a checkpoint; saved as import.json."""

    kind: str
    source: str
    num_tensors: int
    """Tensors of the source that the model has taken over."""
    dropped: list[str] = field(default_factory=list)
    """Names of what the model does not compute: layers above the feature layer, pooling heads."""
    recomputed: list[str] = field(default_factory=list)
    """Stored constants (positions, rotary frequencies), each equal to what the model computes."""
    filled: list[str] = field(default_factory=list)
    """Tensors of a connector's layer that the source lacks, with values at which it changes nothing."""
    vision_encoder: str = ""
    """Hub name that the source gives for its encoder; empty if it gives none."""
    language_model: str = ""
    num_new_rows: int = 0
    """Zero rows that give ``<image>`` a place in embedding and head."""
    num_image_tokens: int = 0
    template: str = ""
    """Name of the prompt template, or ``the source's own``."""
    notes: list[str] = field(default_factory=list)


def build(
    parts: SourceParts, dtype: torch.dtype | None
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor, ImportReport]:
    """Return model, processor and account; ``dtype`` None keeps the widest of the source's types.

    Raises:
        CheckpointError: tensors left over or missing, sizes that do not fit, or parts that cannot be had.
    """
    dtype = _widest_type(parts, dtype)
    text_config = _make_text_config(parts)
    groups = (parts.text, parts.vision, parts.connector.tensors)
    constants = {name: tensor for group in groups for name, tensor in _take_constants(group).items()}
    dropped = _drop_duplicate_head(parts, text_config) + drop(parts.vision, r"(^|\.)head\.")
    vision_tower, encoder, cut = _load_encoder(parts, dtype)
    num_tensors = sum(len(group) for group in groups)
    llm = _load_language_model(parts, text_config, dtype)
    _check_constants(constants, llm, parts.where)
    processor = load_processor(parts, encoder, text_config)
    encoder = _at_size(encoder, processor.image_size_px, parts.where)
    try:
        config = _describe(parts, encoder, vision_tower, llm, processor.tokenizer)
    except ConfigError as error:  # sizes of a connector that do not fit each other
        raise CheckpointError(f"{parts.where}: config.json: {error}") from error
    processor.num_image_tokens = config.num_image_tokens
    if parts.scales_images:
        config.image_scale = published_image_scale(config.text_config)

    with torch.device("meta"):
        model = TinyLlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = vision_tower, llm.base_model
    model.lm_head = llm.get_output_embeddings()
    model.model.multi_modal_projector = _load_connector(parts, config).to(dtype)
    num_rows = llm.get_input_embeddings().num_embeddings
    make_room_for_image_token(model, config.image_token_id)
    model.generation_config = greedy_generation(llm.generation_config, processor.tokenizer)
    report = ImportReport(
        kind=parts.kind,
        source=parts.where,
        num_tensors=num_tensors,
        dropped=[*parts.dropped, *dropped, *cut],
        recomputed=sorted(constants),
        filled=sorted(parts.connector.filled),
        vision_encoder=hub_name(parts.vision_name),
        language_model=hub_name(parts.language_name),
        num_new_rows=model.get_input_embeddings().num_embeddings - num_rows,
        num_image_tokens=config.num_image_tokens,
        template=_template_name(parts, processor),
        notes=list(parts.notes),
    )
    model.train(False)
    _refuse_infinities(model, parts.where)
    return model, processor, report


def _widest_type(parts: SourceParts, dtype: torch.dtype | None) -> torch.dtype:
    """Return the given type, or the one that holds every tensor without loss.

    Raises:
        CheckpointError: weights that are codes of a quantised model, not numbers; all of them are listed.
    """
    tensors = dict[str, Tensor]()
    for group in (parts.text, parts.vision, parts.connector.tensors):
        tensors |= group
    coded = sorted(n for n, t in tensors.items() if t.dtype not in _WEIGHT_TYPES and not _is_constant(n))
    if coded:
        raise CheckpointError(
            f"{parts.where}: the model is quantised: {count(coded)} of type {tensors[coded[0]].dtype} "
            f"({', '.join(coded)}). Save it dequantised, and import that copy."
        )
    types = {tensor.dtype for name, tensor in tensors.items() if not _is_constant(name)}
    return dtype or reduce(torch.promote_types, types or {torch.float32})


def _refuse_infinities(model: nn.Module, where: str) -> None:
    """Stop at weights that no answer can come out of, whether stored so or beyond the type's range."""
    broken = sorted(name for name, tensor in model.named_parameters() if not torch.isfinite(tensor).all())
    if broken:
        raise CheckpointError(
            f"{where}: {count(broken)} with values that are NaN or infinite: {', '.join(broken)}. Leave "
            "out --dtype. If the source has them too, download its folder again."
        )


def _make_text_config(parts: SourceParts) -> Any:
    """Make the language model's own config out of one that also describes the rest."""
    family = str(parts.text_config.get("model_type", "llama"))
    if family not in CONFIG_MAPPING:
        raise CheckpointError(f"{parts.where}: transformers has no language model {family!r}.")
    config_class = CONFIG_MAPPING[family]
    known = {f.name for f in fields(config_class)} | _MOVED
    kept = {key: value for key, value in parts.text_config.items() if key in known and key != "model_type"}
    try:
        return config_class(**kept)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{parts.where}: config.json of the language model: {_reason(error)}"
        ) from error


def _drop_duplicate_head(parts: SourceParts, text_config: Any) -> list[str]:
    """Where head and embedding share their rows, a second copy must be the same and is not needed."""
    head, embedding = parts.text.get("lm_head.weight"), parts.text.get("model.embed_tokens.weight")
    if not text_config.tie_word_embeddings or head is None or embedding is None:
        return []
    if not torch.equal(head, embedding):
        raise CheckpointError(
            f"{parts.where}: config.json ties the head to the embedding (tie_word_embeddings), but "
            "lm_head.weight and model.embed_tokens.weight differ. Correct config.json."
        )
    return drop(parts.text, r"^lm_head\.weight$")


def _load_encoder(parts: SourceParts, dtype: torch.dtype) -> tuple[nn.Module, VisionEncoder, list[str]]:
    """Return the encoder cut at its feature layer, its description, and the names of removed tensors."""
    values, where = parts.vision_config, f"{parts.where}: vision encoder"
    family = str(values.get("model_type", "clip_vision_model"))
    known = [name for name, record in VISION_FAMILIES.items() if record.kind == "transformer"]
    if family not in known:
        allowed = ", ".join(known)
        raise CheckpointError(f"{where}: model_type {family!r} cannot be imported; allowed: {allowed}.")
    config = _make_vision_config(family, values, where)
    total, layer = config.num_hidden_layers, parts.feature_layer
    num_kept = parts.num_vision_layers or (total + 1 + layer if layer < 0 else layer)
    if not 1 <= num_kept <= total:
        raise CheckpointError(
            f"{where}: feature layer {layer} of {total} layers; allowed: 1 to {total}, or -1 to {-total}."
        )
    cut = [name for name in parts.vision if (at := _LAYER.search(name)) and int(at[1]) >= num_kept]
    for name in cut:
        del parts.vision[name]
    config = _make_vision_config(family, values | {"num_hidden_layers": num_kept}, where)
    encoder = VisionEncoder(
        name=family,
        abbreviation=family,
        path="",
        kind="transformer",
        family=family,
        any_size=VISION_FAMILIES[family].any_size,
        image_size_px=config.image_size,
        patch_size_px=config.patch_size,
        width=config.hidden_size,
        num_layers=num_kept,
        feature_layer=-1,
        num_prefix_tokens=parts.num_prefix_tokens,
    )
    return _load_part(AutoModel, config, parts.vision, dtype, where), encoder, sorted(cut)


def _at_size(encoder: VisionEncoder, side_px: int, where: str) -> VisionEncoder:
    """Return the encoder at the side of its images, which may be another where positions are interpolated."""
    if not encoder.any_size and side_px != encoder.image_size_px:
        raise CheckpointError(
            f"{where}: the image processor makes images of {side_px} pixels, but the encoder needs "
            f"{encoder.image_size_px}. Give the folder of the right encoder: --vision-encoder DIR."
        )
    return replace(encoder, image_size_px=side_px)


def _make_vision_config(family: str, values: dict[str, Any], where: str) -> Any:
    """Make the encoder's own config; DINOv2's list of stages is left to follow from its number of layers."""
    config_class = CONFIG_MAPPING[family]
    not_taken = {"model_type", "stage_names", "out_features", "out_indices"}
    known = {f.name for f in fields(config_class)} - not_taken
    try:
        config = config_class(**{key: value for key, value in values.items() if key in known})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{where}: config.json: {_reason(error)}") from error
    if config.model_type.startswith("siglip"):  # some releases of transformers have no default for it
        config.vision_use_head = False  # SigLIP's pooling head is not on the way of the patch features
    return config


def _load_part(auto_class: Any, config: Any, tensors: Tensors, dtype: torch.dtype, where: str) -> Any:
    """Load one part with transformers' own class, which also knows the older names of tensors.

    Raises:
        CheckpointError: lists every tensor that is left over, missing, or of the wrong shape.
    """
    try:
        with torch.device("meta"):
            part_class = type(auto_class.from_config(config))
        part, report = part_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (RuntimeError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: the tensors do not fit config.json: {_reason(error)}") from error
    _refuse_misfits(where, report["unexpected_keys"], report["missing_keys"], report["mismatched_keys"])
    # The loader's report leaves out names that its class thinks harmless; a count of numbers does not.
    num_given, num_there = sum(t.numel() for t in tensors.values()), sum(p.numel() for p in part.parameters())
    if num_given != num_there:
        raise CheckpointError(
            f"{where}: the weights have {num_given:,} values, but the model has {num_there:,}. Compare "
            "config.json and the weights with the publisher's."
        )
    return part


def _load_language_model(parts: SourceParts, config: Any, dtype: torch.dtype) -> Any:
    """Load the language model, its head without the bias where the source's class has none."""
    where, tensors = f"{parts.where}: language model", dict(parts.text)
    if parts.has_head_bias or config.model_type != "phi":
        return _load_part(AutoModelForCausalLM, config, tensors, dtype, where)
    tensors["lm_head.bias"] = torch.zeros(config.vocab_size)  # transformers' class asks for one
    llm = _load_part(AutoModelForCausalLM, config, tensors, dtype, where)
    llm.get_output_embeddings().register_parameter("bias", None)
    return llm


def _template_name(parts: SourceParts, processor: TinyLlavaProcessor) -> str:
    if "{" in parts.template:
        return "the source's own"
    return parts.template or recognise_template(processor.tokenizer, parts)


def _load_connector(parts: SourceParts, config: TinyLlavaConfig) -> nn.Module:
    language: Any = config.text_config
    found = parts.connector
    try:
        connector = build_connector(
            found.name,
            vision_width=config.vision_width,
            language_width=language.hidden_size,
            num_patches=config.num_patches,
            options=found.options,
        )
    except RuntimeError as error:
        raise CheckpointError(f"{parts.where}: connector {found.name}: {error}") from error
    given, wanted = found.tensors | found.filled, connector.state_dict()
    shapes = [
        (name, given[name].shape, wanted[name].shape)
        for name in given.keys() & wanted.keys()
        if given[name].shape != wanted[name].shape
    ]
    where = f"{parts.where}: connector {found.name} (tensor names of tinyllava)"
    _refuse_misfits(where, given.keys() - wanted.keys(), wanted.keys() - given.keys(), shapes)
    connector.load_state_dict(given, strict=True)
    return connector


def _refuse_misfits(
    where: str, left: Iterable[str], missing: Iterable[str], shapes: Iterable[tuple[str, Any, Any]]
) -> None:
    """Stop at tensors that do not fit; ``shapes`` are a name, the shape given, and the one that is needed.

    Raises:
        CheckpointError: lists them all.
    """
    other = [f"{name} {list(given)}, not {list(wanted)}" for name, given, wanted in shapes]
    faults = {"without a counterpart in the model": left, "missing": missing, "of the wrong shape": other}
    told = [f"{count(n)} {what}: {', '.join(n)}" for what, names in faults.items() if (n := sorted(names))]
    if told:
        raise CheckpointError(
            f"{where}: config.json and the weights do not match: {'; '.join(told)}. Compare both files with "
            "the publisher's. If they are the same, the import does not support this variant."
        )


def _describe(
    parts: SourceParts, encoder: VisionEncoder, vision_tower: Any, llm: Any, tokenizer: Any
) -> TinyLlavaConfig:
    connector = find_connector(parts.connector.name)
    options = resolve_options(connector, parts.connector.options)
    # What is dropped in front need not be what the encoder puts there: Factory drops SigLIP's first patch.
    num_outputs = encoder.num_patches() + VISION_FAMILIES[encoder.family].num_prefix_tokens
    num_patches = num_outputs - parts.num_prefix_tokens
    found = Parts(
        encoder=encoder,
        connector=connector,
        connector_options=options,
        language=_describe_language(parts, llm, tokenizer),
        template=Template(name="", text=parts.template),
        num_patches=num_patches,
        num_image_tokens=num_tokens(connector, num_patches, options),
    )
    config = make_config(found, vision_tower.config, llm, tokenizer)
    if parts.image_token_id not in (None, config.image_token_id):
        raise CheckpointError(
            f"{parts.where}: <image> is token {parts.image_token_id} in config.json, but "
            f"{config.image_token_id} in the tokenizer. Give the folder with the right tokenizer: "
            "--language-model DIR."
        )
    return config


def _describe_language(parts: SourceParts, llm: Any, tokenizer: Any) -> LanguageModel:
    return describe_config(
        llm.config.to_dict() | {name: getattr(llm.config, name) for name in SIZES},
        name=llm.config.model_type,
        path=hub_name(parts.language_name),
        template="",
        eos_token=tokenizer.eos_token,
    )


def _is_constant(name: str) -> bool:
    return name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids"))


def _take_constants(tensors: Tensors) -> Tensors:
    return {name: tensors.pop(name) for name in list(tensors) if _is_constant(name)}


def _reason(error: BaseException) -> str:
    """Return the message of a library's error on one line."""
    return " ".join(str(error).split())


def _check_constants(constants: Tensors, llm: nn.Module, where: str) -> None:
    computed = next((b for name, b in llm.named_buffers() if name.endswith("rotary_emb.inv_freq")), None)
    for name, stored in constants.items():
        expected: Tensor | None = computed if name.endswith("inv_freq") else torch.arange(stored.numel())
        flat = stored.flatten().float()
        if (
            expected is None
            or flat.shape != expected.shape
            or not torch.allclose(flat, expected.float(), rtol=1e-2)
        ):
            raise CheckpointError(
                f"{where}: the stored constant {name} does not match config.json. Download both again."
            )
