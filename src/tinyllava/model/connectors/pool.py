"""Average the grid down to a few cells, normalise, then the MLP: the cheapest way to few image tokens.

Paper: section 4.2.1 asks for "further exploration of diverse connectors". The starter's: a CNN's features
are averaged well, and on a small computer every token counts.
"""

from math import isqrt

from torch import Tensor, nn


class Pool(nn.Module):
    """[I, M, X] -> [I, side^2, D]."""

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
