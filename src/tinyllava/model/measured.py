"""Sizes of a language model of an unfamiliar family: built without weights, and counted.

Paper: section 3.1, the small-scale LLM; Table A1 names sizes. Familiar families have closed forms in
``tinyllava.planning.sizes``, which need no torch.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tinyllava.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class MeasuredSize:
    """Parameters of a language model, counted."""

    total: int
    per_layer: int
    """Mean over the layers: in some families they differ."""
    idle_per_layer: int
    """Of a mixture of experts, those of the experts that a token is not sent to."""
    num_layers: int
    linears: tuple[tuple[int, int], ...]
    """(Inputs, outputs) of every linear layer that adapters are put on."""


@lru_cache(maxsize=16)
def measure_language_model(folder: Path) -> MeasuredSize:
    """Build the model of a folder's config.json on the meta device and count it.

    Raises:
        CheckpointError: transformers has no such family, or cannot build it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot build a language model of it ({error}); choose "
            "one of a family that it has."
        ) from error
    num_layers = config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    layers = list(lists[0]) if lists else []
    inside = sum(p.numel() for layer in layers for p in layer.parameters())
    experts = sum(
        p.numel() for layer in layers for name, p in layer.named_parameters() if ".experts." in f".{name}"
    )
    num_experts = getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0) or 1
    idle = experts - experts * getattr(config, "num_experts_per_tok", num_experts) // num_experts
    head = model.get_output_embeddings()
    return MeasuredSize(
        total=sum(p.numel() for p in model.parameters()),
        per_layer=inside // num_layers,
        idle_per_layer=idle // num_layers,
        num_layers=num_layers,
        linears=tuple(
            (module.in_features, module.out_features)
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
        ),
    )
