"""The metric of a user's own questions: by name, by the form of the right answers, or the user's own code.

Paper: none.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tinyllava.errors import ConfigError, TinyLlavaError, look_up, require
from tinyllava.evaluation.judge import JUDGE, UNREAD_REPLY
from tinyllava.evaluation.metrics.choices import find_choice, find_numbers, normalise
from tinyllava.evaluation.metrics.references import METRICS, AnswerMetric, Reading, Reference
from tinyllava.parts.user_code import code_digest, is_reference, locate, run_value

AUTO = "auto"
LOOKS = {
    "choice": "one of several choices",
    "yes_no": "yes or no",
    "number": "numbers",
    "vqa": "answers of several annotators",
    "exact": "short answers",
    "rouge": "long answers",
}
"""What answers look like for which ``auto`` chooses a metric."""
_LONG_WORDS = 4  # texts whose median has more words are compared by ROUGE-L
_PLAIN_NUMBER = re.compile(r"[-+\u2212]?[\d.,]+\s*%?")

UserMetric = Callable[[str, Sequence[str], Mapping[str, Any]], Any]
"""(answer, right answers, record) -> a score in [0, 1]; or (score, what was read); or None: unreadable."""


@dataclass(kw_only=True)
class MetricTable:
    """The metrics by name, with those of the user's that were asked for."""

    metrics: dict[str, AnswerMetric] = field(
        default_factory=lambda: {
            **METRICS,
            JUDGE: AnswerMetric(
                title=JUDGE, read=lambda *_: Reading("", 0.0), unclear=UNREAD_REPLY, has_labels=False
            ),
        }
    )
    digests: dict[str, str] = field(default_factory=dict)
    """Hash of the code of a user's metric, by its name."""

    def find(self, name: str) -> str:
        """Return the name of a metric of the table.

        Raises:
            UnknownNameError: no such metric.
            MissingExtraError: it needs a package that is not installed.
        """
        look_up(self.metrics, name, "metric")
        if name == "rouge":
            require("rouge_score", "metrics", "compares long answers (metric rouge)")
        return name

    def add(self, metric: str | UserMetric) -> str:
        """Return the name of the metric that the user asked for; a function becomes one of the table.

        Raises:
            UnknownNameError: no such metric.
            ConfigError: the user's code fails, or its value is no function.
        """
        if isinstance(metric, str) and not is_reference(metric):
            return look_up(
                {name: name for name in (AUTO, *self.metrics)} | {"FILE.py:NAME": ""}, metric, "metric"
            )
        function = run_value(metric) if isinstance(metric, str) else metric
        if not callable(function):
            raise ConfigError(f"metric {metric}: expected a function, found {type(function).__name__}.")
        name = metric if isinstance(metric, str) else str(getattr(metric, "__name__", "metric"))
        self.digests[name] = code_digest(name)[:12]
        self.metrics[name] = AnswerMetric(
            title=name.rpartition(":")[2],
            read=lambda answer, reference: _ask_user(function, name, answer, reference),
            unclear="empty, or None from the metric",
            has_labels=False,
        )
        return name

    def protocol(self, names: Sequence[str]) -> str:
        """Return an id of the rules: the metrics, a user's with a hash of its code."""
        codes = [f"{name}@{self.digests[name]}" if self.digests.get(name) else name for name in names]
        return f"own/{'+'.join(sorted(codes))}"


def _ask_user(function: Any, name: str, answer: str, reference: Reference) -> Reading:
    """Call the user's function; its error shows its line, and a wrong value is named."""
    try:
        value = function(answer, list(reference.answers), reference.record)
    except TinyLlavaError:
        raise
    except Exception as error:  # the user's code may raise anything
        where = locate(error, name.rpartition(":")[0] or name)
        raise ConfigError(
            f"{where}: {type(error).__name__}: {error} (metric {name}, answer {answer[:80]!r})"
        ) from error
    if value is None:
        return Reading("", 0.0, False)
    score, parsed = value if isinstance(value, tuple) and len(value) == 2 else (value, normalise(answer))
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ConfigError(
            f"metric {name} returned {value!r} for the answer {answer[:80]!r}. Return a score from 0 to 1, "
            "True or False, (score, what was read), or None for an answer that cannot be read."
        )
    return Reading(str(parsed), float(score), bool(answer.strip()))


def choose_metrics(references: Sequence[Reference], kinds: Sequence[str]) -> list[str]:
    """Return a metric for each question that fits the form of its right answers.

    Whether texts are short or long is decided for all of a kind together.
    """
    looks = [_look(reference) for reference in references]
    lengths: dict[str, list[int]] = defaultdict(list)
    for reference, look, kind in zip(references, looks, kinds, strict=True):
        if look == "exact":
            lengths[kind].append(max(len(answer.split()) for answer in reference.answers))
    are_long = {kind: median(numbers) > _LONG_WORDS for kind, numbers in lengths.items()}
    return [
        "rouge" if look == "exact" and are_long[kind] else look
        for look, kind in zip(looks, kinds, strict=True)
    ]


def _look(reference: Reference) -> str:
    answers = reference.answers
    if reference.choices and all(find_choice(answer, reference.choices) for answer in answers):
        return "choice"
    if len(answers) > 3:
        return "vqa"
    if all(normalise(answer) in ("yes", "no") for answer in answers):
        return "yes_no"
    if all(_PLAIN_NUMBER.fullmatch(answer) and len(find_numbers(answer)) == 1 for answer in answers):
        return "number"
    return "exact"
