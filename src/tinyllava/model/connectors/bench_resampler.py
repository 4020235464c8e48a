"""TinyLLaVABench's resampler: learned queries attend to the patches, never to themselves.

Paper: Figure 6 compares a resampler "implemented similarly to [30]"; this is the one that the first published
code has. It is here so that its checkpoints can be imported, and trained further.
Differs: from ``resampler`` in three points: keys and values come from the patches alone, they are made from
the encoder's own width, and the last layer has no bias.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class BenchResampler(nn.Module):
    """[I, M, X] -> [I, num_queries, D]."""

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        num_patches: int,
        *,
        num_queries: int,
        num_layers: int,
        width: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, width) * 0.02)
        self.layers = nn.ModuleList(
            BenchResamplerLayer(vision_width, width, num_heads) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, language_width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features [I, M, X] to image tokens [I, num_queries, D]."""
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        tokens: Tensor = self.output(self.norm(queries))
        return tokens


class BenchResamplerLayer(nn.Module):
    """Attention of the queries to the patches, then a feed-forward block; both residual."""

    def __init__(self, vision_width: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_patches, self.norm_queries = nn.LayerNorm(vision_width), nn.LayerNorm(width)
        self.to_q, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(vision_width, width, bias=False)
        self.to_v = nn.Linear(vision_width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """Update queries [I, Q, W] from patch features [I, M, X]."""
        patches = self.norm_patches(features)
        rows = (self.to_q(self.norm_queries(queries)), self.to_k(patches), self.to_v(patches))
        heads = [row.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for row in rows]
        attended = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        queries = queries + self.to_out(attended)
        updated: Tensor = queries + self.feed_forward(queries)
        return updated
