"""Ask a model: conversations in, text out, in batches or word by word.

Paper: section 3.1; decoding is greedy, as in the published evaluation.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Self

import torch
from transformers import TextIteratorStreamer

from tinyllava.checkpoint_folder import saved_dtype
from tinyllava.conversation import Conversation
from tinyllava.data.images import open_image
from tinyllava.devices import best_device, check_device, multiplies_bf16
from tinyllava.errors import DataError
from tinyllava.model import TinyLlavaForConditionalGeneration, TinyLlavaProcessor
from tinyllava.model.assemble import open_checkpoint


class Chat:
    """A model with its processor, ready to answer.

    Args:
        batch_tokens: most tokens of one batch, padding and answers included; bounds the memory.
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
    def open(cls, folder: str | Path, *, device: str = "", dtype: str = "auto") -> Self:
        """Open a checkpoint on the best device there is.

        Args:
            device: a device of torch; empty means a GPU if there is one.
            dtype: of the weights; ``auto`` is chosen by ``choose_dtype``.

        Raises:
            ConfigError: no such device here.
            CheckpointError: the folder is missing, incomplete, or of another kind.
        """
        found = check_device(device or best_device())
        if dtype == "auto":
            dtype = choose_dtype(saved_dtype(Path(folder)), found.type)
        model, processor = open_checkpoint(folder, dtype=dtype)
        model.to(found)
        return cls(model, processor)

    @property
    def dtype(self) -> str:
        """Name of the type of the weights, such as bfloat16."""
        return str(self.model.dtype).removeprefix("torch.")

    def answer(
        self, conversations: Sequence[Conversation], max_new_tokens: int = 128, **options: Any
    ) -> list[str]:
        """Return one answer for each conversation, the same as if each were asked alone.

        Conversations with and without pictures may be mixed; each ends where the assistant is to speak.

        Args:
            options: of transformers' ``generate``, e.g. ``do_sample=True, temperature=0.2``.

        Raises:
            ImageError: a picture is broken.
            DataError: a conversation does not fit the model's context.
        """
        prompts = [encode_prompt(self.processor, conversation) for conversation in conversations]
        answers = [""] * len(prompts)
        for batch in self._batches([len(prompt) for prompt in prompts], max_new_tokens):
            inputs = self._collate([conversations[i] for i in batch], [prompts[i] for i in batch])
            with torch.inference_mode():
                output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
            new = output[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(batch, decode(self.processor, new.tolist()), strict=True):
                answers[i] = text
        return answers

    def stream(self, conversation: Conversation, max_new_tokens: int = 512, **options: Any) -> Iterator[str]:
        """Yield the answer in pieces as they come; joined they are the answer.

        Closing the iterator stops the model. Raises as ``answer`` does.
        """
        inputs = self._collate([conversation], [encode_prompt(self.processor, conversation)])
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = Event()

        def is_stopped(ids: torch.Tensor, scores: object) -> torch.Tensor:
            return torch.full((len(ids),), stopped.is_set(), device=ids.device)

        def generate() -> None:
            options.update(streamer=streamer, stopping_criteria=[is_stopped], max_new_tokens=max_new_tokens)
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, **options)
            finally:  # the reader must not wait for more, whatever happened
                streamer.text_queue.put(streamer.stop_signal)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(generate)
            try:
                yield from _strip(streamer)
                running.result()
            finally:
                stopped.set()

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
        """Pad prompts on the left and open the pictures."""
        device, width = self.model.device, max(map(len, prompts))
        pad = self.processor.tokenizer.pad_token_id
        inputs = {
            "input_ids": torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device),
            "attention_mask": torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
            ),
        }
        images = [open_image(ref) for conversation in conversations for ref in conversation.images]
        if images:
            inputs["pixel_values"] = self.processor.to_pixels(images).to(device)
        return inputs


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
    """Return the token ids of a conversation up to where the assistant is to speak, image tokens expanded.

    Raises:
        DataError: it does not fit the context of the language model, or its text writes ``<image>``.
    """
    input_ids = processor.encode(conversation, open_answer=True).input_ids
    name = repr(conversation.id or conversation.messages[-1].text[:40])
    num_expected = len(conversation.images) * processor.num_image_tokens
    if input_ids.count(processor.image_token_id) != num_expected:
        raise DataError(
            f"conversation {name} has {processor.image_token} in its text; leave it out: a picture goes in "
            "front of its question by itself."
        )
    if len(input_ids) >= processor.tokenizer.model_max_length:
        raise DataError(
            f"conversation {name} has {len(input_ids):,} "
            f"tokens; the model's context is {processor.tokenizer.model_max_length:,}. Shorten it."
        )
    return input_ids


def decode(processor: TinyLlavaProcessor, ids: list[list[int]]) -> list[str]:
    """Return the text of answers, without special tokens and outer blanks."""
    texts: list[str] = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _strip(pieces: Iterator[str]) -> Iterator[str]:
    """Drop empty pieces and the blanks at both ends of the whole."""
    held, is_first = "", True
    for piece in pieces:
        text = held + (piece.lstrip() if is_first else piece)
        kept = text.rstrip()
        held = text[len(kept) :]  # blanks are given out once something follows them
        if kept:
            yield kept
            is_first = False
