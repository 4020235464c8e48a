"""The questions on which two models differ, as one HTML page with the pictures in it.

Paper: none; the page shows what stands behind a difference between two cells of Tables 3 and A1.
"""

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from tinyllava.conversation import ImageRef
from tinyllava.evaluation.compare import RIGHT, Comparison
from tinyllava.evaluation.question import Question

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ a }} and {{ b }}: questions that flipped</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid #8885 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
article { display: grid; grid-template-columns: 14rem 1fr; gap: 1rem; margin: 1.5rem 0 }
img { max-width: 100%; border-radius: .3rem }
pre { white-space: pre-wrap; margin: .2rem 0; font: inherit }
dt { font-weight: 600 }
.right::after { content: " (right)"; color: #287d3c }
.wrong::after { content: " (wrong)"; color: #b3261e }
</style>
</head>
<body>
<h1>{{ a }} (A) and {{ b }} (B)</h1>
<table>
<tr><th>Benchmark</th><th>A</th><th>B</th><th>B - A, 95% interval</th><th>p, bootstrap</th><th>p, McNemar</th>
<th>questions</th></tr>
{% for one in comparisons %}
<tr><td>{{ one.benchmark }} ({{ one.metric }})</td>
<td class="number">{{ "%.2f" | format(one.a) }}</td><td class="number">{{ "%.2f" | format(one.b) }}</td>
<td class="number">{{ "%+.2f" | format(one.bootstrap.difference) }}
[{{ "%+.2f" | format(one.bootstrap.interval[0]) }}, {{ "%+.2f" | format(one.bootstrap.interval[1]) }}]</td>
<td class="number">{{ "%.4f" | format(one.bootstrap.p_value) }}</td>
<td class="number">{{ "%.4f" | format(one.mcnemar_p) }}</td>
<td class="number">{{ one.num_questions }}</td></tr>
{% endfor %}
</table>
{% for one in comparisons %}
<h2>{{ one.benchmark }}: {{ one.only_a }} only A right, {{ one.only_b }} only B right</h2>
{% if one.flips | length > limit %}<p>The first {{ limit }} of {{ one.flips | length }}.</p>{% endif %}
{% for left, right in one.flips[:limit] %}
{% set shown = show(one.benchmark, left.question_id) %}
<article>
<div>{% if shown.image %}<img src="{{ shown.image }}" alt="{{ left.picture }}" loading="lazy">{% else %}{{
left.picture or "no picture" }}{% endif %}</div>
<dl>
<dt>Question {{ left.question_id }}</dt><dd><pre>{{ left.prompt }}</pre></dd>
{% if shown.target %}<dt>Truth</dt><dd><pre>{{ shown.target }}</pre></dd>{% endif %}
{% for name, answer in (("A", left), ("B", right)) %}
<dt>{{ name }}</dt>
<dd><pre class="{{ 'right' if answer.score >= right_from else 'wrong' }}">{{ answer.answer }}</pre></dd>
{% endfor %}
</dl>
</article>
{% endfor %}
{% endfor %}
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
        questions: Loaded questions by benchmark; without them, no pictures and no truths.
        limit: Flips shown of each benchmark.
    """
    by_id = {(name, q.id): q for name, listed in (questions or {}).items() for q in listed}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)

    def show(benchmark: str, question_id: str) -> dict[str, str]:
        question = by_id.get((benchmark, question_id))
        if question is None:
            return {"image": "", "target": ""}
        images = question.conversation.images
        return {"image": _embed(images[0]) if images else "", "target": _spell(question.target)}

    page = environment.from_string(_PAGE).render(
        comparisons=comparisons, a=a, b=b, limit=limit, show=show, right_from=RIGHT
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _embed(image: ImageRef) -> str:
    """Return the picture as a data URL, "" if its file is not there."""
    data = image.data
    if data is None and image.path is not None and image.path.is_file():
        data = image.path.read_bytes()
    if data is None:
        return ""
    kind = mimetypes.guess_type(str(image))[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _spell(target: object) -> str:
    if isinstance(target, dict):
        return "\n".join(f"{name}: {value}" for name, value in target.items())
    return ", ".join(map(str, target)) if isinstance(target, list) else str(target or "")
