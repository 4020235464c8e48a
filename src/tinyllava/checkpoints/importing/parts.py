"""The common form of every imported layout before a model is built: three parts and a processor."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil

from tinyllava.checkpoints.importing.connectors import Found
from tinyllava.checkpoints.importing.tensors import Tensors, has_weights
from tinyllava.config import Aspect, Transparency
from tinyllava.conversation import ask
from tinyllava.errors import CheckpointError, TinyLlavaError, first_line
from tinyllava.model.processing import IMAGE_TOKEN, TinyLlavaProcessor
from tinyllava.model.tokenizer import fit_template, open_tokenizer
from tinyllava.parts.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from tinyllava.parts.folders import describe_damage, download, read_config
from tinyllava.parts.templates import as_published, read_template, template_names
from tinyllava.parts.vision import VisionEncoder

# What ends a turn in one layout only.
_TEMPLATE_OF_END = {"<|im_end|>": "chatml", "<|eot_id|>": "llama3"}
_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class Given:
    """Parts given by the user: local folders for the parts that the source names by Hub path."""

    vision_encoder: Path | None = None
    language_model: Path | None = None
    template: str = ""
    """Prompt template; empty means the one that the source was trained with."""
    mmproj: Path | None = None
    """Of a GGUF pair, the file with the encoder; None finds it beside the language model."""


@dataclass(frozen=True, kw_only=True)
class SourceParts:
    """A checkpoint taken apart: the tensors of each part under transformers' names for that part alone."""

    kind: str
    """The layout, in words."""
    where: str
    """Where it came from, for messages."""
    text_config: dict[str, Any]
    text: Tensors
    """Names of the causal language model: ``model.*`` and ``lm_head.*``."""
    has_head_bias: bool = True
    """Whether the head keeps the bias that its family's class has; TinyLLaVABench's Phi-2 has none."""
    vision_config: dict[str, Any]
    vision: Tensors
    """Names of the vision model, with or without a leading ``vision_model.``."""
    num_vision_layers: int = 0
    """Encoder layers that the features come through; 0 means by ``feature_layer``."""
    feature_layer: int = -2
    num_prefix_tokens: int
    connector: Found
    scales_images: bool = False
    """Whether the source's code multiplies image tokens by sqrt(D) as it does the embeddings of text."""
    image_aspect: Aspect
    image_processor: Path | None
    """Folder with a preprocessor_config.json; None means the encoder family's defaults at its image size."""
    tokenizer: Path
    is_published: bool = True
    """Whether it was trained by the published code, which trims no turn."""
    has_older_tokens: bool = True
    """Whether that code split text with transformers 4's classes in Python."""
    transparency: Transparency | None = None
    """What becomes of transparent images; None: as the processor does by default."""
    num_language_rows: int = 0
    """Rows of the embedding that the language model itself came with, where the source has more; 0: all."""
    template: str
    """Name of a template, the text of one, or empty: recognised by the tokenizer's end of a turn."""
    chatml: str = "chatml"
    """The template of that name, or the form of it that the source's code writes."""
    image_token_id: int | None = None
    """The id that stands for an image in the source, if its tokenizer has one."""
    vision_name: object = ""
    """What the source calls its encoder: a hub name, or a folder of somebody's machine."""
    language_name: object = ""
    dropped: tuple[str, ...] = ()
    """Names of tensors that are there and not of this model: an encoder's text half, a base model's bias."""
    notes: tuple[str, ...] = ()
    """What a user should know of this import."""


def hub_name(value: object) -> str:
    """Return a name of the form owner/model, or an empty text for anything else, such as a local folder."""
    return value if isinstance(value, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) else ""


def read_aspect(value: Any, where: str) -> Aspect:
    """Return how the source shapes images.

    Raises:
        CheckpointError: several crops of one image, which the model does not take.
    """
    if value in ("pad", "square"):
        aspect: Aspect = value
        return aspect
    if value is None:
        return "square"
    if isinstance(value, str) and "anyres" in value:
        raise CheckpointError(
            f"{where}: image_aspect_ratio {value!r} cuts an image into tiles, which is not supported yet; "
            "allowed: pad, square."
        )
    raise CheckpointError(f"{where}: image_aspect_ratio {value!r} cannot be imported; allowed: pad, square.")


def scales_images(text_config: dict[str, Any], version: object) -> bool:
    """Whether code on that version of transformers multiplied image tokens by sqrt(D).

    Gemma multiplies embeddings by it: in transformers 4 after images are put in, in transformers 5 before.
    """
    family = LANGUAGE_FAMILIES.get(str(text_config.get("model_type")))
    return family is not None and family.scales_embeddings and not str(version or "4").startswith("5")


def choose_template(given: str, model_type: str) -> str:
    """Return the template that the user named, the published code's, or nothing: the tokens have to tell."""
    family = LANGUAGE_FAMILIES.get(model_type)
    return given or (family.published_template if family else "")


def recognise_template(tokenizer: Any, parts: SourceParts) -> str:
    """Return the template that a tokenizer's end of a turn belongs to, and to no other.

    Raises:
        CheckpointError: several layouts, or none, end a turn with that token.
    """
    end = str(tokenizer.eos_token or "")
    if end in _TEMPLATE_OF_END:
        name = _TEMPLATE_OF_END[end]
        return parts.chatml if name == "chatml" else name
    raise CheckpointError(
        f"{parts.where}: no prompt template is named, and several templates end a turn with {end!r}. Choose "
        f"one with --template NAME (known: {', '.join(template_names())})."
    )


def find_base(given: Path | None, reference: str, config: dict[str, Any], *, noun: str) -> Path:
    """Return the folder of the weights that a source builds on, never one that it does not name.

    A folder that the source names and that is there wins. Otherwise the user's folder counts; where it holds
    a tokenizer alone, only that is taken from it.

    Raises:
        CheckpointError: a given folder with other weights than the named ones, or of another size.
    """
    option = "--language-model"
    if given is not None and given.is_dir() and not has_weights(given):
        given = None
    if given is None or not given.is_dir():
        return find_part(given, reference, option=option, noun=noun)
    named = Path(reference)
    if reference and named.is_dir() and named.resolve() != given.resolve():
        raise CheckpointError(
            f"{option} {given}: the source was trained on {reference}, which is available. Remove the "
            "option, or give a folder that contains only a tokenizer."
        )
    found = read_config(given)
    others = [key for key in _SIZES if key in config and key in found and config[key] != found[key]]
    if others:
        sizes = ", ".join(f"{key} {found[key]}, not {config[key]}" for key in others)
        raise CheckpointError(
            f"{option} {given}: not the {noun} that the source was trained on ({sizes}). Give that one"
            + (f": {reference}." if reference else ".")
        )
    return given


def find_part(given: Path | None, reference: str, *, option: str, noun: str) -> Path:
    """Return the folder of a part: the given one, a local one that the source names, or one from the hub.

    Raises:
        CheckpointError: the folder is not there, or neither folder nor network is; names the option.
    """
    if given is not None:
        if not given.is_dir():
            raise CheckpointError(f"{option} {given}: no such folder.")
        return given
    if reference and Path(reference).is_dir():
        return Path(reference)
    if not reference:
        raise CheckpointError(f"the source does not name its {noun}. Give its folder: {option} DIR.")
    try:
        return download_source(reference)
    except CheckpointError as error:
        raise CheckpointError(
            f"the source needs its {noun}: {error} Give a local folder: {option} DIR."
        ) from error


def download_source(name: str) -> Path:
    """Return the folder of a hub repository, less the weights in other programs' forms.

    Raises:
        CheckpointError: see ``download``.
    """
    return download(name, without=("*.msgpack", "*.h5", "*.onnx", "*.gguf", "*.py"))


def load_processor(parts: SourceParts, encoder: VisionEncoder, text_config: Any) -> TinyLlavaProcessor:
    """Join tokenizer, image processor and template; the number of image tokens is set afterwards.

    Raises:
        CheckpointError: the tokenizer or the image processor cannot be had from the folders at hand.
    """
    tokenizer = _load_tokenizer(parts, text_config)
    template = _make_template(parts, tokenizer)
    processor = TinyLlavaProcessor(
        image_processor=_load_image_processor(parts, encoder),
        tokenizer=tokenizer,
        chat_template=template,
        image_aspect=parts.image_aspect,
    )
    if parts.transparency:
        processor.transparency = parts.transparency
    try:
        processor.render(ask(""))
    except (TemplateError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{parts.where}: its chat template cannot be used ({error}). Give one of tinyllava's: "
            "--template NAME."
        ) from error
    return processor


def _make_template(parts: SourceParts, tokenizer: Any) -> str:
    """Return the text of the chat template: the source's own, or ours as its code and tokenizer need it."""
    if "{" in parts.template:
        return _with_bos(parts.template, tokenizer)
    name = parts.template or recognise_template(tokenizer, parts)
    template = fit_template(read_template(name), tokenizer)
    return as_published(template) if parts.is_published else template


def _with_bos(template: str, tokenizer: Any) -> str:
    """Return a template that writes BOS itself, if the original leaves BOS to the tokenizer."""
    bos = tokenizer.bos_token
    if not bos or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return template
    greeting = [{"role": "user", "content": [{"type": "text", "text": "A"}]}]
    try:
        begin = tokenizer.apply_chat_template(greeting, chat_template=template, tokenize=False)
    except (TemplateError, ValueError, TypeError):
        return template  # which is refused, with the reason, where the processor renders it
    return template if begin.startswith(bos) else "{{- bos_token -}}" + template


def _load_tokenizer(parts: SourceParts, text_config: Any) -> Any:
    try:
        tokenizer = open_tokenizer(parts.tokenizer, older_first=parts.has_older_tokens)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        names = ("tokenizer.json", "tokenizer_config.json")
        files = [parts.tokenizer / name for name in names if (parts.tokenizer / name).is_file()]
        for path in files:
            if why := describe_damage(path):
                raise CheckpointError(f"{path}: {why}.") from error
        reason = first_line(error)
        if not isinstance(error, TinyLlavaError):
            reason = f"{type(error).__name__}: {reason}"
        raise CheckpointError(
            f"{parts.tokenizer}: its tokenizer cannot be opened ({reason.rstrip('.')}). Give a "
            "folder of the same language model with a tokenizer.json: --language-model DIR."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    num_rows = int(text_config.vocab_size)
    if len(tokenizer) > num_rows and IMAGE_TOKEN not in tokenizer.get_vocab():
        raise CheckpointError(
            f"{parts.tokenizer}: the tokenizer has {len(tokenizer):,} tokens, but the embedding has only "
            f"{num_rows:,} rows. Give the folder of the right language model: --language-model DIR."
        )
    if tokenizer.eos_token is None:
        raise CheckpointError(
            f"{parts.tokenizer}: tokenizer_config.json has no eos_token, which ends an answer. Add it, or "
            "give the language model's own folder: --language-model DIR."
        )
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.model_max_length = int(text_config.max_position_embeddings)
    return tokenizer


def _load_image_processor(parts: SourceParts, encoder: VisionEncoder) -> Any:
    if parts.image_processor is not None:
        try:
            return AutoImageProcessor.from_pretrained(
                parts.image_processor, backend="pil", trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{parts.image_processor}: image processor cannot be opened: {error} Download the "
                "folder again."
            ) from error
    side = {"height": encoder.image_size_px, "width": encoder.image_size_px}
    kind = VISION_FAMILIES[encoder.family].image_processor
    if kind == "clip":
        return CLIPImageProcessorPil(size={"shortest_edge": encoder.image_size_px}, crop_size=side)
    if kind == "siglip":
        return SiglipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    raise CheckpointError(
        f"{parts.where}: no preprocessor_config.json for its {encoder.name}. Give the encoder's folder: "
        "--vision-encoder DIR."
    )
