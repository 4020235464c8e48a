"""The prompts about one image as a tree: what they share is a node once, however many of them there are.

Paper: none; most benchmarks ask many questions about an image, and its tokens come before all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PromptTree:
    """A trunk of P tokens that all the prompts begin with, and M nodes for what follows, parents first.

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
        """P + M: what has to be computed."""
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
