"""Order of samples: random optimizer steps, of one modality each, split so that little is padded.

Paper: none; LLaVA-1.5's fine-tuning draws so. The samples of a step are random over the whole set, as in its
published code: a step of similar lengths would be nearly one task, because lengths tell tasks apart. Inside a
step, samples are sorted by length, which changes no result: micro-batches need less padding, and the ranks of
a distributed run get equal work.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


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
    ) -> None:
        self.lengths, self.with_image, self.batch_size, self.seed = lengths, with_image, batch_size, seed
        self.micro_batch, self.num_ranks, self.window = micro_batch or batch_size, num_ranks, window
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
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
        order = torch.randperm(len(full), generator=random).tolist()
        steps = [full[position] for position in order]
        steps += [rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size)]
        yield from (index for step in steps for index in self._split(step))

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
