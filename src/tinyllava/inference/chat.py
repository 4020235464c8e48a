"""Ask a model: conversations in, text out, in batches or word by word.

Paper: section 3.1; decoding is greedy, as in the published evaluation.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, Self

import torch
from transformers import LogitsProcessor, TextIteratorStreamer

from tinyllava.conversation import Conversation
from tinyllava.data.images import open_image
from tinyllava.errors import CheckpointError, DataError
from tinyllava.model import TinyLlavaForConditionalGeneration, TinyLlavaProcessor
from tinyllava.model.assemble import open_checkpoint
from tinyllava.model.devices import best_device, check_device, multiplies_bf16
from tinyllava.parts.folders import saved_dtype

FORBID = frozenset({"no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens"})
"""Options of ``generate`` that set logits to minus infinity."""


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

        Conversations with and without images may be mixed; each ends where the assistant is to speak.

        Args:
            options: of transformers' ``generate``, e.g. ``do_sample=True, temperature=0.2``.

        Raises:
            ImageError: an image is broken.
            DataError: a conversation does not fit the model's context.
            CheckpointError: the model's logits are not numbers.
        """
        prompts = [encode_prompt(self.processor, conversation) for conversation in conversations]
        answers = [""] * len(prompts)
        for batch in self._batches([len(prompt) for prompt in prompts], max_new_tokens):
            inputs = self._collate([conversations[i] for i in batch], [prompts[i] for i in batch])
            with torch.inference_mode():
                output = self.model.generate(
                    **inputs, max_new_tokens=max_new_tokens, **self._checked(inputs, options)
                )
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
            options.update(self._checked(inputs, options))
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

    def _checked(self, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Return options of ``generate`` under which it stops at logits that are not numbers."""
        check = _FiniteLogits(
            self.model, inputs["input_ids"].shape[1], can_forbid=bool(FORBID & options.keys())
        )
        return {**options, "logits_processor": [check, *options.get("logits_processor", [])]}

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


class _FiniteLogits(LogitsProcessor):
    """Refuses logits that are not finite, but those that follow a finished answer, which nobody reads."""

    def __init__(
        self, model: TinyLlavaForConditionalGeneration, num_prompt_tokens: int, *, can_forbid: bool
    ) -> None:
        self.model, self.num_prompt_tokens, self.can_forbid = model, num_prompt_tokens, can_forbid
        self.stops = stop_ids(model)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids[:, self.num_prompt_tokens :]
        finished = torch.isin(new, self.stops.to(new.device)).any(1)
        check_logits(self.model, scores[~finished], can_forbid=self.can_forbid)
        return scores


def check_logits(
    model: TinyLlavaForConditionalGeneration, logits: torch.Tensor, *, can_forbid: bool = False
) -> None:
    """Refuse logits [..., K] out of which no answer can be chosen.

    Args:
        can_forbid: whether some may be minus infinity: an option of ``generate`` forbids these tokens.

    Raises:
        CheckpointError: some are NaN or infinite; the weight that is, or the type of the weights, is named.
    """
    usable = logits.isfinite() | (logits.isneginf() & logits.isfinite().any(-1, keepdim=True) & can_forbid)
    if bool(usable.all()):
        return
    what = f"{model.name_or_path or 'the model'}: its logits are not numbers (NaN or infinite)"
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        if weight.is_floating_point() and (num := int((~weight.isfinite()).sum())):
            raise CheckpointError(
                f"{what}: {num:,} of {weight.numel():,} values of {name} are not. Copy the checkpoint again, "
                "or train it again."
            )
    dtype = str(model.dtype).removeprefix("torch.")
    fix = "Open it in bfloat16 or float32." if model.dtype == torch.float16 else "Train the model again."
    raise CheckpointError(f"{what}, though all its weights are: {dtype} overflows. {fix}")


def stop_ids(model: TinyLlavaForConditionalGeneration) -> torch.Tensor:
    """Return the ids of the tokens that end an answer."""
    stops = model.generation_config.eos_token_id
    return torch.tensor(
        stops if isinstance(stops, list) else [] if stops is None else [stops], dtype=torch.long
    )


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
        DataError: it does not fit the context of the language model, or the template leaves out its images.
    """
    input_ids = processor.encode(conversation, open_answer=True).input_ids
    name = repr(conversation.id or conversation.messages[-1].text[:40])
    num_marks = input_ids.count(processor.image_token_id) / processor.num_image_tokens
    if num_marks != len(conversation.images):
        raise DataError(
            f"conversation {name} has {len(conversation.images)} images, its chat template writes "
            f"{num_marks:g} times {processor.image_token}; correct chat_template.jinja of the checkpoint."
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
