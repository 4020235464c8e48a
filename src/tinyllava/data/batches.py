"""Token counts of every record, computed once on all cores, and the order of samples that follows from them.

Paper: none; the order is that of LLaVA-1.5's fine-tuning. The samples of a step are random over the whole
set, as in its published code. A step of similar lengths would be nearly one task, because tasks differ in
length. Inside a step, samples are sorted by length, which changes no result: micro-batches need less padding,
and the ranks of a distributed run get equal work. Packed micro-batches need no padding, so only their sums
matter.

Lengths also decide which records are too long.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from heapq import heapreplace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch.utils.data import Sampler

from tinyllava.conversation import Conversation
from tinyllava.data.cores import map_parts
from tinyllava.data.store import ROWS, StoredConversations
from tinyllava.files import whole_file


class GroupedSampler(Sampler[int]):
    """Shuffle, cut into steps, sort inside each step, shuffle the steps; fixed by seed and epoch.

    Args:
        lengths: tokens of each sample.
        with_image: whether each sample has an image, to keep modalities apart; None mixes them.
        batch_size: samples of one optimizer step over all ranks.
        seed: of the order.
        window: steps that are sorted by length together. 1 leaves each step a random sample of the set; more
            pad less, and give steps of similar length.
        shuffles_steps: False for the one random permutation, which is the order of
            ``torch.utils.data.RandomSampler``: steps are neither shuffled nor sorted.
    """

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        with_image: Sequence[bool] | None,
        batch_size: int,
        seed: int,
        window: int = 1,
        shuffles_steps: bool = True,
    ) -> None:
        self.lengths, self.with_image, self.batch_size, self.seed = lengths, with_image, batch_size, seed
        self.window, self.shuffles_steps = window, shuffles_steps
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return (index for step in self.draw_steps(self.epoch) for index in self.sort(step))

    def sort(self, step: list[int]) -> list[int]:
        """Return a step's samples, the longest first."""
        return sorted(step, key=lambda i: self.lengths[i], reverse=True) if self.shuffles_steps else step

    def draw_steps(self, epoch: int) -> list[list[int]]:
        """Return the samples of each optimizer step of an epoch."""
        random = torch.Generator().manual_seed(self.seed + epoch)
        if self.with_image is None:
            groups = [list(range(len(self.lengths)))]
        else:
            groups = [[i for i, flag in enumerate(self.with_image) if flag is kind] for kind in (True, False)]
        full: list[list[int]] = []
        rest: list[int] = []
        for group in groups:
            for batch in self._batches(group, random):
                if len(batch) == self.batch_size:
                    full.append(batch)
                else:
                    rest += batch
        if self.shuffles_steps:
            full = [full[position] for position in torch.randperm(len(full), generator=random).tolist()]
        rests = [rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size)]
        return full + rests

    def _batches(self, group: list[int], random: torch.Generator) -> list[list[int]]:
        shuffled = [group[i] for i in torch.randperm(len(group), generator=random).tolist()]
        size = self.batch_size * self.window
        batches = []
        for start in range(0, len(shuffled), size):
            window = shuffled[start : start + size]
            if self.window > 1:
                window.sort(key=lambda i: self.lengths[i])
            batches += [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
        return batches


class RankBatches(Sampler[list[int]], ABC):
    """Micro-batches of one rank. Every rank has as many as the others, so that none waits.

    Where the last step of an epoch has fewer samples than micro-batches, some are empty: the collator makes
    a batch of them that adds nothing to loss and gradients. The result depends on no number of ranks.

    Args:
        order: which samples a step has.
        num_passes: micro-batches of a rank in a step.
        rank: whose micro-batches these are.
        num_epochs: that are drawn in all.
    """

    def __init__(
        self, order: GroupedSampler, num_passes: int, num_ranks: int = 1, rank: int = 0, num_epochs: int = 1
    ) -> None:
        self.order, self.num_passes, self.num_ranks, self.rank = order, num_passes, num_ranks, rank
        self.num_epochs, self.epoch = num_epochs, 0

    def __len__(self) -> int:
        num_full, num_left = divmod(len(self.order), self.order.batch_size)
        return num_full * self.num_passes + self.passes_of(num_left)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return self._draw(self.epoch)

    def of_all_epochs(self) -> Iterator[list[int]]:
        """Yield this rank's micro-batches of every epoch: each mixes the samples anew."""
        for epoch in range(self.num_epochs):
            yield from self._draw(epoch)

    def _draw(self, epoch: int) -> Iterator[list[int]]:
        for step in self.order.draw_steps(epoch):
            yield from self.split(step)[self.rank :: self.num_ranks]

    @abstractmethod
    def passes_of(self, num_samples: int) -> int:
        """Return the micro-batches that each rank has of so many samples."""

    @abstractmethod
    def split(self, step: Sequence[int]) -> list[list[int]]:
        """Return the micro-batches of a step, which the ranks take in turn; the largest is first."""


class PaddedBatches(RankBatches):
    """Micro-batches of so many samples, or evenly fewer in the last step of an epoch.

    They hold similar lengths and ranks get equal work: the longest samples come first, and ranks take them in
    turn, forwards in one pass and backwards in the next.

    Args:
        order: which samples a step has.
        size: samples of a micro-batch.
        is_fixed: whether also the last step has micro-batches of that size, and one that is smaller: where
            the mean of each counts. If ranks would have none, they repeat the step's first samples.
    """

    def __init__(
        self, order: GroupedSampler, size: int, num_ranks: int = 1, rank: int = 0, *, is_fixed: bool = False
    ) -> None:
        super().__init__(order, order.batch_size // (size * num_ranks), num_ranks, rank)
        self.size, self.is_fixed = size, is_fixed

    def passes_of(self, num_samples: int) -> int:
        """Return the micro-batches that each rank has of so many samples."""
        return -(-num_samples // (self.size * self.num_ranks))

    def split(self, step: Sequence[int]) -> list[list[int]]:
        """Return the micro-batches of a step, which the ranks take in turn; the largest is first."""
        number = self.num_ranks * self.passes_of(len(step))
        ordered = self.order.sort(list(step))
        sizes = [len(step) // number + (place < len(step) % number) for place in range(number)]
        if self.is_fixed:
            sizes = [self.size] * number
        ends = list(accumulate(sizes))
        parts = [ordered[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        if self.is_fixed:
            parts = [part or ordered[: self.size] for part in parts]
        passes = [parts[i : i + self.num_ranks] for i in range(0, number, self.num_ranks)]
        return [part for turn, one in enumerate(passes) for part in (one[::-1] if turn % 2 else one)]


class PackedBatches(RankBatches):
    """Micro-batches for samples that share a row: all of a step take about the same.

    Each sample of a step goes, the largest first, where least is so far.

    Args:
        order: which samples a step has.
        sizes: what each sample takes, such as its tokens.
        num_passes, num_ranks, rank, num_epochs: see ``RankBatches``.
    """

    def __init__(
        self,
        order: GroupedSampler,
        sizes: Sequence[int],
        num_passes: int,
        num_ranks: int = 1,
        rank: int = 0,
        num_epochs: int = 1,
    ) -> None:
        super().__init__(order, num_passes, num_ranks, rank, num_epochs)
        self.sizes = sizes

    def passes_of(self, num_samples: int) -> int:
        """Return the micro-batches that each rank has of so many samples."""
        return min(self.num_passes, -(-num_samples // self.num_ranks))

    def split(self, step: Sequence[int]) -> list[list[int]]:
        """Return the micro-batches of a step, which the ranks take in turn; the largest is first."""
        number = self.num_ranks * self.passes_of(len(step))
        heap = [(0, place) for place in range(number)]
        parts: list[list[int]] = [[] for _ in range(number)]
        for index in sorted(step, key=lambda i: self.sizes[i], reverse=True):
            total, place = heap[0]
            parts[place].append(index)
            heapreplace(heap, (total + self.sizes[index], place))
        return sorted(parts, key=self.size_of, reverse=True)

    def size_of(self, part: Sequence[int]) -> int:
        """Return the size of a micro-batch."""
        return sum(self.sizes[index] for index in part)

    def fits(self, budget: int) -> bool:
        """Whether no micro-batch of any rank and epoch takes more than the budget."""
        return all(
            self.size_of(self.split(step)[0]) <= budget
            for epoch in range(self.num_epochs)
            for step in self.order.draw_steps(epoch)
        )


def pack(
    order: GroupedSampler,
    sizes: Sequence[int],
    budget: int,
    *,
    num_epochs: int = 1,
    num_ranks: int = 1,
    rank: int = 0,
) -> PackedBatches:
    """Return the fewest micro-batches in which no sum of sizes is above the budget.

    Args:
        budget: at least the largest size.
        num_epochs: which are looked at.
    """
    per_rank = -(-order.batch_size // num_ranks)
    largest = max(
        sum(sizes[i] for i in step) for epoch in range(num_epochs) for step in order.draw_steps(epoch)
    )
    fewest = max(1, min(per_rank, -(-largest // (budget * num_ranks))))
    tried = (PackedBatches(order, sizes, n, num_ranks, rank, num_epochs) for n in range(fewest, per_rank))
    one_each = PackedBatches(order, sizes, per_rank, num_ranks, rank, num_epochs)
    return next((packed for packed in tried if packed.fits(budget)), one_each)


FORMAT = 1
_TOGETHER = 256  # records whose texts are tokenised together: fewer or more take longer

Measure = Callable[[Sequence[Conversation]], Sequence[tuple[int, int]]]
"""Tokens of each conversation, and how many of them are supervised."""


def measure_all(
    conversations: Sequence[Conversation],
    measure: Measure,
    key: str,
    progress: Callable[[int], None] = lambda n: None,
) -> NDArray[np.int32]:
    """Return [2, N]: tokens of each conversation, and supervised tokens.

    Of several processes with converted records one measures and the others wait for it.

    Args:
        key: names all but the conversations that decides the lengths.
        progress: is called with numbers of records that are counted; not for those that were before.

    Raises:
        DataError: of ``measure``.
    """
    if not isinstance(conversations, StoredConversations):
        return _measure(conversations, measure, progress)
    # A part of the records is measured with all that the stage uses.
    whole = StoredConversations(conversations.files, conversations.used)
    at = np.searchsorted(whole.taken, conversations.taken)
    name = hashlib.sha256(f"{FORMAT} {whole.key} {key}".encode()).hexdigest()[:24]
    path = conversations.files[0].folder / f"lengths-{name}.npy"
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            known: NDArray[np.int32] = np.load(path, allow_pickle=False)
            return known[:, at]
        found = _measure(whole, measure, progress)
        with whole_file(path) as partial, partial.open("wb") as file:
            np.save(file, found, allow_pickle=False)
    return found[:, at]


def processor_key(processor: Any, *others: object) -> str:
    """Return a digest of everything that decides how text becomes tokens, and of other settings."""
    tokenizer = processor.tokenizer
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    pipeline |= {"padding": None, "truncation": None}  # what the last call asked of it
    told = [
        pipeline,
        tokenizer.special_tokens_map,
        processor.chat_template,
        processor.num_image_tokens,
        *others,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _measure(
    conversations: Sequence[Conversation], measure: Measure, progress: Callable[[int], None]
) -> NDArray[np.int32]:
    def measure_part(start: int) -> NDArray[np.int32]:
        some = list(conversations[start : start + ROWS])
        lengths = [
            each
            for first in range(0, len(some), _TOGETHER)
            for each in measure(some[first : first + _TOGETHER])
        ]
        return np.array(lengths, dtype=np.int32).reshape(-1, 2).T

    parts = [np.zeros((2, 0), dtype=np.int32)]
    for part in map_parts(measure_part, range(0, len(conversations), ROWS)):
        parts.append(part)
        progress(part.shape[1])
    return np.concatenate(parts, axis=1)
