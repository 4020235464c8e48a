"""Requests in line for the model: one is answered at a time, the others wait, and too many are refused.

Paper: none. Requests are not batched: while one is answered, the model does nothing else.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from tinyllava.inference.chat import Chat
from tinyllava.serving.schema import Question, RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How an answer ended, and its tokens; those of the prompt include its images'."""

    reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_answer_tokens: int


class ModelQueue:
    """Answers questions one after another, in the order in which they came.

    Args:
        max_waiting: places, that of the running one included.
    """

    def __init__(self, chat: Chat, max_waiting: int) -> None:
        self.chat, self.max_waiting = chat, max_waiting
        self.num_places = 0
        """Places that are taken; changed on the event loop only."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._seconds = 1.0  # of one answer, a running mean: what a refused client is told to wait

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place from before the body of a request is read until its answer is sent or its client gone.

        Raises:
            RequestError: all are taken; the client is told when to come again.
        """
        if self.num_places >= self.max_waiting:
            seconds = max(1, round(self._seconds * self.num_places))
            raise RequestError(
                429,
                f"{self.num_places} requests are being answered or wait already, the most that this server "
                f"holds; try again in {seconds} s.",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        self.num_places += 1
        try:
            yield
        finally:
            self.num_places -= 1

    async def answer(self, question: Question) -> AsyncGenerator[str | End, None]:
        """Yield the pieces of an answer as they come, and its end; closing it stops the model.

        Raises:
            TinyLlavaError: what ``Chat.stream`` raises.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[str | End | BaseException] = asyncio.Queue()
        stopped = threading.Event()

        def run() -> None:
            if stopped.is_set():
                return
            started = time.monotonic()
            try:
                for event in _generate(self.chat, question, stopped):
                    loop.call_soon_threadsafe(events.put_nowait, event)
            except BaseException as error:  # noqa: BLE001 (the reader raises it)
                loop.call_soon_threadsafe(events.put_nowait, error)
            self._seconds += 0.2 * (time.monotonic() - started - self._seconds)

        running = self._pool.submit(run)
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, End):
                    return
        finally:
            stopped.set()
            running.cancel()

    def close(self) -> None:
        """Wait for the running answer, which nobody reads any more, to stop."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _generate(chat: Chat, question: Question, stopped: threading.Event) -> Generator[str | End]:
    """Answer in the model's own thread, up to the first of the stop texts."""
    counts = [0, 0]

    def count(ids: torch.Tensor, scores: object) -> torch.Tensor:
        """Count tokens ids [1, N]; called once for each token of the answer."""
        counts[1] += 1
        counts[0] = ids.shape[1] - counts[1]
        return torch.tensor([stopped.is_set()], device=ids.device)

    if question.options:  # the generator of torch is the process's: a seed must not reach the next request
        torch.seed() if question.seed is None else torch.manual_seed(question.seed)
    stream = chat.stream(
        question.conversation, question.max_new_tokens, stopping_criteria=[count], **question.options
    )
    cut = UntilStop(question.stops)
    try:
        for piece in stream:
            if text := cut.feed(piece):
                yield text
            if cut.is_found:
                break
        else:
            if text := cut.rest():
                yield text
    finally:
        stream.close()
    reason: Literal["stop", "length"] = "length" if stream.is_cut and not cut.is_found else "stop"
    yield End(reason=reason, num_prompt_tokens=counts[0], num_answer_tokens=counts[1])


class UntilStop:
    """Passes text on up to the first stop text; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.is_found, self._held = stops, False, ""

    def feed(self, piece: str) -> str:
        """Return what can be passed on, now that a piece has come."""
        text = self._held + piece
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.is_found, self._held = True, ""
            return text[: min(ends)]
        num_held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def rest(self) -> str:
        """Return what was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a beginning of the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
