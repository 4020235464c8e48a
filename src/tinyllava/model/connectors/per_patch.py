"""Connectors that map each patch, or each block of patches, to one image token.

Paper: section 3.1 and section 4.1.1. Section 4.2.1 asks for "further exploration of diverse connectors":
pixel shuffle and pooling produce fewer tokens.
"""

from math import isqrt

from torch import Tensor, nn


class MLP(nn.Module):
    """[I, M, X] -> [I, M, D]: the paper's "two-layer Multi-Layer Perceptron (MLP) with GELU activation".

    The names of the layers are those of transformers' LLaVA, so that its class opens our checkpoints.
    """

    def __init__(self, vision_width: int, language_width: int, num_patches: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(language_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features [I, M, X] to image tokens [I, M, D]."""
        tokens: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return tokens


class Linear(nn.Module):
    """[I, M, X] -> [I, M, D]: one linear layer, the connector of the first LLaVA."""

    def __init__(self, vision_width: int, language_width: int, num_patches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features [I, M, X] to image tokens [I, M, D]."""
        tokens: Tensor = self.linear(features)
        return tokens


class PixelShuffle(nn.Module):
    """[I, M, X] -> [I, M / block^2, D]: space to depth, then the MLP. Each token sees a block of patches."""

    def __init__(self, vision_width: int, language_width: int, num_patches: int, *, block: int) -> None:
        super().__init__()
        self.side, self.block = isqrt(num_patches), block
        self.linear_1 = nn.Linear(vision_width * block**2, language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(language_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features [I, M, X], row by row, to image tokens [I, T, D], row by row."""
        num_images, _, width = features.shape
        side, block = self.side // self.block, self.block
        blocks = features.reshape(num_images, side, block, side, block, width).transpose(2, 3)
        blocks = blocks.reshape(num_images, side**2, block**2 * width)
        tokens: Tensor = self.linear_2(self.act(self.linear_1(blocks)))
        return tokens


class Pool(nn.Module):
    """[I, M, X] -> [I, side^2, D]: average the grid down to a few cells, normalise, then the MLP.

    A CNN's features average well, and on a small computer every token counts.
    """

    def __init__(self, vision_width: int, language_width: int, num_patches: int, *, side: int) -> None:
        super().__init__()
        self.grid_side = isqrt(num_patches)
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.norm = nn.LayerNorm(
            vision_width, elementwise_affine=False
        )  # a CNN's last grid has no norm of its own
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(language_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features [I, M, X], row by row, to image tokens [I, T, D], row by row."""
        grid = features.transpose(1, 2).unflatten(2, (self.grid_side, self.grid_side))
        cells = self.pool(grid).flatten(2).transpose(1, 2)
        tokens: Tensor = self.linear_2(self.act(self.linear_1(self.norm(cells))))
        return tokens


class Slots(nn.Module):
    """[I, M, X] -> [I, T, D]: average the whole grid, normalise, then an MLP with an output for each token.

    The starter's connector: each token can represent another word (``tinyllava.starter.words``).

    Args:
        dropout_percent: share of the averaged features that training drops at random, so that a small set of
            images is not memorised. It works on cached features, where changing the image does not.
    """

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        num_patches: int,
        *,
        num_slots: int,
        dropout_percent: int = 0,
    ) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.norm = nn.LayerNorm(vision_width, elementwise_affine=False)
        self.dropout = nn.Dropout(dropout_percent / 100)
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(language_width, num_slots * language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map the patch features [I, M, X] of each image to its image tokens [I, T, D]."""
        hidden = self.act(self.linear_1(self.dropout(self.norm(features.mean(1)))))
        tokens: Tensor = self.linear_2(hidden).unflatten(-1, (self.num_slots, -1))
        return tokens
