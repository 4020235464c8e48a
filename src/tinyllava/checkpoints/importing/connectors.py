"""Match published connectors to this package's: the name, the options, and the new tensor names of each.

Differs: two published connectors lack a layer of the more general connector here. That layer is filled in so
that it changes nothing, and the report names it.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from tinyllava.checkpoints.importing.tensors import Tensors, whole
from tinyllava.errors import CheckpointError

_LINEAR = {"0.": "linear.", "": "linear."}
_MLP = {"0.": "linear_1.", "2.": "linear_2."}
_BENCH_RESAMPLER = {
    r"^resampler_blocks\.": "layers.",
    r"\.norm_image\.": ".norm_patches.",
    r"\.norm_hidden\.": ".norm_queries.",
    r"^post_norm\.": "norm.",
    r"^final_proj\.": "output.",
}
_FACTORY_RESAMPLER = {
    r"^latents$": "queries",
    r"^linear\.": "input.",
    r"\.norm_latents\.": ".norm_queries.",
    r"^(layers\.\d+)\.0\.": r"\1.",
    r"^(layers\.\d+)\.1\.": r"\1.feed_forward.",
}
_QFORMER = {
    r"^query_tokens$": "queries",
    r"^projector\.": "output.",
    r"^bert\.encoder\.": "former.encoder.",
    r"^bert\.embeddings\.LayerNorm\.": "former.layernorm.",
    r"attention\.self\.": "attention.attention.",
}
_BERT_LAYERS = {768: 12}
"""Layers of the BERT that Factory takes, by its width; its config.json does not say."""
_BERT_HEAD_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Found:
    """The connector of this package that computes the same as the source's."""

    name: str
    options: dict[str, int] = field(default_factory=dict)
    tensors: Tensors
    """The source's, under our names."""
    filled: Tensors = field(default_factory=dict)
    """Tensors of a layer that the source's lacks, with the values at which it changes nothing."""


def name_connector(kind: str, tensors: Tensors, where: str) -> Found:
    """Return our connector for a name that all published code shares.

    Raises:
        CheckpointError: a connector that is not here.
    """
    if kind == "mlp2x_gelu":
        return Found(name="mlp", tensors=_rename_starts(tensors, _MLP))
    if kind in ("linear", "mlp1x_gelu"):
        return Found(name="linear", tensors=_rename_starts(tensors, _LINEAR))
    raise CheckpointError(
        f"{where}: connector {kind!r} cannot be imported; allowed: linear, mlp1x_gelu, mlp2x_gelu, "
        "resampler, and TinyLLaVA Factory's qformer."
    )


def bench_resampler(config: dict[str, Any], tensors: Tensors, where: str) -> Found:
    """TinyLLaVABench's resampler, of the sizes in config.json or those that its code falls back to."""
    width = whole(config, "resampler_hidden_size", 768, where)
    options = {
        "num_queries": whole(config, "num_queries", 128, where),
        "num_layers": whole(config, "num_resampler_layers", 3, where),
        "width": width,
        "num_heads": 8 if width == 512 else 12,
    }
    return Found(name="bench_resampler", options=options, tensors=_replace(tensors, _BENCH_RESAMPLER))


def factory_resampler(config: dict[str, Any], tensors: Tensors, where: str) -> Found:
    """TinyLLaVA Factory's resampler: at the language model's width throughout, without a last layer."""
    width = whole(config, "hidden_size", config["text_config"].get("hidden_size"), where)
    options = {
        "num_queries": whole(config, "num_queries", 128, where),
        "num_layers": whole(config, "num_resampler_layers", 3, where),
        "width": width,
        "num_heads": 8,
        "head_width": 64,
    }
    filled = {"output.weight": torch.eye(width), "output.bias": torch.zeros(width)}
    return Found(
        name="resampler", options=options, tensors=_replace(tensors, _FACTORY_RESAMPLER), filled=filled
    )


def factory_qformer(tensors: Tensors, where: str) -> Found:
    """TinyLLaVA Factory's Q-Former: a BERT whose norm of the queries has no weights.

    Raises:
        CheckpointError: no queries, or layers that are missing altogether.
    """
    queries = tensors.get("query_tokens")
    if queries is None or queries.ndim != 3:
        raise CheckpointError(f"{where}: connector qformer: query_tokens [1, Q, W] is missing.")
    _, num_queries, width = queries.shape
    indices = {int(at[1]) for name in tensors if (at := re.search(r"encoder\.layer\.(\d+)\.", name))}
    num_layers = 1 + max(indices, default=-1)
    if num_layers != _BERT_LAYERS.get(width, max(1, num_layers)):
        raise CheckpointError(
            f"{where}: connector qformer: {num_layers} layers of width {width}; expected "
            f"{_BERT_LAYERS.get(width, 'at least 1')}. Download the folder again."
        )
    options = {
        "num_queries": num_queries,
        "num_layers": num_layers,
        "width": width,
        "num_heads": max(1, width // _BERT_HEAD_WIDTH),
        "cross_every": 2,
    }
    renamed = _replace(tensors, _QFORMER)
    neutral = {"former.layernorm.weight": torch.ones(width), "former.layernorm.bias": torch.zeros(width)}
    filled = {name: tensor for name, tensor in neutral.items() if name not in renamed}
    return Found(name="qformer", options=options, tensors=renamed, filled=filled)


def _rename_starts(tensors: Tensors, prefixes: dict[str, str]) -> Tensors:
    """Return the tensors with the first prefix that a name begins with exchanged."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        renamed[name if old is None else prefixes[old] + name.removeprefix(old)] = tensor
    return renamed


def _replace(tensors: Tensors, pieces: dict[str, str]) -> Tensors:
    """Return the tensors with their names rewritten by regular expressions, in the order of ``pieces``."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        new = name
        for old, piece in pieces.items():
            new = re.sub(old, piece, new)
        renamed[new] = tensor
    return renamed
