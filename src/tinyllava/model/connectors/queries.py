"""Connectors in which a fixed number of learned queries attend to the patch features.

Paper: section 4.1.1, "resamplers ... implemented similarly to [30]" (Otter, which took Flamingo's).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class Resampler(nn.Module):
    """[I, M, X] -> [I, num_queries, D]: a Perceiver resampler.

    Queries attend to the patches and to themselves.

    Differs: the layers may be narrower than the language model (option ``width``), so that Figure 6's
    "similar parameter setting" can be had; Otter's have the encoder's width.
    """

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
        queries = self.queries.expand(features.shape[0], -1, -1)
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


class BenchResampler(nn.Module):
    """[I, M, X] -> [I, num_queries, D]: the resampler of the first published code, TinyLLaVABench.

    It exists so that those checkpoints can be imported and trained further.
    Differs from ``Resampler``: keys and values come from the patches alone, they are made from the
    encoder's own width, and the last layer has no bias.
    """

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
        queries = self.queries.expand(features.shape[0], -1, -1)
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


class QFormer(nn.Module):
    """[I, M, X] -> [I, num_queries, D]: BLIP-2's connector.

    Queries go through a small BERT that sees the patches.

    Paper: [31] of section 2; the blocks are transformers' own.
    Differs: no text goes in, and the weights are new.
    """

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
        cross_every: int,
    ) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * width,
            cross_attention_frequency=cross_every,
            encoder_hidden_size=vision_width,
        )
        self.num_patches, self.vision_width = num_patches, vision_width
        self.queries = nn.Parameter(torch.randn(1, num_queries, width) * config.initializer_range)
        self.former = Blip2QFormerModel(config)
        self.output = nn.Linear(width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features [I, M, X] to image tokens [I, num_queries, D]."""
        if not features.shape[0]:  # a batch of text only: transformers' class cannot reshape nothing
            return self.forward(features.new_zeros(1, self.num_patches, self.vision_width))[:0]
        queries = self.queries.expand(features.shape[0], -1, -1)
        attended = self.former(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        tokens: Tensor = self.output(attended)
        return tokens
