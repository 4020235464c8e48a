"""The adapters of a stage in PEFT's own two files, a folder for each component that has some.

Differs: the paper's models are fine-tuned in full. Merged into the model's weights adapters cannot be taken
out again; these files keep them apart, for PEFT itself and for servers that load adapters.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

_PREFIX = "base_model.model."  # what PEFT's wrapper puts in front of a module's name


def save_adapters(folder: Path, model: TinyLlavaForConditionalGeneration) -> None:
    """Write ``folder/COMPONENT/adapter_config.json`` and ``adapter_model.safetensors``, where there are some.

    The layers are listed one by one, so that PEFT finds the same ones whatever else the model has.

    Args:
        model: with the adapters of a stage in place, not merged yet.
    """
    for component, config in getattr(model, "peft_config", {}).items():
        tensors = {}
        for name, parameter in model.named_parameters():
            for factor in ("lora_A", "lora_B"):
                layer, found, rest = name.partition(f".{factor}.{component}.")
                if found:
                    tensors[f"{_PREFIX}{layer}.{factor}.{rest}"] = parameter.detach().contiguous()
        layers = sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors})
        settings = {**config.to_dict(), "target_modules": layers, "inference_mode": True}
        (folder / component).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / component / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True)
        (folder / component / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
