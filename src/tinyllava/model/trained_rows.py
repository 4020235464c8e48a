"""Train the rows of added tokens where the rest of embedding and head is frozen, as beside adapters.

Paper: none; its models keep the vocabulary of their language model.
Differs: PEFT trains chosen rows too, but leaves out a head's bias (Phi-2 has one) and copies the whole table
in every pass; here only the new rows are computed beside it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tinyllava.model.modeling import TinyLlavaForConditionalGeneration


class TrainedRows(nn.Module):
    """An embedding or a head of which only some rows are trained.

    Args:
        base_layer: with its own weights frozen.
        ids: [R], the trained rows, ascending.
        rows: [R, D], shared between an embedding and a head that are tied.
    """

    ids: Tensor

    def __init__(self, base_layer: nn.Module, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.rows = rows
        self.register_buffer("ids", ids, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen table [K, D]; its trained rows are as they were."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The head's bias; None for an embedding."""
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    def state_when_merged(self) -> dict[str, Tensor]:
        """Return what the layer's state will be once it is merged."""
        weight = self.weight.detach().clone()
        weight[self.ids] = self.rows.detach().to(weight.dtype)
        return {"weight": weight, **({} if self.bias is None else {"bias": self.bias.detach()})}

    def merge(self) -> nn.Module:
        """Return the layer with the trained rows in place."""
        with torch.no_grad():
            self.base_layer.weight[self.ids] = self.rows.to(self.base_layer.weight.dtype)
        merged: nn.Module = self.base_layer
        return merged


class RowsOfEmbedding(TrainedRows):
    """Embeds token ids [...] as [..., D]."""

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return int(self.base_layer.num_embeddings)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed, new tokens by their trained rows."""
        embedded: Tensor = self.base_layer(input_ids)
        places = torch.searchsorted(self.ids, input_ids).clamp(max=len(self.ids) - 1)
        is_new = (self.ids[places] == input_ids).unsqueeze(-1)
        rows = self.rows[places] * getattr(self.base_layer, "embed_scale", 1.0)  # Gemma 3's layer scales
        return torch.where(is_new, rows.to(embedded.dtype), embedded)


class RowsOfHead(TrainedRows):
    """Scores hidden states [..., D] as [..., K]."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Score, new tokens by their trained rows."""
        logits: Tensor = self.base_layer(hidden)
        new = linear(hidden, self.rows, None if self.bias is None else self.bias[self.ids])
        return logits.index_copy(-1, self.ids, new.to(logits.dtype))


def train_added_rows(model: TinyLlavaForConditionalGeneration) -> None:
    """Train the rows of added tokens where embedding and head are frozen otherwise."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tower: Any = model  # which takes any module there
    if not model.config.added_token_ids or embedding.weight.requires_grad:
        return
    ids = torch.tensor(model.config.added_token_ids, device=embedding.weight.device)
    rows = nn.Parameter(embedding.weight[ids].detach().clone())
    is_tied = head.weight is embedding.weight
    tower.set_input_embeddings(RowsOfEmbedding(embedding, ids, rows))
    head_rows = rows if is_tied else nn.Parameter(head.weight[ids].detach().clone())
    tower.lm_head = RowsOfHead(head, ids, head_rows)


def merge_added_rows(model: nn.Module) -> None:
    """Put trained rows into the layers below them, which take their places again."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, TrainedRows)]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.merge())
