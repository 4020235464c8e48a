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
from collections.abc import Callable, Iterator, Sequence
from heapq import heapreplace
from itertools import cycle
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
        micro_batch: samples of a forward pass of one rank.
        num_ranks: ranks that take the micro-batches of a step in turn.
        window: steps that are sorted by length together. 1 leaves each step a random sample of the set; more
            pad less, and give steps of similar length.
        shuffles_steps: False for steps in the order of the one random permutation, which is the order of
            ``torch.utils.data.RandomSampler``.
    """

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        with_image: Sequence[bool] | None,
        batch_size: int,
        seed: int,
        micro_batch: int = 0,
        num_ranks: int = 1,
        window: int = 1,
        shuffles_steps: bool = True,
    ) -> None:
        self.lengths, self.with_image, self.batch_size, self.seed = lengths, with_image, batch_size, seed
        self.micro_batch, self.num_ranks, self.window = micro_batch or batch_size, num_ranks, window
        self.shuffles_steps = shuffles_steps
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return (index for step in self.draw_steps(self.epoch) for index in self._split(step))

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

    def _split(self, step: list[int]) -> list[int]:
        """Order a step's samples so that micro-batches hold similar lengths and ranks equal work.

        The longest come first. Ranks take them in turn, forwards in one pass and backwards in the next.
        """
        ordered = sorted(step, key=lambda i: self.lengths[i], reverse=True)
        size = self.micro_batch
        parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        passes = [parts[i : i + self.num_ranks] for i in range(0, len(parts), self.num_ranks)]
        turned = [one[::-1] if number % 2 else one for number, one in enumerate(passes)]
        return [index for one in turned for part in one for index in part]


class PackedBatches(Sampler[list[int]]):
    """Micro-batches of one rank, for samples that share a row: all of a step take about the same.

    The samples of a step are those of ``order``. Each goes, the largest first, where least is so far. Every
    rank has as many micro-batches as the others. Where the last step of an epoch has fewer samples than
    micro-batches, the first samples of the epoch fill them, as accelerate does.

    Args:
        order: which samples a step has.
        sizes: what each sample takes, such as its tokens.
        num_passes: micro-batches of a rank in a step.
        rank: whose micro-batches these are.
        num_epochs: that are drawn in all.
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
        self.order, self.sizes, self.num_passes = order, sizes, num_passes
        self.num_ranks, self.rank, self.num_epochs, self.epoch = num_ranks, rank, num_epochs, 0

    def __len__(self) -> int:
        num_full, num_left = divmod(len(self.order), self.order.batch_size)
        return num_full * self.num_passes + min(self.num_passes, -(-num_left // self.num_ranks))

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
        steps = self.order.draw_steps(epoch)
        first = [index for step in steps[: self.num_ranks] for index in step]
        for step in steps:
            yield from self.split(step, first)[self.rank :: self.num_ranks]

    def split(self, step: Sequence[int], spare: Sequence[int] = ()) -> list[list[int]]:
        """Return the micro-batches of a step over all ranks, which take them in turn; the largest is first.

        Args:
            step: its samples.
            spare: samples for micro-batches that would be empty.
        """
        number = self.num_ranks * min(self.num_passes, -(-len(step) // self.num_ranks))
        heap = [(0, place) for place in range(number)]
        parts: list[list[int]] = [[] for _ in range(number)]
        for index in sorted(step, key=lambda i: self.sizes[i], reverse=True):
            total, place = heap[0]
            parts[place].append(index)
            heapreplace(heap, (total + self.sizes[index], place))
        for part, index in zip((part for part in parts if not part), cycle(spare), strict=False):
            part.append(index)
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
            progress(len(conversations))
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
