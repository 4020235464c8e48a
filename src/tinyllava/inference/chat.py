"""Ask a model: conversations in, text out, in batches or as a stream.

Paper: section 3.1. Decoding is greedy, as in the published evaluation.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, Self

import torch
from transformers import TextIteratorStreamer

from tinyllava.conversation import Answer, Conversation, ImageLike, ask, check_question
from tinyllava.data.images import open_image
from tinyllava.data.packages import find_default_model
from tinyllava.errors import ConfigError, DataError
from tinyllava.inference.dialogue import Dialogue
from tinyllava.inference.logits import FiniteLogits, stop_ids
from tinyllava.model import TinyLlavaForConditionalGeneration, TinyLlavaProcessor
from tinyllava.model.assemble import open_checkpoint
from tinyllava.model.devices import best_device, call_in_thread, check_device, multiplies_bf16
from tinyllava.model.linear import pack_linear_layers
from tinyllava.model.quantised import check_bits, quantise_language_model, quantised_bits
from tinyllava.model.rebuild import whole_model
from tinyllava.parts.folders import local_folder, saved_dtype

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_FORBIDDING = ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens")
"""Options of ``generate`` that set logits to minus infinity."""
OPTIONS = (
    "do_sample",
    *_SAMPLING,
    *_FORBIDDING,
    "repetition_penalty",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "stop_strings",
    "stopping_criteria",
    "logits_processor",
)
"""Options of ``generate`` that ``Chat`` takes."""


class Chat:
    """A model with its processor, ready to answer. ``Chat.open`` opens a checkpoint.

    Args:
        batch_tokens: max tokens of one batch, including padding and answers; limits the memory.
    """

    def __init__(
        self,
        model: TinyLlavaForConditionalGeneration,
        processor: TinyLlavaProcessor,
        *,
        batch_tokens: int = 16_384,
    ) -> None:
        self.model: Any = model.train(False)  # Any: the stock classes are only partly typed
        self.processor = processor
        self.batch_tokens = batch_tokens

    @classmethod
    def open(cls, folder: str | Path = "", *, device: str = "", dtype: str = "auto", bits: int = 16) -> Self:
        """Open a checkpoint, on a GPU if available.

        Args:
            folder: the checkpoint's folder, or its name on the Hub (``owner/name``; downloaded once);
                empty means the starter's model.
            device: a torch device, such as ``cuda:1``; empty means a GPU if available.
            dtype: type of the weights, such as ``bfloat16``; ``auto``: see ``choose_dtype``.
            bits: 4 or 8 quantises the linear layers of the language model (needs bitsandbytes).

        Raises:
            ConfigError: the device or the number of bits does not exist.
            MissingExtraError: ``bits`` is below 16 and bitsandbytes is not installed.
            CheckpointError: the folder is missing or incomplete, or is not a checkpoint.
        """
        check_bits(bits)
        folder = folder or find_default_model("give its folder to Chat.open")
        folder = whole_model(local_folder(folder))
        found = check_device(device or best_device())
        if dtype == "auto":
            dtype = choose_dtype(saved_dtype(Path(folder)), found.type)
        return cls(*call_in_thread(_open, folder, found, dtype, bits))

    @property
    def dtype(self) -> str:
        """Type of the weights, such as bfloat16; quantised weights add their bits, as in float32-4bit."""
        held = quantised_bits(self.model)
        return str(self.model.dtype).removeprefix("torch.") + (f"-{held}bit" if held < 16 else "")

    @property
    def context_tokens(self) -> int:
        """Max number of tokens of prompt and answer together."""
        return int(self.processor.tokenizer.model_max_length)

    def answer(
        self, conversations: Sequence[Conversation], max_new_tokens: int = 128, **options: Any
    ) -> list[Answer]:
        """Return one answer for each conversation, the same as if each were asked alone.

        Conversations with and without images may be mixed. Each must end with a user's message. An answer
        ends at ``max_new_tokens`` or where the context is full; ``is_cut`` is then true.

        Args:
            options: options of transformers' ``generate``, e.g. ``do_sample=True, temperature=0.2``.

        Raises:
            ConfigError: an option that is not supported.
            ImageError: an image is broken.
            DataError: a conversation does not fit the model's context.
            CheckpointError: the model's logits are NaN or infinite.
        """
        check_options(options)
        prompts = [encode_prompt(self.processor, conversation) for conversation in conversations]
        answers = [Answer("")] * len(prompts)
        for batch in self._batches([len(prompt) for prompt in prompts], max_new_tokens):
            inputs = self._collate([conversations[i] for i in batch], [prompts[i] for i in batch])
            limits = [self._limit(prompts[i], max_new_tokens) for i in batch]
            for i, text in zip(batch, self._generate(inputs, limits, options), strict=True):
                answers[i] = text
        return answers

    def ask(self, text: str, *images: ImageLike, max_new_tokens: int = 512, **options: Any) -> Answer:
        """Answer one question about any number of images: paths, bytes, data URLs or Pillow images.

        Raises the errors of ``answer``, and DataError if the text is the name of an image.
        """
        check_question(text)
        return self.answer([ask(text, *images)], max_new_tokens, **options)[0]

    def start(self, *images: ImageLike, system: str = "") -> Dialogue:
        """Start a conversation of several turns; see ``Dialogue``."""
        return Dialogue(self, *images, system=system)

    def answer_each(
        self, conversations: Sequence[Conversation], max_new_tokens: int = 128, **options: Any
    ) -> list[Answer | DataError]:
        """Answer like ``answer``, but return the error of a conversation that cannot be asked."""
        try:
            return [*self.answer(conversations, max_new_tokens, **options)]
        except DataError:
            refused = [self._refusal(conversation) for conversation in conversations]
        asked = [one for one, error in zip(conversations, refused, strict=True) if error is None]
        answers = iter(self.answer(asked, max_new_tokens, **options))
        return [next(answers) if error is None else error for error in refused]

    def _refusal(self, conversation: Conversation) -> DataError | None:
        """Return why a conversation cannot be asked: its images or its length."""
        try:
            encode_prompt(self.processor, conversation)
            for ref in conversation.images:
                open_image(ref)
        except DataError as error:
            return error
        return None

    def stream(self, conversation: Conversation, max_new_tokens: int = 512, **options: Any) -> "Stream":
        """Yield the answer in pieces while it is generated; joined, they are the answer.

        Closing the stream stops the model. Options and errors are those of ``answer``, without ``num_beams``.
        """
        check_options(options, is_streamed=True)
        prompt = encode_prompt(self.processor, conversation)
        inputs, limit = self._collate([conversation], [prompt]), self._limit(prompt, max_new_tokens)
        return Stream(
            lambda streamer, stop: self._generate(inputs, [limit], options, streamer, stop)[0], self
        )

    def shorten(self, conversation: Conversation, num_answer_tokens: int) -> tuple[Conversation, int]:
        """Drop a conversation's oldest questions, and their answers, until the next answer has room.

        Images of dropped questions move to the oldest question that is kept. A system message stays.

        Args:
            num_answer_tokens: room for the answer; at most a quarter of the context is kept free for it.

        Returns:
            The shortened conversation, with at least the last question, and the number of dropped questions.
        """
        room = min(num_answer_tokens, self.context_tokens // 4)
        num_system = sum(message.role == "system" for message in conversation.messages[:1])
        head, turns = conversation.messages[:num_system], conversation.messages[num_system:]
        num_dropped = 0
        while True:
            shorter = replace(conversation, messages=(*head, *turns))
            num_tokens = len(self.processor.encode(shorter, open_answer=True).input_ids)
            if num_tokens + room <= self.context_tokens or len(turns) < 3:
                return shorter, num_dropped
            images = (*turns[0].images, *turns[1].images, *turns[2].images)
            turns = (replace(turns[2], images=images), *turns[3:])
            num_dropped += 1

    def _limit(self, prompt: list[int], max_new_tokens: int) -> int:
        return min(max_new_tokens, self.context_tokens - len(prompt))

    def _generate(
        self,
        inputs: dict[str, Any],
        limits: list[int],
        options: Mapping[str, Any],
        streamer: TextIteratorStreamer | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Answer]:
        """Answer the prompts of a batch, each with its own limit of tokens."""
        width, stops = inputs["input_ids"].shape[1], set(stop_ids(self.model).tolist())

        def at_limit(ids: torch.Tensor, scores: object) -> torch.Tensor:
            own = torch.tensor(limits, device=ids.device).repeat_interleave(len(ids) // len(limits))
            return torch.logical_or(ids.shape[1] - width >= own, torch.tensor(stop(), device=ids.device))

        check = FiniteLogits(self.model, width, can_forbid=any(name in options for name in _FORBIDDING))
        given = {
            **options,
            "stopping_criteria": [*options.get("stopping_criteria", []), at_limit],
            "logits_processor": [check, *options.get("logits_processor", [])],
            **({"tokenizer": self.processor.tokenizer} if "stop_strings" in options else {}),
        }
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=max(limits), streamer=streamer, **given)
        pad = self.processor.tokenizer.pad_token_id
        new = output[:, width:].tolist()
        rows = [_trim(row[:limit], stops, pad) for row, limit in zip(new, limits, strict=True)]
        return [
            Answer(text, is_cut=len(row) >= limit and row[-1] not in stops)
            for text, row, limit in zip(decode(self.processor, rows), rows, limits, strict=True)
        ]

    def _batches(self, lengths: list[int], max_new_tokens: int) -> Iterator[list[int]]:
        """Yield indices, longest first, as many as fit the token budget."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and (lengths[batch[0]] + max_new_tokens) * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _collate(self, conversations: list[Conversation], prompts: list[list[int]]) -> dict[str, Any]:
        """Pad prompts on the left and open the images."""
        device, width = self.model.device, max(map(len, prompts))
        pad = self.processor.tokenizer.pad_token_id
        inputs = {
            "input_ids": torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device),
            "attention_mask": torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
            ),
        }
        images = [
            open_image(ref, self.processor.background)
            for conversation in conversations
            for ref in conversation.images
        ]
        if images:
            inputs["pixel_values"] = self.processor.to_pixels(images).to(device)
        return inputs


def _open(
    folder: Path, device: torch.device, dtype: str, bits: int
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor]:
    model, processor = open_checkpoint(folder, dtype=dtype, keep_bits=True)
    quantise_language_model(model, bits)
    model.to(device)
    pack_linear_layers(model, copies_tied=quantised_bits(model) == 16)  # a copy takes memory
    return model, processor


def choose_dtype(saved: str, device_type: str) -> str:
    """Return the type of the weights that a checkpoint answers with by default.

    A CPU computes in float32. A GPU keeps the saved type, but weights that training left in float32 are
    taken in bfloat16 where it multiplies that: the products of training were in it too, and float32 is an
    order of magnitude slower (docs/decisions/0016-answers-in-half-precision.md).

    Args:
        saved: type in the checkpoint's config, such as float32.
        device_type: such as cuda.
    """
    if device_type == "cpu":
        return "float32"
    return "bfloat16" if saved == "float32" and multiplies_bf16(device_type) else saved


def encode_prompt(processor: TinyLlavaProcessor, conversation: Conversation) -> list[int]:
    """Return the token ids of a conversation up to the start of the answer, with image tokens expanded.

    Raises:
        DataError: it does not fit the context of the language model, or the template leaves out its images.
    """
    input_ids = processor.encode(conversation, open_answer=True).input_ids
    name = repr(conversation.id or conversation.messages[-1].text[:40])
    num_marks = input_ids.count(processor.image_token_id) / processor.num_image_tokens
    if num_marks != len(conversation.images):
        raise DataError(
            f"conversation {name} has {len(conversation.images)} images, but its chat template writes "
            f"{processor.image_token} {num_marks:g} times. Fix chat_template.jinja in the checkpoint."
        )
    if len(input_ids) >= processor.tokenizer.model_max_length:
        raise DataError(
            f"conversation {name} has {len(input_ids):,} "
            f"tokens, but the context of the model is {processor.tokenizer.model_max_length:,}. Shorten it."
        )
    return input_ids


def decode(processor: TinyLlavaProcessor, ids: list[list[int]]) -> list[str]:
    """Return the text of answers, without special tokens and outer blanks."""
    texts: list[str] = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _trim(row: list[int], stops: set[int], pad: int) -> list[int]:
    """Return the tokens of an answer up to its end token; without one, drop the padding after it."""
    end = next((i + 1 for i, token in enumerate(row) if token in stops), None)
    if end is not None:
        return row[:end]
    while row and row[-1] == pad:
        row = row[:-1]
    return row


def check_options(options: Mapping[str, Any], *, is_streamed: bool = False) -> None:
    """Reject options of ``generate`` that would have no effect.

    Raises:
        ConfigError: an option that is not known, has no effect, or that a stream cannot follow.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            why = (
                "only one answer per question; ask again for another"
                if name == "num_return_sequences"
                else ""
            )
            raise ConfigError(
                f"option {name} = {value!r} is not supported{f' ({why})' if why else ''}; "
                f"supported: {', '.join(OPTIONS)}."
            )
        if name in _SAMPLING and not options.get("do_sample"):
            raise ConfigError(f"option {name} = {value!r} has no effect without do_sample=True. Add it.")
    if is_streamed and options.get("num_beams", 1) != 1:
        raise ConfigError(f"num_beams = {options['num_beams']!r} cannot be streamed; use Chat.answer.")


class Stream(Iterator[str]):
    """An answer in pieces while it is generated; at its end, ``is_cut`` says whether it reached its limit."""

    def __init__(
        self, generate: Callable[[TextIteratorStreamer, Callable[[], bool]], Answer], chat: Chat
    ) -> None:
        self.is_cut = False
        self._pieces = self._run(generate, chat)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop the model."""
        self._pieces.close()

    def _run(
        self, generate: Callable[[TextIteratorStreamer, Callable[[], bool]], Answer], chat: Chat
    ) -> Generator[str]:
        streamer = TextIteratorStreamer(chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = Event()

        def run() -> Answer:
            try:
                return generate(streamer, stopped.is_set)
            finally:  # the reader must not wait for more, whatever happened
                streamer.text_queue.put(streamer.stop_signal)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run)
            try:
                yield from filter(None, map(Strip().feed, streamer))
                self.is_cut = running.result().is_cut
            finally:
                stopped.set()


class Strip:
    """Drops the blanks at both ends of a text that comes in pieces."""

    def __init__(self) -> None:
        self._held, self._is_first = "", True

    def feed(self, piece: str) -> str:
        """Return the text that can be passed on after a new piece."""
        text = self._held + (piece.lstrip() if self._is_first else piece)
        kept = text.rstrip()
        self._held = text[len(kept) :]  # blanks are given out once something follows them
        self._is_first &= not kept
        return kept
