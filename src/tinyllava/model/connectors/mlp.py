"""Two linear layers with GELU between: the paper's connector.

Paper: section 4.1.1, "a two-layer Multi-Layer Perceptron (MLP) with GELU activation".
The names of the layers are those of transformers' LLaVA, so that its class opens our checkpoints.
"""

from torch import Tensor, nn


class MLP(nn.Module):
    """[I, M, X] -> [I, M, D]."""

    def __init__(self, vision_width: int, language_width: int, num_patches: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(language_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features [I, M, X] to image tokens [I, M, D]."""
        tokens: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return tokens
