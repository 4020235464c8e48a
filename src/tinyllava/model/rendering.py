"""From a conversation to its text by the chat template, and from parts of the text to tokens.

Paper: section 3.2; the spans of what the assistant says are the set A of equation 3.

The package's own templates look at a turn's role, at its number of images and at whether it has a text, and
put the text somewhere, with or without its outer blanks. Conversations that are equal in these (a shape)
differ in nothing but the texts, so such a template is rendered once for each shape. Any other template is
rendered each time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllava.conversation import Conversation, ImageRef, Message, Role, to_chat
from tinyllava.model.compat import render_template
from tinyllava.model.tokenizer import Spans
from tinyllava.parts.templates import gap_of, is_packaged, takes_plain_text

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Shape = tuple[tuple[Role, int, bool], ...]
"""Of each turn: role, number of images, whether it has a text."""
_IMAGE = ImageRef()
_BLANK = "\v"  # which stripping removes and no template writes
_FIRST_UNUSED, _NUM_UNUSED = 0xF0000, 0xFFFE  # private characters of Unicode: no template writes them
_TEXT = re.compile(f"{_BLANK}?([{chr(_FIRST_UNUSED)}-{chr(_FIRST_UNUSED + _NUM_UNUSED - 1)}]){_BLANK}?")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a template is filled with beside the turns."""

    template: str
    """Jinja."""
    open_answer: bool
    """End where the assistant is to speak."""
    bos: str
    eos: str
    leading_bos: str
    gap: str

    def render(self, conversation: Conversation) -> tuple[str, Spans]:
        """Return the text of a conversation and the spans [start, end) of what the assistant says."""
        shape = tuple((one.role, len(one.images), bool(one.text)) for one in conversation.messages)
        if len(shape) > _NUM_UNUSED or not is_packaged(self.template):
            return self.render_alone(conversation)
        return _outline(self, shape).fill([message.text for message in conversation.messages])

    def render_alone(self, conversation: Conversation) -> tuple[str, Spans]:
        """Return the same of any template, which takes twenty times as long."""
        return render_template(
            to_chat(conversation, plain=takes_plain_text(self.template)),
            self.template,
            add_generation_prompt=self.open_answer,
            bos_token=self.bos,
            eos_token=self.eos,
            leading_bos=self.leading_bos,
            gap=self.gap,
        )


def settings_of(tokenizer: Any, chat_template: str, template: str, open_answer: bool) -> Settings:
    """Return how a template is filled for a checkpoint.

    Args:
        chat_template: the checkpoint's own.
        template: the one that is filled.
    """
    return Settings(
        template=template,
        open_answer=open_answer,
        bos=tokenizer.bos_token or "",
        eos=tokenizer.eos_token or "",
        leading_bos=leading_bos(tokenizer, chat_template),
        gap=gap_of(chat_template),
    )


@lru_cache(maxsize=16)
def leading_bos(tokenizer: Any, chat_template: str) -> str:
    """Return the start of a caption: BOS if the checkpoint's conversations start with it, otherwise nothing.

    A language model that saw BOS in front of every text rests its attention on it (docs/log.md has what was
    seen without).
    """
    bos = str(tokenizer.bos_token or "")
    greeting = [{"role": "user", "content": ""}]
    begin = tokenizer.apply_chat_template(greeting, chat_template=chat_template, tokenize=False)
    return bos if begin.startswith(bos) else ""


@dataclass(frozen=True, slots=True)
class _Outline:
    """The text of a shape: pieces of the template, and places for the texts of turns between them."""

    pieces: tuple[str, ...]
    texts: tuple[tuple[int, int, bool], ...]
    """Which piece is the text of which turn, and whether without its outer blanks."""
    spans: tuple[tuple[int, int], ...]
    """Pieces [first, last) that the assistant says."""

    def fill(self, said: Sequence[str]) -> tuple[str, Spans]:
        pieces = list(self.pieces)
        for piece, turn, is_stripped in self.texts:
            pieces[piece] = said[turn].strip() if is_stripped else said[turn]
        ends = list(accumulate(map(len, pieces), initial=0))
        return "".join(pieces), [(ends[first], ends[last]) for first, last in self.spans]


@lru_cache(maxsize=4096)
def _outline(settings: Settings, shape: Shape) -> _Outline:
    """Render a conversation of a shape whose texts are one known character each, and cut the result."""
    turns = tuple(
        Message(
            role=role,
            text=f"{_BLANK}{chr(_FIRST_UNUSED + turn)}{_BLANK}" if has_text else "",
            images=(_IMAGE,) * num_images,
        )
        for turn, (role, num_images, has_text) in enumerate(shape)
    )
    rendered, spans = settings.render_alone(Conversation(messages=turns))
    places = {found.start(): found for found in _TEXT.finditer(rendered)}
    edges = {edge for span in spans for edge in span}
    edges |= {edge for found in places.values() for edge in found.span()}
    cuts = sorted(edges | {0, len(rendered)})
    number = {cut: piece for piece, cut in enumerate(cuts)}
    return _Outline(
        pieces=tuple(rendered[start:end] for start, end in pairwise(cuts)),
        texts=tuple(
            (number[start], ord(found[1]) - _FIRST_UNUSED, len(found[0]) == 1)
            for start, found in places.items()
        ),
        spans=tuple((number[start], number[end]) for start, end in spans),
    )


def whole_encodings(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Return a tokenizer's encodings of texts, with ids and offsets, whatever its last call asked of it.

    A call of the tokenizer itself takes a third longer, because it copies them to dictionaries of lists.
    """
    pipeline = tokenizer.backend_tokenizer
    if pipeline.truncation is not None:
        pipeline.no_truncation()
    if pipeline.padding is not None:
        pipeline.no_padding()
    if len(texts) == 1:  # threads would cost more than they save
        return [pipeline.encode(texts[0], add_special_tokens=False)]
    found: list[Any] = pipeline.encode_batch(texts, add_special_tokens=False)
    return found


def locate_all(
    read: Sequence[tuple[str, Spans, list[int], Spans]],
) -> tuple[list[Bools], tuple[int, int] | None]:
    """Locate the tokens of many texts together, as if each text began behind the one before.

    Args:
        read: of each: text, spans, token ids, their offsets.

    Returns:
        Of each: what ``locate_tokens`` returns of its tokens; and of the first token that reaches across an
        edge: its text and its place there.
    """
    counts = [len(ids) for _, _, ids, _ in read]
    ends = list(accumulate(counts, initial=0))
    starts = list(accumulate((len(text) + 1 for text, _, _, _ in read), initial=0))
    edges = np.fromiter(
        chain.from_iterable(chain.from_iterable(offsets for _, _, _, offsets in read)),
        dtype=np.int64,
        count=2 * ends[-1],
    ).reshape(-1, 2)
    edges += np.repeat(np.array(starts[:-1], dtype=np.int64), counts)[:, None]
    spans = [
        (start + first, start + last)
        for start, (_, spans, _, _) in zip(starts, read, strict=False)
        for first, last in spans
    ]
    inside, joining = locate_tokens(edges, spans)
    masks = [inside[start:end] for start, end in pairwise(ends)]
    if joining is None:
        return masks, None
    number = int(np.searchsorted(ends, joining, side="right")) - 1
    return masks, (number, joining - ends[number])


def locate_tokens(offsets: Ints, spans: Spans) -> tuple[Bools, int | None]:
    """Find the tokens inside spans of a text.

    Args:
        offsets: [N, 2], start and end of each token in the text.
        spans: disjoint parts [start, end) in ascending order.

    Returns:
        [N], whether each token is within a span, and the first token that reaches across an edge of one.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    edges = np.array(spans, dtype=np.int64).reshape(-1, 2)
    before = np.searchsorted(edges[:, 0], starts, side="right")  # spans that begin at or before each token
    last_ends = np.concatenate(([-1], edges[:, 1]))[before]
    inside = (ends <= last_ends) & (ends > starts)
    flat = edges.ravel()
    crosses = np.searchsorted(flat, starts, side="right") < np.searchsorted(flat, ends, side="left")
    found = np.flatnonzero(crosses & ~inside)
    return inside, int(found[0]) if len(found) else None
