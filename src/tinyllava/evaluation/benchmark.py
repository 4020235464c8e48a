"""The definition of a benchmark: questions from files, a grade for each answer, a score over the grades.

Paper: section 4.1.3 (which benchmarks) and appendix A (what each measures).

Data flow: ``load`` returns questions, the model answers, and ``score`` grades every answer and summarises.
Grading reads only text, so saved predictions are scored again without a model. ``summarise`` needs only the
predictions, so two files of predictions can be compared without the data set.
"""

import datetime
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tinyllava.conversation import Answer
from tinyllava.errors import DataError
from tinyllava.evaluation.metrics.statistics import Ratio, estimate
from tinyllava.evaluation.question import Judging, Question, Reply
from tinyllava.evaluation.read import NeededFile
from tinyllava.evaluation.results import Metric, Result
from tinyllava.files import write_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One answer, as it is saved: raw, parsed and scored (None: not to be scored here, or not yet)."""

    benchmark: str
    question_id: str
    image: str
    prompt: str
    answer: str
    parsed: str
    score: float | None
    category: str = ""
    groups: tuple[str, ...] = ()
    judge: str = ""
    """The judge that scored it, if one did."""
    is_clear: bool = True
    """Whether the answer, or the judge's reply to it, was of the kind that was asked for."""
    is_cut: bool = False
    """Whether the answer ran into its limit of tokens."""
    target: str = ""
    """A hash of what it was graded against; empty if that is not known."""

    @property
    def cluster(self) -> str:
        """The image that shares the prediction's error, or the prediction itself if it has no image."""
        return self.image or f"question {self.question_id}"


class Grade(NamedTuple):
    """The parsed answer, and its score in [0, 1] (None: not scored locally)."""

    parsed: str
    score: float | None
    is_clear: bool = True
    """Whether the answer was of the kind that was asked for, however the official tool counts it."""


Summary = Mapping[str, Sequence[Ratio]]
"""Names of metrics, in the order of printing, each a sum of ratios."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Metrics (none where answers are not public, or not yet judged), predictions, number of missing ones."""

    metrics: tuple[Metric, ...]
    predictions: tuple[Prediction, ...]
    num_missing: int

    @property
    def num_unclear(self) -> int:
        """Number of answers that were not understood."""
        return sum(not prediction.is_clear for prediction in self.predictions)

    @property
    def num_cut(self) -> int:
        """Number of answers that ran into their limit of tokens."""
        return sum(prediction.is_cut for prediction in self.predictions)


def mean_scores(predictions: Sequence[Prediction]) -> Summary:
    """Return the mean score in percent: over all questions, and over each group of them."""
    return {"accuracy": [mean_of(predictions)], **means_by_group(predictions)}


def means_by_group(predictions: Sequence[Prediction]) -> dict[str, list[Ratio]]:
    """Return the mean score of every group, kinds and values in the order of their names."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        for group in prediction.groups:
            groups.setdefault(group, []).append(prediction)
    return {group: [mean_of(groups[group])] for group in sorted(groups, key=_natural_order)}


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]


def mean_of(predictions: Sequence[Prediction]) -> Ratio:
    """Return the mean score of these predictions, in percent."""
    return Ratio(numerators=[p.score or 0.0 for p in predictions], clusters=[p.cluster for p in predictions])


Exporter = Callable[[Sequence[Question], Mapping[str, str], Path, Path], Sequence[Path]]
"""(questions, answers by question id, the benchmark's folder, folder to write to) -> files written."""


def write_export(path: Path, text: str) -> tuple[Path]:
    """Write one file of an export, its folder too if need be."""
    write_text(path, text)
    return (path,)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark under one protocol."""

    name: str
    title: str
    """Heading of its column in the tables of the paper."""
    protocol: str
    """Id of the rules; another prompt, parser, metric or judge prompt is another id."""
    split: str
    metric: str
    """Name of the headline metric."""
    num_questions: int
    """Questions in the published set, as ``count`` counts them."""
    prompt: str
    """What is asked, with the fields of the record in braces."""
    load: Callable[[Path], list[Question]]
    grade: Callable[[Question, str], Grade]
    summarise: Callable[[Sequence[Prediction]], Summary] = mean_scores
    count: Callable[[Sequence[Question]], int] = len
    """Number of questions in a list (MMBench asks each several times)."""
    expect: Callable[[Sequence[Question]], int] | None = None
    """Questions in the release that a list was read from, where releases differ; else ``num_questions``."""
    unit: str = "questions"
    """What the headline metric counts, as a comparison names it."""
    unit_of: Callable[[Prediction], str | None] = lambda prediction: prediction.question_id
    """The unit that an answer belongs to, right only if all of its answers are; None: not in the headline."""
    unclear: str = "empty"
    """What is not understood: ``Grade.is_clear`` is false for it; an empty answer never is clear."""
    max_new_tokens: int = 128
    judging: Judging | None = None
    """How a judge model grades the answers; None where none is needed."""
    details: Callable[[Sequence[Question], Sequence[Prediction]], Sequence[Metric]] | None = None
    """Sub-scores of the official tool that are not ratios of sums."""
    prompting: str = ""
    """Id of what is asked, where several protocols grade the same answers; empty: the protocol's."""
    is_edited: bool = False
    """Whether the user may edit the questions, so that answers are kept with a hash of what was asked."""
    has_number_ids: bool = False
    """Whether ids are numbers, not texts, in LLaVA's question and answer files."""
    export: Exporter | None = None
    """Writes the files that the official server or tool reads."""
    export_package: str = ""
    """Package of the extra ``report`` that ``export`` writes with."""
    files: tuple[NeededFile, ...] = ()
    folders: tuple[str, ...] = ()
    """What its folder is called in LLaVA's layout, where that is not its name."""
    notes: tuple[str, ...] = ()
    """What a reader of the number has to know."""

    def predict(
        self, question: Question, answer: str | None, review: Reply | None = None, judge: str = ""
    ) -> Prediction:
        """Grade one answer; None means a question that was not answered, which counts as wrong.

        An answer that waits for its judge has no score yet.
        """
        judging = self.judging
        is_judged = judging is not None and judging.is_needed(question, answer or "")
        if judging is not None and is_judged:
            grade = Grade("", None) if review is None else Grade(*judging.grade_runs(question, review))
            if review is not None:
                grade = grade._replace(is_clear=judging.can_read(question, review))
        else:
            grade = Grade("", 0.0) if answer is None else self.grade(question, answer)
        is_clear = answer is None or (grade.is_clear and bool(answer.strip()))
        return Prediction(
            benchmark=self.name,
            question_id=question.id,
            image=question.image,
            prompt=question.prompt,
            answer=answer or "",
            parsed=grade.parsed,
            score=grade.score,
            category=question.category,
            groups=question.groups,
            judge=judge if is_judged and review is not None else "",
            is_clear=is_clear,
            is_cut=isinstance(answer, Answer) and answer.is_cut,
            target=_hash_target(question.target),
        )

    def score(
        self,
        questions: Sequence[Question],
        answers: Mapping[str, str],
        reviews: Mapping[str, Reply] | None = None,
        judge: str = "",
    ) -> Scored:
        """Grade all answers (by question id) and sum up; ``reviews`` are ``judge``'s replies by question id.

        Raises:
            DataError: an answer or a review belongs to no question, two questions have one id, or there are
                reviews of several runs where one counts.
        """
        _check_ids(self.name, questions, answers, reviews or {})
        has_runs = any(not isinstance(reply, str) for reply in (reviews or {}).values())
        if has_runs and not (self.judging and self.judging.has_runs):
            raise DataError(f"{self.name}: the reviews are from several runs; keep those of one run.")
        predictions = tuple(
            self.predict(q, answers.get(q.id), (reviews or {}).get(q.id), judge) for q in questions
        )
        metrics: tuple[Metric, ...] = ()
        if predictions and all(prediction.score is not None for prediction in predictions):
            summary = self.summarise(predictions)
            metrics = tuple(estimate(name, ratios) for name, ratios in summary.items())
            metrics += tuple(self.details(questions, predictions)) if self.details else ()
        num_missing = sum(q.id not in answers for q in questions)
        return Scored(metrics=metrics, predictions=predictions, num_missing=num_missing)

    def result(
        self,
        questions: Sequence[Question],
        scored: Scored,
        *,
        model: str,
        decoding: Mapping[str, Any] | None = None,
        dtype: str = "",
        judge: str | None = None,
        notes: Sequence[str] = (),
    ) -> Result:
        """Return the record of a scored run, dated now."""
        num = self.count(questions)
        num_expected = self.expect(questions) if self.expect else self.num_questions
        partial = f"partial set: {num:,} of {num_expected:,} questions"
        return Result(
            benchmark=self.name,
            protocol=self.protocol,
            split=self.split,
            model=model,
            metric=self.metric,
            metrics=scored.metrics,
            num_questions=num,
            num_images=len({q.image for q in questions} - {""}),
            num_missing=scored.num_missing,
            num_unclear=scored.num_unclear,
            num_cut=scored.num_cut,
            num_expected=num_expected,
            data_sha256=hash_questions(questions),
            decoding=dict(
                {"do_sample": False, "num_beams": 1, "max_new_tokens": self.max_new_tokens}
                if decoding is None
                else decoding
            ),
            dtype=dtype,
            judge=judge,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            notes=(*([partial] if num < num_expected else []), *self.notes, *notes),
        )


def _check_ids(
    name: str, questions: Sequence[Question], answers: Mapping[str, str], reviews: Mapping[str, Reply]
) -> None:
    ids = {question.id for question in questions}
    if len(ids) < len(questions):
        twice, times = Counter(question.id for question in questions).most_common(1)[0]
        raise DataError(f"{name}: question id {twice!r} occurs {times} times; keep one in the data files.")
    for noun, given in (("answers", answers), ("reviews", reviews)):
        extra = [given_id for given_id in given if given_id not in ids]
        if extra:
            raise DataError(
                f"{name}: {len(extra):,} of {len(given):,} {noun} match no question, the first with id "
                f"{extra[0]!r}. They belong to other data files; score them with those."
            )


def _hash_target(target: Any) -> str:
    text = json.dumps(target, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hash_questions(questions: Sequence[Question]) -> str:
    """Return a SHA-256 over ids, prompts, image names and targets, whatever the order of the questions."""
    digests = sorted(
        hashlib.sha256(
            json.dumps([q.id, q.prompt, q.image, q.target], sort_keys=True, default=str).encode()
        ).digest()
        for q in questions
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()
