"""Numbers beside the score of a user's own questions: the most frequent answer's, and F1 over all labels."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from tinyllava.evaluation.benchmark import Grade, Prediction
from tinyllava.evaluation.metrics.statistics import Ratio, estimate
from tinyllava.evaluation.metrics.words import split_labels
from tinyllava.evaluation.own_judge import JUDGE
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.results import Metric


def beside_the_score(
    grade: Callable[[Question, str], Grade], questions: Sequence[Question], predictions: Sequence[Prediction]
) -> list[Metric]:
    """Return F1 over all labels, and what the most frequent right answer of each kind would score."""
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
