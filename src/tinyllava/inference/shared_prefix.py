"""Answer all questions about an image together: a tree of prompts whose shared parts are computed once.

Paper: none; greedy decoding as in section 4.1.3's protocols, with the answers of one question at a time. Most
benchmarks ask many questions about an image, and its tokens come before all of them.
Differs: the published evaluation encodes the image and its tokens again for every question. Here an image is
a row of the batch, and its prompts form a tree. A causal forward pass computes the trunk (system text and
image). A second pass computes the branches, in which a token sees only its own branch. Each decoding step
computes the next token of every unfinished question against the one cache of the row. Nothing is repeated or
copied.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from tinyllava.inference.logits import check_logits, forbid_images, stop_ids
from tinyllava.model import TinyLlavaForConditionalGeneration
from tinyllava.model.compat import CACHE_NAME, attention_of

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PromptTree:
    """A trunk of P tokens that all prompts share, and M nodes for the rest, parents first.

    ``image_slots`` [P + M] holds, for an image token, which one of the images' tokens it is, else -1.
    """

    trunk: Ints
    """[P] token ids; no prompt ends in the trunk."""
    tokens: Ints
    """[M] token ids."""
    positions: Ints
    """[M] position of a node in its prompts, counted from 0 at the start of the trunk."""
    sees: NDArray[np.bool_]
    """[M, M] which nodes a node attends to: those on its way to the trunk, and itself."""
    ends: Ints
    """[number of prompts] the node with which each prompt ends; equal prompts end in one node."""
    image_slots: Ints

    @property
    def num_tokens(self) -> int:
        """Number of tokens to compute, P + M."""
        return len(self.trunk) + len(self.tokens)


def grow_tree(prompts: Sequence[Sequence[int]], image_token_id: int) -> PromptTree:
    """Return the tree of prompts, each a list of token ids with the same images in the same order."""
    assert prompts
    assert all(prompts)
    num_shared = _common_length(prompts)
    tokens: list[int] = []
    parents: list[int] = []
    positions: list[int] = []
    nodes: dict[tuple[int, int], int] = {}
    ends = []
    for prompt in prompts:
        node = -1
        for position in range(num_shared, len(prompt)):
            key = (node, prompt[position])
            node = nodes.setdefault(key, len(tokens))
            if node == len(tokens):
                tokens.append(key[1])
                parents.append(key[0])
                positions.append(position)
        ends.append(node)
    trunk = np.asarray(prompts[0][:num_shared], dtype=np.int64)
    sees = _trace(parents)
    at_image = np.asarray(tokens, dtype=np.int64) == image_token_id
    trunk_slots = np.cumsum(trunk == image_token_id) - 1
    # Image tokens before a node: those of the trunk and those that the node sees, less itself.
    node_slots = (trunk == image_token_id).sum() + (sees & at_image).sum(axis=1) - 1
    slots = np.concatenate(
        [np.where(trunk == image_token_id, trunk_slots, -1), np.where(at_image, node_slots, -1)]
    )
    return PromptTree(
        trunk=trunk,
        tokens=np.asarray(tokens, dtype=np.int64),
        positions=np.asarray(positions, dtype=np.int64),
        sees=sees,
        ends=np.asarray(ends, dtype=np.int64),
        image_slots=slots,
    )


def _common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts share, the last token of the shortest not counted."""
    num = min(map(len, prompts)) - 1
    heads = np.asarray([prompt[:num] for prompt in prompts], dtype=np.int64)
    differs = (heads != heads[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else num


def _trace(parents: list[int]) -> NDArray[np.bool_]:
    sees = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees


_ENCODER_BATCH = 32  # images that the vision encoder takes at once


@dataclass(frozen=True, kw_only=True)
class ImageGroup:
    """Prompts that ask about the same images."""

    tree: PromptTree
    pixel_values: Tensor | None = None
    """[I, 3, H, W]; None for prompts without an image."""


@contextmanager
def _attention_with_masks(model: TinyLlavaForConditionalGeneration) -> Iterator[None]:
    """Let the language model attend by SDPA for now if its own implementation takes no mask of ours."""
    chosen = attention_of(model.language_model)
    language_model: Any = model.language_model
    if chosen in ("sdpa", "eager"):
        yield
        return
    language_model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        language_model.set_attn_implementation(chosen)


def can_share(model: TinyLlavaForConditionalGeneration) -> bool:
    """Tell whether the language model attends to everything before a token (no sliding window)."""
    text_config = model.config.text_config
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"]
    window = getattr(text_config, "sliding_window", None)
    return set(kinds) == {"full_attention"} and (
        window is None or not getattr(text_config, "use_sliding_window", True)
    )


@torch.inference_mode()
def answer_groups(
    model: TinyLlavaForConditionalGeneration,
    groups: Sequence[ImageGroup],
    max_new_tokens: int,
    context_tokens: int = sys.maxsize,
) -> list[list[list[int]]]:
    """Return the token ids of the greedy answer to each prompt of each group, its end token included.

    An answer without its end token ran into ``max_new_tokens``, or into ``context_tokens`` with its prompt.
    All groups are one batch; the caller bounds its size.

    Raises:
        CheckpointError: the model's logits are not numbers.
    """
    with _attention_with_masks(model):
        trunks = _Trunks(model, groups)
        hidden, seen, positions, where = trunks.branch()
        answers = _decode(model, trunks.cache, hidden, seen, positions, max_new_tokens, context_tokens)
    return [[answers[g][column] for column in columns] for g, columns in enumerate(where)]


class _Trunks:
    """The trunks of G groups in one cache, and the pass over their branches."""

    def __init__(self, model: TinyLlavaForConditionalGeneration, groups: Sequence[ImageGroup]) -> None:
        self.model, self.groups, self.device = model, groups, model.device
        self.cache = DynamicCache()
        self.image_tokens = _encode_images(model, groups)
        self.num_shared = [len(group.tree.trunk) for group in groups]
        self.width = max(self.num_shared)
        if self.width:
            # Trunks are padded on the right: causal attention never looks there, and branches are masked.
            embeds = self._embed([g.tree.trunk for g in groups], [g.tree.image_slots for g in groups])
            model.language_model(inputs_embeds=embeds, **{CACHE_NAME: self.cache}, use_cache=True)

    def branch(self) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
        """Run the branches.

        Returns:
            The hidden states [G, Q, D] at the ends of the Q different prompts of each group (padded), which
            cache slots each of them sees [G, Q, P + M], their next positions [G, Q] (-1 where padded), and
            for each group the column in Q of each of its prompts.
        """
        trees = [group.tree for group in self.groups]
        embeds = self._embed([t.tokens for t in trees], [t.image_slots[len(t.trunk) :] for t in trees])
        num_groups, num_nodes = embeds.shape[:2]
        sees = torch.zeros(num_groups, num_nodes, self.width + num_nodes, dtype=torch.bool)
        positions = torch.zeros(num_groups, num_nodes, dtype=torch.long)
        unique = [sorted(set(tree.ends.tolist())) for tree in trees]
        ends = torch.zeros(num_groups, max(map(len, unique)), dtype=torch.long)
        next_positions = torch.full_like(ends, -1)
        for g, tree in enumerate(trees):
            sees[g, :, : self.num_shared[g]] = True
            sees[g, : len(tree.tokens), self.width : self.width + len(tree.tokens)] = torch.from_numpy(
                tree.sees
            )
            positions[g, : len(tree.tokens)] = torch.from_numpy(tree.positions)
            ends[g, : len(unique[g])] = torch.tensor(unique[g])
            next_positions[g, : len(unique[g])] = positions[g][ends[g, : len(unique[g])]] + 1
        sees[:, :, self.width :] |= torch.eye(num_nodes, dtype=torch.bool)  # padding sees itself
        sees, ends = sees.to(self.device), ends.to(self.device)
        hidden = _forward(self.model, embeds, sees, positions.to(self.device), self.cache)
        columns = [[unique[g].index(end) for end in tree.ends.tolist()] for g, tree in enumerate(trees)]
        return _pick(hidden, ends), _pick(sees, ends), next_positions.to(self.device), columns

    def _embed(self, tokens: Sequence[object], slots: Sequence[object]) -> Tensor:
        """Embed token ids of different lengths [G, N, D], padded on the right, images in their places."""
        rows = [torch.as_tensor(row) for row in tokens]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        embeds: Tensor = self.model.get_input_embeddings()(ids)
        for g, image_tokens in enumerate(self.image_tokens):
            if image_tokens is not None:
                slot = torch.as_tensor(slots[g])[: len(rows[g])].to(self.device)
                embeds[g, : len(slot)][slot >= 0] = image_tokens[slot[slot >= 0]].to(embeds.dtype)
        return embeds


def _encode_images(
    model: TinyLlavaForConditionalGeneration, groups: Sequence[ImageGroup]
) -> list[Tensor | None]:
    """Return the image tokens of each group, its images one after the other [I * T, D]."""
    pixels = [group.pixel_values for group in groups if group.pixel_values is not None]
    if not pixels:
        return [None] * len(groups)
    batches = torch.cat(pixels).split(_ENCODER_BATCH)
    tokens = torch.cat([model.model.get_image_features(b.to(model.device)) for b in batches])
    taken = iter(tokens.split([len(p) for p in pixels]))
    return [None if group.pixel_values is None else next(taken).flatten(0, 1) for group in groups]


def _decode(
    model: TinyLlavaForConditionalGeneration,
    cache: DynamicCache,
    hidden: Tensor,
    seen: Tensor,
    positions: Tensor,
    max_new_tokens: int,
    context_tokens: int,
) -> list[list[list[int]]]:
    """Decode Q prompts on each of G rows until each has ended.

    Args:
        hidden: [G, Q, D] at the ends of the prompts.
        seen: [G, Q, K] which slots of the cache each prompt sees.
        positions: [G, Q] of the next token; -1 marks padding.
    """
    stops = stop_ids(model).to(hidden.device)
    answers: list[list[list[int]]] = [[[] for _ in row] for row in positions.tolist()]
    rows = torch.arange(len(hidden), device=hidden.device)  # those that are still in the cache
    alive = positions >= 0
    order = torch.arange(hidden.shape[1], device=hidden.device).expand(
        len(hidden), -1
    )  # columns in ``hidden``
    tokens = torch.zeros_like(positions)
    for step in range(max_new_tokens):
        active = alive.gather(1, order)
        logits = model.lm_head(hidden[active])
        check_logits(model, logits)
        next_tokens = forbid_images(model, logits).argmax(-1)
        tokens[rows_of(active), order[active]] = next_tokens
        has_room = positions.gather(1, order)[active] + 1 < context_tokens
        alive[rows_of(active), order[active]] = ~torch.isin(next_tokens, stops) & has_room
        for g, q, token in torch.stack([rows[rows_of(active)], order[active], next_tokens]).T.tolist():
            answers[g][q].append(token)
        kept = alive.any(1)
        if step == max_new_tokens - 1 or not kept.any():
            break
        if int(kept.sum()) * 2 <= len(kept):  # half the rows are done: let go of their part of the cache
            cache.batch_select_indices(kept.nonzero().squeeze(1))
            rows, alive, seen, positions, tokens = (t[kept] for t in (rows, alive, seen, positions, tokens))
        # Unfinished questions first; rows with fewer of them are padded with finished ones.
        order = (~alive).to(torch.int8).argsort(dim=1, stable=True)[:, : int(alive.sum(1).max())]
        own = torch.eye(order.shape[1], dtype=torch.bool, device=order.device).expand(len(order), -1, -1)
        sees = torch.cat([_pick(seen, order), own], dim=2)
        embeds = model.get_input_embeddings()(tokens.gather(1, order))
        hidden = _forward(model, embeds, sees, positions.gather(1, order).clamp(min=0), cache)
        new_slots = torch.zeros(*seen.shape[:2], order.shape[1], dtype=torch.bool, device=order.device)
        new_slots.scatter_(1, order[:, :, None].expand_as(own), own)
        seen = torch.cat([seen, new_slots], dim=2)
        positions = positions + 1
    return answers


def rows_of(mask: Tensor) -> Tensor:
    """Return the row of every true entry of a mask [G, A], in the order in which the mask selects."""
    return mask.nonzero()[:, 0]


def _forward(
    model: TinyLlavaForConditionalGeneration,
    embeds: Tensor,
    sees: Tensor,
    positions: Tensor,
    cache: DynamicCache,
) -> Tensor:
    """Run the language model over new tokens [G, N, D] that see the slots ``sees`` [G, N, K + N]."""
    if attention_of(model.language_model) == "eager":  # adds its mask; SDPA also takes true and false
        mask = torch.zeros(sees.shape, dtype=embeds.dtype, device=sees.device)
        sees = mask.masked_fill_(~sees, torch.finfo(embeds.dtype).min)
    output = model.language_model(
        inputs_embeds=embeds,
        attention_mask=sees[:, None],
        position_ids=positions,
        use_cache=True,
        **{CACHE_NAME: cache},
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Return ``values[g, index[g, a]]`` [G, A, ...] of values [G, N, ...]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
