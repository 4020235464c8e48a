"""The answers to one benchmark or to a user's own questions, as one HTML page with the images in it.

Paper: none; the details of a number of Table 3: its parts, confusions, right and wrong answers.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava.data.images import thumbnail_url
from tinyllava.evaluation.benchmark import Benchmark, Prediction
from tinyllava.evaluation.compare import RIGHT
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.results import Metric, Result
from tinyllava.files import page_environment, write_text
from tinyllava.studies.report.flips import spell

NUM_SHOWN = 12
"""Wrong answers, and as many right ones, of each kind of question."""


def write_answers(
    path: Path,
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    result: Result,
    blind: Result | None = None,
) -> Path:
    """Write the page; it needs no other file, and the same answers give the same bytes.

    Args:
        path: the page.
        benchmark: what was asked.
        questions: those with a prediction.
        predictions: the scored answers.
        result: their numbers.
        blind: the numbers of the same model with blank images.
    """
    by_id = {question.id: question for question in questions}
    kinds: dict[str, list[tuple[Question, Prediction]]] = defaultdict(list)
    for prediction in predictions:
        question = by_id[prediction.question_id]
        kinds[prediction.category].append((question, prediction))
    confusions = count_confusions(questions, predictions)
    environment = page_environment(Path(__file__).parent)
    page = environment.get_template("answers.jinja").render(
        benchmark=benchmark,
        result=result,
        facts=_facts(result, blind),
        groups=_group_metrics(result),
        confusions=confusions,
        kinds={kind: _choose_cards(pairs) for kind, pairs in kinds.items()},
    )
    write_text(path, page + "\n")
    return path


def _facts(result: Result, blind: Result | None) -> dict[str, tuple[str, str]]:
    """Return the numbers at the head of the page, each with its interval, if it has one."""
    facts = {}
    for name, one in (("", result), (" with blank images", blind)):
        if one is not None and one.value is not None:
            metric = one.metric_named(one.metric)
            facts[f"{one.metric}{name}"] = (f"{metric.value:.1f}", _interval(metric))
    for metric in result.metrics:
        if metric.name.startswith("baseline="):
            facts[f"{metric.name.removeprefix('baseline=')} alone"] = (f"{metric.value:.1f}", "")
    counts = {"questions": result.num_questions, "images": result.num_images, "not read": result.num_unclear}
    rare = {"cut off": result.num_cut, "without an answer": result.num_missing}
    counts |= {name: count for name, count in rare.items() if count}
    return facts | {name: (f"{count:,}", "") for name, count in counts.items()}


def _interval(metric: Metric) -> str:
    return "" if metric.interval is None else f"{metric.interval[0]:.1f} to {metric.interval[1]:.1f}"


def _group_metrics(result: Result) -> dict[str, list[dict[str, str]]]:
    """Return the numbers beside the headline by kind of group: each with its name, value, interval, count."""
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for metric in result.metrics:
        kind, _, name = metric.name.rpartition("=")
        if metric.name != result.metric and kind != "baseline":
            row = {"name": name, "value": f"{metric.value:.1f}", "interval": _interval(metric)}
            groups[kind or "score"].append({**row, "count": f"{metric.num_questions:,}"})
    return dict(groups)


def _choose_cards(pairs: Sequence[tuple[Question, Prediction]]) -> dict[str, Any]:
    """Return the counts of a kind and a fixed random choice of its wrong and right answers."""
    mixed = random.Random(0).sample(pairs, len(pairs))
    scored = [pair for pair in mixed if pair[1].score is not None]
    groups: dict[str, Any] = {}
    for name, is_right in (("wrong", False), ("right", True), ("not scored", None)):
        chosen = [p for p in scored if ((p[1].score or 0.0) >= RIGHT) == is_right]
        chosen = [p for p in mixed if p[1].score is None] if is_right is None else chosen
        cards = [
            {
                "images": [shown for ref in question.conversation.images if (shown := thumbnail_url(ref))],
                "prompt": question.prompt,
                "prediction": prediction,
                "truth": spell(question.target),
            }
            for question, prediction in chosen[:NUM_SHOWN]
        ]
        groups[name] = {"count": len(chosen), "cards": cards}
    return groups


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
