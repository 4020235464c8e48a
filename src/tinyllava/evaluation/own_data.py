"""A user's own questions as a benchmark, graded by a metric that fits the answers or that the user chose.

Paper: none. The file is read as in training. Each answer of a record is asked for, after the turns before it.
Further fields of a record: ``kind``, ``metric``, ``answers`` (all that are right), ``choices``,
``tolerance``.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from tinyllava.config import DataConfig
from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.readers.columns import listed_texts, reference_answers
from tinyllava.data.readers.hub import record_files
from tinyllava.data.records import open_readings, parse_columns, read_configured, read_raw
from tinyllava.errors import ConfigError, DataError, UnknownNameError
from tinyllava.evaluation.benchmark import Benchmark, Grade, Prediction, Summary, mean_of, means_by_group
from tinyllava.evaluation.judge import JUDGE, JUDGING
from tinyllava.evaluation.metrics.choices import parse_tolerance, split_labels
from tinyllava.evaluation.metrics.references import Reference
from tinyllava.evaluation.metrics.statistics import Ratio, estimate
from tinyllava.evaluation.own_metrics import AUTO, LOOKS, MetricTable, UserMetric, choose_metrics
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.results import Metric

PREFIX = "own-"
"""What the name of every benchmark out of a user's file begins with."""
MAX_TOKENS = 256
"""Of an answer, where nothing else is asked for."""
MAX_LABELS = 50
"""Right answers with an accuracy of their own; where a file has more, the most frequent ones."""
_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s+(\S.*?)\s*$", re.MULTILINE)


class ReadingSettings(TypedDict, total=False):
    """How a user's own file is read, as for training (see ``tinyllava.config.DataConfig``)."""

    images: str | Path
    columns: tuple[str, ...]
    reader: str
    allow_urls: bool
    keep_places: bool
    skip: tuple[str, ...]


class OwnSettings(ReadingSettings, total=False):
    """Settings of a user's own file, as ``own_benchmark`` takes them."""

    metric: str | UserMetric
    tolerance: str
    max_tokens: int


def name_of(data: str | Path) -> str:
    """Return the name under which the questions of a file are evaluated."""
    return PREFIX + (re.sub(r"[^\w-]+", "_", Path(data).name.split(".")[0]) or "data")


def own_benchmark(
    data: str | Path,
    *,
    metric: str | UserMetric = AUTO,
    tolerance: str = "0",
    max_tokens: int = MAX_TOKENS,
    **reading: Unpack[ReadingSettings],
) -> Benchmark:
    """Return a benchmark over a user's own file.

    Args:
        data: records with questions and right answers: a file, a folder of images, or a split of the hub.
        metric: a name of ``references.METRICS``, ``judge``, ``auto`` (by what the answers look like), a
            function, or one as ``FILE.py:NAME``. A record's own ``metric`` counts before it.
        tolerance: of numbers: ``0.5``, or ``5%``. A record's own counts before it.
        max_tokens: max length of an answer.
        reading: images, columns, reader, allow_urls, keep_places, skip; as in training.

    Raises:
        DataError: a record has a defect, or a right answer that its metric cannot read.
        ConfigError: a wrong tolerance, or the user's function fails.
        UnknownNameError: no such metric.
        MissingExtraError: long answers need a package that is not installed.
    """
    table = MetricTable()
    asked, said = _read_asked(data, reading)
    references = [_reference(one, tolerance) for one in asked]
    default = table.add(metric)
    kinds = [_kind_field(one) for one in asked]
    looks = choose_metrics(references, kinds)
    kinds = [kind or LOOKS[look] for kind, look in zip(kinds, looks, strict=True)]
    names = looks if default == AUTO else [default] * len(asked)
    names = [_own_metric(one, table) or table.find(name) for one, name in zip(asked, names, strict=True)]
    questions = _with_groups(
        [_question(*one, table) for one in zip(asked, references, names, kinds, strict=True)], table
    )
    used = list(dict.fromkeys(names))
    return replace(
        from_predictions(name_of(data)),
        protocol=table.protocol(used),
        metric=_headline([table.metrics[name].title for name in used]),
        num_questions=len(questions),
        max_new_tokens=max_tokens,
        load=lambda _: list(questions),
        grade=partial(_grade, table),
        details=partial(beside_the_score, partial(_grade, table)),
        unclear="; ".join(dict.fromkeys(table.metrics[name].unclear for name in used)),
        judging=JUDGING if JUDGE in used else None,
        notes=(*_say_metrics(asked, names, table, default), *said),
    )


def from_predictions(name: str, predictions: Sequence[Prediction] = ()) -> Benchmark:
    """Return what compares two models on own questions; the file itself is not needed."""
    return Benchmark(
        name=name,
        title=name.removeprefix(PREFIX),
        protocol="own",
        prompting="own",
        split="",
        metric=_headline(_titles(predictions)),
        num_questions=0,
        prompt="{question}",
        load=lambda folder: [],
        grade=lambda question, answer: Grade("", None),
        summarise=_summarise,
        is_edited=True,
    )


def _headline(titles: Sequence[str]) -> str:
    return titles[0] if len(titles) == 1 else "mean score"


def _titles(predictions: Sequence[Prediction]) -> list[str]:
    groups = {group for prediction in predictions for group in prediction.groups}
    return sorted(group.removeprefix("metric=") for group in groups if group.startswith("metric="))


def _summarise(predictions: Sequence[Prediction]) -> Summary:
    """Return the mean score over all and over each group; where kinds are metrics, they are named once."""
    groups = means_by_group(predictions)
    sizes = Counter(group.partition("=")[0] for group in groups)
    if sizes["kind"] == sizes["metric"] == len({prediction.groups[:2] for prediction in predictions}):
        sizes["metric"] = 1
    several = {group: ratios for group, ratios in groups.items() if sizes[group.partition("=")[0]] > 1}
    return {_headline(_titles(predictions)): [mean_of(predictions)], **several}


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One answer of a record, before its metric is known."""

    conversation: Conversation
    """Up to the question."""
    id: str
    answers: tuple[str, ...]
    fields: Mapping[str, Any]
    """The record as it is in the file."""


def _read_asked(name: str | Path, reading: ReadingSettings) -> tuple[list[_Asked], list[str]]:
    """Return a question for each answer of one or more files, and what was left out of them in words."""
    paths = record_files(name)
    data = DataConfig(
        records=tuple(map(str, paths)),
        images=str(reading.get("images", "")),
        columns=tuple(reading.get("columns", ())),
        reader=reading.get("reader", ""),
        keep_image_places=reading.get("keep_places", False),
        allow_urls=reading.get("allow_urls", False),
        skip=tuple(reading.get("skip", ())),
    )
    records = read_configured(data)
    fields = {
        (str(one.path), at): raw if isinstance(raw, dict) else {}
        for _, readings in open_readings(data)
        for one in readings
        for at, raw in read_raw(one.path, one.images, data.reader)
    }
    root = os.path.commonpath([path.parent for path in paths])
    names = {str(path): f"{path.relative_to(root).as_posix()}: " for path in paths if len(paths) > 1}
    times = Counter(talk.id for talk in records.conversations)
    asked: list[_Asked] = []
    for talk in records.conversations:
        at = names.get(talk.source, "") + talk.at
        own = fields[talk.source, talk.at]
        asked += _split_turns(talk, own, at, times[talk.id] == 1, parse_columns(data.columns))
    said = [f"skipped records ({name}): {number:,}" for name, number in records.skipped.items() if number]
    unused = ", ".join(f"{name} ({num:,})" for name, num in records.ignored.items())
    return asked, said + ([f"unused fields: {unused}"] if unused else [])


def _split_turns(
    conversation: Conversation, fields: Mapping[str, Any], at: str, is_id: bool, columns: Mapping[str, str]
) -> list[_Asked]:
    """Return a question for each answer of a conversation, with the turns before it."""
    messages = conversation.messages
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    names = (conversation.id, "" if conversation.id and is_id else at)
    base = " ".join(name for name in names if name)
    listed = _texts(fields, "answers", conversation) or reference_answers(fields, columns)
    given = listed if len(turns) == 1 else ()
    return [
        _Asked(
            conversation=replace(conversation, messages=messages[:i]),
            id=base if len(turns) == 1 else f"{base}#{number}",
            answers=given or (messages[i].text.strip(),),
            fields=fields,
        )
        for number, i in enumerate(turns, start=1)
    ]


def _texts(fields: Mapping[str, Any], name: str, conversation: Conversation) -> tuple[str, ...]:
    """Return a field that is a list of texts or numbers, or of VQA's objects with an answer each."""
    value = listed_texts(fields.get(name))
    if value in (None, "", []):
        return ()
    listed = value if isinstance(value, list) else [value]
    texts = [one.get("answer") if isinstance(one, dict) else one for one in listed]
    if not all(isinstance(one, str | int | float) and str(one).strip() for one in texts):
        raise DataError(
            f"{conversation.place}: {name!r} is {str(value)[:80]}. Write a list of texts, such as "
            '["red", "dark red"].'
        )
    return tuple(str(one).strip() for one in texts)


def _reference(one: _Asked, tolerance: str) -> Reference:
    tolerance = str(one.fields.get("tolerance", tolerance))
    try:
        parse_tolerance(tolerance)
    except ValueError:
        raise ConfigError(
            f"{one.conversation.place}: tolerance {tolerance!r} is not a number. Write 0.5, or 5% of the "
            "right answer."
        ) from None
    return Reference(answers=one.answers, choices=_read_choices(one), tolerance=tolerance, record=one.fields)


def _read_choices(one: _Asked) -> dict[str, str]:
    """Return the options by letter: the lines ``A. ...`` of the question, or the field ``choices``."""
    lines = dict(_OPTION_LINE.findall(one.conversation.messages[-1].text))
    expected = [chr(ord("A") + i) for i in range(len(lines))]
    if len(lines) > 1 and list(lines) == expected:
        return lines
    value = one.fields.get("choices")
    if isinstance(value, dict) and value:
        return {str(letter).strip().upper(): str(text) for letter, text in value.items()}
    if listed := _texts(one.fields, "choices", one.conversation):
        return {chr(ord("A") + i): text for i, text in enumerate(listed)}
    return {}


def _kind_field(one: _Asked) -> str:
    """Return the kind that a record names; a category that is the answer itself names none."""
    category = str(one.fields.get("category") or "")
    return str(one.fields.get("kind") or ("" if category in one.answers else category))


def _own_metric(one: _Asked, table: MetricTable) -> str:
    """Return the metric that a record names; code that only a data file names is not run."""
    name = str(one.fields.get("metric") or AUTO)
    if name == AUTO:
        return ""
    try:
        return table.find(name)
    except UnknownNameError as error:
        raise DataError(f"{one.conversation.place}: {error}") from None


def _question(one: _Asked, reference: Reference, name: str, kind: str, table: MetricTable) -> Question:
    metric = table.metrics[name]
    if problem := metric.check(reference):
        raise DataError(f"{one.conversation.place}: metric {name}: {problem}")
    target: dict[str, Any] = {"answers": list(one.answers), "metric": name}
    if reference.choices and name == "choice":
        target["choices"] = dict(reference.choices)
    if name == "number":
        target["tolerance"] = reference.tolerance
    if metric.has_labels:
        target["label"] = metric.read(one.answers[0], reference).parsed
    return Question(
        id=one.id,
        conversation=one.conversation,
        image=", ".join(map(_name_image, one.conversation.images)),
        target=target,
        category=kind,
        meta={"reference": reference},
    )


def _name_image(image: ImageRef) -> str:
    """Return what tells an image from others: its name, its path, or a hash of its bytes."""
    return image.name or str(image.path or hashlib.sha256(image.data or b"").hexdigest()[:12])


def _with_groups(questions: Sequence[Question], table: MetricTable) -> list[Question]:
    """Add what each question is counted in: its kind, its metric, its right answer if that is frequent."""
    labels = Counter(question.target.get("label", "") for question in questions)
    frequent = {label for label, times in labels.most_common(MAX_LABELS) if times > 1 and label}
    return [
        replace(
            question,
            groups=(
                f"kind={question.category}",
                f"metric={table.metrics[question.target['metric']].title}",
                *(f"answer={one.replace('=', ':')}" for one in frequent & {question.target.get("label")}),
            ),
        )
        for question in questions
    ]


def _say_metrics(
    asked: Sequence[_Asked], names: Sequence[str], table: MetricTable, default: str
) -> tuple[str, ...]:
    """Say which metric grades how many answers, and why."""
    counts: Counter[tuple[str, str]] = Counter()
    for one, name in zip(asked, names, strict=True):
        by_record = one.fields.get("metric") not in (None, "", AUTO)
        why = "chosen by the record" if by_record else "chosen with --metric"
        if default == AUTO and not by_record:
            why = f"{LOOKS[name]}; --metric chooses another"
        counts[table.metrics[name].title, why] += 1
    return tuple(
        f"metric {title}: {number:,} answer{'s' * (number != 1)} ({why})"
        for (title, why), number in counts.items()
    )


def _grade(table: MetricTable, question: Question, answer: str) -> Grade:
    name = question.target["metric"]
    if name == JUDGE:
        return Grade("", None)
    parsed, score, is_clear = table.metrics[name].read(answer, question.meta["reference"])
    if score == 1 and "label" in question.target:
        parsed = question.target["label"]  # of several right answers, the first stands for all
    return Grade(parsed, score, is_clear)


def beside_the_score(
    grade: Callable[[Question, str], Grade], questions: Sequence[Question], predictions: Sequence[Prediction]
) -> list[Metric]:
    """Return F1 over all labels, and the score of the most frequent right answer of each kind."""
    metrics = _label_f1(questions, predictions)
    if any(question.target["metric"] == JUDGE for question in questions):
        return metrics
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.category][question.target["answers"][0]] += 1
    most = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}
    grades = [grade(question, most[question.category]).score or 0.0 for question in questions]
    ratio = Ratio(numerators=grades, clusters=[prediction.cluster for prediction in predictions])
    return [*metrics, estimate("baseline=most frequent answer", [ratio])]


def _label_f1(questions: Sequence[Question], predictions: Sequence[Prediction]) -> list[Metric]:
    """Return micro and macro F1 over the labels of the questions that are graded by F1."""
    pairs = [
        (split_labels(question.target["answers"]), split_labels([prediction.answer]), prediction.cluster)
        for question, prediction in zip(questions, predictions, strict=True)
        if question.target["metric"] == "f1"
    ]
    if not pairs:
        return []
    labels = sorted(set().union(*(right for right, _, _ in pairs)))
    clusters = [cluster for _, _, cluster in pairs]
    micro = Ratio(
        numerators=[2.0 * len(right & said) for right, said, _ in pairs],
        denominators=[float(len(right) + len(said)) for right, said, _ in pairs],
        clusters=clusters,
    )
    macro = [
        Ratio(
            numerators=[2.0 * (label in right and label in said) for right, said, _ in pairs],
            denominators=[float((label in right) + (label in said)) for right, said, _ in pairs],
            clusters=clusters,
            weight=100 / len(labels),
            num_questions=len(pairs) if label == labels[0] else 0,
        )
        for label in labels
    ]
    return [estimate("labels=micro F1", [micro]), estimate("labels=macro F1", macro)]
