"""VQA accuracy: how many of ten annotators gave the same answer.

Paper: appendix A, VQAv2 and TextVQA.
"""

from collections.abc import Sequence

from tinyllava.evaluation.metrics.vqa_normaliser import clean, normalise_evalai, normalise_vqa

NUM_ANNOTATORS = 10


def accuracy_of_matches(num_matches: int, num_answers: int = NUM_ANNOTATORS) -> float:
    """Return the mean over annotators i of min(1, matches among the others / 3), in closed form.

    With ten answers: 0 -> 0, 1 -> 0.3, 2 -> 0.6, 3 -> 0.9, 4 and more -> 1.
    """
    m, n = num_matches, num_answers
    return (m * min(1.0, max(0, m - 1) / 3) + (n - m) * min(1.0, m / 3)) / n


def grade_vqa(answer: str, human_answers: Sequence[str]) -> tuple[str, float]:
    """Return the answer as compared, and its accuracy, by the official tool of VQAv2.

    Both sides are normalised only where the human answers differ; where all agree, the answer has to match
    them to the letter.
    """
    answer, humans = clean(answer), [clean(human) for human in human_answers]
    if len(set(humans)) > 1:
        answer, humans = normalise_vqa(answer), [normalise_vqa(human) for human in humans]
    return answer, accuracy_of_matches(humans.count(answer), len(humans))


def grade_textvqa(answer: str, human_answers: Sequence[str]) -> tuple[str, float]:
    """Return the answer as compared, and its accuracy, by the M4C evaluator: always normalised."""
    answer = normalise_evalai(answer)
    humans = [normalise_evalai(human) for human in human_answers]
    return answer, accuracy_of_matches(humans.count(answer), len(humans))
