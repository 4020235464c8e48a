"""The processor of an imported checkpoint: tokenizer with ``<image>``, image processor, template."""

from typing import Any

from jinja2 import TemplateError
from transformers import AutoImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil

from tinyllava.checkpoints.importing.parts import SourceParts, recognise_template
from tinyllava.conversation import ask
from tinyllava.errors import CheckpointError, TinyLlavaError, first_line
from tinyllava.model.processing import IMAGE_TOKEN, TinyLlavaProcessor
from tinyllava.model.tokenizer import fit_template, open_tokenizer
from tinyllava.parts.families import VISION_FAMILIES
from tinyllava.parts.folders import describe_damage
from tinyllava.parts.templates import as_published, read_template
from tinyllava.parts.vision import VisionEncoder


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
            f"{parts.where}: its chat template cannot be used ({error}); give one of ours: --template NAME."
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
    """Return a template that writes BOS where it leaves that to the tokenizer: here it is the template's."""
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
            f"{parts.tokenizer}: the tokenizer has {len(tokenizer):,} tokens for {num_rows:,} rows of the "
            "embedding; give the folder of the right language model: --language-model DIR."
        )
    if tokenizer.eos_token is None:
        raise CheckpointError(
            f"{parts.tokenizer}: tokenizer_config.json has no eos_token, the mark at which an answer ends; "
            "name it there, or give the language model's own folder: --language-model DIR."
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
                f"{parts.image_processor}: image processor cannot be opened: {error} Fetch the folder again."
            ) from error
    side = {"height": encoder.image_size_px, "width": encoder.image_size_px}
    kind = VISION_FAMILIES[encoder.family].image_processor
    if kind == "clip":
        return CLIPImageProcessorPil(size={"shortest_edge": encoder.image_size_px}, crop_size=side)
    if kind == "siglip":
        return SiglipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    raise CheckpointError(
        f"{parts.where}: no preprocessor_config.json for its {encoder.name}; give the encoder's folder: "
        "--vision-encoder DIR."
    )
