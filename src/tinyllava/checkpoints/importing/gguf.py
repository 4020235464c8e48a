"""A pair of GGUF files for llama.cpp: the language model, and an mmproj with SigLIP or CLIP and an MLP.

Weights in 16 and 32 bits are read unchanged, and quantised ones are dequantised by the gguf package. Files
that tinyllava wrote contain their tokenizer, template and image processor. For other files, the user provides
them.
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from tinyllava.checkpoints.exporting.gguf import (
    ARCHITECTURES,
    LAYER_NAMES,
    SETTINGS_KEY,
    TEXT_NAMES,
    VISION_LAYER_NAMES,
    VISION_NAMES,
)
from tinyllava.checkpoints.importing.connectors import Found
from tinyllava.checkpoints.importing.parts import Given, SourceParts
from tinyllava.checkpoints.importing.tensors import Tensors, refuse_left_over
from tinyllava.errors import CheckpointError, first_line

# Of two names here that are one there, the one of Phi's architecture; the others have the other.
_PHI = {"self_attn.dense", "mlp.fc1", "mlp.fc2", "final_layernorm"}
_NOT_PHI = {"self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "norm"}
_PROJECTORS = {"janus_pro": (0, 1), "mlp": (0, 2)}
"""Types of connectors that are our MLP, with the numbers of its two layers."""
_VISION_END = {"v.post_ln": "post_layernorm"}


class _File:
    """A GGUF file: its settings, and its tensors until they are taken."""

    def __init__(self, path: Path) -> None:
        try:
            self.reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            reason = first_line(error)
            raise CheckpointError(
                f"{path}: not a readable GGUF file ({reason}). Download it again."
            ) from error
        self.path = path
        self.left = {tensor.name: tensor for tensor in self.reader.tensors}

    def value(self, name: str, default: Any = None) -> Any:
        """Return a setting; of numbers in 32 bits the shortest that means the same."""
        field = self.reader.fields.get(name)
        if field is None:
            return default
        found = field.contents()
        return float(str(np.float32(found))) if isinstance(found, float) else found

    def need(self, name: str) -> Any:
        """Return a setting that has to be there."""
        if (found := self.value(name)) is None:
            raise CheckpointError(f"{self.path}: has no {name}. Download it again.")
        return found

    def take(self, name: str) -> Tensor:
        """Return a tensor, dequantised if it is stored in fewer than 16 bits."""
        stored = self.left.pop(name)
        shape = [int(size) for size in reversed(stored.shape)]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except RuntimeError as error:  # a type without a rule here
            raise CheckpointError(
                f"{self.path}: {name} is of type {stored.tensor_type.name}, which the gguf package cannot "
                "dequantise. Give a file in F16, BF16, Q8_0 or Q4_0."
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))


def recognises(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with such files and no other checkpoint."""
    if path.is_dir():
        return not (path / "config.json").is_file() and any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def read(path: Path, given: Given) -> SourceParts:
    """Take a pair apart.

    Raises:
        CheckpointError: one of both is missing or damaged, an architecture that is not here, or no tokenizer.
    """
    model, mmproj = _find_pair(path, given.mmproj)
    settings = json.loads(mmproj.value(SETTINGS_KEY, "{}"))
    text_config, text = _read_language_model(model)
    vision_config, vision, connector, feature_layer = _read_mmproj(mmproj)
    for file in (model, mmproj):
        refuse_left_over(file.left, str(file.path))
    scratch = Path(tempfile.mkdtemp())
    is_clip = vision_config["model_type"] == "clip_vision_model"
    parts = SourceParts(
        kind="GGUF of llama.cpp",
        where=str(path),
        text_config=text_config,
        text=text,
        vision_config=vision_config,
        vision=vision,
        feature_layer=feature_layer,
        num_prefix_tokens=int(is_clip),
        connector=Found(name="mlp", tensors=connector),
        scales_images=text_config["model_type"] == "gemma",
        image_aspect=settings.get("image_aspect", "pad"),
        image_processor=_write_image_processor(scratch, mmproj, settings, is_clip=is_clip),
        tokenizer=given.language_model or _write_tokenizer(scratch, model),
        is_published=False,
        has_older_tokens=False,
        transparency=settings.get("transparency"),
        num_language_rows=settings.get("num_language_rows", 0),
        template=given.template or settings.get("chat_template", ""),
        notes=() if settings else tuple(_notes(mmproj, is_clip=is_clip)),
    )
    weakref.finalize(parts, shutil.rmtree, scratch, ignore_errors=True)
    return parts


def _notes(mmproj: _File, *, is_clip: bool) -> Iterator[str]:
    """Say what files of others leave open."""
    yield (
        "images are padded to a square as in LLaVA, because the files do not record how the model was trained"
    )
    if not is_clip and mmproj.value("clip.has_llava_projector") and not mmproj.value("clip.use_gelu"):
        yield (
            "the encoder's activation is SigLIP's (tanh GELU); llama.cpp's converter writes use_gelu = false "
            "for it, and llama.cpp computes the quick GELU"
        )


def _find_pair(path: Path, mmproj: Path | None) -> tuple[_File, _File]:
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob("*.gguf"))
    projectors = [file for file in files if "mmproj" in file.name]
    models = [file for file in files if file not in projectors and file != mmproj]
    if path.suffix == ".gguf" and path in projectors and mmproj is None:
        projectors = [path]
    elif path.suffix == ".gguf":
        models = [path]
    if mmproj is not None:
        projectors = [mmproj]
    names = ", ".join(file.name for file in files)
    if len(models) != 1:
        raise CheckpointError(
            f"{path}: expected one language model beside its mmproj; found {names}. Give the path of the "
            "language model's file in place of the folder."
        )
    if len(projectors) != 1:
        raise CheckpointError(
            f"{path}: expected one file with mmproj in its name in {folder}; found {names}. Give the file "
            "with the encoder: --mmproj FILE."
        )
    if not projectors[0].is_file():
        raise CheckpointError(f"--mmproj {projectors[0]}: no such file. Give the path of a GGUF file.")
    return _File(models[0]), _File(projectors[0])


def _read_language_model(file: _File) -> tuple[dict[str, Any], Tensors]:
    """Return config and tensors under transformers' names."""
    there = file.need("general.architecture")
    family = {name: here for here, name in ARCHITECTURES.items()}.get(there)
    if family is None:
        raise CheckpointError(
            f"{file.path}: language model {there!r}; allowed: {', '.join(ARCHITECTURES.values())}."
        )
    if "rope_freqs.weight" in file.left:
        raise CheckpointError(
            f"{file.path}: its rotary frequencies are scaled (rope_freqs), but the file does not name the "
            "rule. Import the folder from which the file was made."
        )
    config = _text_config(file, there, family)
    other = _NOT_PHI if family == "phi" else _PHI
    layer_names = {name: here for here, name in LAYER_NAMES.items() if here not in other}
    outer_names = {name: here for here, name in TEXT_NAMES.items() if here not in other}
    tensors = {}
    for name in list(file.left):
        part, _, kind = name.rpartition(".")
        if part == "output":
            tensors[f"lm_head.{kind}"] = file.take(name)
        elif part in outer_names:
            tensors[f"model.{outer_names[part]}.{kind}"] = file.take(name)
        elif part.startswith("blk."):
            _, number, inner = part.split(".", 2)
            if inner in layer_names:
                tensors[f"model.layers.{number}.{layer_names[inner]}.{kind}"] = file.take(name)
    for name, tensor in tensors.items():
        if family == "llama" and ".self_attn.q_proj." in name:
            tensors[name] = _to_halves(tensor, config["num_attention_heads"])
        elif family == "llama" and ".self_attn.k_proj." in name:
            tensors[name] = _to_halves(tensor, config["num_key_value_heads"])
        elif family == "gemma" and name.endswith("norm.weight"):
            tensors[name] = tensor - 1  # stored as what the norm multiplies with
    config["vocab_size"] = len(tensors["model.embed_tokens.weight"])
    return config, tensors


def _text_config(file: _File, there: str, family: str) -> dict[str, Any]:
    def need(name: str) -> Any:
        return file.need(f"{there}.{name}")

    heads, width = need("attention.head_count"), need("embedding_length")
    head_width = file.value(f"{there}.attention.key_length", width // heads)
    rotated = file.value(f"{there}.rope.dimension_count", head_width)
    tokens = {name: file.value(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    config = {
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": need("block_count"),
        "intermediate_size": int(file.left["blk.0.ffn_up.weight"].shape[1])
        if "blk.0.ffn_up.weight" in file.left  # of Phi, llama.cpp's converter says four widths in any case
        else need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.value(f"{there}.attention.head_count_kv", heads),
        "max_position_embeddings": need("context_length"),
        "rope_theta": file.value(f"{there}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.left,
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id", tokens["eos_token_id"]),
        **tokens,
    }
    if family in ("phi", "stablelm"):
        config |= {"layer_norm_eps": need("attention.layer_norm_epsilon")}
        config |= {"partial_rotary_factor": rotated / head_width}
    else:
        config |= {"rms_norm_eps": need("attention.layer_norm_rms_epsilon"), "head_dim": head_width}
    has_bias = "blk.0.attn_q.bias" in file.left
    return config | {
        "stablelm": {"use_qkv_bias": has_bias},
        "llama": {"attention_bias": has_bias},
        "qwen3": {"attention_bias": has_bias},
    }.get(family, {})


def _to_halves(tensor: Tensor, heads: int) -> Tensor:
    """Put rows that Llama rotates in neighbouring pairs there into halves of a head."""
    halves: Tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return halves


def _read_mmproj(file: _File) -> tuple[dict[str, Any], Tensors, Tensors, int]:
    """Return config and tensors of the encoder, tensors of the connector, and the feature layer."""
    projector = file.value("clip.projector_type") or file.value("clip.vision.projector_type")
    if projector not in _PROJECTORS:
        allowed = ", ".join(_PROJECTORS)
        raise CheckpointError(f"{file.path}: projector type {projector!r}; allowed: {allowed}.")
    is_clip = "v.class_embd" in file.left
    family = "clip_vision_model" if is_clip else "siglip_vision_model"
    if file.value("clip.use_silu"):
        raise CheckpointError(f"{file.path}: an encoder with SiLU cannot be imported; allowed: GELU.")
    gelu = "gelu" if is_clip else "gelu_pytorch_tanh"
    # That converter writes false for every activation but "gelu", SigLIP's tanh form too.
    has_gelu = file.value("clip.use_gelu") or (not is_clip and file.value("clip.has_llava_projector"))
    config = {
        "model_type": family,
        "hidden_size": file.need("clip.vision.embedding_length"),
        "intermediate_size": file.need("clip.vision.feed_forward_length"),
        "num_hidden_layers": file.need("clip.vision.block_count"),
        "num_attention_heads": file.need("clip.vision.attention.head_count"),
        "image_size": file.need("clip.vision.image_size"),
        "patch_size": file.need("clip.vision.patch_size"),
        "layer_norm_eps": file.need("clip.vision.attention.layer_norm_epsilon"),
        "hidden_act": gelu if has_gelu else "quick_gelu",
    }
    names = {there: here for here, there in VISION_NAMES.items()}
    inner_names = {there: here for here, there in VISION_LAYER_NAMES.items()}
    if _has_swapped_mlp(file):
        inner_names |= {"ffn_down": "mlp.fc1", "ffn_up": "mlp.fc2"}
    layers = {f"mm.{there}": f"linear_{n + 1}" for n, there in enumerate(_PROJECTORS[projector])}
    vision, connector = {}, {}
    for name in list(file.left):
        part, _, kind = name.rpartition(".")
        if name in names:
            vision[names[name]] = file.take(name)
        elif part in _VISION_END:
            vision[f"{_VISION_END[part]}.{kind}"] = file.take(name)
        elif name.startswith("v.head."):  # SigLIP's pooling, which is not on the way of the features
            vision[name.removeprefix("v.")] = file.take(name)
        elif part in layers:
            connector[f"{layers[part]}.{kind}"] = file.take(name)
        elif part.startswith("v.blk."):
            _, _, number, inner = part.split(".", 3)
            if inner in inner_names:
                vision[f"encoder.layers.{number}.{inner_names[inner]}.{kind}"] = file.take(name)
    # The norm behind the features, which a file need not have, is never computed.
    width = config["hidden_size"]
    vision.setdefault("post_layernorm.weight", torch.ones(width))
    vision.setdefault("post_layernorm.bias", torch.zeros(width))
    return config, vision, connector, _feature_layer(file)


def _has_swapped_mlp(file: _File) -> bool:
    """Whether the encoder's layers have ``ffn_down`` before their activation, as older converters named them.

    They wrote the bias of the layer before the activation, which is the longer one, as that of ``ffn_down``.
    Where both have one length, the files of llama.cpp's converter for LLaVA's encoders are told by a setting
    that only it writes.
    """
    first, last = (file.left[f"v.blk.0.ffn_{name}.bias"].shape[0] for name in ("down", "up"))
    return bool(first > last or (first == last and file.value("clip.has_llava_projector")))


def _feature_layer(file: _File) -> int:
    """Return whose output is used of the encoder's stored layers, -1 for the last.

    Without a list, it is the last one: whoever writes an encoder for LLaVA leaves out what LLaVA does not
    use. llama.cpp leaves out one more (ggml-org/llama.cpp #25817).
    """
    num_layers: int = file.need("clip.vision.block_count")
    used = np.atleast_1d(file.value("clip.vision.feature_layer", [num_layers])).tolist()
    if len(used) != 1 or not 0 < used[0] <= num_layers:
        raise CheckpointError(
            f"{file.path}: clip.vision.feature_layer is {used}; allowed: one layer, 1 to {num_layers}."
        )
    return int(used[0]) - num_layers - 1


def _write_image_processor(scratch: Path, file: _File, settings: dict[str, Any], *, is_clip: bool) -> Path:
    """Write the image processor that was stored, or one of the file's size and colours."""
    size = file.need("clip.vision.image_size")
    square = {"height": size, "width": size}
    values = settings.get("image_processor") or {
        "image_processor_type": "CLIPImageProcessor" if is_clip else "SiglipImageProcessor",
        "size": {"shortest_edge": size} if is_clip else square,
        **({"crop_size": square} if is_clip else {}),
        "image_mean": list(file.need("clip.vision.image_mean")),
        "image_std": list(file.need("clip.vision.image_std")),
    }
    (scratch / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
    return scratch


def _write_tokenizer(scratch: Path, file: _File) -> Path:
    """Write the tokenizer that tinyllava stored as it was.

    Raises:
        CheckpointError: a file of others, which has tokens and merges, but not all rules.
    """
    stored = file.value(gguf.Keys.Tokenizer.HF_JSON)
    if stored is None:
        raise CheckpointError(
            f"{file.path}: the file has the tokens, but not every rule of the tokenizer. Give a folder with "
            "the language model's tokenizer.json: --language-model DIR."
        )
    tokens = file.need("tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for here, there in names.items():
        if (number := file.value(f"tokenizer.ggml.{there}_token_id")) is not None:
            settings[f"{here}_token"] = tokens[number]
    (scratch / "tokenizer.json").write_text(stored, encoding="utf-8")
    (scratch / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return scratch
