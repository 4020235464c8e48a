"""Write a model as a pair of GGUF files (language model and mmproj) for llama.cpp and programs built on it.

The format and its tensor names are llama.cpp's. Whether they have the same meaning is measured in
llama_cpp.py, not assumed. SigLIP with the two-layer MLP is projector type ``janus_pro``, which runs every
stored layer and pads with SigLIP's mean. CLIP is type ``mlp``.
Differs: the GELU of llama.cpp's connector is the tanh approximation, and this package's is exact.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from gguf.quants import quantize as encode
from torch import Tensor

from tinyllava.checkpoints.exporting.gguf_text import add_tokenizer
from tinyllava.errors import CheckpointError
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import IMAGE_RULES, TinyLlavaProcessor

Quantized = Literal["f32", "f16", "q8_0", "q4_0"]

SETTINGS_KEY = "tinyllava.settings"
"""Of mmproj: what llama.cpp has no words for."""
MODEL, MMPROJ = "model.gguf", "mmproj.gguf"
# Name of an architecture there, by the model type here.
ARCHITECTURES = {
    "llama": "llama",
    "phi": "phi2",
    "stablelm": "stablelm",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
TEXT_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "final_layernorm": "output_norm"}
VISION_LAYER_NAMES = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
VISION_NAMES = {
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "embeddings.class_embedding": "v.class_embd",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
# The encoder's own end, which LLaVA's features are taken in front of.
_UNUSED = ("post_layernorm.", "head.")
CONNECTOR_LAYERS = {"siglip_vision_model": (0, 1), "clip_vision_model": (0, 2)}
EXTRA_CHECK = {"clip_vision_model": "if it passes the comparison in llama.cpp (#25814, #25817)"}
"""What decides for an encoder whose operations llama.cpp has, but not always right; see llama_cpp.py."""
GELUS = {"gelu": True, "gelu_pytorch_tanh": True, "quick_gelu": False}
_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


def reasons_against_gguf(config: TinyLlavaConfig) -> list[str]:
    """Return why llama.cpp cannot compute a model; empty if it can."""
    text, vision = config.text_config, config.vision_config
    reasons = [*_text_reasons(config, text)]
    if config.connector != "mlp" or (config.connector_options or {}).get("depth", 2) != 2:
        reasons.append(f"connector {config.connector!r}: llama.cpp supports only the two-layer MLP")
    if config.encoder_kind == "cnn" or vision.model_type not in CONNECTOR_LAYERS:
        reasons.append(f"encoder {vision.model_type!r}: llama.cpp supports only SigLIP and CLIP")
    elif config.num_prefix_tokens != (prefix := int(vision.model_type == "clip_vision_model")):
        reasons.append(f"{config.num_prefix_tokens} prefix tokens are dropped: llama.cpp drops {prefix}")
    elif vision.hidden_act not in GELUS:
        reasons.append(f"encoder activation {vision.hidden_act!r}: llama.cpp supports {', '.join(GELUS)}")
    return reasons


def bytes_in_gguf(shape: Sequence[int], kind: str, *, is_text: bool, is_table: bool) -> int:
    """Return the bytes of a tensor in a file whose language model has matrices of that kind.

    Args:
        is_text: of the language model, or of encoder and connector.
        is_table: embedding or head.
    """
    if len(shape) < 2:
        kind = "f32"
    elif not is_text:
        kind = "f32" if kind == "f32" or len(shape) > 2 else "f16"
    elif is_table and kind == "q4_0":
        kind = "q8_0"
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[_stored_as(shape[-1], kind)]
    return math.prod(shape) // per_block * block_bytes


def _text_reasons(config: TinyLlavaConfig, text: Any) -> Iterator[str]:
    if text.model_type not in ARCHITECTURES:
        yield f"language model {text.model_type!r}: the GGUF export supports {', '.join(ARCHITECTURES)}"
        return
    if config.lm_head_bias and text.model_type != "phi":
        yield f"bias of the output head: llama.cpp has none for {text.model_type!r}"
    for name in ("qk_layernorm", "use_parallel_residual", "use_sliding_window"):
        if getattr(text, name, False):
            yield f"{name} of {text.model_type!r}: not supported by llama.cpp"
    if (text.model_type == "stablelm" or text.model_type == "phi") and config.tie_word_embeddings:
        yield f"an output head that shares the embedding of {text.model_type!r}: not supported by llama.cpp"
    kind = (text.rope_parameters or {}).get("rope_type", "default")
    if kind != "default" and not (kind in ("linear", "llama3") and text.model_type == "llama"):
        yield f"rotary embedding of type {kind!r} in {text.model_type!r}: not supported by llama.cpp"
    expected = {"phi": ("gelu_new",), "gemma": ("gelu_pytorch_tanh", "gelu")}.get(text.model_type, ("silu",))
    if text.hidden_act not in expected:
        allowed = " or ".join(expected)
        yield f"activation {text.hidden_act!r}: llama.cpp supports {allowed} for {text.model_type!r}"


def write_gguf(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    name: str,
    quantized: Quantized,
) -> None:
    """Write both files, and round the model's weights to the written values.

    Matrices of the language model are written as ``quantized``; with 4 bits, embedding and head have 8. Those
    of encoder and connector have at least 16, vectors and the patch embedding 32.

    Raises:
        CheckpointError: a tokenizer that llama.cpp does not have, or a tensor that it has no name for.
    """
    with torch.no_grad():
        _write_language_model(folder / MODEL, model, processor, name, quantized)
        _write_mmproj(folder / MMPROJ, model, processor, name, "f32" if quantized == "f32" else "f16")


def _write_language_model(
    path: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    name: str,
    quantized: Quantized,
) -> None:
    text: Any = model.config.text_config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[text.model_type])
    _add_kind(writer, "model", name, model.model.language_model, model.lm_head)
    writer.add_file_type(_FILE_TYPES[quantized])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_text_metadata(writer, text)
    add_tokenizer(writer, processor, text.vocab_size)
    for there, tensor in _text_tensors(model):
        is_table = there in ("token_embd.weight", "output.weight")
        kind: Quantized = "q8_0" if is_table and quantized == "q4_0" else quantized
        heads = _rotated_heads(there, text)
        _add_tensor(writer, there, tensor, kind, heads)
    if (factors := _rope_factors(model)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    _close(writer)


def _add_kind(writer: gguf.GGUFWriter, kind: str, name: str, *modules: torch.nn.Module) -> None:
    """Add what programs list of a file before they open it: its kind, name and size."""
    sizes = {weight.data_ptr(): weight.numel() for module in modules for weight in module.parameters()}
    writer.add_type(kind)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(sum(sizes.values()), 0, 0, 0))


def _add_text_metadata(writer: gguf.GGUFWriter, text: Any) -> None:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = text.rope_parameters or {}
    rotated = int(head_dim * rope.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", 1.0)))
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if text.model_type not in ("phi", "stablelm"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(text.layer_norm_eps)
    if text.model_type == "stablelm":
        writer.add_parallel_residual(False)


def _text_tensors(model: TinyLlavaForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    """Yield names there and the parameters that they hold."""
    for inner, tensor in model.model.language_model.named_parameters():
        here, _, kind = inner.rpartition(".")
        if here.startswith("layers."):
            _, number, here = here.split(".", 2)
            there = f"blk.{number}.{_known(LAYER_NAMES, here, inner)}"
        else:
            there = _known(TEXT_NAMES, here, inner)
        yield f"{there}.{kind}", tensor
    if not model.config.tie_word_embeddings:
        for kind, tensor in model.lm_head.named_parameters():
            yield f"output.{kind}", tensor


def _known(names: dict[str, str], here: str, tensor: str) -> str:
    if here not in names:
        raise CheckpointError(
            f"tensor {tensor!r}: llama.cpp has no counterpart for it. Use `--format tinyllava`."
        )
    return names[here]


def _rotated_heads(there: str, text: Any) -> int:
    """Return the heads whose rows Llama's rotary embedding there expects in pairs; 0 for all else."""
    if text.model_type != "llama":
        return 0
    part = there.split(".")[-2]
    heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}
    return int(heads.get(part, 0))


def _rope_factors(model: TinyLlavaForConditionalGeneration) -> np.ndarray[Any, Any] | None:
    """Return what the rotary frequencies of a longer Llama are divided by; None for plain ones."""
    text: Any = model.config.text_config
    if (text.rope_parameters or {}).get("rope_type", "default") == "default":
        return None
    used = model.model.language_model.rotary_emb.inv_freq.double()
    plain = text.rope_parameters["rope_theta"] ** -(torch.arange(len(used), dtype=torch.double) / len(used))
    return np.asarray((plain / used).float())


def _write_mmproj(
    path: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    name: str,
    quantized: Quantized,
) -> None:
    vision: Any = model.config.vision_config
    writer = gguf.GGUFWriter(path, "clip")
    encoder, connector = model.model.vision_tower, model.model.multi_modal_projector
    _add_kind(writer, "mmproj", f"{name} (vision)", encoder, connector)
    writer.add_file_type(_FILE_TYPES[quantized])
    writer.add_clip_has_vision_encoder(True)
    is_clip = vision.model_type == "clip_vision_model"
    writer.add_clip_projector_type("mlp" if is_clip else "janus_pro")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(model.config.text_config.hidden_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(list(processor.image_processor.image_mean))
    writer.add_vision_image_std(list(processor.image_processor.image_std))
    writer.add_string(IMAGE_RULES, processor.image_rules)  # llama.cpp does not read it
    if is_clip:  # otherwise one layer fewer is run, and ours are stored cut
        writer.add_array("clip.vision.feature_layer", [vision.num_hidden_layers])
    if GELUS[vision.hidden_act]:
        writer.add_vision_use_gelu(True)
    _add_settings(writer, model, processor)
    for there, tensor in _vision_tensors(model):
        is_exact = there in ("v.patch_embd.weight", "v.position_embd.weight")
        _add_tensor(writer, there, tensor, "f32" if is_exact else quantized)
    _close(writer)


def _add_settings(
    writer: gguf.GGUFWriter, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor
) -> None:
    """Add the settings that llama.cpp does not have but an import needs to rebuild the same model."""
    values = {
        "chat_template": processor.chat_template,
        "image_processor": json.loads(processor.image_processor.to_json_string()),
        "image_aspect": processor.image_aspect,
        "transparency": processor.transparency,
        "num_language_rows": model.config.num_language_rows,
    }
    writer.add_string(SETTINGS_KEY, json.dumps(values))


def _vision_tensors(model: TinyLlavaForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    for inner, tensor in model.model.vision_tower.named_parameters():
        here = inner.removeprefix("vision_model.")
        if here.startswith(_UNUSED):
            continue
        if here.startswith("encoder.layers."):
            _, _, number, rest = here.split(".", 3)
            module, _, kind = rest.rpartition(".")
            yield f"v.blk.{number}.{_known(VISION_LAYER_NAMES, module, inner)}.{kind}", tensor
        else:
            yield _known(VISION_NAMES, here, inner), tensor
    numbers = CONNECTOR_LAYERS[model.config.vision_config.model_type]
    layers = [m for m in model.model.multi_modal_projector.modules() if isinstance(m, torch.nn.Linear)]
    # Gemma multiplies every input by the root of its width there; here only those of tokens.
    text: Any = model.config.text_config
    scale = math.sqrt(text.hidden_size) if text.model_type == "gemma" else 1.0
    for number, layer in zip(numbers, layers, strict=True):
        divisor = scale if layer is layers[-1] else 1.0
        yield f"mm.{number}.weight", layer.weight if divisor == 1 else layer.weight / divisor
        yield f"mm.{number}.bias", layer.bias if divisor == 1 else layer.bias / divisor


def _add_tensor(
    writer: gguf.GGUFWriter, there: str, tensor: Tensor, kind: Quantized, rotated_heads: int = 0
) -> None:
    """Add a tensor as it is stored there, and leave in it the values that the stored form encodes."""
    values = tensor.float()
    if rotated_heads:  # [halves, pairs] of each head become [pairs, halves]
        values = values.unflatten(0, (rotated_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    array = values.contiguous().numpy()
    stored_as = _stored_as(array.shape[-1], kind if array.ndim > 1 else "f32")
    is_gemma_norm = writer.arch == "gemma" and there.endswith("norm.weight")
    stored = encode(array + 1 if is_gemma_norm else array, stored_as)  # its norms are stored as what they do
    writer.add_tensor(there, stored, raw_dtype=stored_as)
    if stored_as == gguf.GGMLQuantizationType.F32:
        return
    rounded = torch.from_numpy(dequantize(stored, stored_as).reshape(array.shape).copy())
    if rotated_heads:
        rounded = rounded.unflatten(0, (rotated_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    tensor.copy_(rounded)


def _stored_as(row_length: int, kind: str) -> gguf.GGMLQuantizationType:
    """Return the type of a matrix; 16 bits for rows that are no whole number of blocks."""
    stored_as = _TYPES[kind]
    is_whole = row_length % gguf.GGML_QUANT_SIZES[stored_as][0] == 0
    return stored_as if is_whole else gguf.GGMLQuantizationType.F16


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
