"""New tokens of a task, such as ``<loc_0>``: in the tokenizer, as rows of the embedding, and in training.

Paper: none; its models keep the vocabulary of their language model.
Differs: PEFT trains chosen rows too, but omits a head's bias (Phi-2 has one) and copies the whole table in
every pass. Here only the new rows are computed separately.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from torch.nn.functional import linear

from tinyllava.errors import CheckpointError, ConfigError
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import IMAGE_TOKEN, TinyLlavaProcessor

ROWS_MULTIPLE = 64
"""Embedding rows are padded to this, which matrix units like."""
_SHOWN = 5


def find_tokens_without_row(tokenizer: Any, num_rows: int) -> list[str]:
    """Return the tokens whose ids are beyond the last row of an embedding, except ``<image>``."""
    added = tokenizer.added_tokens_decoder.items()
    return [token.content for id_, token in added if id_ >= num_rows and token.content != IMAGE_TOKEN]


def require_rows(place: str, tokenizer: Any, num_rows: int, given: Sequence[str] = ()) -> None:
    """Reject a folder if its tokenizer has tokens without a row in the embedding.

    Args:
        place: of the folder, for the message.
        given: tokens that are to get rows.

    Raises:
        CheckpointError: there are others.
    """
    missing = [token for token in find_tokens_without_row(tokenizer, num_rows) if token not in given]
    if missing:
        shown = " ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise CheckpointError(
            f"{place}: its embedding has {num_rows:,} rows, but {len(missing)} of its tokens have none "
            f"({shown}). Add rows with --add-tokens {shown}, or remove the tokens from tokenizer.json."
        )


def add_tokens(
    model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, tokens: Sequence[str]
) -> None:
    """Give a model tokens that questions and answers may contain.

    A new token's rows are the mean of the rows of the pieces that its text had before, so that the model
    starts from what it knew. A token that the tokenizer has keeps its row; if it was a special one, it
    becomes text: allowed in questions and answers, and shown in answers.

    Raises:
        ConfigError: no text, or a token that the template writes.
    """
    tokenizer = processor.tokenizer
    _refuse_tokens(tokenizer, str(processor.chat_template), tokens)
    without = _without(tokenizer, tokens)
    known = tokenizer.get_vocab()
    old_rows = model.config.num_language_rows or model.get_input_embeddings().num_embeddings
    pieces = {
        token: without.encode(token, add_special_tokens=False).ids
        for token in tokens
        if known.get(token, old_rows) >= old_rows
    }
    _make_text(tokenizer, tokens)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}
    _make_room(model, max(ids.values(), default=0))
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for token, parts in pieces.items():
                rows = [part for part in parts if part < old_rows] or list(range(old_rows))
                for values in (layer.weight, getattr(layer, "bias", None)):
                    if values is not None:
                        values[ids[token]] = values[rows].mean(0)
    model.config.added_token_ids = sorted({*(model.config.added_token_ids or ()), *ids.values()})


def _refuse_tokens(tokenizer: Any, template: str, tokens: Sequence[str]) -> None:
    kept = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, IMAGE_TOKEN}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token in tokens:
        if not token.strip() or token != token.strip():
            raise ConfigError(
                f"add_tokens = {token!r}: a token must have text, and no spaces at its start or end."
            )
        if token in kept or (token in special and token in template):
            raise ConfigError(
                f"add_tokens = {token!r}: the prompt template uses it as a special token. Choose another "
                "token."
            )


def _without(tokenizer: Any, tokens: Sequence[str]) -> Tokenizer:
    """Return a copy of a tokenizer that reads some added tokens as plain text."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = [one for one in settings["added_tokens"] if one["content"] not in tokens]
    settings |= {"truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(settings))


def _make_text(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens as vocabulary for text; one that was special is special no longer."""
    extra = list(getattr(tokenizer, "extra_special_tokens", None) or ())
    if set(extra) & set(tokens):
        tokenizer.extra_special_tokens = [token for token in extra if token not in tokens]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])


def _make_room(model: TinyLlavaForConditionalGeneration, last_id: int) -> None:
    """Have rows up to an id. ``<image>`` and what fills up stay out of the softmax where they were."""
    num_rows, config = model.get_input_embeddings().num_embeddings, model.config
    if last_id >= num_rows:
        model.resize_token_embeddings(last_id + 1, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[num_rows:] = 0
    if config.num_language_rows and last_id >= config.num_language_rows:
        is_behind = config.image_token_id >= config.num_language_rows
        config.num_language_rows = last_id + 1
        config.leaves_out_image |= is_behind and config.image_token_id <= last_id
    elif not config.num_language_rows and last_id >= num_rows:
        config.num_language_rows = last_id + 1


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
        """Return the layer's state after merging."""
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
