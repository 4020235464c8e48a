"""Which formats can hold a model, or why not, and the table of formats with their sizes.

The reasons come from the modules that write the formats. The same reasons reject an export and fill every
table.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import gguf
from safetensors import safe_open

from tinyllava.checkpoints.exporting.gguf import EXTRA_CHECK, bytes_in_gguf, reasons_against_gguf
from tinyllava.checkpoints.exporting.gguf_text import add_tokenizer
from tinyllava.checkpoints.exporting.graphs import BLOCK, Pixels
from tinyllava.checkpoints.exporting.onnx import PACKAGES, reasons_against_onnx
from tinyllava.checkpoints.exporting.stock import reasons_against_stock
from tinyllava.checkpoints.exporting.web import RUNTIME_BYTES
from tinyllava.errors import CheckpointError
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.parts.connectors import CONNECTORS
from tinyllava.parts.families import LANGUAGE_FAMILIES
from tinyllava.parts.language import LANGUAGE_MODELS, LanguageModel
from tinyllava.parts.vision import VISION_ENCODERS, VisionEncoder

Layout = Literal["tinyllava", "llava", "vllm", "onnx", "web", "gguf"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_READERS = {"llava": "transformers' LLaVA", "vllm": "vLLM", "gguf": "llama.cpp"}  # the others are ONNX
_TYPES = {**dict.fromkeys(("onnx", "web"), ("fp32", "fp16", "int8")), "gguf": ("f32", "f16", "q8_0", "q4_0")}
NOT_MEASURED = "not measured"


def reasons_against(
    config: TinyLlavaConfig, layout: Layout, processor: TinyLlavaProcessor | None = None
) -> list[str]:
    """Return why a model cannot be written in a layout; nothing if it can.

    Args:
        processor: looked at too where it is given: llama.cpp has to know the tokenizer and the template, ONNX
            the filter that resizes images.
    """
    if layout == "tinyllava":
        return []
    if layout in ("llava", "vllm"):
        return reasons_against_stock(config, layout)
    reasons = reasons_against_gguf(config) if layout == "gguf" else reasons_against_onnx(config)
    if processor is not None:
        try:
            if layout == "gguf":
                add_tokenizer(gguf.GGUFWriter(None, "llama"), processor, config.text_config.vocab_size)
            else:
                Pixels(processor)
        except CheckpointError as error:
            reasons.append(str(error))
    return reasons


def refuse_what_does_not_fit(config: TinyLlavaConfig, layout: Layout) -> None:
    """Stop before any work.

    Raises:
        CheckpointError: the layout cannot hold the model; lists every reason.
    """
    if reasons := reasons_against(config, layout):
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        raise CheckpointError(
            f"{_READERS.get(layout, 'ONNX')} cannot hold this model:\n{lines}\n"
            "Use `--format tinyllava`, which can hold every model. `tinyllava export DIR --formats` lists "
            "all formats."
        )


def format_rows(config: TinyLlavaConfig, written: Layout, agreement: str) -> list[list[str]]:
    """Return the model card's table: each format, whether it is possible or why not, and the agreement.

    Args:
        written: the layout that was written.
        agreement: how closely it agrees with the model.
    """
    rows = [["format", "possible", "agreement"]]
    for layout in LAYOUTS:
        reasons = reasons_against(config, layout)
        found = agreement if layout == written else "" if reasons else NOT_MEASURED
        rows.append([layout, in_words(reasons, fault_of(config, layout)), found])
    return rows


def part_rows() -> list[list[str]]:
    """Return which formats support each part of the tables, if all other parts are supported.

    Parts to which the same applies share a row.
    """
    encoder, language = VISION_ENCODERS["SigLIP"], LANGUAGE_MODELS["TinyLlama"]
    configs = {
        **{name: _config_of(part, "mlp", language) for name, part in VISION_ENCODERS.items()},
        **{name: _config_of(encoder, name, language) for name in CONNECTORS},
        **{name: _config_of(encoder, "mlp", part) for name, part in LANGUAGE_MODELS.items()},
    }
    names_of: dict[tuple[str, ...], list[str]] = {}
    for name, config in configs.items():
        kind = (
            "encoder" if name in VISION_ENCODERS else "connector" if name in CONNECTORS else "language model"
        )
        # The row says which part it is.
        own = re.compile(rf"{kind} '(?:{name}|{config.vision_config.model_type})':? ")
        cells = []
        for layout in LAYOUTS:
            reasons = [own.sub("", reason) for reason in reasons_against(config, layout)]
            cells.append(in_words(reasons, fault_of(config, layout)))
        names_of.setdefault((kind, *cells), []).append(f"`{name}`")
    return [["part", *LAYOUTS], *([", ".join(names), *cells] for (_, *cells), names in names_of.items())]


def in_words(reasons: Sequence[str], condition: str) -> str:
    """Return yes, yes under a condition, or no with the reasons."""
    if reasons:
        return "no: " + "; ".join(reasons)
    return f"yes, {condition}" if condition else "yes"


def _config_of(encoder: VisionEncoder, connector: str, language: LanguageModel) -> TinyLlavaConfig:
    """Return the config of a model of these parts, as far as the reasons look at it."""
    return TinyLlavaConfig(
        vision_config={"model_type": encoder.family},
        text_config={"model_type": language.family, "tie_word_embeddings": language.tied},
        connector=connector,
        connector_options=dict(CONNECTORS[connector].options),
        encoder_kind=encoder.kind,
        num_prefix_tokens=encoder.num_prefix_tokens,
        lm_head_bias=LANGUAGE_FAMILIES[language.family].head_bias,
    )


def fault_of(config: TinyLlavaConfig, layout: Layout) -> str:
    """Return the condition of an export that only a trial decides; empty if there is none."""
    return EXTRA_CHECK.get(config.vision_config.model_type, "") if layout == "gguf" else ""


"""What ``--dtype`` (ONNX) and ``--quantize`` (GGUF) can be."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table: a layout in one type of weights."""

    layout: Layout
    kind: str = ""
    """Type of the weights where the layout has several."""
    reasons: tuple[str, ...] = ()
    """Why the model cannot be written so; empty if it can."""
    condition: str = ""
    """What has to be there, or to happen, for it to be written."""
    num_bytes: int = 0
    """Of the weights, estimated from the shapes of the tensors until it is measured."""
    agreement: str = NOT_MEASURED

    @property
    def name(self) -> str:
        """Layout and type."""
        return f"{self.layout} {self.kind}".strip()

    @property
    def possible(self) -> str:
        """Yes, yes under a condition, or no."""
        return "no" if self.reasons else in_words((), self.condition)

    @property
    def size(self) -> str:
        """The size in words, empty if the format is not possible."""
        size = f"{self.num_bytes / 1e6:,.1f} MB" if not self.reasons else ""
        return f"about {size}" if size and self.agreement == NOT_MEASURED else size


def list_formats(folder: Path) -> list[Format]:
    """Return one row a format for a checkpoint, before any weight is loaded.

    Raises:
        CheckpointError: the folder's config or processor cannot be read.
    """
    config = TinyLlavaConfig.from_pretrained(folder)
    processor = TinyLlavaProcessor.from_pretrained(folder)
    tensors = list(_read_shapes(folder))
    rows = []
    for layout in LAYOUTS:
        if reasons := reasons_against(config, layout, processor):
            rows.append(Format(layout=layout, reasons=tuple(reasons)))
            continue
        condition = _condition(config, layout)
        for kind in _TYPES.get(layout, ("",)):
            num_bytes = sum(_num_bytes(tensor, config, layout, kind) for tensor in tensors)
            num_bytes += RUNTIME_BYTES if layout == "web" else 0
            rows.append(Format(layout=layout, kind=kind, condition=condition, num_bytes=num_bytes))
    return rows


def _condition(config: TinyLlavaConfig, layout: Layout) -> str:
    packages = {"onnx": PACKAGES, "web": PACKAGES, "gguf": ("xllamacpp",)}.get(layout, ())
    missing = [name for name in packages if find_spec(name) is None]
    if not missing:
        return fault_of(config, layout)
    if layout == "gguf":
        return "not compared without pip install 'tinyllava[gguf]'"
    return "after pip install 'tinyllava[onnx]'"


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    name: str
    shape: Sequence[int]
    item_bytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _read_shapes(folder: Path) -> Iterator[_Tensor]:
    """Yield the tensors in the headers of a checkpoint's weight files."""
    item_bytes = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                part = file.get_slice(name)
                yield _Tensor(
                    name=name, shape=part.get_shape(), item_bytes=item_bytes.get(part.get_dtype(), 4)
                )


def _num_bytes(tensor: _Tensor, config: TinyLlavaConfig, layout: Layout, kind: str) -> int:
    """Return the bytes that a tensor of the checkpoint takes in a layout."""
    if layout == "gguf":
        is_text = "language_model" in tensor.name or tensor.name.startswith("lm_head")
        is_table = "embed_tokens" in tensor.name or tensor.name.startswith("lm_head")
        return bytes_in_gguf(tensor.shape, kind, is_text=is_text, is_table=is_table)
    if layout not in ("onnx", "web"):
        return tensor.size * tensor.item_bytes
    is_table = "embed_tokens" in tensor.name
    plain = tensor.size * {"fp32": 4, "fp16": 2, "int8": 1 if is_table else 4}[kind]
    matrix = plain
    if kind == "int8" and len(tensor.shape) == 2:  # each row in blocks, with a scale of four bytes
        matrix = tensor.shape[0] * -(-tensor.shape[1] // BLOCK) * (BLOCK + 4)
    # Embedding and head are in two graphs, each with its rows.
    return (plain if is_table else 0) + (matrix if not is_table or config.tie_word_embeddings else 0)
