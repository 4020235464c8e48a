"""Judges: a real HTTP server on the loopback stands in for the endpoint."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evaluation import benchmark_files as files
from tinyllava.errors import DataError, JudgeError
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.judge import Endpoint, Judge, ReplyCache, read_reviews, save_reviews

Reply = Callable[[dict, int], tuple[int, dict[str, str], object]]
"""(body of the request, number of requests before it) -> status, headers, what to send as JSON."""


def says(text: str) -> tuple[int, dict[str, str], object]:
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@contextmanager
def serve(reply: Reply) -> Iterator[tuple[str, list[dict]]]:
    """Serve chat completions; yield the address and the list of requests, each with its headers."""
    requests: list[dict] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                status, headers, document = reply(body, len(requests) - 1)
            data = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/", requests
    finally:
        server.shutdown()
        server.server_close()


def judge(url: str, folder: Path, **special: object) -> Judge:
    endpoint = Endpoint(
        **{"url": url, "model": "stand-in", "api_key": "k", "first_wait_seconds": 0.01, **special}
    )
    return Judge(endpoint=endpoint, cache=ReplyCache(folder / "cache" / "replies.jsonl"))


def mmvet(folder: Path):
    questions = BENCHMARKS["mmvet"].load(files.mmvet(folder))
    return BENCHMARKS["mmvet"], questions, {"v1_0": "x = -1", "v1_1": "Zoë", "v1_2": "abc"}


def test_mmvet_is_asked_in_the_words_of_the_users_evaluator(tmp_path: Path) -> None:
    benchmark, questions, answers = mmvet(tmp_path)
    with serve(lambda body, _: says("0.5")) as (url, requests):
        reviews = judge(url, tmp_path).review(benchmark, questions, answers, tmp_path)
    assert reviews.replies == dict.fromkeys(answers, "0.5")
    first = next(one for one in requests if "x = -1" in one["messages"][0]["content"])
    assert first["messages"][0]["content"] == (
        "Stand-in instruction.\n\nQuestion | Correctness\n\n"
        "What is x in the equation? | -1 <AND> -5 | x = -1 | "
    )
    assert (first["path"], first["key"], first["model"]) == ("/v1/chat/completions", "Bearer k", "stand-in")
    assert (first["temperature"], first["max_tokens"]) == (0.0, 3)
    scored = benchmark.score(questions, answers, reviews.replies)
    assert scored.metrics[0].value == 50
    assert benchmark.result(questions, scored, model="m", judge=reviews.judge).judge == "stand-in"


def test_an_unreadable_grade_is_asked_for_again_and_ends_as_zero(tmp_path: Path) -> None:
    benchmark, questions, answers = mmvet(tmp_path)
    with serve(lambda body, _: says("I would say" if "x = -1" in str(body) else "1.0")) as (url, requests):
        reviews = judge(url, tmp_path).review(benchmark, questions, answers, tmp_path)
    tries = [one for one in requests if "x = -1" in one["messages"][0]["content"]]
    assert [one["temperature"] for one in tries] == [0.0, 0.0, 0.5, 1.0, 1.5]
    assert [one["messages"][0]["content"].endswith("(digit): ") for one in tries] == [False] + [True] * 4
    scored = benchmark.score(questions, answers, reviews.replies)
    assert [p.score for p in scored.predictions] == [0, 1, 1]


def test_a_busy_endpoint_is_asked_again(tmp_path: Path) -> None:
    benchmark, questions, answers = mmvet(tmp_path)

    def busy(body: dict, number: int) -> tuple[int, dict[str, str], object]:
        return (
            (429, {"Retry-After": "0.01"}, {}) if number < 2 else (503, {}, {}) if number < 4 else says("1")
        )

    with serve(busy) as (url, requests):
        reviews = judge(url, tmp_path, num_concurrent=1).review(benchmark, questions, answers, tmp_path)
    assert len(requests) == 4 + 3
    assert set(reviews.replies.values()) == {"1"}


def test_nothing_is_paid_twice_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    benchmark, questions, answers = mmvet(tmp_path)

    def dies(body: dict, number: int) -> tuple[int, dict[str, str], object]:
        return says("0.7") if number < 1 else (401, {}, {"error": "no credit"})

    with (
        serve(dies) as (url, _),
        pytest.raises(JudgeError, match=r"refused judge 'stand-in'.*no credit.*key"),
    ):
        judge(url, tmp_path, num_concurrent=1).review(benchmark, questions, answers, tmp_path)
    cache = tmp_path / "cache" / "replies.jsonl"
    assert len(cache.read_text().splitlines()) == 1
    cache.write_text(cache.read_text() + '{"key": "half a li')
    with serve(lambda body, _: says("0.1")) as (url, requests):
        again = judge(url, tmp_path)
        cost = again.estimate_cost(benchmark, questions, answers, tmp_path, price_in=10.0, price_out=30.0)
        assert (cost.num_requests, cost.num_cached, cost.completion_tokens) == (2, 1, 6)
        assert cost.price == pytest.approx((cost.prompt_tokens * 10 + 6 * 30) / 1e6)
        reviews = again.review(benchmark, questions, answers, tmp_path)
        assert len(requests) == 2
        assert again.review(benchmark, questions, answers, tmp_path) == reviews
        assert len(requests) == 2
    assert Counter(reviews.replies.values()) == {"0.1": 2, "0.7": 1}
    save_reviews(reviews, tmp_path / "reviews.jsonl")
    recorded = read_reviews(tmp_path / "reviews.jsonl")
    recorded.check_answers("mmvet", answers)
    with pytest.raises(
        DataError, match=r"mmvet: 1 of 3 reviews by stand-in are about other answers, .*'v1_1'"
    ):
        recorded.check_answers("mmvet", answers | {"v1_1": "of another model"})


def test_an_interrupt_leaves_what_was_not_asked_unpaid(tmp_path: Path, monkeypatch) -> None:
    benchmark, questions, answers = mmvet(tmp_path)
    with serve(lambda body, _: says("1")) as (url, requests):
        called = judge(url, tmp_path, num_concurrent=1)

        def interrupt(key: str) -> str | None:
            raise KeyboardInterrupt

        monkeypatch.setattr(called.cache, "find", interrupt)
        with pytest.raises(KeyboardInterrupt):
            called.review(benchmark, questions, answers, tmp_path)
    assert requests == []


def test_broken_files_of_the_official_prompt_are_named(tmp_path: Path) -> None:
    for name, write, script in (
        ("mmvet", files.mmvet, "mm-vet_evaluator.py"),
        ("llava-w", files.llava_w, "eval_gpt_review_bench.py"),
    ):
        benchmark = BENCHMARKS[name]
        questions = benchmark.load(write(tmp_path / name))
        (tmp_path / name / script).write_text("prompt = 1\nprompt = (\n")
        with pytest.raises(DataError, match=rf"{script}:2: not a Python file.*Take it from https"):
            judge("", tmp_path).review(benchmark, questions, {}, tmp_path / name)


def test_an_endpoint_that_never_answers(tmp_path: Path) -> None:
    benchmark, questions, answers = mmvet(tmp_path)
    lost = judge("http://127.0.0.1:9", tmp_path, num_attempts=2)
    with pytest.raises(JudgeError, match=r"in 2 attempts.*ConnectError.*earlier replies are kept"):
        lost.review(benchmark, questions, answers, tmp_path)
    with (
        serve(lambda body, _: (200, {}, b"<html>")) as (url, _),
        pytest.raises(JudgeError, match="is not a chat completions endpoint; it sent '<html>'"),
    ):
        judge(url, tmp_path).review(benchmark, questions, answers, tmp_path)


def test_requests_run_at_the_same_time(tmp_path: Path) -> None:
    benchmark, questions, answers = mmvet(tmp_path)
    together = threading.Barrier(3)

    with serve(lambda body, _: says("1")) as (url, _):
        called = judge(url, tmp_path, num_concurrent=3)
        find = called.cache.find

        def meet(key: str) -> str | None:
            together.wait(timeout=600)
            return find(key)

        called.cache.find = meet  # type: ignore[method-assign]
        assert len(called.review(benchmark, questions, answers, tmp_path).replies) == 3


def test_llava_w_lays_out_context_question_answers_and_rule(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["llava-w"]
    questions = benchmark.load(files.llava_w(tmp_path))
    answers = {question.id: f"Answer {question.id}." for question in questions}
    with serve(lambda body, _: says("8 6\nBecause.")) as (url, requests):
        reviews = judge(url, tmp_path).review(benchmark, questions, answers, tmp_path)
    third = next(one for one in requests if "Question 2?" in one["messages"][1]["content"])
    assert third["messages"] == [
        {"role": "system", "content": "Stand-in system line."},
        {
            "role": "user",
            "content": "[Context]\nFirst.\nSecond.\n\n[Question]\nQuestion 2?\n\n"
            "[Assistant 1]\nReference 2.\n\n[End of Assistant 1]\n\n"
            "[Assistant 2]\nAnswer 2.\n\n[End of Assistant 2]\n\n"
            "[System]\nRule complex.\n\n",
        },
    ]
    assert (third["temperature"], third["max_tokens"]) == (0.2, 1024)
    assert benchmark.score(questions, answers, reviews.replies).metrics[0].value == 75


def test_mmbench_judges_only_what_the_rules_cannot_read(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["mmbench-judge"]
    questions = benchmark.load(files.mmbench(tmp_path))
    right = {question.id: question.target["answer"] for question in questions}
    answers = {**right, "241": "man's best friend", "1000241": "no idea", "252": ""}

    def answer(body: dict, _: int) -> tuple[int, dict[str, str], object]:
        return says("B" if "best friend\nLetter" in body["messages"][0]["content"] else "??")

    with serve(answer) as (url, requests):
        reviews = judge(url, tmp_path).review(benchmark, questions, answers, tmp_path)
    assert set(reviews.replies) == {"241", "1000241"}
    assert len(requests) == 1 + 3  # the second could not be read three times
    scores = {
        p.question_id: p.score for p in benchmark.score(questions, answers, reviews.replies).predictions
    }
    assert scores == {**dict.fromkeys(right, 1.0), "1000241": 0.0, "252": 0.0}
    assert benchmark.score(questions, answers).metrics == ()  # not yet judged


@pytest.mark.parametrize("name", ["mmvet-own-prompt", "llava-w-own-prompt"])
def test_our_own_wording_needs_no_file_and_is_another_protocol(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    official = BENCHMARKS[name.removesuffix("-own-prompt")]
    questions = benchmark.load(
        {"mmvet-own-prompt": files.mmvet, "llava-w-own-prompt": files.llava_w}[name](tmp_path)
    )
    (tmp_path / "empty").mkdir()
    with serve(lambda body, _: says("1 1" if "llava" in name else "1")) as (url, _):
        called = judge(url, tmp_path)
        assert called.review(benchmark, questions, {}, tmp_path / "empty").judge == "stand-in"
        with pytest.raises(DataError, match=rf"no such file; .*the official .* {name}"):
            called.review(official, questions, {}, tmp_path / "empty")
    assert benchmark.protocol != official.protocol


def test_a_benchmark_without_a_judge_says_so(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="gqa does not use a judge"):
        judge("", tmp_path).review(BENCHMARKS["gqa"], [], {}, tmp_path)


def test_recorded_reviews_are_replayed(tmp_path: Path) -> None:
    benchmark, questions, answers = mmvet(tmp_path)
    grades = {
        q.id: {"model": ["gpt-4-0613"] * 2, "content": ["0.1", "0.9"], "score": [0.1, 0.9]} for q in questions
    }
    files.write_json(tmp_path / "grades.json", grades)
    reviews = read_reviews(tmp_path / "grades.json")
    assert reviews.judge == "gpt-4-0613"
    metrics = {one.name: one.value for one in benchmark.score(questions, answers, reviews.replies).metrics}
    # the mean of the runs, as the official tool has it, and what it prints of them
    assert [metrics[name] for name in ("accuracy", "run 1", "run 2", "std of runs")] == pytest.approx(
        [50, 10, 90, 40]
    )
    save_reviews(reviews, tmp_path / "ours.jsonl")
    assert read_reviews(tmp_path / "ours.jsonl") == reviews
    lines = [
        {"id": 1, "question_id": 0, "category": "llava_bench_conv", "content": "8 7\nx", "tuple": [8, 7]}
    ]
    files.write_lines(tmp_path / "llava.jsonl", lines)
    assert read_reviews(tmp_path / "llava.jsonl", judge="gpt-4-0314").replies == {"0": "8 7\nx"}


def test_reviews_of_two_judges_or_of_nobody_are_refused(tmp_path: Path) -> None:
    lines = [{"question_id": n, "judge": f"judge {n}", "content": "1"} for n in range(2)]
    files.write_lines(tmp_path / "two.jsonl", lines)
    with pytest.raises(DataError, match="from one judge; recorded or given: judge 0, judge 1"):
        read_reviews(tmp_path / "two.jsonl")
    files.write_lines(tmp_path / "one.jsonl", lines[:1])
    with pytest.raises(DataError, match="recorded or given: another, judge 0"):
        read_reviews(tmp_path / "one.jsonl", judge="another")
    files.write_lines(tmp_path / "none.jsonl", [{"question_id": 1, "content": "1"}])
    with pytest.raises(DataError, match="recorded or given: none"):
        read_reviews(tmp_path / "none.jsonl")
    files.write_lines(tmp_path / "twice.jsonl", [lines[0], lines[0]])
    with pytest.raises(DataError, match=r"twice.jsonl:2: question '0' has a second review"):
        read_reviews(tmp_path / "twice.jsonl")


def test_runs_that_are_not_whole_or_that_no_official_tool_has_are_refused(tmp_path: Path) -> None:
    grades = {
        f"v1_{n}": {"model": ["m"] * runs, "content": ["1.0"] * runs, "score": [1.0] * runs}
        for n, runs in enumerate((3, 2))
    }
    files.write_json(tmp_path / "grades.json", grades)
    with pytest.raises(DataError, match=r"grades.json:\d+, entry 'v1_1': question 'v1_1' has 2 runs, .* 3"):
        read_reviews(tmp_path / "grades.json")
    benchmark = BENCHMARKS["llava-w"]
    questions = benchmark.load(files.llava_w(tmp_path))
    with pytest.raises(DataError, match="llava-w: the reviews are from several runs; keep those of one run"):
        benchmark.score(questions, {}, {question.id: ("8 7", "7 8") for question in questions})
