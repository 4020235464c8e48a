"""What was taken for what: right answers against what was read out of a model's answers.

Paper: none.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.question import Question

MAX_LABELS = 20
"""Rows and columns of a confusion table: the most frequent right answers of a kind."""
OTHER, UNREAD = "(other)", "(not read)"


@dataclass(frozen=True, kw_only=True)
class Confusions:
    """How often each right answer was read as each answer; ``counts[truth][answer]``."""

    kind: str
    truths: tuple[str, ...]
    answers: tuple[str, ...]
    """The truths, and behind them ``OTHER`` and ``UNREAD`` where there are such answers."""
    counts: tuple[tuple[int, ...], ...]


def _count(pairs: Sequence[tuple[str, Prediction]], kind: str) -> Confusions | None:
    """Count (right answer, prediction) pairs of a kind; None where no label recurs."""
    frequent = Counter(truth for truth, _ in pairs if truth)
    truths = sorted(truth for truth, _ in frequent.most_common(MAX_LABELS))
    if len(truths) < 2 or max(frequent.values()) == 1:
        return None
    counts: Counter[tuple[str, str]] = Counter()
    for truth, prediction in pairs:
        read = truth if prediction.score == 1 else prediction.parsed
        read = read if read in truths else OTHER
        counts[truth, read if prediction.is_clear and prediction.answer else UNREAD] += 1
    extra = [name for name in (OTHER, UNREAD) if any(counts[truth, name] for truth in truths)]
    answers = (*truths, *extra)
    return Confusions(
        kind=kind,
        truths=tuple(truths),
        answers=answers,
        counts=tuple(tuple(counts[truth, answer] for answer in answers) for truth in truths),
    )


def count_confusions(questions: Sequence[Question], predictions: Sequence[Prediction]) -> list[Confusions]:
    """Return a table for each kind of question with a right answer that recurs.

    Args:
        questions: of a benchmark; the right answer is the target, or its ``label``.
        predictions: the scored answers to them.
    """
    truths = {question.id: _label(question) for question in questions}
    kinds: dict[str, list[tuple[str, Prediction]]] = defaultdict(list)
    for prediction in predictions:
        kinds[prediction.category].append((truths[prediction.question_id], prediction))
    found = [_count(pairs, kind) for kind, pairs in kinds.items()]
    return [one for one in found if one is not None]


def _label(question: Question) -> str:
    """Return the right answer as the metric reads it; empty where it is no label."""
    target = question.target
    if isinstance(target, Mapping):
        return str(target.get("label", ""))
    return target if isinstance(target, str) else ""
