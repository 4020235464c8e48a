"""What a judge model is asked about an answer, and how its reply is read: the part that a benchmark owns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tinyllava.evaluation.question import Question

Wording = Mapping[str, str]
"""The texts of a judge's prompt, by the benchmark's own keys."""


Reply = str | tuple[str, ...]
"""A judge's last reply to a question, or its last reply in each of several runs."""


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One call of a judge: chat messages as OpenAI's API has them, and the sampling."""

    messages: tuple[Mapping[str, str], ...]
    temperature: float
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How a benchmark uses a judge."""

    official_judge: str
    """The judge of the published numbers; another judge's numbers stand in another column."""
    wording: Callable[[Path], Wording]
    """Reads the prompt from the user's copy of the benchmark's files in this folder, or returns our own."""
    ask: Callable[[Wording, Question, str, int], JudgeRequest]
    """Makes the request for a question, an answer and the number of earlier tries."""
    is_valid: Callable[[Question, str], bool]
    """Tells whether a reply can be read; if not, the judge is asked again, up to ``max_tries`` times."""
    grade: Callable[[Question, str], tuple[str, float]]
    """Turns the last reply into what was understood and a score."""
    max_tries: int = 1
    is_needed: Callable[[Question, str], bool] = lambda *_: True
    """Whether this answer has to be judged; if not, the benchmark's own ``grade`` serves."""
    has_runs: bool = False
    """Whether the official tool takes the mean of several runs of the judge."""

    def grade_runs(self, question: Question, reply: Reply) -> tuple[str, float]:
        """Return what was understood in each run, blanks between, and the mean score."""
        runs = (reply,) if isinstance(reply, str) else reply
        parsed, scores = zip(*(self.grade(question, one) for one in runs), strict=True)
        return " ".join(parsed), fmean(scores)

    def can_read(self, question: Question, reply: Reply) -> bool:
        """Tell whether the reply of every run can be read."""
        runs = (reply,) if isinstance(reply, str) else reply
        return all(self.is_valid(question, one) for one in runs)
