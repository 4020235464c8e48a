"""A judge model behind any OpenAI-compatible endpoint, or its recorded reviews.

Paper: appendix A; GPT-4 grades MM-Vet and LLaVA-W. A local model behind an OpenAI-compatible server works in
the same way. Replies are saved as they arrive, so a killed run resumes and nothing is paid twice.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx  # the client of huggingface-hub

from tinyllava.errors import DataError, JudgeError
from tinyllava.evaluation.benchmark import Benchmark
from tinyllava.evaluation.question import JudgeRequest, Judging, Question, Reply, Wording
from tinyllava.evaluation.read import Record, read_entries, read_lines
from tinyllava.files import write_text

CHARACTERS_PER_TOKEN = 4
"""English text in the judges' vocabularies; the cost shown beforehand is an estimate."""
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A judge: a model at an address that speaks OpenAI's chat completions."""

    url: str
    """Up to and with the version, as ``https://api.openai.com/v1``."""
    model: str
    api_key: str = ""
    num_concurrent: int = 8
    num_attempts: int = 6
    """Attempts to get a reply through a busy or failing endpoint."""
    first_wait_seconds: float = 1.0
    """Before the second attempt; doubles each time, unless the endpoint says how long to wait."""
    timeout_seconds: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The estimated cost of judging: calls, tokens in and out, and their price."""

    num_requests: int
    num_cached: int
    prompt_tokens: int
    completion_tokens: int
    price: float | None
    """In the currency of the prices given; None where none were."""

    def __str__(self) -> str:
        if not self.num_requests:
            return f"no requests, {self.num_cached:,} replies are cached"
        price = "price not known" if self.price is None else f"at most about {self.price:.2f}"
        return (
            f"{self.num_requests:,} requests ({self.num_cached:,} more are cached), about "
            f"{self.prompt_tokens:,} tokens in and at most {self.completion_tokens:,} out: {price}"
        )


@dataclass(frozen=True, kw_only=True)
class Reviews:
    """A judge's last reply to each question, by question id, and the judge that gave them."""

    judge: str
    replies: Mapping[str, Reply]
    reviewed: Mapping[str, str] = field(default_factory=dict)
    """A hash of the answer that each reply is about; other programs' reviews do not have it."""

    def check_answers(self, benchmark: str, answers: Mapping[str, str]) -> None:
        """Make sure that the reviews are about these answers, as far as they say.

        Raises:
            DataError: one is about another answer to its question, such as another model's.
        """
        other = [key for key, told in self.reviewed.items() if told != _hash_answer(answers.get(key, ""))]
        if other:
            raise DataError(
                f"{benchmark}: {len(other):,} of {len(self.replies):,} reviews by {self.judge} are about "
                f"other answers, the first to question {other[0]!r}. Give the reviews of this model's "
                "answers, or judge them with --judge-url."
            )


def _hash_answer(answer: str) -> str:
    return hashlib.sha256(answer.encode()).hexdigest()[:12]


class ReplyCache:
    """Replies on disk by a hash of judge and request; safe to append to from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        if path.exists():
            num_whole = path.read_bytes().rfind(b"\n") + 1
            if num_whole < path.stat().st_size:  # a killed run may leave half a line
                os.truncate(path, num_whole)
            if num_whole:
                self._replies = {one.text("key"): one.text("reply") for one in read_lines(path)}
        path.parent.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(model: str, request: JudgeRequest) -> str:
        """Return the key of a request to a judge; tries of one text differ by temperature or wording."""
        content = [model, list(map(dict, request.messages)), request.temperature, request.max_tokens]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def find(self, key: str) -> str | None:
        """Return the reply that is kept under ``key``, if any."""
        return self._replies.get(key)

    def keep(self, key: str, reply: str) -> None:
        """Keep a reply, on disk at once."""
        with self._lock, self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n")
            self._replies[key] = reply


@dataclass(frozen=True, kw_only=True)
class Judge:
    """An endpoint with its cache."""

    endpoint: Endpoint
    cache: ReplyCache

    def estimate_cost(
        self,
        benchmark: Benchmark,
        questions: Sequence[Question],
        answers: Mapping[str, str],
        folder: Path,
        *,
        price_in: float | None = None,
        price_out: float | None = None,
    ) -> Cost:
        """Return the cost of judging if every first reply is readable, with prices per million tokens."""
        judging, wording, needed = _prepare(benchmark, questions, answers, folder)
        requests = [judging.ask(wording, question, answers.get(question.id, ""), 0) for question in needed]
        new = [one for one in requests if self.cache.find(ReplyCache.key(self.endpoint.model, one)) is None]
        tokens_in = sum(
            len(message["content"]) // CHARACTERS_PER_TOKEN + 4 for one in new for message in one.messages
        )
        tokens_out = sum(one.max_tokens for one in new)
        price = None
        if price_in is not None and price_out is not None:
            price = (tokens_in * price_in + tokens_out * price_out) / 1e6
        return Cost(
            num_requests=len(new),
            num_cached=len(requests) - len(new),
            prompt_tokens=tokens_in,
            completion_tokens=tokens_out,
            price=price,
        )

    def review(
        self, benchmark: Benchmark, questions: Sequence[Question], answers: Mapping[str, str], folder: Path
    ) -> Reviews:
        """Have all answers that need it judged; unreadable replies are asked for again as the protocol says.

        Args:
            benchmark: The benchmark, with its ``judging``.
            questions: Its questions.
            answers: The model's answers by question id; a missing one is judged as empty.
            folder: The benchmark's folder, where the official prompt is read from.

        Raises:
            JudgeError: the endpoint refuses, or does not answer after all attempts; replies are kept.
        """
        judging, wording, needed = _prepare(benchmark, questions, answers, folder)
        with httpx.Client(timeout=self.endpoint.timeout_seconds) as client:

            def review_one(question: Question) -> str:
                reply = ""
                for num_tries in range(judging.max_tries):
                    request = judging.ask(wording, question, answers.get(question.id, ""), num_tries)
                    reply = self._reply(client, request)
                    if judging.is_valid(question, reply):
                        break
                return reply

            with ThreadPoolExecutor(self.endpoint.num_concurrent) as pool:
                futures = [pool.submit(review_one, question) for question in needed]
                try:
                    replies = [future.result() for future in futures]
                except BaseException:  # also Ctrl-C: what was not asked yet is not paid for
                    pool.shutdown(cancel_futures=True)
                    raise
        ids = [question.id for question in needed]
        return Reviews(
            judge=self.endpoint.model,
            replies=dict(zip(ids, replies, strict=True)),
            reviewed={key: _hash_answer(answers.get(key, "")) for key in ids},
        )

    def _reply(self, client: httpx.Client, request: JudgeRequest) -> str:
        key = ReplyCache.key(self.endpoint.model, request)
        reply = self.cache.find(key)
        if reply is None:
            reply = _call(client, self.endpoint, request)
            self.cache.keep(key, reply)
        return reply


def _prepare(
    benchmark: Benchmark, questions: Sequence[Question], answers: Mapping[str, str], folder: Path
) -> tuple[Judging, Wording, list[Question]]:
    if benchmark.judging is None:
        raise JudgeError(f"{benchmark.name} does not use a judge; score its answers without one.")
    needed = [q for q in questions if benchmark.judging.is_needed(q, answers.get(q.id, ""))]
    return benchmark.judging, benchmark.judging.wording(folder), needed


def _call(client: httpx.Client, endpoint: Endpoint, request: JudgeRequest) -> str:
    url = endpoint.url.rstrip("/") + "/chat/completions"
    body = {
        "model": endpoint.model,
        "messages": list(map(dict, request.messages)),
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    problem = ""
    for attempt in range(endpoint.num_attempts):
        wait = endpoint.first_wait_seconds * 2**attempt
        try:
            response = client.post(url, json=body, headers=headers)
        except httpx.TransportError as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if response.is_success:
                return _read_reply(url, response)
            problem = f"status {response.status_code}: {response.text[:200]}"
            if response.status_code not in _RETRIED:
                raise JudgeError(
                    f"{url} refused judge {endpoint.model!r}: {problem}. Fix the URL, the judge's "
                    "name or the key."
                )
            told = response.headers.get("retry-after", "")
            wait = float(told) if told.replace(".", "", 1).isdigit() else wait
        if attempt + 1 < endpoint.num_attempts:
            time.sleep(wait)
    raise JudgeError(
        f"{url} did not reply for judge {endpoint.model!r} in {endpoint.num_attempts} attempts; "
        f"last: {problem}. Run the same command later to resume; earlier replies are kept."
    )


def _read_reply(url: str, response: httpx.Response) -> str:
    try:
        document: Any = response.json()
        reply = document["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        sent = response.text[:200]
        raise JudgeError(f"{url} is not a chat completions endpoint; it sent {sent!r}.") from None
    return reply if isinstance(reply, str) else ""


def find_reviews(path: Path, benchmark: str) -> Path | None:
    """Return the recorded reviews of a benchmark: ``path`` itself, or the file for it in that folder, if any.

    Raises:
        DataError: no such path, or the folder has several files for the benchmark.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Give recorded reviews.")
    if not path.is_dir():
        return path
    patterns = (f"{benchmark}.jsonl", f"{benchmark}.json", f"{benchmark}/reviews-*.jsonl")
    found = sorted(one for pattern in patterns for one in path.glob(pattern))
    if len(found) > 1:
        names = ", ".join(str(one.relative_to(path)) for one in found)
        raise DataError(f"{path}: several reviews of {benchmark}: {names}. Give the file of one judge.")
    return found[0] if found else None


def read_reviews(path: Path, *, judge: str = "") -> Reviews:
    """Read recorded reviews: ours or LLaVA's (JSON lines) or MM-Vet's grades (JSON by question id).

    MM-Vet's record several runs, and all of them count. Ours and MM-Vet's name the judge; LLaVA's do not.

    Raises:
        DataError: the judge is not recorded and not given, a given one differs, or there are two; a question
            has more runs than another.
    """
    found: dict[str, Reply] = {}
    reviewed: dict[str, str] = {}
    judges = {judge} - {""}
    for key, record in _read_reviewed(path):
        if key in found:
            record.fail(f"question {key!r} has a second review.", "Keep one of the two lines.")
        has_runs = isinstance(record.field("content"), list)
        runs = record.texts("content") if has_runs else [record.text("content")]
        first = next(iter(found.values()), None)
        expected = len(runs) if first is None else 1 if isinstance(first, str) else len(first)
        if not runs or len(runs) != expected:
            record.fail(
                f"question {key!r} has {len(runs)} runs, but the first question has {expected}.",
                "Grade it again, or keep the same number of runs for every question.",
            )
        found[key] = runs[0] if len(runs) == 1 else tuple(runs)
        if "answer_hash" in record.values:
            reviewed[key] = record.text("answer_hash")
        judges |= set(record.texts("model")) if "model" in record.values else set()
        judges |= {str(record.values.get("judge", ""))} - {""}
    if len(judges) != 1:
        named = ", ".join(sorted(judges)) or "none"
        raise DataError(
            f"{path}:1: the reviews must be from one judge; recorded or given: {named}. Name the judge, or "
            "keep the reviews of each judge in a separate file."
        )
    return Reviews(judge=judges.pop(), replies=found, reviewed=reviewed)


def _read_reviewed(path: Path) -> Iterator[tuple[str, Record]]:
    if path.suffix == ".json":
        yield from read_entries(path).items()
        return
    for record in read_lines(path):
        yield record.text("question_id"), record


def save_reviews(reviews: Reviews, path: Path) -> None:
    """Write reviews as JSON lines: question id, judge, content, and a hash of the answer they are about."""
    lines = (
        {"question_id": key, "judge": reviews.judge, "content": reply}
        | ({"answer_hash": reviews.reviewed[key]} if key in reviews.reviewed else {})
        for key, reply in reviews.replies.items()
    )
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


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
