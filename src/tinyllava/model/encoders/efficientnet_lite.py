"""EfficientNet-Lite: a small convolutional vision encoder that runs in a few milliseconds on a CPU core.

Paper: section 3.1, the second kind of vision encoder: a CNN whose output grid of features is reshaped.
Differs: the paper's experiments use CLIP and SigLIP only; this encoder serves the starter.
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
