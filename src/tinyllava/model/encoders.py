"""Vision encoders that transformers does not have: EfficientNet-Lite, and two fused encoders.

Paper: section 3.1 allows any encoder that gives patch features. EfficientNet-Lite is its second kind, a CNN
whose output grid is reshaped. A fused encoder combines the features of two encoders.
Differs: the paper's experiments use only CLIP and SigLIP, one encoder per model. EfficientNet-Lite serves the
starter.
Source: EfficientNet-Lite of TensorFlow Lite (no squeeze-and-excitation, ReLU6, stem and head not scaled).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

if TYPE_CHECKING:
    from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor

from tinyllava.model.compat import ComposedModel
from tinyllava.parts.folders import written_whole
from tinyllava.parts.vision import VisionEncoder, find_vision_encoder, join_encoders


class BlockGroup(NamedTuple):
    """One row of the architecture table: blocks that share everything but their first stride."""

    num_blocks: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


# The seven groups of EfficientNet-B0, before the multipliers of the larger variants.
GROUPS = (
    BlockGroup(1, 3, 1, 1, 16),
    BlockGroup(2, 3, 2, 6, 24),
    BlockGroup(2, 5, 2, 6, 40),
    BlockGroup(3, 3, 2, 6, 80),
    BlockGroup(3, 5, 1, 6, 112),
    BlockGroup(4, 5, 2, 6, 192),
    BlockGroup(1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
STRIDE = 32


class EfficientNetLiteConfig(PreTrainedConfig):
    """Size of an EfficientNet-Lite; `image_size` in pixels is a default, any size works.

    Lite0 has the multipliers (width 1.0, depth 1.0), Lite1 (1.0, 1.1), Lite2 (1.1, 1.2).
    """

    model_type: ClassVar[str] = "efficientnet_lite"

    width_multiplier: float = 1.0
    depth_multiplier: float = 1.0
    image_size: int = 224
    hidden_size: int = 1280
    num_channels: int = 3
    batch_norm_eps: float = 1e-3

    @property
    def patch_size(self) -> int:
        """Pixels of the image per cell of the last grid, in each direction."""
        return STRIDE


def scale_channels(channels: int, multiplier: float) -> int:
    """Scale a channel count to the nearest multiple of 8 that loses at most a tenth (TensorFlow's rule)."""
    scaled = channels * multiplier
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class ConvolutionNorm(nn.Module):
    """A convolution padded as TensorFlow's SAME, batch normalisation and, unless `linear`, ReLU6."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        eps: float,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.linear = kernel, stride, linear
        padding = kernel // 2 if stride == 1 else 0
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=eps, momentum=0.01)

    def forward(self, grid: Tensor) -> Tensor:
        """[I, inputs, H, W] -> [I, outputs, ceil(H / stride), ceil(W / stride)]."""
        if self.stride > 1:
            # SAME puts the odd pixel of padding at the right and the bottom, which nn.Conv2d cannot express.
            amounts = [
                max((math.ceil(size / self.stride) - 1) * self.stride + self.kernel - size, 0)
                for size in (grid.shape[3], grid.shape[2])
            ]
            grid = functional.pad(grid, [part for a in amounts for part in (a // 2, a - a // 2)])
        if torch.is_grad_enabled() or self.norm.training:
            grid = self.norm(self.convolution(grid))
            return grid if self.linear else functional.relu6(grid)
        grid = self._convolve_folded(grid)
        return grid if self.linear else functional.relu6(grid, inplace=True)

    def _convolve_folded(self, grid: Tensor) -> Tensor:
        """Convolve with the norm's scale and shift folded in: the same numbers in half the time on a CPU."""
        norm, convolution = self.norm, self.convolution
        assert norm.running_mean is not None  # nn.BatchNorm2d can be told to keep none
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return functional.conv2d(
            grid,
            convolution.weight * scale[:, None, None, None],
            norm.bias - norm.running_mean * scale,
            convolution.stride,
            convolution.padding,
            groups=convolution.groups,
        )


class InvertedBottleneck(nn.Module):
    """MobileNet's inverted residual block: expand, filter each channel, project; residual if shapes allow."""

    def __init__(
        self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int, eps: float
    ) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = ConvolutionNorm(inputs, width, eps) if expansion != 1 else None
        self.depthwise = ConvolutionNorm(width, width, eps, kernel=kernel, stride=stride, groups=width)
        self.project = ConvolutionNorm(width, outputs, eps, linear=True)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, grid: Tensor) -> Tensor:
        """[I, inputs, H, W] -> [I, outputs, ceil(H / stride), ceil(W / stride)]."""
        hidden = grid if self.expand is None else self.expand(grid)
        hidden = cast(Tensor, self.project(self.depthwise(hidden)))
        return hidden + grid if self.is_residual else hidden


def build_blocks(config: EfficientNetLiteConfig) -> Iterator[InvertedBottleneck]:
    """Yield the blocks of the variant; the first and the last group keep their length in every variant."""
    inputs = STEM_CHANNELS
    for index, group in enumerate(GROUPS):
        is_fixed = index in (0, len(GROUPS) - 1)
        num_blocks = group.num_blocks if is_fixed else math.ceil(group.num_blocks * config.depth_multiplier)
        outputs = scale_channels(group.channels, config.width_multiplier)
        for block in range(num_blocks):
            stride = group.stride if block == 0 else 1
            yield InvertedBottleneck(
                inputs, outputs, group.expansion, group.kernel_size, stride, config.batch_norm_eps
            )
            inputs = outputs


def flatten_grid(grid: Tensor) -> Tensor:
    """[I, X, H, W] -> [I, M, X] with M = H * W, row by row."""
    return grid.flatten(2).transpose(1, 2)


class EfficientNetLiteModel(PreTrainedModel):
    """The encoder V of eq. 1 as a CNN: images in, a flattened grid of features out.

    `last_hidden_state` is the grid before the classifier's pooling, [I, M, 1280] with
    M = ceil(height / 32) * ceil(width / 32).
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "vision_encoder"
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        eps = config.batch_norm_eps
        self.stem = ConvolutionNorm(config.num_channels, STEM_CHANNELS, eps, kernel=3, stride=2)
        self.blocks = nn.ModuleList(build_blocks(config))
        last = scale_channels(GROUPS[-1].channels, config.width_multiplier)
        self.head = ConvolutionNorm(last, config.hidden_size, eps)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, **_: object
    ) -> BaseModelOutput:
        """Encode images [I, 3, H, W], normalised as (pixel - 127) / 128 with pixels from 0 to 255.

        With `output_hidden_states` the flattened grids after the stem, each block and the head are returned
        too; their M and X differ from layer to layer.
        """
        grid = self.stem(pixel_values.to(self.dtype).contiguous(memory_format=torch.channels_last))
        grids = [grid]
        for block in self.blocks:
            grid = block(grid)
            if output_hidden_states:
                grids.append(grid)
        grid = self.head(grid)
        return BaseModelOutput(
            last_hidden_state=flatten_grid(grid),
            hidden_states=tuple(map(flatten_grid, [*grids, grid])) if output_hidden_states else None,
        )


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)


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
        self._statistics: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
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
        mean1, mean2, deviation1, deviation2 = self._statistics_for(pixel_values)
        pixels = (pixel_values * deviation1 + mean1 - mean2) / deviation2
        side = self.config.second_image_size
        if pixels.shape[-1] == side:
            return pixels
        return interpolate(pixels.float(), size=(side, side), mode="bicubic", antialias=True).to(pixels.dtype)

    def _statistics_for(self, pixels: Tensor) -> list[Tensor]:
        """Return both means and both deviations [1, 3, 1, 1].

        They are copied to a device once, because the host waits for each copy.
        """
        place = (pixels.device, pixels.dtype)
        found = self._statistics.get(place)
        if found is None:
            values = (*self.config.means, *self.config.deviations)
            with torch.inference_mode(False):  # training may be next
                found = [
                    torch.tensor(v, device=pixels.device, dtype=pixels.dtype).view(1, 3, 1, 1) for v in values
                ]
            if not torch.compiler.is_compiling():  # where there are no values to keep
                self._statistics[place] = found
        return found


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config without the names of its stages, which would have to be cut with the layers."""
    stages = ("stage_names", "out_features", "out_indices")
    return {key: value for key, value in config.to_dict().items() if key not in stages}


def _without_last_norm(tower: Any) -> Any:
    """Remove the norm after the last layer: features are what the layer itself gives."""
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
