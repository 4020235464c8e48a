"""Layers of language model and encoder as compiled code (``torch.compile``), if a run asks for it.

Paper: none. Norms, rotary embeddings, activations and additions of a layer become a few fused kernels, which
also keep less for the backward pass. Losses and gradients are equal up to rounding. Where activations are
recomputed, the compiled layer is what runs twice, so it may still hand over to code that is not compiled.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyllava.errors import ConfigError
from tinyllava.model.compat import decoder_layers, encoder_layers, own_forward, set_checkpointing
from tinyllava.model.encoders import FusedVisionModel
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

BACKEND = "inductor"
_OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Dropout draws the numbers that it draws without compiling."""
_MOST_FORMS = 32
"""Of the code of layers of one kind: trained or not, with adapters or not, for one row or more. Beyond the
limit, by default 8, PyTorch would run the rest as it is."""
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


class _Compiled:
    """The forward pass of a layer as compiled code; a copy of the layer gets code of its own."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.run = layer, _compile(own_forward(layer))
        self.recomputes = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:  # those of the first layer may be a part of a tensor: no code for these alone
            args = (args[0].contiguous(), *args[1:])
        if self.recomputes and self.layer.training and torch.is_grad_enabled():
            return checkpoint(self.run, *args, use_reentrant=False, **kwargs)
        return self.run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Compiled":
        copied = _Compiled(copy.deepcopy(self.layer, memo))
        copied.recomputes = self.recomputes
        return copied


def compile_layers(model: TinyLlavaForConditionalGeneration) -> Callable[[], None]:
    """Compile each layer of language model and encoder, for any batch and length, and return what undoes it.

    Layers of one form share their code. A layer is compiled when it first runs. A CNN stays as it is. Where a
    model is divided among processes (FSDP2), its layers are compiled before: the weights of a layer are then
    gathered around its code and not within it.
    """
    layers: list[Any] = list(_layers(model))
    for layer in layers:
        layer.forward = _Compiled(layer)
    config: Any = torch.compiler.config
    forms = config.patch(recompile_limit=_MOST_FORMS)
    forms.__enter__()

    def undo() -> None:
        forms.__exit__(None, None, None)
        torch.compiler.reset()  # the code of this stage counts no more
        for layer in layers:
            del layer.forward

    return undo


def recompute(model: TinyLlavaForConditionalGeneration, is_on: bool) -> None:
    """Recompute a model's activations in the backward pass, or keep them; its layers may be compiled.

    transformers would recompute within what is compiled, where no code may be left out of it.
    """
    set_checkpointing(model, is_on)
    for layer in _layers(model):
        compiled: Any = layer.forward
        if isinstance(compiled, _Compiled):
            compiled.recomputes = is_on
            layer.gradient_checkpointing = False  # type: ignore[assignment]


def _layers(model: TinyLlavaForConditionalGeneration) -> Iterator[nn.Module]:
    yield from decoder_layers(model.language_model)
    encoder: Any = model.vision_encoder
    if isinstance(encoder, FusedVisionModel):
        yield from encoder_layers(encoder.first)
        yield from encoder_layers(encoder.second)
    elif model.config.encoder_kind == "transformer":
        yield from encoder_layers(encoder)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    options = _OPTIONS if BACKEND == "inductor" else None
    return torch.compile(function, backend=BACKEND, dynamic=True, options=options)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run layers as they are, for passes of other shapes such as answers with a cache."""
    with torch.compiler.set_stance("force_eager"):
        yield
