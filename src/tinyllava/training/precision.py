"""What a stage computes in: the precision, TF32 or exact fp32, and frozen weights held in half precision.

Paper: section 4.1.2 freezes V_phi, and in pre-training F_theta; the published code holds what is frozen in
half precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tinyllava.model.devices import multiplies_bf16
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What matrix products compute in, by the name of the precision; none for fp32 and tf32."""


def choose_precision(wanted: str) -> str:
    """Return fp32, tf32, bf16 or fp16; 'auto' is bf16 where the hardware multiplies it faster, else fp32."""
    if wanted != "auto":
        return wanted
    return "bf16" if multiplies_bf16("cuda" if torch.cuda.is_available() else "cpu") else "fp32"


def computing_in(precision: str, device: torch.device) -> torch.autocast:
    """Return autocast to the precision, which does nothing in fp32 and tf32."""
    half = HALF.get(precision)
    return torch.autocast(device.type, half, enabled=half is not None)


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Let an NVIDIA GPU round the inputs of fp32 products to TF32 if that is the precision, and else never.

    PyTorch rounds those of convolutions by default. Products that stay in fp32 within bf16, such as the
    angles of rotary embeddings, are exact too.
    """
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = precision == "tf32"
        yield
    finally:
        for kind, was_allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = was_allowed


def hold_frozen_in_half(model: TinyLlavaForConditionalGeneration, precision: str) -> Callable[[], None]:
    """Hold the weights of frozen linear layers in half precision while a stage trains.

    Autocast would round them so in every forward pass: losses and gradients are the same, bit by bit. The
    device holds half of their bytes, and no copy for the backward pass. Embeddings and norms, which autocast
    leaves in fp32, stay, and so does the small connector.

    Returns:
        A function that gives the model its own weights back, on the host. Weights that half precision cannot
        represent stay there meanwhile; those of a model published in bf16 need no copy.
    """
    half = HALF.get(precision)
    held: list[tuple[nn.Parameter, Tensor | None]] = []
    for parameter in _rounded_by_autocast(model) if half else ():
        rounded = parameter.data.to(half)
        is_exact = torch.equal(rounded.float(), parameter.data)
        held.append((parameter, None if is_exact else parameter.data.cpu()))
        parameter.data = rounded

    def give_back() -> None:
        if held:
            model.to("cpu")
        for parameter, original in held:
            parameter.data = parameter.data.float() if original is None else original

    return give_back


def _rounded_by_autocast(model: TinyLlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Return the frozen fp32 weights and biases that nothing but a linear layer reads."""
    parts = (model.vision_encoder, model.language_model, model.lm_head)
    linears = [m for part in parts for m in part.modules() if type(m) is nn.Linear]
    inside = {id(p): p for linear in linears for p in linear.parameters(recurse=False)}
    elsewhere = {id(p) for m in model.modules() if type(m) is not nn.Linear for p in m.parameters(False)}
    # Pixels are given to an encoder in the precision of its first parameter.
    elsewhere.add(id(next(model.vision_encoder.parameters())))
    return [
        p
        for key, p in inside.items()
        if key not in elsewhere and not p.requires_grad and p.dtype == torch.float32
    ]
