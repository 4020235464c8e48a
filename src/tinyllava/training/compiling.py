"""Layers of the language model as compiled code (``torch.compile``), if the hardware settings ask for it.

Paper: none. Norms, rotary embeddings, activations and additions of a layer become a few fused kernels, which
also keep less for the backward pass. Losses and gradients are equal up to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tinyllava.errors import ConfigError
from tinyllava.model.compat import decoder_layers
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

BACKEND = "inductor"
_OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Dropout draws the numbers that it draws without compiling."""
_FIX = "Set hardware.compile False, or install what is missing (apt install g++ python3-dev)."


def check_compiler(device: torch.device) -> None:
    """Compile one line of code and its backward pass.

    Raises:
        ConfigError: it cannot be compiled here, for want of a C++ compiler, Python's headers or Triton.
    """

    def double(values: Tensor) -> Tensor:
        return values.sin() * 2 + 1

    try:
        _compile(double)(torch.ones(8, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # what a compiler or its absence raises is documented nowhere
        said = [line for line in str(error).splitlines() if line.strip() and not line.startswith("backend=")]
        reason = said[0].strip().rstrip(".") if said else type(error).__name__
        raise ConfigError(f"hardware.compile: this machine cannot compile ({reason}). {_FIX}") from error


def compile_layers(model: TinyLlavaForConditionalGeneration) -> Callable[[], None]:
    """Compile each layer of the language model, for any batch and length, and return what undoes it.

    Layers of one form share their code. A layer is compiled when it first runs.
    """
    layers: list[Any] = list(decoder_layers(model.language_model))
    for layer in layers:
        layer.forward = _compile(layer.forward)

    def undo() -> None:
        for layer in layers:
            del layer.forward

    return undo


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    options = _OPTIONS if BACKEND == "inductor" else None
    return torch.compile(function, backend=BACKEND, dynamic=True, options=options)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run layers as they are, for passes of other shapes such as answers with a cache."""
    with torch.compiler.set_stance("force_eager"):
        yield
