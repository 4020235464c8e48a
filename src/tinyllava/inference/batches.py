"""From questions to batches: grouped by image, prepared by background processes, filled by length.

Paper: section 4.1.3. ``blank`` makes the baseline that shows how much of a score needs no image.
"""

import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.images import open_image
from tinyllava.data.workers import PAGES_BYTES, Loading, begin_worker, naming_dead_workers, usable_workers
from tinyllava.errors import DataError
from tinyllava.inference.chat import encode_prompt
from tinyllava.inference.shared_prefix import ImageGroup, grow_tree
from tinyllava.model import TinyLlavaProcessor
from tinyllava.model.packing import ImagePacking

MAX_GROUP = 64  # questions of one group: what more share would gain less than what their attention costs
_THREADS = "TOKENIZERS_PARALLELISM"
_FEW_TOKENS = 16  # of a question: an estimate for how many groups a window holds
_WINDOW = 4  # batches that are gathered before groups of like length are put together


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A group that is ready for the model, and which conversations it holds."""

    indices: tuple[int, ...]
    group: ImageGroup


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A conversation that cannot be asked: its image is broken, or it is too long for the context."""

    index: int
    error: DataError


def group_by_image(
    conversations: Sequence[Conversation], indices: Iterable[int], max_group: int = MAX_GROUP
) -> list[tuple[int, ...]]:
    """Return groups of indices whose conversations have the same images, in order of first appearance."""
    by_images: dict[tuple[ImageRef, ...], list[int]] = {}
    for i in indices:
        by_images.setdefault(conversations[i].images, []).append(i)
    return [
        tuple(members[start : start + max_group])
        for members in by_images.values()
        for start in range(0, len(members), max_group)
    ]


def prepare_group(
    processor: TinyLlavaProcessor,
    conversations: Sequence[Conversation],
    to_pixels: Callable[[list[Image.Image]], Any] | None = None,
) -> ImageGroup:
    """Tokenise conversations about the same images and open these.

    Args:
        to_pixels: what images become; the processor's pixel values if None.

    Raises:
        ImageError: an image is missing or broken.
        DataError: a conversation does not fit the model's context.
    """
    images = [open_image(ref, processor.background) for ref in conversations[0].images]
    prompts = [encode_prompt(processor, conversation) for conversation in conversations]
    return ImageGroup(
        tree=grow_tree(prompts, processor.image_token_id),
        pixel_values=(to_pixels or processor.to_pixels)(images) if images else None,
    )


class _Groups(Dataset[list[Prepared | Refused]]):
    def __init__(
        self,
        processor: TinyLlavaProcessor,
        conversations: Sequence[Conversation],
        groups: Sequence[tuple[int, ...]],
        packing: ImagePacking | None = None,
    ) -> None:
        self.processor, self.conversations, self.groups = processor, conversations, groups
        self.to_pixels = packing.pack if packing else None

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> list[Prepared | Refused]:
        indices = self.groups[number]
        try:
            return [self._prepare(indices)]
        except DataError:
            refused = [one for i in indices for one in self._refuse(i)]
            left = tuple(i for i in indices if i not in {one.index for one in refused})
            return [*refused, *([self._prepare(left)] if left else [])]

    def _prepare(self, indices: tuple[int, ...]) -> Prepared:
        group = prepare_group(self.processor, [self.conversations[i] for i in indices], self.to_pixels)
        return Prepared(indices=indices, group=group)

    def _refuse(self, index: int) -> list[Refused]:
        try:
            self._prepare((index,))
        except DataError as error:
            return [Refused(index=index, error=error)]
        return []


def prepare(
    processor: TinyLlavaProcessor,
    conversations: Sequence[Conversation],
    groups: Sequence[tuple[int, ...]],
    *,
    num_workers: int,
    packing: ImagePacking | None = None,
    batch_tokens: int = 0,
) -> Iterator[Prepared | Refused]:
    """Yield the groups in order, made ready by ``num_workers`` processes (0: by this one).

    A conversation that cannot be asked is left out of its group and comes by itself.

    Args:
        packing: what images become, with ``unpacked`` on the device; None for pixel values.
        batch_tokens: see ``fill_batches``: its next window is made ready while one is answered.
    """
    dataset = _Groups(processor, conversations, groups, packing)
    ahead = _groups_of_window(processor, conversations, groups, batch_tokens)
    image_bytes = packing.image_bytes if packing else 4 * 3 * processor.image_size_px**2
    loading = _limit_workers(conversations, groups, num_workers, image_bytes, ahead)
    num_workers = loading.num_workers
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=loading.prefetch_factor if num_workers else None,
        worker_init_fn=begin_worker,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # for the processes' seeds, in place of the caller's
    )
    with naming_dead_workers("--workers"):
        with _tokenizers_without_threads():
            groups_in_order = iter(loader)  # starts the processes
        for prepared in groups_in_order:
            for one in prepared:
                yield _copied(one) if num_workers and isinstance(one, Prepared) else one


def _copied(prepared: Prepared) -> Prepared:
    """Take the pixels out of the shared memory: many groups are gathered before they are asked."""
    pixels = prepared.group.pixel_values
    if pixels is None:
        return prepared
    return dataclasses.replace(
        prepared, group=dataclasses.replace(prepared.group, pixel_values=pixels.clone())
    )


def unpacked(prepared: Prepared, packing: ImagePacking, device: torch.device) -> ImageGroup:
    """Return a prepared group with pixel values, made on the device."""
    pixels = prepared.group.pixel_values
    if pixels is None:
        return prepared.group
    return dataclasses.replace(prepared.group, pixel_values=packing.unpack(pixels.to(device)))


def _groups_of_window(
    processor: TinyLlavaProcessor,
    conversations: Sequence[Conversation],
    groups: Sequence[tuple[int, ...]],
    batch_tokens: int,
) -> int:
    """Return about how many groups ``fill_batches`` gathers at a time, rather too many than too few."""
    num_images = sum(len(conversations[indices[0]].images) for indices in groups)
    num_questions = sum(map(len, groups))
    num_tokens = num_images * processor.num_image_tokens + num_questions * _FEW_TOKENS
    return min(len(groups), -(-_WINDOW * batch_tokens * len(groups) // max(1, num_tokens)))


def _limit_workers(
    conversations: Sequence[Conversation],
    groups: Sequence[tuple[int, ...]],
    num_workers: int,
    image_bytes: int,
    ahead: int,
) -> Loading:
    """Take fewer workers where the shared memory cannot hold what they prepare, and say so."""
    num_images = max((len(conversations[indices[0]].images) for indices in groups), default=0)
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    loading = usable_workers(num_workers, num_images * image_bytes + PAGES_BYTES, 1, num_processes, ahead)
    if loading.why and os.environ.get("RANK", "0") == "0":
        print(loading.why, file=sys.stderr)
    return loading


@contextmanager
def _tokenizers_without_threads() -> Iterator[None]:
    """Tell tokenizers of processes that start now to use no threads, which do not survive a fork."""
    if _THREADS in os.environ:
        yield
        return
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        del os.environ[_THREADS]


def _as_it_is(prepared: Any) -> Any:
    return prepared


def fill_batches(groups: Iterable[Prepared], batch_tokens: int) -> Iterator[list[Prepared]]:
    """Yield batches of at most ``batch_tokens`` tokens with padding; groups of like length come together."""
    window: list[Prepared] = []
    num_tokens = 0
    for prepared in groups:
        window.append(prepared)
        num_tokens += prepared.group.tree.num_tokens
        if num_tokens >= _WINDOW * batch_tokens:
            *full, window = _cut(window, batch_tokens)
            yield from full
            num_tokens = sum(p.group.tree.num_tokens for p in window)
    yield from _cut(window, batch_tokens)


def _cut(window: list[Prepared], batch_tokens: int) -> Iterator[list[Prepared]]:
    batch: list[Prepared] = []
    for prepared in sorted(window, key=lambda p: (len(p.group.tree.trunk), len(p.group.tree.tokens))):
        trees = [p.group.tree for p in (*batch, prepared)]
        padded = len(trees) * (max(len(t.trunk) for t in trees) + max(len(t.tokens) for t in trees))
        if batch and padded > batch_tokens:
            yield batch
            batch = []
        batch.append(prepared)
    if batch:
        yield batch


def blank_image(colour: tuple[int, ...]) -> ImageRef:
    """Return an image of a single colour, 0-255."""
    data = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(data, "PNG")
    return ImageRef(data=data.getvalue(), name="blank")


def blank(conversation: Conversation, image: ImageRef) -> Conversation:
    """Return the conversation with ``image`` in place of each of its own."""
    messages = tuple(
        dataclasses.replace(message, images=(image,) * len(message.images))
        for message in conversation.messages
    )
    return dataclasses.replace(conversation, messages=messages)
