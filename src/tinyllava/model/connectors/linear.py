"""One linear layer from patch features to image tokens.

Paper: section 3.1; the first LLaVA's connector.
"""

from torch import Tensor, nn


class Linear(nn.Module):
    """[I, M, X] -> [I, M, D]."""

    def __init__(self, vision_width: int, language_width: int, num_patches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features [I, M, X] to image tokens [I, M, D]."""
        tokens: Tensor = self.linear(features)
        return tokens
