"""Q-Former: learned queries go through a small BERT whose layers look at the patches.

Paper: the connector of BLIP-2 ([31] of the paper), which section 2 names; the blocks are transformers' own.
Differs: no text goes in, only queries, and the weights are new, not BLIP-2's.
"""

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class QFormer(nn.Module):
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
        if not len(features):  # a batch of text only: transformers' class cannot reshape nothing
            return self.forward(features.new_zeros(1, self.num_patches, self.vision_width))[:0]
        queries = self.queries.expand(len(features), -1, -1)
        attended = self.former(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        tokens: Tensor = self.output(attended)
        return tokens
