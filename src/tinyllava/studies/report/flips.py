"""The questions on which two models differ, as one HTML page with the images in it.

Paper: none; the page shows the answers behind a difference between two cells of Tables 3 and A1.
"""

import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava.conversation import ImageRef
from tinyllava.evaluation.compare import RIGHT, Comparison
from tinyllava.evaluation.question import Question
from tinyllava.files import data_url, page_environment, write_text

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="tinyllava">
<title>{{ a }} and {{ b }}: questions that flipped</title>
<link rel="icon" href="data:,">
<style>
{{ style | safe }}
h1 small { font-size: 1rem }
pre { white-space: pre-wrap; margin: 0; font: inherit }
dl { margin: 0; font-size: .92rem }
dt { color: var(--soft); font-size: .82rem; margin-top: .4rem }
dd { margin: 0 }
.right::after { content: " (right)"; color: var(--good) }
.wrong::after { content: " (wrong)"; color: var(--bad) }
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
{% if one.unit != "questions" %}<small>{{ one.unit }}</small>{% endif %}
{% if one.num_unpaired %}<small>{{ one.describe_unpaired() }}</small>{% endif %}</td></tr>
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
