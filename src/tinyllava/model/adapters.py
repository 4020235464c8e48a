"""The adapters of a stage in PEFT's own two files, a folder for each component that has some.

Differs: the paper's models are fine-tuned in full. Merged into the model's weights adapters cannot be taken
out again; these files keep them apart, for PEFT itself and for servers that load adapters.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from tinyllava.files import whole_file
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.trained_rows import TrainedRows

_PREFIX = "base_model.model."  # what PEFT's wrapper puts in front of a module's name


def save_adapters(folder: Path, model: TinyLlavaForConditionalGeneration) -> None:
    """Write ``folder/COMPONENT/adapter_config.json`` and ``adapter_model.safetensors``, where there are some.

    The layers are listed one by one, so that PEFT finds the same ones whatever else the model has. What was
    trained in full beside the adapters (the connector) is PEFT's ``modules_to_save`` of the last component's,
    so that the adapters are never opened without it.

    Args:
        model: with the adapters of a stage in place, not merged yet.
    """
    configs = getattr(model, "peft_config", {})
    for component, config in configs.items():
        beside = _trained_beside(model) if component == list(configs)[-1] else []
        tensors = {
            f"{_PREFIX}{module}.{name}": tensor.detach().contiguous()
            for module in beside
            for name, tensor in _state(model.get_submodule(module)).items()
        }
        for name, parameter in model.named_parameters():
            for factor in ("lora_A", "lora_B"):
                layer, found, rest = name.partition(f".{factor}.{component}.")
                if found:
                    tensors[f"{_PREFIX}{layer}.{factor}.{rest}"] = parameter.detach().contiguous()
        adapted = (name for name in tensors if ".lora_" in name)
        layers = sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in adapted})
        settings = {**config.to_dict(), "target_modules": layers, "inference_mode": True}
        if beside:
            settings["modules_to_save"] = beside
        (folder / component).mkdir(parents=True, exist_ok=True)
        with whole_file(folder / component / "adapter_model.safetensors") as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True)
        (folder / component / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors as the model has them without what trains single rows."""
    return module.state_when_merged() if isinstance(module, TrainedRows) else module.state_dict()


def _trained_beside(model: nn.Module) -> list[str]:
    """Return the largest modules without adapters that hold everything else that was trained."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    rows = [name for name, module in model.named_modules() if isinstance(module, TrainedRows)]
    trained -= {f"{name}.rows" for name in rows}
    found: list[str] = []
    for module_name, module in model.named_modules():  # outer ones come first
        inside = {f"{module_name}.{name}" for name, _ in module.named_parameters()}
        own = {f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)}
        is_whole = bool(inside) and inside <= trained
        if (is_whole or own & trained) and not module_name.startswith(tuple(f"{name}." for name in found)):
            found.append(module_name)
    return found + rows
