"""Where a model of transformers keeps its layers, and what the last one of an encoder gives."""

from typing import Any

from torch import Tensor, nn

from tinyllava.parts.families import LANGUAGE_FAMILIES, VISION_FAMILIES


def encoder_layers(vision_tower: nn.Module) -> nn.ModuleList:
    """Return the layers of a transformer encoder."""
    family = VISION_FAMILIES.get(_model_type(vision_tower))
    return _layers(vision_tower, family.layers if family else "")


def decoder_layers(language_model: nn.Module) -> nn.ModuleList:
    """Return the layers of a language model without its head."""
    family = LANGUAGE_FAMILIES.get(_model_type(language_model))
    return _layers(language_model, family.layers if family else "")


def _model_type(model: nn.Module) -> str:
    config: Any = model.config
    return str(config.model_type)


def _layers(model: nn.Module, place: str) -> nn.ModuleList:
    """Return the list at the place that the family's record names, or the first one of the right length."""
    config: Any = model.config
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and (not place or f".{name}".endswith(f".{place}"))
    ]
    assert found, f"{type(model).__name__} has no list of {config.num_hidden_layers} layers"
    return found[0]


def last_layer_output(vision_tower: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return what the last layer gives, before the norm that some encoders put behind it.

    ``output_hidden_states=True`` would give the same and keep every other layer's output in memory too.
    """
    caught: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = encoder_layers(vision_tower)[-1].register_forward_hook(keep)
    try:
        vision_tower(pixel_values)
    finally:
        handle.remove()
    return caught[0]
