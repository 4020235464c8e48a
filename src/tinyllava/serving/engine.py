"""The default engine: one thread decodes all answers together and passes their text to the event loop.

Paper: none. An answer is the same as that of ``Chat``.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

from tinyllava.inference.chat import Chat
from tinyllava.inference.continuous import ContinuousDecoder, Sequence
from tinyllava.model.devices import call_in_thread, give_back_freed_memory
from tinyllava.model.linear import speed_up_reading
from tinyllava.serving.queue import End, Words
from tinyllava.serving.schema import Question

_Event = str | End | BaseException
_LOG = logging.getLogger(__name__)
_PAUSE_SECONDS = 0.25
"""For which nobody has asked before something is computed ahead: programs ask on at once, people read."""
_MANY_FORGOTTEN = 100
"""Dropped conversations after which memory is given back; it takes milliseconds, and new memory as long."""


@dataclass(eq=False, kw_only=True)
class _Reader:
    """A request that waits for its answer."""

    sequence: Sequence
    words: Words
    events: "asyncio.Queue[_Event]" = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)


class OwnEngine:
    """Answers questions together, see ``ContinuousDecoder`` for its arguments and errors.

    Nothing else may use the model meanwhile.
    """

    def __init__(self, chat: Chat, *, cache_tokens: int = 0, max_running: int = 32) -> None:
        self.context_tokens = chat.context_tokens
        self.decoder = call_in_thread(
            ContinuousDecoder, chat, cache_tokens=cache_tokens, max_running=max_running
        )
        give_back_freed_memory()  # of weights that were laid out anew
        speed_up_reading(chat.model)  # before requests come, which would wait for it
        # Its own: a tokenizer cannot be read while another thread encodes, which changes settings of it.
        self._tokenizer = deepcopy(chat.processor.tokenizer)
        self._readers: dict[Sequence, _Reader] = {}
        self._num_preparing = self._num_given_back = 0
        self._commands: queue.SimpleQueue[tuple[Literal["add", "remove", "close"], _Reader | None]]
        self._commands = queue.SimpleQueue()
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def counts(self) -> dict[str, int]:
        """Return numbers for the metrics."""
        return {
            "running": len(self.decoder.running),
            "kept_tokens": self.decoder.num_kept_tokens,
            "reused_tokens": self.decoder.num_reused,
            "ahead_tokens": self.decoder.num_ahead,
        }

    async def answer(self, question: Question) -> AsyncGenerator[str | End, None]:
        """Yield the pieces of an answer as they come, and its end; closing it stops the model.

        Raises:
            TinyLlavaError: what ``Chat.stream`` raises.
        """
        loop, gone = asyncio.get_running_loop(), threading.Event()
        self._num_preparing += 1
        try:
            sequence = await loop.run_in_executor(self._preparing, self._prepare, question, gone)
        finally:
            gone.set()
            self._num_preparing -= 1
        reader = _Reader(sequence=sequence, words=Words(self._tokenizer, question.stops))
        self._commands.put(("add", reader))
        try:
            while True:
                event = await reader.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, End):
                    return
        finally:
            self._commands.put(("remove", reader))

    def _prepare(self, question: Question, gone: threading.Event) -> Sequence:
        return self.decoder.prepare(
            question.conversation,
            question.max_new_tokens,
            options=question.options,
            seed=question.seed,
            is_wanted=lambda: not gone.is_set(),
        )

    def close(self) -> None:
        """Stop all answers, because nothing reads them any more."""
        self._commands.put(("close", None))
        self._thread.join()
        self._preparing.shutdown(wait=True, cancel_futures=True)

    def _run(self) -> None:
        """Decode until the engine is closed; the model's own thread."""
        while self._obey():
            try:
                grown = self.decoder.step()
            except Exception as error:  # noqa: BLE001 (each reader raises it)
                for sequence in self.decoder.drop_running():
                    self._tell(self._readers.pop(sequence), error)
                continue
            for sequence in grown:
                self._pass_on(self._readers[sequence])
        self.decoder.close()

    def _obey(self) -> bool:
        """Do what was asked for; wait for something to do; false at the end."""
        while True:
            is_idle = not (self.decoder.running or self.decoder.waiting)
            pause = _PAUSE_SECONDS if self.decoder.can_look_ahead else None
            try:
                command, reader = self._commands.get(block=is_idle, timeout=pause)
            except queue.Empty:
                if not is_idle:
                    return True
                self._look_ahead()
                self._give_back()
                continue
            if command == "close" or reader is None:
                return False
            if command == "add":
                self._readers[reader.sequence] = reader
                self.decoder.add(reader.sequence)
            elif self._readers.pop(reader.sequence, None):
                self.decoder.remove(reader.sequence)

    def _give_back(self) -> None:
        """Return memory after many conversations were dropped: the C library keeps it, in pieces."""
        if self.decoder.num_forgotten - self._num_given_back >= _MANY_FORGOTTEN:
            self._num_given_back = self.decoder.num_forgotten
            give_back_freed_memory()

    def _look_ahead(self) -> None:
        if self._num_preparing:
            return
        try:
            self.decoder.look_ahead()
        except Exception:  # noqa: BLE001 (the next turn computes it then, and its request has the error)
            _LOG.exception("the start of a next turn was not computed ahead")

    def _pass_on(self, reader: _Reader) -> None:
        """Send the text of the newest token, and the end."""
        sequence, cut = reader.sequence, reader.words.cut
        if text := reader.words.feed(sequence.answer[-1], sequence.is_done):
            self._tell(reader, text)
        if not sequence.is_done and not cut.is_found:
            return
        del self._readers[sequence]
        if not sequence.is_done:
            self.decoder.remove(sequence)
        self._tell(
            reader,
            End(
                reason="stop" if sequence.is_ended or cut.is_found else "length",
                num_prompt_tokens=len(sequence.prompt),
                num_answer_tokens=len(sequence.answer),
            ),
        )

    def _tell(self, reader: _Reader, event: _Event) -> None:
        try:
            reader.loop.call_soon_threadsafe(reader.events.put_nowait, event)
        except RuntimeError:  # the event loop has ended, and its requests with it
            self._readers.pop(reader.sequence, None)
