"""Which formats can hold a model, and why the others cannot.

The reasons are those of the modules that write the formats: what refuses a model also fills every table.
"""

import re
from collections.abc import Sequence
from typing import Literal, get_args

import gguf

from tinyllava.checkpoints.exporting.gguf import EXTRA_CHECK, reasons_against_gguf
from tinyllava.checkpoints.exporting.gguf_text import add_tokenizer
from tinyllava.checkpoints.exporting.graphs import Pixels
from tinyllava.checkpoints.exporting.onnx import reasons_against_onnx
from tinyllava.checkpoints.exporting.stock import reasons_against_stock
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
            "`--format tinyllava` writes the layout that can; `tinyllava export DIR --formats` lists all."
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
    """Return which formats take each part of the tables, beside parts that all formats take.

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
    """Return on what an export depends that is tried rather than known."""
    return EXTRA_CHECK.get(config.vision_config.model_type, "") if layout == "gguf" else ""
