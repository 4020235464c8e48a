"""Answers that arrive in pieces: what an engine gives, and how tokens become text.

Paper: none.
"""

import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tinyllava.inference.chat import Strip
from tinyllava.serving.schema import Question

_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How an answer ended, and its tokens; those of the prompt include its images'."""

    reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_answer_tokens: int


class Engine(Protocol):
    """An engine that answers many questions at once."""

    context_tokens: int

    def answer(self, question: Question) -> AsyncGenerator[str | End, None]:
        """Yield the pieces of an answer as they come, and its end; closing it stops the model.

        Raises:
            TinyLlavaError: what ``Chat.stream`` raises.
        """
        ...

    def counts(self) -> dict[str, int]:
        """Return numbers for the metrics, by name: gauges of the engine at this moment."""
        ...

    def close(self) -> None:
        """Stop everything."""
        ...


class UntilStop:
    """Passes on text up to the first stop text. A possible start of a stop text is withheld."""

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
        """Return the withheld text when nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a beginning of the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Words:
    """Turns the tokens of an answer into text, in pieces that later tokens do not change."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self.tokenizer, self.cut = tokenizer, UntilStop(stops)
        self._strip = Strip()
        self._tokens: list[int] = []
        self._told = 0  # of these tokens, those whose text is given out; they stay as context of the next

    def feed(self, token: int, is_last: bool) -> str:
        """Return what can be given out, now that a token has come."""
        self._tokens.append(token)
        told = self._decode(self._tokens[: self._told])
        new = self._decode(self._tokens)
        is_open = new.endswith("\N{REPLACEMENT CHARACTER}") or self._is_joined(token)
        if is_open and not is_last:
            return ""  # a piece of a character, or of bytes that are a character only together
        text = self.cut.feed(self._strip.feed(new[len(told) :]))
        self._tokens = self._tokens[self._told :]
        self._told = len(self._tokens)
        return text + self.cut.rest() if is_last and not self.cut.is_found else text

    def _is_joined(self, token: int) -> bool:
        """Whether the next token decides its text: one byte, such as ``<0x0A>``, or nothing by itself."""
        special = token in self.tokenizer.all_special_ids
        return special or bool(_BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token))))

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
