"""Compare an answer with the reference answers of a user's own question.

Paper: none. Each metric returns what it read from an answer, so that unreadable answers are counted
separately from wrong ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from tinyllava.evaluation.metrics.choices import (
    find_choice,
    find_numbers,
    find_yes_or_no,
    has_run,
    normalise,
    parse_tolerance,
    split_labels,
    words_of,
)
from tinyllava.evaluation.metrics.vqa import grade_textvqa


class Reading(NamedTuple):
    """The value read from an answer, its score in [0, 1], and whether the answer could be read."""

    parsed: str
    score: float
    is_clear: bool = True


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The right answers, and the settings for reading an answer."""

    answers: Sequence[str]
    choices: Mapping[str, str] = field(default_factory=dict)
    """Letter -> text of the options."""
    tolerance: str = "0"
    """How far a number may be off: ``0.5``, or ``5%`` of the right one."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The user's record, for a metric of their own."""


@dataclass(frozen=True, kw_only=True)
class AnswerMetric:
    """A way to compare an answer with references."""

    title: str
    read: Callable[[str, Reference], Reading]
    unclear: str = "empty"
    """Which answers cannot be read."""
    has_labels: bool = True
    """Whether what is read is one of a few labels, for a confusion table."""
    check: Callable[[Reference], str] = lambda _: ""
    """Says what is wrong with a reference, with the fix; empty if nothing is."""


def _read_exact(answer: str, reference: Reference) -> Reading:
    parsed = normalise(answer)
    return Reading(parsed, float(parsed in {normalise(one) for one in reference.answers}), bool(parsed))


def _read_contains(answer: str, reference: Reference) -> Reading:
    words = words_of(answer)
    found = [one for one in reference.answers if has_run(words, words_of(one))]
    return Reading(normalise(found[0]) if found else normalise(answer), float(bool(found)), bool(words))


def _read_vqa(answer: str, reference: Reference) -> Reading:
    """Normalise both sides always: VQAv2's rule compares to the letter where all annotators agree."""
    parsed, score = grade_textvqa(normalise(answer), [normalise(one) for one in reference.answers])
    return Reading(parsed or normalise(answer), score if answer.strip() else 0.0, bool(answer.strip()))


def _read_yes_no(answer: str, reference: Reference) -> Reading:
    said = find_yes_or_no(answer)
    return Reading(said, float(bool(said) and said == find_yes_or_no(reference.answers[0])), bool(said))


def _read_number(answer: str, reference: Reference) -> Reading:
    numbers = set(find_numbers(answer))
    if len(numbers) != 1:
        return Reading("", 0.0, False)
    value = numbers.pop()
    tolerance, is_share = parse_tolerance(reference.tolerance)
    rights = [find_numbers(one)[0] for one in reference.answers]
    is_right = any(
        abs(value - right) <= (tolerance * abs(right) if is_share else tolerance) + 1e-9 * abs(right)
        for right in rights
    )
    return Reading(f"{value:g}", float(is_right))


def _check_number(reference: Reference) -> str:
    for one in reference.answers:
        if len(set(find_numbers(one))) != 1:
            return f"the right answer {one!r} is not one number. Write it as 3.5, or choose another metric."
    return ""


def _read_choice(answer: str, reference: Reference) -> Reading:
    letter = find_choice(answer, reference.choices)
    rights = {find_choice(one, reference.choices) for one in reference.answers}
    return Reading(letter, float(bool(letter) and letter in rights), bool(letter))


def _check_choice(reference: Reference) -> str:
    if not reference.choices:
        return (
            "it has no choices. Add 'choices': a list of texts, or write them into the question as lines "
            "such as 'A. red'."
        )
    wrong = [one for one in reference.answers if not find_choice(one, reference.choices)]
    listed = ", ".join(f"{letter}. {text}" for letter, text in reference.choices.items())
    return (
        f"the right answer {wrong[0]!r} is not one of its choices: {listed}. Fix the answer or the choices."
        if wrong
        else ""
    )


def _read_f1(answer: str, reference: Reference) -> Reading:
    said, right = split_labels([answer]), split_labels(reference.answers)
    score = 2 * len(said & right) / (len(said) + len(right)) if said or right else 0.0
    return Reading(", ".join(sorted(said)), score, bool(said))


class _Tokenizer:
    """Words of any script, in place of rouge-score's own, which drops all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk; see the extra ``metrics``

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())


def _read_rouge(answer: str, reference: Reference) -> Reading:
    scores = [_rouge().score(one, answer)["rougeL"].fmeasure for one in reference.answers]
    return Reading(" ".join(answer.split()), float(max(scores)), bool(answer.strip()))


MIN_VQA_ANSWERS = 4
"""With fewer, even an answer that all annotators gave would not score 100%."""


def _check_vqa(reference: Reference) -> str:
    num = len(reference.answers)
    if num >= MIN_VQA_ANSWERS:
        return ""
    return (
        f"VQA accuracy needs the answers of at least {MIN_VQA_ANSWERS} annotators, found {num}. List them in "
        "'answers', or choose the metric exact."
    )


METRICS: dict[str, AnswerMetric] = {
    "exact": AnswerMetric(title="exact match", read=_read_exact),
    "yes_no": AnswerMetric(
        title="yes or no",
        read=_read_yes_no,
        unclear="neither yes nor no, or both",
        check=lambda reference: (
            ""
            if find_yes_or_no(reference.answers[0])
            else f"the right answer {reference.answers[0]!r} is neither yes nor no. Choose another metric."
        ),
    ),
    "number": AnswerMetric(
        title="number", read=_read_number, unclear="no number, or several", check=_check_number
    ),
    "choice": AnswerMetric(
        title="choice", read=_read_choice, unclear="no option, or several", check=_check_choice
    ),
    "contains": AnswerMetric(title="contains", read=_read_contains),
    "vqa": AnswerMetric(title="VQA accuracy", read=_read_vqa, has_labels=False, check=_check_vqa),
    "f1": AnswerMetric(title="F1 of labels", read=_read_f1, has_labels=False),
    "rouge": AnswerMetric(title="ROUGE-L", read=_read_rouge, has_labels=False),
}
"""Metrics of own questions by the name that ``--metric`` takes."""
