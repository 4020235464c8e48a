"""Space to depth, then the MLP: fewer image tokens, each of which sees a block of patches.

Paper: section 4.2.1 asks for "further exploration of diverse connectors"; this is the token-reducing one.
"""

from math import isqrt

from torch import Tensor, nn


class PixelShuffle(nn.Module):
    """[I, M, X] -> [I, M / block^2, D]."""

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
