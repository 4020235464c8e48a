"""The list of formats of a checkpoint: possible or not, how large, how close; before any weight is loaded."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from safetensors import safe_open

from tinyllava.checkpoints.exporting.formats import (
    LAYOUTS,
    NOT_MEASURED,
    Layout,
    fault_of,
    in_words,
    reasons_against,
)
from tinyllava.checkpoints.exporting.gguf import bytes_in_gguf
from tinyllava.checkpoints.exporting.onnx import PACKAGES
from tinyllava.checkpoints.exporting.web import RUNTIME_BYTES
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.processing import TinyLlavaProcessor

_TYPES = {**dict.fromkeys(("onnx", "web"), ("fp32", "fp16", "int8")), "gguf": ("f32", "f16", "q8_0", "q4_0")}
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
        """The size in words, empty for what cannot be."""
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
        return "to compare it: pip install 'tinyllava[gguf]'"
    return "with pip install 'tinyllava[onnx]'"


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    name: str
    shape: Sequence[int]
    item_bytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _read_shapes(folder: Path) -> Iterator[_Tensor]:
    """Yield what the heads of a checkpoint's weight files say."""
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
    each = {"fp32": 4, "fp16": 2, "int8": 1 if len(tensor.shape) == 2 else 4}[kind]
    # Embedding and head are in two graphs, each with its rows.
    copies = 2 if "embed_tokens" in tensor.name and config.tie_word_embeddings else 1
    return tensor.size * each * copies
