"""Assemble a model from its three parts, open an existing one, save one.

Paper: section 3.1 and Table 1.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
)
from transformers.utils import GENERATION_CONFIG_NAME

from tinyllava.config import ModelConfig, Run, to_json
from tinyllava.conversation import Conversation, ImageRef, Message, ask, to_chat
from tinyllava.errors import CheckpointError, ConfigError
from tinyllava.files import whole_folder, write_json
from tinyllava.model.compat import encoder_layers
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.connectors import build_connector
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import IMAGE_TOKEN, TinyLlavaProcessor, try_image_processor
from tinyllava.model.quantised import (
    QUANTISED_FILE,
    check_bits,
    dequantise,
    load_quantised,
    quantised_bits,
    quantised_layers,
)
from tinyllava.model.quiet import transformers_errors_only, without_loading_bars
from tinyllava.model.token_rows import ROWS_MULTIPLE, require_rows
from tinyllava.model.tokenizer import fit_template, open_tokenizer
from tinyllava.parts.families import LANGUAGE_FAMILIES
from tinyllava.parts.folders import check_checkpoint, check_processor_files, read_config, recorded_model
from tinyllava.parts.language import LanguageModel
from tinyllava.parts.resolve import Parts, resolve
from tinyllava.parts.templates import as_published
from tinyllava.parts.untrusted import find_trap, refusing, try_out
from tinyllava.parts.user_code import is_reference, recall_value
from tinyllava.parts.vision import VisionEncoder

_STAGES = ("stage_names", "out_features", "out_indices")


@without_loading_bars()
def assemble(
    model: ModelConfig, *, dtype: torch.dtype = torch.float32
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor]:
    """Load encoder and language model, build a new connector, and join them.

    The connector's initial weights follow from torch's random state. Everything else is the parts' own.

    Raises:
        UnknownNameError, ConfigError, CheckpointError: see the tables of parts.
    """
    parts = resolve(model)
    tokenizer = load_tokenizer(parts.language, older_first=bool(model.code))
    load_image_processor(model, parts.encoder)  # refused before the weights are loaded
    llm = AutoModelForCausalLM.from_pretrained(parts.language.path, dtype=dtype)
    if model.code == "bench":  # declares the head without a bias, so Phi-2 loses the one it has
        llm.get_output_embeddings().register_parameter("bias", None)
    vision_tower = cut_encoder(load_encoder(parts.encoder, dtype), parts.encoder)
    config = make_config(parts, vision_tower.config, llm, tokenizer)
    if model.code:
        config.image_scale = published_image_scale(config.text_config)

    with torch.device("meta"):
        assembled = TinyLlavaForConditionalGeneration(config)
    assembled.model.vision_tower = vision_tower
    assembled.model.language_model = llm.base_model
    assembled.lm_head = llm.get_output_embeddings()
    assembled.model.multi_modal_projector = _new_connector(config).to(dtype)
    require_rows(parts.language.path, tokenizer, llm.get_input_embeddings().num_embeddings, model.add_tokens)
    make_room_for_image_token(assembled, config.image_token_id)
    assembled.generation_config = greedy_generation(llm.generation_config, tokenizer)
    return assembled.eval(), make_processor(parts, model, tokenizer)


def published_image_scale(text_config: Any) -> float:
    """Return the factor of image tokens in code on transformers 4: it put them in before Gemma's sqrt(D)."""
    family = LANGUAGE_FAMILIES.get(text_config.model_type)
    return float(text_config.hidden_size**0.5) if family and family.scales_embeddings else 1.0


def greedy_generation(published: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """Return settings under which answers follow from the weights alone.

    Of what a language model was published with (sampling, Qwen's repetition penalty) only its tokens stay.
    """
    return GenerationConfig(
        bos_token_id=published.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


@without_loading_bars()
def open_checkpoint(
    folder: str | Path, *, dtype: torch.dtype | str = "auto", keep_bits: bool = False
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor]:
    """Open a saved folder, whatever it is called, with no network.

    Answers are greedy unless a caller asks for sampling: of the folder's settings of generation only the
    tokens count.

    Args:
        keep_bits: hold layers that are stored in 4 or 8 bits so; otherwise they become ordinary ones.

    Raises:
        MissingExtraError: layers are stored in 4 or 8 bits, and bitsandbytes, which multiplies them, is not
            installed.
        CheckpointError: the folder is missing, incomplete, or of another kind.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    _refuse_unknown_classes(folder)
    processor = open_processor(folder)
    # Its report of weights would name quantised layers, which come next, as missing; faults are raised below.
    with refusing(folder, "cannot be opened"), transformers_errors_only():
        model, report = TinyLlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
    if (quantised := folder / QUANTISED_FILE).is_file():
        load_quantised(model, quantised)
        report["missing_keys"] = set(report["missing_keys"]) - quantised_layers(model).keys()
        if keep_bits:
            check_bits(quantised_bits(model))
        else:
            dequantise(model)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(fault):
            raise CheckpointError(
                f"{folder}: {fault.replace('_', ' ')}: {', '.join(map(str, sorted(report[fault])))}"
            )
    require_rows(str(folder), processor.tokenizer, model.get_input_embeddings().num_embeddings)
    if model.config.num_image_tokens != processor.num_image_tokens:
        raise CheckpointError(
            f"{folder}: processor_config.json says {processor.num_image_tokens} tokens per image, but the "
            f"connector in config.json produces {model.config.num_image_tokens}; copy the folder again."
        )
    ends = model.generation_config.eos_token_id
    model.generation_config = greedy_generation(model.generation_config, processor.tokenizer)
    if ends is not None and (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config.eos_token_id = ends  # there may be several
    longest = getattr(model.config.text_config, "max_position_embeddings", None) or sys.maxsize
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, longest)
    return model.eval(), processor


def _refuse_unknown_classes(folder: Path) -> None:
    """Raise for a part of a class that nobody has registered: the user's code that does has to run first.

    Raises:
        CheckpointError: it names the code, as far as the checkpoint records it.
    """
    config = read_config(folder)
    for name, part in (("vision_encoder", "vision_config"), ("language_model", "text_config")):
        kind = str(config.get(part, {}).get("model_type", ""))
        if not kind or kind in CONFIG_MAPPING:
            continue
        reference = str(getattr(recorded_model(folder), name))
        if is_reference(reference):
            recall_value(reference, str(folder))
        raise CheckpointError(
            f"{folder}: its {name.replace('_', ' ')} is of type {kind!r}, which transformers does not have. "
            "Name your code that registers its classes: --with FILE.py (in Python: "
            "tinyllava.run_code('FILE.py'))."
        )


def save_model(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    run: Run,
    provenance: Mapping[str, Any],
    beside: Mapping[str, Any],
) -> None:
    """Write a self-contained folder; it appears whole or not at all."""
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
        (part / "run.json").write_text(to_json(run), encoding="utf-8")
        for name, value in {"provenance.json": provenance, **beside}.items():
            write_json(part / name, value)


def open_processor(folder: Path) -> TinyLlavaProcessor:
    """Open tokenizer, image processor and template of a saved folder, with no network.

    Raises:
        CheckpointError: one of their files is missing or damaged; it is named.
    """
    check_processor_files(folder)
    with refusing(folder, "its tokenizer or image processor cannot be opened"):
        processor: TinyLlavaProcessor = TinyLlavaProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    chats, template = [to_chat(conversation) for conversation in _examples()], str(processor.chat_template)
    if why := find_trap(template) or try_out(lambda: _try_template(processor), template, chats):
        raise CheckpointError(
            f"{folder / 'chat_template.jinja'}: no chat template with generation marks ({why}); copy the "
            "folder again."
        )
    if why := try_out(lambda: _try_image(processor)):
        raise CheckpointError(f"{folder}: its image processor cannot be used ({why}); copy the folder again.")
    return processor


def _examples() -> Iterator[Conversation]:
    """Yield conversations of each kind: open, answered, and answered with a further question."""
    image = ImageRef(name="an image")
    system, answer = Message(role="system", text="Be short."), Message(role="assistant", text="A dog.")
    for question in (ask(""), ask("What is it?"), ask("What is it?", image), ask("What?", image, image)):
        answered = (system, *question.messages, answer)
        yield question
        yield Conversation(messages=answered)
        yield Conversation(messages=(*answered, *ask("Why?").messages))
    many = (system, *(*ask("Why?", image).messages, answer) * 16)
    yield Conversation(messages=(*many, *ask("Is there a dog? " * 200).messages))


def _try_template(processor: TinyLlavaProcessor) -> None:
    """Render and tokenise the examples."""
    for conversation in _examples():
        if conversation.messages[-1].role == "assistant":
            processor.render(conversation)
        else:  # also with an earlier turn: a mask that is not exact stops training, not answering
            processor.encode(conversation, open_answer=True)


def _try_image(processor: TinyLlavaProcessor) -> None:
    torch.set_num_threads(1)
    pixels = processor.to_pixels([Image.new("RGB", (64, 48))])
    if not (isinstance(pixels, torch.Tensor) and pixels.ndim == 4 and pixels.shape[:2] == (1, 3)):
        raise ValueError("it does not produce an image with three channels")
    if not pixels.is_floating_point() or not bool(pixels.isfinite().all()):
        raise ValueError("it produces values that are not finite")


def load_tokenizer(language: LanguageModel, *, older_first: bool = False) -> Any:
    """Load a tokenizer that ends turns as the template does, with a padding token and ``<image>``.

    Args:
        older_first: prefer the older of its forms, as the published code does.
    """
    tokenizer = open_tokenizer(language.path, older_first=older_first)
    if language.eos_token and tokenizer.eos_token != language.eos_token:
        raise ConfigError(
            f"{language.path}: the tokenizer ends a turn with {tokenizer.eos_token!r}, but template "
            f"{language.template!r} is meant for {language.eos_token!r}; choose another template."
        )
    if tokenizer.pad_token is None:
        # Never a reason to touch the embedding: what is padded is told by the attention mask alone.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.model_max_length = language.context_tokens
    return tokenizer


def load_encoder(encoder: VisionEncoder, dtype: torch.dtype) -> Any:
    """Load the vision half of a folder that may also hold a text half (CLIP, SigLIP), or two as one."""
    if encoder.members and encoder.members[0].path:  # those of a saved folder have none: it is one model
        from tinyllava.model.encoders import load_fused  # which loads each of the two with this function

        return load_fused(encoder, dtype)
    config = AutoConfig.from_pretrained(encoder.path)
    config = getattr(config, "vision_config", None) or config
    if config.model_type.startswith("siglip"):  # some releases of transformers have no default for it
        config.vision_use_head = False  # SigLIP's pooling head is not on the way of the patch features
    with transformers_errors_only():  # it would list the text half and the head, left out on purpose
        tower, report = AutoModel.from_pretrained(
            encoder.path, config=config, dtype=dtype, output_loading_info=True
        )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{encoder.path}: tensors of {type(tower).__name__} are missing: "
            f"{', '.join(sorted(report['missing_keys']))}. Download the folder again."
        )
    return tower


def cut_encoder(vision_tower: Any, encoder: VisionEncoder) -> Any:
    """Drop the layers above the feature layer: they would be computed, stored and trained for nothing."""
    if encoder.kind == "cnn":
        return vision_tower
    layers = encoder_layers(vision_tower)
    num_kept = len(layers) + 1 + encoder.feature_layer if encoder.feature_layer < 0 else encoder.feature_layer
    if not 1 <= num_kept <= len(layers):
        raise ConfigError(
            f"{encoder.name} has no feature layer {encoder.feature_layer}: it has {len(layers)} layers."
        )
    del layers[num_kept:]
    vision_tower.config.num_hidden_layers = num_kept
    return vision_tower


def make_config(parts: Parts, vision_config: Any, llm: Any, tokenizer: Any) -> TinyLlavaConfig:
    """Describe the assembled model."""
    encoder = parts.encoder
    config = TinyLlavaConfig(
        # Lists of stages would have to be cut with the layers; only backbones of detectors read them.
        vision_config={k: v for k, v in vision_config.to_dict().items() if k not in _STAGES},
        text_config=llm.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=parts.num_image_tokens,
        connector=parts.connector.name,
        connector_options=dict(parts.connector_options),
        num_patches=parts.num_patches,
        num_prefix_tokens=encoder.num_prefix_tokens,
        encoder_kind=encoder.kind,
        vision_width=encoder.width,
        vision_feature_select_strategy="default" if encoder.num_prefix_tokens == 1 else "full",
        lm_head_bias=llm.get_output_embeddings().bias is not None,
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
    )
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return config


def make_processor(parts: Parts, model: ModelConfig, tokenizer: Any) -> TinyLlavaProcessor:
    """Load the encoder's image processor and join it with tokenizer and template.

    Args:
        model: which says how images are prepared, and whose code is reproduced.
    """
    template = fit_template(parts.template.text, tokenizer)
    return TinyLlavaProcessor(
        image_processor=load_image_processor(model, parts.encoder),
        tokenizer=tokenizer,
        chat_template=as_published(template) if model.code else template,
        num_image_tokens=parts.num_image_tokens,
        image_aspect=model.image_aspect,
        transparency=model.transparency,
    )


def load_image_processor(model: ModelConfig, encoder: VisionEncoder) -> Any:
    """Load an encoder's image processor, set it to the model's image size, and try it once.

    Raises:
        ConfigError: what it makes of an image is not what the encoder takes; both sizes are named.
    """
    image_processor = AutoImageProcessor.from_pretrained(encoder.path, backend="pil")
    if model.image_size_px:
        side = model.image_size_px
        image_processor.size = (
            {"shortest_edge": side}
            if "shortest_edge" in image_processor.size
            else {"height": side, "width": side}
        )
        if getattr(image_processor, "crop_size", None):
            image_processor.crop_size = {"height": side, "width": side}
    side = model.image_size_px or encoder.image_size_px
    if problem := try_image_processor(image_processor, model.image_aspect, side):
        raise ConfigError(f"{encoder.path}: {problem} Fix its preprocessor_config.json.")
    return image_processor


def _new_connector(config: TinyLlavaConfig) -> Any:
    return build_connector(
        config.connector,
        vision_width=config.vision_width,
        language_width=config.text_config.hidden_size,
        num_patches=config.num_patches,
        options=config.connector_options or {},
    )


def make_room_for_image_token(model: TinyLlavaForConditionalGeneration, image_token_id: int) -> None:
    """Give ``<image>`` a row when the language model has none to spare.

    New rows are zero: the input row is never read (a feature replaces it) and a zero output row gives the
    neutral logit 0. The loss leaves them out: what is trained is the language model's own distribution.
    """
    num_rows = model.get_input_embeddings().num_embeddings
    if image_token_id < num_rows:
        return
    model.config.num_language_rows = num_rows
    model.resize_token_embeddings(image_token_id + 1, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[num_rows:] = 0
