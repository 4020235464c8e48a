"""Convert the starter's weights, once, into ordinary local Hugging Face folders.

Paper: section 3.1; the parts V and F of the starter's model.
Everything after this step uses ``from_pretrained`` on a folder and does not depend on packages.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tinyllava.errors import PackageError
from tinyllava.files import cache_folder
from tinyllava.parts.folders import written_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

IMAGE_SIZE_PX = 224
CONTEXT_TOKENS = 8192
# Width and depth multipliers of the published variants.
MULTIPLIERS = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}


def convert_language_model(package: Path, cache: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in float32, converted from the package's GGUF file."""
    return _convert_once("SmolLM2-135M-Instruct", cache, lambda folder: _save_language_model(package, folder))


def convert_vision_encoder(
    package: Path, variant: int = 2, image_size_px: int = IMAGE_SIZE_PX, cache: Path | None = None
) -> Path:
    """Return the folder of EfficientNet-Lite`variant` with an image processor of the given size."""
    name = f"EfficientNet-Lite{variant}-{image_size_px}px"
    return _convert_once(
        name, cache, lambda folder: _save_vision_encoder(package, variant, image_size_px, folder)
    )


def _convert_once(name: str, cache: Path | None, save: Callable[[Path], None]) -> Path:
    """Let `save` fill the folder if it does not exist. An existing folder is complete."""
    folder = (cache or cache_folder()) / "models" / name
    if not folder.is_dir():
        with written_whole(folder) as partial:
            partial.mkdir(parents=True, exist_ok=True)
            save(partial)
    return folder


def _only_file(package: Path, pattern: str) -> Path:
    found = sorted(package.rglob(pattern))
    if len(found) != 1:
        raise PackageError(
            f"{package}: expected one file {pattern}, found {len(found)}; delete it and run again"
        )
    return found[0]


def _save_language_model(package: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = _only_file(package, "*.gguf")
    opened = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are dense by now, but transformers still calls the model quantised and does not save it.
    values = {k: v for k, v in opened.config.to_dict().items() if k != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    model.load_state_dict(opened.state_dict())
    model.generation_config = opened.generation_config
    tokenizer.model_max_length = CONTEXT_TOKENS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_vision_encoder(package: Path, variant: int, image_size_px: int, folder: Path) -> None:
    import torch
    from transformers import SiglipImageProcessorPil

    from tinyllava.model.encoders import EfficientNetLiteConfig, EfficientNetLiteModel

    width, depth = MULTIPLIERS[variant]
    config = EfficientNetLiteConfig(
        width_multiplier=width, depth_multiplier=depth, image_size=image_size_px, dtype="float32"
    )
    state = torch.load(_only_file(package, "*.pth"), map_location="cpu", weights_only=True)
    model = EfficientNetLiteModel(config)
    model.load_state_dict(rename_weights(state))
    model.save_pretrained(folder)
    # Resize, then (pixel - 127) / 128: the plainest of transformers' PIL processors does just that.
    SiglipImageProcessorPil(
        size={"height": image_size_px, "width": image_size_px},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    ).save_pretrained(folder)


def rename_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the package's tensors the names of `EfficientNetLiteModel` and leave out the classifier `_fc`."""
    parts = {
        r"^_conv_stem\.": "stem.convolution.",
        r"^_bn0\.": "stem.norm.",
        r"^_conv_head\.": "head.convolution.",
        r"^_bn1\.": "head.norm.",
        r"^_blocks\.": "blocks.",
        r"\._(expand|depthwise|project)_conv\.": r".\1.convolution.",
        r"\._bn0\.": ".expand.norm.",
        r"\._bn1\.": ".depthwise.norm.",
        r"\._bn2\.": ".project.norm.",
    }
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith("_fc."):
            for pattern, replacement in parts.items():
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
    return renamed
