"""What a judge model is asked about an answer, and how its reply is read: the part that a benchmark owns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = Mapping[str, str]
"""A chat message as OpenAI's API has it: ``role`` and ``content``."""


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One call of a judge."""

    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How a benchmark uses a judge.

    ``wording`` reads the judge's prompt from the user's copy of the benchmark's files (or returns our own);
    ``ask`` makes the request for (wording, question text, target, answer, number of earlier tries);
    ``is_valid`` tells whether a reply can be read, else the judge is asked again, up to ``max_tries``;
    ``grade`` turns the last reply (with answer and target at hand) into what was understood and a score in
    [0, 1].
    """

    official_judge: str
    wording: Callable[[Path], str]
    ask: Callable[[str, str, Any, str, int], JudgeRequest]
    is_valid: Callable[[str], bool]
    grade: Callable[[str, str, Any], tuple[str, float]]
    max_tries: int = 1
    is_needed: Callable[[str, Any], bool] = lambda *_: True
    """Whether this answer (with its target) has to be judged at all."""
