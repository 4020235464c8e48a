"""Answers as HTML pages with the images in them: those of one evaluation, and the flips between two.

Paper: none; what is behind a number of Table 3: its parts, what was taken for what, right and wrong answers.

Paper: none; the page of flips shows what stands behind a difference between two cells of Tables 3 and A1.
"""

import io
import mimetypes
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava.conversation import ImageRef
from tinyllava.data.images import open_image
from tinyllava.errors import ImageError
from tinyllava.evaluation.benchmark import Benchmark, Prediction
from tinyllava.evaluation.compare import RIGHT, Comparison
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.results import Metric, Result
from tinyllava.files import data_url, page_environment, write_text

THUMBNAIL_PX = 192
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
                "images": [
                    thumbnail for ref in question.conversation.images if (thumbnail := _thumbnail(ref))
                ],
                "prompt": question.prompt,
                "prediction": prediction,
                "truth": spell(question.target),
            }
            for question, prediction in chosen[:NUM_SHOWN]
        ]
        groups[name] = {"count": len(chosen), "cards": cards}
    return groups


def _thumbnail(ref: Any) -> str:
    """Return an image as a small data URL; empty where it cannot be opened."""
    try:
        image = open_image(ref)
    except ImageError:
        return ""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return data_url(buffer.getvalue(), "image/jpeg")


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


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ a }} and {{ b }}: questions that flipped</title>
<link rel="icon" href="data:,">
<style>
{{ style | safe }}
h1 small { font-size: 1rem }
pre { white-space: pre-wrap; margin: 0; font: inherit }
dl { margin: 0; font-size: .92rem }
dt { color: var(--soft); font-size: .82rem; margin-top: .4rem }
dd { margin: 0 }
.right::after { content: " (right)"; color: #1d6b34 }
.wrong::after { content: " (wrong)"; color: #a3231c }
</style>
</head>
<body>
<h1><small>A: {{ a }}</small><small>B: {{ b }}</small>Questions that flipped</h1>
<div class="scroll" tabindex="0" role="region" aria-label="Differences">
<table>
<thead><tr><th>benchmark</th><th class="number">A</th><th class="number">B</th>
<th class="number">B − A, 95% interval</th><th class="number">p, bootstrap</th>
<th class="number">p, McNemar</th><th class="number">questions</th></tr></thead>
{% for one in comparisons %}
<tr><th>{{ one.benchmark }}<small>{{ one.metric }}</small></th>
<td class="number">{{ "%.2f" | format(one.a) }}</td><td class="number">{{ "%.2f" | format(one.b) }}</td>
<td class="number">{{ "%+.2f" | format(one.bootstrap.difference) }}
<small>{{ one.bootstrap.describe_interval(" to ") }}</small></td>
<td class="number">{{ "none" if one.bootstrap.p_value is none
else "%.4f" | format(one.bootstrap.p_value) }}</td>
<td class="number">{{ "%.4f" | format(one.mcnemar_p) }}</td>
<td class="number">{{ "{:,}".format(one.num_units) }}
{% if one.unit != "questions" %}<small>{{ one.unit }}</small>{% endif %}</td></tr>
{% endfor %}
</table>
</div>
{% for one in comparisons if one.flips %}
<h2>{{ one.benchmark }}: {{ one.only_a }} only A right, {{ one.only_b }} only B right</h2>
{% if one.flips | length > limit %}<p>The first {{ limit }} of {{ one.flips | length }}.</p>{% endif %}
<div class="cards">
{% for left, right in one.flips[:limit] %}
{% set shown = show(one.benchmark, left.question_id) %}
<article>
<div class="images">{% for image in shown.images %}<img src="{{ image }}" alt="{{ left.image }}">{% else %}{{
left.image or "no image" }}{% endfor %}</div>
<div><dl>
<dt>question {{ left.question_id }}</dt><dd><pre>{{ left.prompt }}</pre></dd>
{% if shown.target %}<dt>truth</dt><dd><pre>{{ shown.target }}</pre></dd>{% endif %}
{% for name, answer in (("A", left), ("B", right)) %}
<dt>{{ name }}</dt>
<dd><pre class="{{ 'right' if answer.score >= right_from else 'wrong' }}">{{ answer.answer }}</pre></dd>
{% endfor %}
</dl></div>
</article>
{% endfor %}
</div>
{% endfor %}
{% set equal = comparisons | rejectattr("flips") | map(attribute="benchmark") | join(", ") %}
{% if equal %}<p>No question flipped: {{ equal }}.</p>{% endif %}

</body>
</html>
"""


def write_flips(
    comparisons: Sequence[Comparison],
    path: Path,
    *,
    a: str,
    b: str,
    questions: Mapping[str, Sequence[Question]] | None = None,
    limit: int = 200,
) -> None:
    """Write the page; it needs no other file.

    Args:
        comparisons: What to show.
        path: The page.
        a: Name of the first model.
        b: Name of the second model.
        questions: Loaded questions by benchmark; without them, no images and no truths.
        limit: Flips shown of each benchmark.
    """
    by_id = {(name, q.id): q for name, listed in (questions or {}).items() for q in listed}
    environment = page_environment(Path(__file__).parent)

    def show(benchmark: str, question_id: str) -> dict[str, Any]:
        question = by_id.get((benchmark, question_id))
        if question is None:
            return {"images": [], "target": ""}
        images = [found for ref in question.conversation.images if (found := _embed(ref))]
        return {"images": images, "target": spell(question.target)}

    page = environment.from_string(_PAGE).render(
        comparisons=comparisons, a=a, b=b, limit=limit, show=show, right_from=RIGHT
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def _embed(image: ImageRef) -> str:
    """Return the image as a data URL, "" if its file is not there."""
    data = image.data
    if data is None and image.path is not None and image.path.is_file():
        data = image.path.read_bytes()
    if data is None:
        return ""
    kind = mimetypes.guess_type(str(image))[0] or "image/jpeg"
    return data_url(data, kind)


def spell(target: object) -> str:
    """Return the right answer of a question as text."""
    if isinstance(target, dict) and "answers" in target:  # a user's own question
        target = list(dict.fromkeys(target["answers"]))
    if isinstance(target, dict):
        return "\n".join(f"{name}: {value}" for name, value in target.items())
    return ", ".join(map(str, target)) if isinstance(target, list) else str(target or "")
