"""Two vision encoders as one: the features that both have of the same patch, side by side.

Paper: section 3.1 allows any encoder that gives patch features; this one gives those of two.
Differs: the paper's models have one encoder each.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from tinyllava.model.compat import ComposedModel
from tinyllava.parts.folders import written_whole
from tinyllava.parts.vision import VisionEncoder, find_vision_encoder, join_encoders


@strict
class FusedVisionConfig(PreTrainedConfig):
    """Two encoders, cut at their feature layers, and how the second's image follows from the first's."""

    model_type: ClassVar[str] = "fused_vision"
    sub_configs: ClassVar[dict[str, Any]] = {"first_config": AutoConfig, "second_config": AutoConfig}

    first_config: dict[str, Any] | PreTrainedConfig | None = None
    second_config: dict[str, Any] | PreTrainedConfig | None = None
    num_prefix_tokens: list[int] | None = None
    """Outputs that are no patches, of each encoder."""
    image_size: int = 384
    """Side of the first encoder's image."""
    second_image_size: int = 378
    patch_size: int = 14
    hidden_size: int = 2176
    """X1 + X2."""
    means: list[list[float]] | None = None
    """Mean of each encoder's image processor."""
    deviations: list[list[float]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            value = getattr(self, name)
            if isinstance(value, dict):
                value = dict(value)
                setattr(self, name, AutoConfig.for_model(value.pop("model_type"), **value))
        super().__post_init__(**kwargs)


class FusedVisionModel(ComposedModel):
    """Images [I, 3, H, W] of the first encoder's kind to patch features [I, M, X1 + X2]."""

    config_class = FusedVisionConfig
    base_model_prefix = "vision_encoder"
    main_input_name = "pixel_values"

    def __init__(self, config: FusedVisionConfig) -> None:
        super().__init__(config)
        self.first = _without_last_norm(AutoModel.from_config(config.first_config))
        self.second = _without_last_norm(AutoModel.from_config(config.second_config))
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutput:
        """Encode images that the first encoder's image processor made."""
        features = [
            tower(pixels).last_hidden_state[:, num_prefix:]
            for tower, pixels, num_prefix in zip(
                (self.first, self.second),
                (pixel_values, self.to_second(pixel_values)),
                self.config.num_prefix_tokens,
                strict=True,
            )
        ]
        return BaseModelOutput(last_hidden_state=torch.cat(features, dim=-1))

    def to_second(self, pixel_values: Tensor) -> Tensor:
        """Return the images as the second encoder wants them: its mean, deviation and size."""
        (mean1, mean2), (deviation1, deviation2) = (
            [pixel_values.new_tensor(value).view(1, 3, 1, 1) for value in pair]
            for pair in (self.config.means, self.config.deviations)
        )
        pixels = (pixel_values * deviation1 + mean1 - mean2) / deviation2
        side = self.config.second_image_size
        if pixels.shape[-1] == side:
            return pixels
        return interpolate(pixels.float(), size=(side, side), mode="bicubic", antialias=True).to(pixels.dtype)


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config without the names of its stages, which would have to be cut with the layers."""
    stages = ("stage_names", "out_features", "out_indices")
    return {key: value for key, value in config.to_dict().items() if key not in stages}


def _without_last_norm(tower: Any) -> Any:
    """Take out the norm behind the last layer: features are what the layer itself gives."""
    for name in ("post_layernorm", "layernorm"):
        if hasattr(tower, name):
            setattr(tower, name, nn.Identity())
    return tower


def fuse(first: str, second: str, folder: str | Path) -> Path:
    """Write two encoders as one local folder, to be named as any other encoder.

    Raises:
        ConfigError, UnknownNameError, CheckpointError: see ``find_vision_encoder`` and ``join_encoders``.
    """
    spec = join_encoders(find_vision_encoder(first), find_vision_encoder(second))
    with written_whole(Path(folder)) as partial:
        load_fused(spec, torch.float32).save_pretrained(partial)
        AutoImageProcessor.from_pretrained(spec.path, backend="pil").save_pretrained(partial)
    return Path(folder)


def load_fused(spec: VisionEncoder, dtype: torch.dtype) -> FusedVisionModel:
    """Load the two encoders that ``join_encoders`` described, cut at their feature layers, as one."""
    from tinyllava.model.assemble import cut_encoder, load_encoder

    towers = [cut_encoder(load_encoder(member, dtype), member) for member in spec.members]
    processors = [AutoImageProcessor.from_pretrained(member.path, backend="pil") for member in spec.members]
    config = FusedVisionConfig(
        first_config=_plain(towers[0].config),
        second_config=_plain(towers[1].config),
        num_prefix_tokens=[member.num_prefix_tokens for member in spec.members],
        image_size=spec.image_size_px,
        second_image_size=spec.members[1].image_size_px,
        patch_size=spec.patch_size_px,
        hidden_size=spec.width,
        means=[list(p.image_mean) for p in processors],
        deviations=[list(p.image_std) for p in processors],
    )
    with torch.device("meta"):
        model = FusedVisionModel(config)
    model.first, model.second = map(_without_last_norm, towers)
    model.eval()
    return model


AutoConfig.register(FusedVisionConfig.model_type, FusedVisionConfig)
AutoModel.register(FusedVisionConfig, FusedVisionModel)
