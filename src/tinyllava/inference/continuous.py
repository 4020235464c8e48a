"""Continuous batching: each conversation joins the decoding loop when it arrives and leaves when it is done.

Paper: none. Answers are those of ``Chat``. An image is encoded once while it is cached, and the part that a
prompt shares with another prompt or an earlier turn is not computed again.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from hashlib import sha256
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.images import open_image, read_image_bytes
from tinyllava.errors import ConfigError
from tinyllava.inference.chat import Chat, decode, encode_prompt
from tinyllava.inference.logits import check_logits, forbid_images, stop_ids, warpers
from tinyllava.inference.ragged import KeysValues, RaggedModel

_MAX_KEPT = 512  # conversations that are looked through for each prompt
_DEFAULT_BYTES = 4 * 2**30
_IMAGE_TOKENS = 65_536  # of remembered images together


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """A prompt and its answer on their way.

    ``key`` has the token ids of the prompt, but the digest of an image in place of its tokens' ids: equal
    beginnings of two keys have equal keys and values.
    """

    prompt: list[int]
    turns: tuple[Message, ...] = ()
    """What was said, without the bytes of its images."""
    key: list[int | bytes]
    images: list[Tensor | None]
    """Pixels [1, 3, H, W] of each image; None where they were not needed."""
    features: dict[int, Tensor] = field(default_factory=dict)
    """Image tokens [T, D], by the number of the image."""
    limit: int
    options: Mapping[str, Any]
    generator: torch.Generator | None = None
    past: KeysValues = field(default_factory=KeysValues)
    answer: list[int] = field(default_factory=list)
    is_done: bool = False
    is_ended: bool = False
    """Whether the answer has its end token; otherwise it ran into its limit."""

    @property
    def num_reserved(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + self.limit


class ContinuousDecoder:
    """Decodes sequences together, step by step. One thread calls all methods but ``prepare``.

    Args:
        cache_tokens: tokens whose keys and values are held, for running and remembered conversations
            together; 0 takes as many as 4 GiB hold, at least one context.
        max_running: sequences that are decoded together.
        prefill_tokens: tokens of prompts that are computed in one step; between two steps every running
            answer gets its next token. 0: 128 on a CPU, 1024 elsewhere.

    Raises:
        ConfigError: the model cannot be batched, or the cache is smaller than one context.
    """

    def __init__(
        self, chat: Chat, *, cache_tokens: int = 0, max_running: int = 32, prefill_tokens: int = 0
    ) -> None:
        self.chat, self.max_running = chat, max_running
        self.ragged = RaggedModel(chat.model)
        self.cache_tokens = cache_tokens or max(
            _DEFAULT_BYTES // self.ragged.token_bytes, chat.context_tokens
        )
        if self.cache_tokens < chat.context_tokens:
            self.ragged.close()
            raise ConfigError(
                f"a cache of {cache_tokens:,} tokens cannot hold one conversation: the context of the model "
                f"is {chat.context_tokens:,}. Give at least that many, or remove the option."
            )
        self.prefill_tokens = prefill_tokens or (128 if chat.model.device.type == "cpu" else 1_024)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_reused = 0
        """Tokens of prompts that were not computed, so far."""
        self.num_ahead = 0
        """Tokens that ``look_ahead`` computed, so far."""
        self.num_forgotten = 0  # conversations, so far
        self._kept: OrderedDict[int, Sequence] = OrderedDict()
        self._answered: deque[Sequence] = deque(maxlen=max_running)
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._encoding = Lock()  # a tokenizer has settings that change while it encodes
        self._stops = set(stop_ids(chat.model).tolist())

    def close(self) -> None:
        """Forget everything and give the model its own attention back."""
        self.waiting.clear()
        self.running.clear()
        self._kept.clear()
        self._answered.clear()
        self._features.clear()
        self.ragged.close()

    @property
    def num_kept_tokens(self) -> int:
        """Tokens of remembered conversations."""
        return sum(sequence.past.length for sequence in tuple(self._kept.values()))

    def prepare(
        self,
        conversation: Conversation,
        max_new_tokens: int,
        *,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Sequence:
        """Make a conversation ready to be added; may run in any thread.

        Args:
            options: ``temperature`` and ``top_p`` to sample with; without any the likeliest token is taken.
            seed: of the sampling; the tokens are those of ``Chat`` after ``torch.manual_seed``.
            is_wanted: asked before each image is opened; large ones take seconds.

        Raises:
            CancelledError: it is no longer wanted.
            ImageError: an image is broken.
            DataError: the conversation does not fit the model's context.
        """
        processor, device = self.chat.processor, self.chat.model.device
        with self._encoding:
            prompt = encode_prompt(processor, conversation)
        digests = [sha256(read_image_bytes(ref)).digest() for ref in conversation.images]
        found = ((i, self._features.get(digest)) for i, digest in enumerate(digests))
        known = {i: features for i, features in found if features is not None}
        images: list[Tensor | None] = []
        for i, ref in enumerate(conversation.images):
            if not is_wanted():
                raise CancelledError
            # One at a time: of each, only the pixels at the encoder's size stay.
            images.append(
                None if i in known else processor.to_pixels([open_image(ref, processor.background)])
            )
        key: list[int | bytes] = [*prompt]
        num_seen = 0
        for position, token in enumerate(prompt):
            if token == processor.image_token_id:
                key[position] = digests[num_seen // processor.num_image_tokens]
                num_seen += 1
        generator = None
        if options:
            generator = torch.Generator(device)
            generator.seed() if seed is None else generator.manual_seed(seed)
        return Sequence(
            prompt=prompt,
            turns=tuple(replace(m, images=(ImageRef(),) * len(m.images)) for m in conversation.messages),
            key=key,
            images=images,
            features=known,
            limit=min(max_new_tokens, self.chat.context_tokens - len(prompt)),
            options=options or {},
            generator=generator,
        )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its place."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Stop a sequence in any state. Computed keys and values stay in the cache."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._leave(sequence)

    def drop_running(self) -> list[Sequence]:
        """Give up everything that runs, after an error, and return it; if nothing does, what was to begin.

        What is remembered goes too: if memory ran out, it would run out again.
        """
        self._kept.clear()
        self._features.clear()
        dropped, self.running = self.running, []
        if not dropped and self.waiting:
            dropped.append(self.waiting.popleft())
        return dropped

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Give every running answer its next token, and compute a piece of the prompts.

        Returns:
            The sequences whose answer grew; those that are done have left.

        Raises:
            CheckpointError: the model's logits are not numbers.
        """
        self._admit()
        new: list[tuple[Sequence, Tensor]] = []
        room = self.prefill_tokens
        for sequence in self.running:
            num_left = len(sequence.prompt) - sequence.past.length
            if num_left <= 0:
                new.append((sequence, self._embed(sequence.answer[-1:])))
            elif room:
                end = sequence.past.length + min(room, num_left)
                room -= end - sequence.past.length
                new.append((sequence, self._embed_prompt(sequence, end)))
        if not new:
            return []
        hidden = self.ragged.forward([(sequence.past, embeds) for sequence, embeds in new])
        ready = [i for i, (sequence, _) in enumerate(new) if sequence.past.length >= len(sequence.prompt)]
        grown = [new[i][0] for i in ready]
        if grown:
            self._choose(grown, hidden[torch.tensor(ready, device=hidden.device)])
        for sequence in grown:
            sequence.is_ended = sequence.answer[-1] in self._stops
            sequence.is_done = sequence.is_ended or len(sequence.answer) >= sequence.limit
            if sequence.is_done:
                self._leave(sequence)
        return grown

    @property
    def can_look_ahead(self) -> bool:
        """Whether ``look_ahead`` may have something to do."""
        return bool(self._answered)

    @torch.inference_mode()
    def look_ahead(self) -> None:
        """Compute what the next turn of one answered conversation begins with, whatever it asks.

        That is the end of the answer and the words of the template before a question. To be called while
        nothing waits. If the next turn begins otherwise, its prompt is computed from there.
        """
        sequence = self._answered.pop()
        start = sequence.past.length
        if id(sequence) not in self._kept:
            return
        with self._encoding:
            begin = self._begin_of_next(sequence)
        new = begin[start:]
        known = zip(sequence.key, begin, strict=False)
        if not 0 < len(new) <= self.prefill_tokens or len(begin) >= self.chat.context_tokens:
            return
        if any(key != token for key, token in known if isinstance(key, int)):
            return  # the client sends back another text, as after a stop text
        self.ragged.forward([(sequence.past, self._embed(new))])
        sequence.past.trim()
        sequence.key += new
        self.num_ahead += len(new)
        self._forget(self.cache_tokens - sum(running.num_reserved for running in self.running))

    def _begin_of_next(self, sequence: Sequence) -> list[int]:
        """Return the tokens that two prompts share that go on with different questions."""
        answer = Message(role="assistant", text=decode(self.chat.processor, [sequence.answer])[0])
        following = [
            Conversation(messages=(*sequence.turns, answer, Message(role="user", text=question)))
            for question in ("A", "7")
        ]
        one, other = self.chat.processor.encode_all(following, open_answer=True)
        return one.input_ids[: _common_length(one.input_ids, other.input_ids)]

    def _choose(self, sequences: list[Sequence], hidden: Tensor) -> None:
        """Add the next token to the answers of sequences, from hidden states [S, D]."""
        model = self.chat.model
        logits = model.lm_head(hidden).float()
        check_logits(model, logits)
        logits = forbid_images(model, logits)
        likeliest = logits.argmax(-1).tolist()
        for i, sequence in enumerate(sequences):
            token = likeliest[i]
            if sequence.options:
                ids = torch.tensor([sequence.prompt + sequence.answer])
                scores = warpers(sequence.options)(ids, logits[i : i + 1])
                token = int(torch.multinomial(scores.softmax(-1), 1, generator=sequence.generator))
            sequence.answer.append(token)
            sequence.key.append(token)

    def _admit(self) -> None:
        """Let waiting sequences begin, in order, while there is room.

        One that begins like a prompt that is being computed waits for that, and others pass it.
        """
        reserved = sum(sequence.num_reserved for sequence in self.running)
        for sequence in list(self.waiting):
            full = reserved + sequence.num_reserved > self.cache_tokens
            if len(self.running) >= self.max_running or (full and self.running):
                return
            if self._begin(sequence):
                self.waiting.remove(sequence)
                self.running.append(sequence)
                reserved += sequence.num_reserved
                self._forget(self.cache_tokens - reserved)

    def _begin(self, sequence: Sequence) -> bool:
        """Take over the longest beginning that is computed; false if a longer one is about to be."""
        most = len(sequence.prompt) - 1  # the last token leads to the first logits
        best, best_length = None, 0
        for source in (*self.running, *self._kept.values()):
            shared = min(_common_length(sequence.key, source.key), most)
            if shared <= best_length:
                continue
            if source.past.length < min(shared, len(source.prompt)):
                return False
            shared = min(shared, source.past.length)
            if shared > best_length:
                best, best_length = source, shared
        if best is None:
            sequence.past = KeysValues(len(sequence.prompt))
            return True
        self.num_reused += best_length
        if id(best) in self._kept:
            self._kept.move_to_end(id(best))
            if best_length == best.past.length:
                sequence.past = self._kept.pop(id(best)).past
                sequence.past.room = len(sequence.prompt)
                return True
        sequence.past = best.past.copy(best_length, len(sequence.prompt))
        return True

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out, and remember what is computed of it."""
        self.running.remove(sequence)
        sequence.images, sequence.features = [], {}
        length = sequence.past.length
        del sequence.key[length:]
        for number, other in list(self._kept.items()):
            num_shared = _common_length(sequence.key, other.key)
            if num_shared == length:
                return  # known already
            if num_shared == len(other.key):
                del self._kept[number]
        if length:
            sequence.past.trim()
            self._kept[id(sequence)] = sequence
            if sequence.is_done and sequence.turns:
                self._answered.append(sequence)
        self._forget(self.cache_tokens - sum(running.num_reserved for running in self.running))

    def _forget(self, room: int) -> None:
        """Drop what was not used for longest, until the rest has room."""
        num_tokens = self.num_kept_tokens
        while self._kept and (num_tokens > room or len(self._kept) > _MAX_KEPT):
            num_tokens -= self._kept.popitem(last=False)[1].past.length
            self.num_forgotten += 1

    def _embed(self, ids: list[int]) -> Tensor:
        model = self.chat.model
        embeds: Tensor = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
        return embeds

    def _embed_prompt(self, sequence: Sequence, end: int) -> Tensor:
        """Embed the next tokens of a prompt, images in their places."""
        start, processor = sequence.past.length, self.chat.processor
        embeds = self._embed(sequence.prompt[start:end])
        num_tokens = processor.num_image_tokens
        slot = sequence.prompt[:start].count(processor.image_token_id)
        for position in range(start, end):
            if sequence.prompt[position] == processor.image_token_id:
                number, row = divmod(slot, num_tokens)
                if number not in sequence.features:
                    sequence.features[number] = self._encode(sequence, number, position)
                embeds[position - start] = sequence.features[number][row].to(embeds.dtype)
                slot += 1
        return embeds

    def _encode(self, sequence: Sequence, number: int, position: int) -> Tensor:
        """Return the tokens [T, D] of an image, and remember them."""
        digest = sequence.key[position]
        assert isinstance(digest, bytes)
        features = self._features.pop(digest, None)
        if features is None:
            pixels = sequence.images[number]
            assert pixels is not None
            features = self.chat.model.model.get_image_features(pixels.to(self.chat.model.device))[0]
        self._features[digest] = features
        while len(self._features) * len(features) > _IMAGE_TOKENS and len(self._features) > 1:
            self._features.popitem(last=False)
        return features


def _common_length(one: list[Any], other: list[Any]) -> int:
    """Return how many first entries two lists share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
