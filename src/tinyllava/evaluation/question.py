"""Questions of a benchmark, the list that loaders fill, and the questions to a judge.

Paper: section 4.1.3 and appendix A. The suffixes are those of LLaVA-1.5's evaluation, which the paper
follows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from tinyllava.conversation import Conversation, ImageRef, ask
from tinyllava.errors import DataError
from tinyllava.evaluation.read import FIX, Record, read_lines

SHORT = "Answer the question using a single word or phrase."


_NO_META: Mapping[str, Any] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question with everything needed to ask it and to grade the answer.

    ``image`` names the image, also where several questions share one ("" for a question without image);
    ``target`` is JSON-able; ``groups`` are the breakdowns that the question counts in, each ``kind=value``.
    """

    id: str
    conversation: Conversation
    image: str
    target: Any
    category: str = ""
    groups: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=lambda: _NO_META)
    """What only one benchmark needs; ``llava_id`` and ``llava_prompt`` stand in LLaVA's files where these
    have another id or prompt."""

    @property
    def prompt(self) -> str:
        """The text that the model is asked, suffix included."""
        return self.conversation.messages[-1].text


class QuestionList:
    """The questions read so far; a repeated id is reported with both places."""

    def __init__(self) -> None:
        self._questions: list[Question] = []
        self._places: dict[str, tuple[Path, int | None]] = {}
        self._texts: dict[str, str] = {}  # VQAv2's test has 447,793 questions; many are asked again and again

    def add(
        self,
        record: Record,
        *,
        id: str,
        text: str,
        image: ImageRef | None,
        target: Any,
        image_name: str | None = None,
        category: str = "",
        groups: tuple[str, ...] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the question of ``record``; ``image_name`` is the image's own name if not given."""
        if id in self._places:
            path, line = self._places[id]
            other = f"{path}:{line}" if line else str(path)
            record.fail(f"question id {id!r} is used twice (first in {other}).")
        self._places[id] = (record.path, record.line)
        self._questions.append(
            Question(
                id=id,
                conversation=ask(self._texts.setdefault(text, text), *([image] if image else []), id=id),
                image=image_name if image_name is not None else image.name if image else "",
                target=target,
                category=category,
                groups=groups,
                meta=meta or _NO_META,
            )
        )

    def finish(self, source: Path) -> list[Question]:
        """Return the questions; there has to be at least one."""
        if not self._questions:
            raise DataError(f"{source}:1: contains no question of this benchmark. {FIX}")
        return self._questions


def check_images(questions: Sequence[Question]) -> None:
    """Make sure that most images are on disk before hours of work; a few missing ones are reported later.

    Raises:
        DataError: half of them or more are not; how many, and one of them.
    """
    paths = {image.path: None for question in questions for image in question.conversation.images}
    missing = [path for path in paths if path is not None and not path.is_file()]
    if missing and 2 * len(missing) >= len(paths):
        raise DataError(
            f"{missing[0]}: no such image; {len(missing):,} of {len(paths):,} are missing. {FIX} "
            "(--blind needs none.)"
        )


def read_llava_prompts(path: Path) -> Iterator[tuple[Record, str]]:
    """Yield the records of one of LLaVA's question files with their prompt; its suffix is checked."""
    for record in read_lines(path):
        text = record.text("text")
        if not text.endswith("\n" + SHORT):
            record.fail(
                f"field 'text' does not end with a newline and {SHORT!r}. Another prompt is another protocol."
            )
        yield record, text


def find_source(folder: Path, *names: str) -> Path | None:
    """Return the first of these files that is in the folder."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def no_source(folder: Path, benchmark: str, *names: str) -> DataError:
    """Return the error for a folder in which none of the files is that the questions could come from."""
    return DataError(
        f"{folder}: no questions of {benchmark}; looked for {', '.join(names)}. "
        f"`tinyllava data benchmarks {benchmark} {folder}` lists their source."
    )


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
        """Return the parsed answers of all runs, joined by spaces, and the mean score."""
        runs = (reply,) if isinstance(reply, str) else reply
        parsed, scores = zip(*(self.grade(question, one) for one in runs), strict=True)
        return " ".join(parsed), fmean(scores)

    def can_read(self, question: Question, reply: Reply) -> bool:
        """Tell whether the reply of every run can be read."""
        runs = (reply,) if isinstance(reply, str) else reply
        return all(self.is_valid(question, one) for one in runs)
