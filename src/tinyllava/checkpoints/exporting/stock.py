"""Write a model in the layout of transformers' LlavaForConditionalGeneration, which vLLM reads too.

The tensors are named as in the files on the Hub (``vision_tower.vision_model.*``,
``language_model.model.*``). Every version of transformers reads these names, and vLLM's encoders read no
others.
The encoder is stored without its unused layers, so ``vision_feature_layer`` is -1. transformers takes the
last layer's output before the final norm. vLLM builds that many layers and omits the norm. transformers 4
returns SigLIP's last layer after the norm, so SigLIP gets one more layer, of zeros, and -2 selects its input.
transformers 4.57 reads the files as 5 does; see ``_suit_older_versions``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlavaConfig, LlavaImageProcessorPil, LlavaProcessor

from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.parts.families import VISION_FAMILIES

_SIGLIP = "siglip_vision_model"
_VLLM_ENCODERS = [name for name, family in VISION_FAMILIES.items() if family.in_vllm]
_HUB_NAMES = {"language_model": "language_model.model", "lm_head": "language_model.lm_head"}


def reasons_against_stock(config: TinyLlavaConfig, layout: str) -> list[str]:
    """Return why the folder would answer otherwise than the model does; nothing if it would not.

    Args:
        layout: llava, or vllm.
    """
    vision: Any = config.vision_config
    reasons = []
    if config.connector != "mlp":
        reasons.append(f"connector {config.connector!r}: LLaVA supports only the two-layer MLP")
    if config.lm_head_bias:
        reasons.append("LLaVA has no bias in the output head (Phi-2), so the logits would differ")
    if config.encoder_kind == "cnn":
        what = "two fused encoders" if vision.model_type == "fused_vision" else "a CNN"
        reasons.append(f"encoder {vision.model_type!r}: {what}; LLaVA supports one transformer")
    elif config.num_prefix_tokens not in (0, 1):
        reasons.append(f"{config.num_prefix_tokens} prefix tokens are dropped: LLaVA drops 0 or 1")
    if layout == "vllm" and vision.model_type not in _VLLM_ENCODERS:
        reasons.append(f"encoder {vision.model_type!r}: vLLM's LLaVA supports {' and '.join(_VLLM_ENCODERS)}")
    return reasons


def write_stock(
    folder: Path, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, max_shard_size: str
) -> None:
    """Write weights, configs, processor and chat template."""
    make_stock_config(model).save_pretrained(folder)
    save_torch_state_dict(stock_tensors(model), folder, max_shard_size=max_shard_size)
    model.generation_config.save_pretrained(folder)
    stock = make_stock_processor(model.config, processor)
    stock.save_pretrained(folder)
    stock.image_processor.save_pretrained(folder)  # a file of its own, where older versions look for it
    _suit_older_versions(folder)


def _suit_older_versions(folder: Path) -> None:
    """Add the settings that transformers 4 reads, and let only the template write BOS.

    Without it 4.57 takes 10000 for every rotary base and a default for the rotary part, knows no class for
    the tokenizer, and pads on the right.
    """

    def change(name: str, make: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        path = folder / name
        values = make(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    change("config.json", lambda values: values | {"text_config": _with_older_rotary(values["text_config"])})
    change("tokenizer_config.json", _with_older_names)
    change("tokenizer.json", without_bos)


def _with_older_rotary(text: dict[str, Any]) -> dict[str, Any]:
    rotary = text.get("rope_parameters") or {}
    known = {key: rotary[key] for key in ("rope_theta", "partial_rotary_factor") if key in rotary}
    if rotary.get("rope_type", "default") != "default":
        known["rope_scaling"] = {key: value for key, value in rotary.items() if key not in known}
    return text | known


def _with_older_names(settings: dict[str, Any]) -> dict[str, Any]:
    changed = {k: v for k, v in settings.items() if k not in ("backend", "is_local", "local_files_only")}
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed | {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}


def without_bos(pipeline: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer.json that adds no token: the chat template writes BOS."""
    if (pipeline.get("post_processor") or {}).get("type") == "ByteLevel":  # which adds no token
        return pipeline
    return pipeline | {"post_processor": None}


def make_stock_config(model: TinyLlavaForConditionalGeneration) -> LlavaConfig:
    """Return the stock config of a model."""
    config = model.config
    text: dict[str, Any] = config.text_config.to_dict() | {"_name_or_path": ""}
    # vLLM chooses the language model by it.
    text["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)].__name__]
    vision: dict[str, Any] = config.vision_config.to_dict() | {"_name_or_path": ""}
    has_idle_layer = vision["model_type"] == _SIGLIP
    vision["num_hidden_layers"] = config.vision_config.num_hidden_layers + has_idle_layer
    stock = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=config.image_token_id,
        image_seq_length=config.num_image_tokens,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=-2 if has_idle_layer else -1,
        vision_feature_select_strategy=_strategy(config),
        tie_word_embeddings=config.tie_word_embeddings,
    )
    stock.architectures = ["LlavaForConditionalGeneration"]
    stock.dtype = model.dtype
    stock.pad_token_id, stock.eos_token_id = config.pad_token_id, config.eos_token_id
    return stock


_SAME_IN_4 = ({"llama", "qwen2", "stablelm"}, set(_VLLM_ENCODERS))
"""Language models and encoders whose exports `make test-older` compares in transformers 4.57."""


def describe_versions(config: TinyLlavaConfig, difference: float) -> str:
    """Return the card's section on the releases of transformers that compute the same."""
    text, vision = config.text_config.model_type, config.vision_config.model_type
    if text.startswith("gemma"):
        older = (
            "transformers 4 multiplies the image tokens of Gemma by the square root of its width, which "
            "changes the answers. Use transformers 5."
        )
    elif text in _SAME_IN_4[0] and vision in _SAME_IN_4[1]:
        older = (
            "transformers 4.57 gives the same results: the project's tests compare token ids, pixels and "
            "logits of this layout."
        )
    else:
        older = "This kind of model has not been tested in transformers 4. Use transformers 5."
    return (
        "## Agreement\n\nThe export was compared with the checkpoint in transformers "
        f"{transformers.__version__}. The largest logit difference is {difference:.2g}. {older}"
    )


def stock_tensors(model: TinyLlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Return the tensors under the hub's names; a head that shares the embedding's rows is left out."""
    has_prefix = model.config.vision_config.model_type in _VLLM_ENCODERS
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        part, _, inner = name.removeprefix("model.").partition(".")
        if part == "vision_tower" and has_prefix and not inner.startswith("vision_model."):
            inner = f"vision_model.{inner}"
        tensors[f"{_HUB_NAMES.get(part, part)}.{inner}"] = tensor
    vision: Any = model.config.vision_config
    if vision.model_type == _SIGLIP:  # zeros pass their input on
        last, idle = (f".layers.{vision.num_hidden_layers - 1 + more}." for more in (0, 1))
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_tower.")}
        tensors |= {
            name.replace(last, idle): torch.zeros_like(tensor) for name, tensor in own.items() if last in name
        }
    return tensors


def make_stock_processor(config: TinyLlavaConfig, processor: TinyLlavaProcessor) -> LlavaProcessor:
    """Return transformers' processor with the same template, the same pixels and as many image tokens."""
    vision: Any = config.vision_config
    grid = (processor.image_size_px // vision.patch_size) ** 2
    return LlavaProcessor(
        image_processor=_stock_image_processor(processor),
        tokenizer=processor.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=_strategy(config),
        num_additional_image_tokens=config.num_patches + config.num_prefix_tokens - grid,
        chat_template=processor.chat_template,
    )


def _strategy(config: TinyLlavaConfig) -> str:
    return "default" if config.num_prefix_tokens == 1 else "full"


def _stock_image_processor(processor: TinyLlavaProcessor) -> Any:
    """Return the image processor, with LLaVA's own padding where images are padded to a square."""
    own = processor.image_processor
    if processor.image_aspect != "pad":
        return own
    names = (
        "do_convert_rgb",
        "do_resize",
        "size",
        "resample",
        "do_center_crop",
        "crop_size",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
    )
    values = {name: getattr(own, name, None) for name in names}
    values["do_center_crop"] = bool(values["do_center_crop"])
    values["crop_size"] = values["crop_size"] or values["size"]  # unused without a crop, but asked for
    return LlavaImageProcessorPil(**values, do_pad=True)
