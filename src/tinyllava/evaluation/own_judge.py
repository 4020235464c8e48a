"""A judge model's grade of an answer to a user's own question, from 0 to 10; the wording is ours."""

import re

from tinyllava.evaluation.question import JudgeRequest, Judging, Question, Wording

JUDGE = "judge"
"""Name of the metric."""
UNREAD_REPLY = "empty, or no grade in the judge's reply"
_WORDING = {
    "prompt": (
        "Compare a reply to a question about an image with the right answer. You cannot see the image; take "
        "the right answer as true. Grade how far the reply says the same, from 0 (wrong, or nothing of it) "
        "to 10 (all of it, and nothing that contradicts it). Other words for the same thing are right.\n\n"
        "Question: {question}\nRight answer: {answers}\nReply: {reply}\n\n"
        "Answer with the grade alone, a whole number from 0 to 10."
    )
}


def _ask_judge(wording: Wording, question: Question, answer: str, num_tries: int) -> JudgeRequest:
    """Make the request; later tries are a little warmer, so that they differ."""
    parts = {"question": question.prompt, "answers": " / ".join(question.target["answers"]), "reply": answer}
    content = re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], wording["prompt"])
    return JudgeRequest(
        messages=({"role": "user", "content": content},), temperature=0.3 * num_tries, max_tokens=8
    )


def _read_grade(reply: str) -> int | None:
    numbers = re.findall(r"\d+", reply.partition("/")[0])
    return int(numbers[0]) if len(numbers) == 1 and int(numbers[0]) <= 10 else None


def _grade_reply(question: Question, reply: str) -> tuple[str, float]:
    grade = _read_grade(reply)
    return ("", 0.0) if grade is None else (str(grade), grade / 10)


JUDGING = Judging(
    official_judge="",
    wording=lambda _: _WORDING,
    ask=_ask_judge,
    is_valid=lambda _, reply: _read_grade(reply) is not None,
    grade=_grade_reply,
    max_tries=3,
    is_needed=lambda question, _: question.target["metric"] == JUDGE,
)
