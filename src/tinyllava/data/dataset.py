"""From conversations to examples: token ids, supervised positions and pixels; questions as branches.

Paper: section 3.2, (X, Y) and the set A. In pre-training, the template 'caption' reduces Y to Y_a (equation
1).
Differs: with ``separate_questions``, the questions about one image share a row without seeing each other. The
paper trains a conversation turn by turn, where later answers can be copied from earlier ones instead of being
learned from the image.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tinyllava.conversation import Conversation, Message
from tinyllava.data.batches import Measure, measure_all, processor_key
from tinyllava.data.defects import Defect, raise_defects
from tinyllava.data.features import FeatureCache
from tinyllava.data.images import naming_record, open_image
from tinyllava.data.store import cut, image_counts, question_counts, record_numbers, select
from tinyllava.errors import DataError
from tinyllava.model.modeling import IGNORED, Segments
from tinyllava.model.packing import ImagePacking
from tinyllava.model.processing import Encoded, TinyLlavaProcessor


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sample of N tokens."""

    input_ids: Tensor
    """[N]"""
    labels: Tensor
    """[N], -100 where not supervised"""
    pixel_values: Tensor | None = None
    """[I, 3, H, W]; bytes where the examples have a packing"""
    image_features: Tensor | None = None
    """[I, M, X], in place of pixels"""
    branches: Tensor | None = None
    """[N], 0 in the shared beginning, then the number of each token's question; None without branches"""
    place: str = ""
    """Of its record, for errors."""


@dataclass(kw_only=True)
class Examples(Dataset[Example]):
    """The examples of one stage, made when asked for."""

    conversations: Sequence[Conversation]
    processor: TinyLlavaProcessor
    template: str | None = None
    """Jinja text of the stage's template; None for the checkpoint's own."""
    separate_questions: bool = False
    """Whether each question of a conversation is a branch of its own (see ``tinyllava.data.dataset``)."""
    features: FeatureCache | None = None
    packing: ImagePacking | None = None
    """Turns images into bytes, which the trainer unpacks on the device; None: into pixel values, here."""
    lengths: Sequence[int] = ()
    """Tokens of each example, image tokens included; filled by ``measure``."""
    supervised_lengths: Sequence[int] = ()
    num_truncated: int = 0
    """Records that were too long and end after an earlier answer; filled by ``measure``."""

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Example:
        """Make one example.

        Raises:
            ImageError: its image is broken; the record is named.
        """
        conversation = self.conversations[index]
        encoded = self.encode(conversation)
        input_ids = torch.from_numpy(encoded.token_ids)
        labels = input_ids.masked_fill(~torch.from_numpy(encoded.is_supervised), IGNORED)
        branches = torch.tensor(encoded.branches) if encoded.branches else None
        pixels = features = None
        with naming_record(conversation):
            if conversation.images and self.features is not None:
                features = torch.stack([self.features.read(ref) for ref in conversation.images])
            elif conversation.images:
                images = [open_image(ref, self.processor.background) for ref in conversation.images]
                to_pixels = self.packing.pack if self.packing else self.processor.to_pixels
                pixels = to_pixels(images)
        return Example(
            input_ids=input_ids,
            labels=labels,
            pixel_values=pixels,
            image_features=features,
            branches=branches,
            place=conversation.place,
        )

    def unpacked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with the pixel values of its images, made where the batch is."""
        if self.packing is None or "pixel_values" not in inputs:
            return inputs
        return inputs | {"pixel_values": self.packing.unpack(inputs["pixel_values"])}

    def select(self, kept: NDArray[np.int64]) -> "Examples":
        """Return some of the examples, by their places."""
        if len(kept) == len(self):
            return self
        return replace(
            self,
            conversations=select(self.conversations, kept),
            lengths=array("i", (self.lengths[place] for place in kept)),
            supervised_lengths=array("i", (self.supervised_lengths[place] for place in kept)),
        )

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokenise a conversation as the stage trains it.

        Raises:
            DataError: see ``TinyLlavaProcessor.encode`` and ``encode_branches``.
        """
        return self.encode_all([conversation])[0]

    def encode_all(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Tokenise conversations together, which takes less time; raises as ``encode``."""
        if self.separate_questions:
            return [encode_branches(self.processor, one, self.template) for one in conversations]
        return self.processor.encode_all(conversations, template=self.template)


def measure(
    examples: Examples,
    max_length_tokens: int,
    skip: tuple[str, ...],
    progress: Callable[[int], None] = lambda n: None,
    *,
    truncate: bool = False,
) -> tuple[Examples, Counter[str]]:
    """Tokenise everything once: find records that are too long before the first step.

    The lengths of converted records are kept beside them, and counted by all cores.

    Args:
        truncate: whether a record that is too long ends after the last answer that fits, if one does.

    Returns:
        The examples that are left, with their lengths, and the number left out by defect.

    Raises:
        Defect, Defects: records whose defect is not in ``skip``.
        DataError: of ``Examples.encode``.
    """
    describes = _drops_questions(examples)
    conversations = examples.conversations

    def count(some: Sequence[Conversation]) -> list[tuple[int, int]]:
        counted = [not (describes and _is_no_caption(one)) for one in some]
        encoded = iter(examples.encode_all([one for one, on in zip(some, counted, strict=True) if on]))
        found = (next(encoded) if on else None for on in counted)
        return [(len(e.token_ids), int(e.is_supervised.sum())) if e else (0, 0) for e in found]

    key = processor_key(examples.processor, examples.template, examples.separate_questions)
    lengths, supervised = measure_all(conversations, count, key, progress)
    if truncate:
        examples = _truncate(examples, lengths, supervised, max_length_tokens, count)
        conversations = examples.conversations
    questions = question_counts(conversations)
    is_dialogue = (questions > 1) & describes
    is_text = (image_counts(conversations) == 0) & describes & ~is_dialogue
    wrong = {"dialogue": is_dialogue, "text_only": is_text, "too_long": lengths > max_length_tokens}
    details: dict[str, Callable[[int], str]] = {
        "dialogue": lambda i: (
            f"{questions[i]} questions, but the template of this stage drops them and trains on captions"
        ),
        "text_only": lambda i: "no image, but this stage trains on image captions",
        "too_long": lambda i: f"{lengths[i]} tokens exceed max_length_tokens = {max_length_tokens}",
    }
    once = {name: _first_places(conversations, found) for name, found in wrong.items()}
    defects = [
        Defect(name, conversations[i].place, details[name](i))
        for name, places in once.items()
        if name not in skip
        for i in places
    ]
    raise_defects(Path(conversations[0].source) if len(conversations) else Path(), defects)
    kept = np.flatnonzero(~(is_dialogue | is_text | wrong["too_long"]))
    measured = replace(
        examples, lengths=array("i", lengths.tolist()), supervised_lengths=array("i", supervised.tolist())
    )
    return measured.select(kept), Counter({name: len(found) for name, found in once.items() if found})


def _first_places(conversations: Sequence[Conversation], found: NDArray[np.bool_]) -> list[int]:
    """Return where each of some records comes first: a record that is several samples is one defect."""
    _, first = np.unique(record_numbers(conversations)[found], return_index=True)
    return [int(place) for place in np.flatnonzero(found)[first]]


def _truncate(
    examples: Examples,
    lengths: NDArray[np.int32],
    supervised: NDArray[np.int32],
    max_length_tokens: int,
    count: Measure,
) -> Examples:
    """Cut records that are too long after an earlier answer, and write their lengths into the arrays."""
    ends: dict[int, int] = {}
    for place in np.flatnonzero(lengths > max_length_tokens).tolist():
        end, found = _last_end(examples.conversations[place], max_length_tokens, count)
        if end:
            ends[place] = end
            lengths[place], supervised[place] = found
    numbers = record_numbers(examples.conversations)
    return replace(
        examples,
        conversations=cut(examples.conversations, ends) if ends else examples.conversations,
        num_truncated=len({int(numbers[place]) for place in ends}),
    )


def _last_end(
    conversation: Conversation, max_length_tokens: int, count: Measure
) -> tuple[int, tuple[int, int]]:
    """Return how many turns fit, up to the end of an answer, and their tokens; 0 if not even the first ones.

    What is left always has an answer that adds to the loss.
    """
    messages = conversation.messages
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    first = next(i for i in answers if messages[i].is_trained)
    ends = [i + 1 for i in answers if i >= first][:-1]
    low, high, fitting = 0, len(ends), (0, 0)
    while low < high:  # more turns, more tokens
        middle = (low + high + 1) // 2
        [found] = count([replace(conversation, messages=messages[: ends[middle - 1]])])
        if found[0] <= max_length_tokens:
            low, fitting = middle, found
        else:
            high = middle - 1
    return (ends[low - 1] if low else 0), fitting


def _drops_questions(examples: Examples) -> bool:
    """Whether the template drops the user's text, so that an answer can only describe the image."""
    question = "Which question?"
    talk = Conversation(
        messages=(Message(role="user", text=question), Message(role="assistant", text="An answer."))
    )
    return question not in examples.processor.render(talk, template=examples.template)[0]


def _is_no_caption(conversation: Conversation) -> bool:
    return sum(message.role == "user" for message in conversation.messages) > 1 or not conversation.images


@dataclass(frozen=True)
class Collator:
    """Examples to one batch, right-padded, or packed into one row without padding."""

    pad_token_id: int
    image_token_id: int
    packs: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return input_ids, attention_mask and labels [B, N], all images, and the samples' ids.

        Positions of image tokens and supervised tokens, and the number of tokens, are counted here: on a GPU
        the host would have to wait for them (see ``TinyLlavaForConditionalGeneration.forward``). Where a
        sample has branches, there are ``branches`` [B, N] too. A packed batch has one row [1, N] and
        ``segments`` in place of mask and branches. Without examples it is a row of two tokens without loss.
        """
        blank = torch.full((2,), self.pad_token_id)
        rows = examples or [Example(input_ids=blank, labels=torch.full_like(blank, IGNORED))]
        batch = _pack(rows) if self.packs else self._pad_rows(rows)
        for name in ("pixel_values", "image_features"):
            parts = [value for e in examples if (value := getattr(e, name)) is not None]
            if parts:
                batch[name] = torch.cat(parts)
        at_image = batch["input_ids"] == self.image_token_id
        batch["image_positions"] = at_image.flatten().nonzero().flatten()
        followed = batch["labels"][:, 1:].flatten()
        if self.packs:
            followed = batch["labels"][0, batch["segments"]["kept"] + 1]
        batch["supervised_positions"] = (followed != IGNORED).nonzero().flatten()
        batch["num_tokens"] = sum(len(example.input_ids) for example in examples)
        batch["sample_ids"] = [example.place for example in examples]
        return batch

    def _pad_rows(self, examples: Sequence[Example]) -> dict[str, Any]:
        longest = max(len(example.input_ids) for example in examples)
        batch: dict[str, Any] = {
            "input_ids": _pad([e.input_ids for e in examples], longest, self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(e.input_ids) for e in examples], longest, 0),
            "labels": _pad([e.labels for e in examples], longest, IGNORED),
        }
        if any(example.branches is not None for example in examples):
            rows = [torch.zeros_like(e.input_ids) if e.branches is None else e.branches for e in examples]
            batch["branches"] = _pad(rows, longest, PADDING)
        return batch


def _pack(examples: Sequence[Example]) -> dict[str, Any]:
    """Join samples into one row [1, N]; see ``Segments``."""
    lengths = [len(example.input_ids) - 1 for example in examples]
    starts = [0, *accumulate(len(example.input_ids) for example in examples)]
    labels = torch.cat([example.labels for example in examples])
    labels[starts[:-1]] = IGNORED  # no token before it is of the same sample
    segments: Segments = {
        "lengths": lengths,
        "kept": torch.cat([torch.arange(n) + start for n, start in zip(lengths, starts, strict=False)]),
        "positions": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    if any(example.branches is not None for example in examples):
        rows = [torch.zeros_like(e.input_ids) if e.branches is None else e.branches for e in examples]
        segments["branches"] = torch.cat([row[:-1] for row in rows])[None]
    ids = torch.cat([example.input_ids for example in examples])
    return {"input_ids": ids[None], "labels": labels[None], "segments": segments}


def _pad(rows: list[Tensor], length: int, value: int) -> Tensor:
    padded = rows[0].new_full((len(rows), length), value)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


PADDING = -1
"""Branch of the padding behind a row: nothing that counts sees it."""


def split_questions(conversation: Conversation) -> list[Conversation]:
    """Return one conversation for each question, with the system text and the images of the first.

    Raises:
        DataError: a later question has images of its own.
    """
    system = tuple(takewhile(lambda message: message.role == "system", conversation.messages))
    turns = conversation.messages[len(system) :]
    starts = [i for i, message in enumerate(turns) if message.role == "user"]
    if any(turns[i].images for i in starts[1:]):
        raise DataError(
            f"{conversation.place}: a later question has its own images and "
            "cannot be separated. Put all images into the first question, or set separate_questions to false."
        )
    parts = []
    for start, end in zip(starts, [*starts[1:], len(turns)], strict=True):
        first = turns[starts[0]]
        question = turns[start] if start == starts[0] else replace(turns[start], images=first.images)
        parts.append(replace(conversation, messages=(*system, question, *turns[start + 1 : end])))
    return parts


def encode_branches(
    processor: TinyLlavaProcessor, conversation: Conversation, template: str | None = None
) -> Encoded:
    """Tokenise a conversation with its questions as branches after their shared prefix.

    The shared beginning ends before the first supervised token of any branch: the token that predicts a
    supervised one is always of the same branch.

    Raises:
        DataError: see ``split_questions`` and ``TinyLlavaProcessor.encode``; or the template puts an answer
            directly after the image.
    """
    asked = [one for one in split_questions(conversation) if one.messages[-1].is_trained]
    parts = [processor.encode(part, template=template) for part in asked]  # nobody sees the others
    if len(parts) < 2:
        return parts[0]
    num_shared = _num_shared(parts)
    shared, image = parts[0].input_ids[:num_shared], processor.image_token_id
    if shared.count(image) != parts[0].input_ids.count(image):
        raise DataError(
            f"{conversation.place}: the template puts the answer directly after "
            "the image, so the questions cannot be separated. Set separate_questions to false."
        )
    input_ids, supervised, branches = list(shared), [False] * num_shared, [0] * num_shared
    for number, part in enumerate(parts, start=1):
        end = len(part.supervised) - part.supervised[::-1].index(True)  # no loss depends on what follows
        input_ids += part.input_ids[num_shared:end]
        supervised += part.supervised[num_shared:end]
        branches += [number] * (end - num_shared)
    text = "".join(part.text for part in parts)
    return Encoded(
        text=text,
        token_ids=np.array(input_ids, dtype=np.int64),
        is_supervised=np.array(supervised, dtype=np.bool_),
        branches=branches,
    )


def _num_shared(parts: list[Encoded]) -> int:
    """Count the tokens that all parts begin with, up to one before the first supervised token."""
    most = min(part.supervised.index(True) for part in parts) - 1
    columns = zip(*(part.input_ids for part in parts), strict=False)
    return min(most, sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns)))
