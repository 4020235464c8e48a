"""Order of samples in which each batch holds similar lengths, and only images or only text.

Paper: none; LLaVA-1.5's fine-tuning groups so. Padding is wasted work, and a batch of one modality keeps the
ranks of a distributed run alike.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """Shuffle, sort inside large windows by length, shuffle whole batches; fixed by seed and epoch.

    Args:
        lengths: tokens of each sample.
        with_image: whether each sample has an image, to keep modalities apart; None mixes them.
        batch_size: samples of one optimizer step over all ranks.
    """

    WINDOW = 50  # batches that are sorted together: larger wastes less padding, smaller is closer to random

    def __init__(
        self, *, lengths: Sequence[int], with_image: Sequence[bool] | None, batch_size: int, seed: int
    ) -> None:
        self.lengths, self.with_image, self.batch_size, self.seed = lengths, with_image, batch_size, seed
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
        yield from (index for position in order for index in full[position])
        yield from rest

    def _batches(self, group: list[int], random: torch.Generator) -> list[list[int]]:
        shuffled = [group[i] for i in torch.randperm(len(group), generator=random).tolist()]
        size = self.batch_size * self.WINDOW
        batches = []
        for start in range(0, len(shuffled), size):
            window = sorted(shuffled[start : start + size], key=lambda i: self.lengths[i])
            batches += [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
        return batches
