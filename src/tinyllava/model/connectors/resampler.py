"""Perceiver resampler: learned queries attend to the patch features and to themselves.

Paper: section 4.1.1, "resamplers ... implemented similarly to [30]" (Otter, which took Flamingo's).
Differs: the layers may be narrower than the LLM (option ``width``), so that Figure 6's "similar
parameter setting" can be had; Otter's stand at the encoder's width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Resampler(nn.Module):
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
        head_width: int,
    ) -> None:
        super().__init__()
        self.input = nn.Linear(vision_width, width)
        self.queries = nn.Parameter(torch.randn(num_queries, width) * 0.02)
        self.layers = nn.ModuleList(ResamplerLayer(width, num_heads, head_width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features [I, M, X] to image tokens [I, num_queries, D]."""
        media = self.input(features)
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, media)
        tokens: Tensor = self.output(self.norm(queries))
        return tokens


class ResamplerLayer(nn.Module):
    """Attention of the queries to patches and queries, then a feed-forward block; both residual."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_media, self.norm_queries = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, num_heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * num_heads * head_width, bias=False)
        self.to_out = nn.Linear(num_heads * head_width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, queries: Tensor, media: Tensor) -> Tensor:
        """Update queries [I, Q, W] from media [I, M, W]."""
        normed = self.norm_queries(queries)
        keys, values = self.to_kv(torch.cat([self.norm_media(media), normed], dim=1)).chunk(2, dim=-1)
        attended = scaled_dot_product_attention(
            self._heads(self.to_q(normed)), self._heads(keys), self._heads(values)
        )
        queries = queries + self.to_out(attended.transpose(1, 2).flatten(2))
        updated: Tensor = queries + self.feed_forward(queries)
        return updated

    def _heads(self, x: Tensor) -> Tensor:
        """[I, N, H * W] -> [I, H, N, W]."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return heads.transpose(1, 2)
