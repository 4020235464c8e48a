"""What the server refuses, and how it says so; limits; clients that leave; the end."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import httpx2 as httpx
import pytest

from served import Served, data_url, serve
from tinyllava.cli import main
from tinyllava.cli.serve import _listen
from tinyllava.inference.chat import Chat

JSON = {"Content-Type": "application/json"}


def ask_about(url: str, **fields: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url, **fields}}
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


LARGE = data_url(1, 2, 3, size=(7_000, 7_000))
HEIC = "data:image/heic;base64,AAAAGGZ0eXBoZWljAAAAAG1pZjFoZWlj"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "n": ({"n": 2}, "n", "n = '2' is not supported; it may only be 1"),
    "logprobs": ({"logprobs": True}, "logprobs", "not supported"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    "penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    "misspelt": ({"max_token": 5}, "max_token", "Supported: model, messages"),
    "too many tokens": ({"max_tokens": 99_999}, "max_tokens", "at most 2048"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "no whole number": ({"max_tokens": 1.5}, "max_tokens", "max_tokens = 1.5"),
    "two limits": ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ; send one"),
    "temperature": ({"temperature": -1}, "temperature", "temperature = -1"),
    "top_p": ({"top_p": 0}, "top_p", "top_p = 0"),
    "seed": ({"seed": 2**70}, "seed", "seed"),
    "stop": ({"stop": ["a"] * 5}, "stop", "stop"),
    "empty stop": ({"stop": ""}, "stop", "stop"),
    "stream options": ({"stream_options": {"include_usage": True}}, "stream_options", "need stream = true"),
    "no messages": ({"messages": []}, "messages", "messages"),
    "role": (turns("tool"), "messages.0.role", "'system', 'developer', 'user' or 'assistant'"),
    "order": (turns("user", "user"), "messages", "roles user, user"),
    "no question": (turns("user", "assistant"), "messages", "with a user's message at the end"),
    "late system": (turns("user", "assistant", "system", "user"), "messages", "system (optional), then"),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages.0.content.0",
        "input_audio",
    ),
    "extra": (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
        "messages.0.tool_calls",
        "field 'tool_calls' is not supported",
    ),
    "address": (
        ask_about("http://127.0.0.1/a.png"),
        "messages.0.content.0.image_url.url",
        "this server never opens files, and downloads images only from allowed hosts",
    ),
    "file": (
        ask_about("/etc/hostname"),
        "messages.0.content.0.image_url.url",
        "this server never opens files",
    ),
    "file address": (ask_about("file:///etc/hostname"), "messages.0.content.0.image_url.url", "data URL"),
    "no base64": (ask_about("data:image/png;base64,%%"), "messages.0.content.0.image_url.url", "data URL"),
    "no image": (
        ask_about("data:image/png;base64,AAAA"),
        "messages.0.content.0.image_url.url",
        "not a known image format",
    ),
    "HEIC": (ask_about(HEIC), "messages.0.content.0.image_url.url", "a HEIC image"),
    "truncated": (
        ask_about(data_url(1, 2, 3, size=(300, 300))[:-200]),
        "messages",
        "image file is truncated",
    ),
    "detail": (ask_about(data_url(1, 2, 3), detail="huge"), "messages.0.content.0.image_url.detail", "huge"),
    "pixels": (
        ask_about(data_url(1, 2, 3, size=(8_000, 8_000))),
        "messages.0.content.0.image_url.url",
        "8,000 x 8,000 pixels; at most 50,000,000",
    ),
    "pixels of all": (
        {"messages": [{"role": "user", "content": ask_about(LARGE)["messages"][0]["content"] * 5}]},
        "messages",
        "the images have 245,000,000 pixels together; at most 200,000,000 in one request",
    ),
    "too long": (
        {"messages": [{"role": "user", "content": "word " * 900}]},
        "messages",
        "the context of the model is 512",
    ),
    "far too long": ({"messages": [{"role": "user", "content": "x" * 500_000}]}, "messages", "characters"),
    "images": (
        {
            "messages": [
                {"role": "user", "content": ask_about(data_url(1, 1, 1))["messages"][0]["content"] * 17}
            ]
        },
        "messages",
        "17 images in one request; at most 16",
    ),
}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(served: Served, name: str, is_streamed: bool) -> None:
    fields, param, part = REFUSED[name]
    if name == "stream options" and is_streamed:
        fields = {"stream_options": {"other": 1}}
        param, part = "stream_options.other", "not supported"
    response = served.post(**fields, stream=is_streamed)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert (error["param"], part in error["message"]) == (param, True), error


def test_sixteen_large_images_are_opened_one_by_one_or_refused_together(served: Served) -> None:
    """An image takes 12 MB decoded and 16 padded: fifteen more at once would take 420 more."""
    proc = Path("/proc") / str(served.process.pid)

    def post(*urls: str) -> tuple[httpx.Response, float]:
        (proc / "clear_refs").write_text("5")  # the peak begins anew
        parts = [ask_about(url)["messages"][0]["content"][0] for url in urls]
        response = served.post(messages=[{"role": "user", "content": parts}], max_tokens=1)
        peak = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return response, int(peak.split()[1]) / 1024

    urls = [data_url(n, 50, 90, size=(2_000, 1_500), kind="JPEG") for n in range(17)]
    one, peak_of_one = post(urls[0])
    many, peak_of_many = post(*urls[1:])
    refused, peak_of_refused = post(*[data_url(5, 50, 90, size=(4_000, 3_200), kind="JPEG")] * 16)
    assert (one.status_code, many.status_code, refused.status_code) == (200, 200, 400)
    assert many.json()["usage"]["prompt_tokens"] > one.json()["usage"]["prompt_tokens"]
    said = "the images have 204,800,000 pixels together; at most 200,000,000 in one request. Scale them down."
    assert said in refused.json()["error"]["message"]
    assert max(peak_of_many, peak_of_refused) < peak_of_one + 150


def test_other_refusals(served: Served) -> None:
    wrong_model = served.post(model="gpt-4")
    assert (wrong_model.status_code, wrong_model.json()["error"]["code"]) == (404, "model_not_found")
    for body in (b"", b"{", b"[]", b"[" * 100_000, b'{"model": "\\ud800"}', b"\xff\xfe"):
        broken = served.post(content=body)
        assert broken.status_code == 400, body
        assert broken.json()["error"]["message"]
    many = served.post(content=b'{"x": [' + b"[]," * 300_000 + b"[]]}").json()["error"]
    assert "commas and brackets; at most 200,000" in many["message"]
    address = f"{served.address}/v1/chat/completions"
    as_text = httpx.post(address, content=b"{}", headers={"Content-Type": "text/plain"}, timeout=600)
    assert as_text.status_code == 415
    assert httpx.get(address, timeout=600).status_code == 405
    assert httpx.get(f"{served.address}/../../etc/hostname", timeout=600).status_code == 404
    outside = httpx.get(f"{served.address}/page/../server.py", timeout=600)
    assert outside.json()["error"]["code"] == "not_found"
    foreign = httpx.get(f"{served.address}/v1/models", headers={"Host": "evil.example:80"}, timeout=600)
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "host_not_allowed")
    port = served.address.rpartition(":")[2]
    own = httpx.get(f"{served.address}/health", headers={"Host": f"[::1]:{port}"}, timeout=600)
    assert own.status_code == 200


@contextmanager
def streaming(served: Served, max_tokens: int = 400) -> Iterator[Iterator[str]]:
    """Begin a long answer; yields its lines from the second piece on."""
    messages = [{"role": "user", "content": "Is there a dog?"}]
    body = {"model": "toy", "messages": messages, "max_tokens": max_tokens, "stream": True}
    with httpx.stream(
        "POST", f"{served.address}/v1/chat/completions", content=json.dumps(body), headers=JSON, timeout=600
    ) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        next(lines)
        yield lines


HOLDING = """
import os, sys, time
from pathlib import Path
from tinyllava.cli import main
from tinyllava.inference.continuous import ContinuousDecoder

step = ContinuousDecoder.step


def held(self):
    while Path(os.environ["HELD"]).exists() and any(len(one.answer) > 8 for one in self.running):
        time.sleep(0.01)
    return step(self)


ContinuousDecoder.step = held
sys.exit(main())
"""


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file is there, the answers of ``small`` stop after a few tokens."""
    return tmp_path_factory.mktemp("small") / "hold"


@pytest.fixture(scope="module")
def small(toy: Path, hold: Path) -> Iterator[Served]:
    options = ("--max-waiting", "1", "--max-body-mib", "1", "--max-tokens", "480", "--max-images", "2")
    held = {"HELD": str(hold)}
    with serve(toy, *options, "--name", "toy", environment=held, program=("-c", HOLDING)) as running:
        yield running


def test_a_full_queue_says_when_to_come_again(small: Served, hold: Path) -> None:
    hold.touch()
    with streaming(small) as lines:
        refused = small.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["Retry-After"]) >= 1
        hold.unlink()
        assert list(lines)[-2] == "data: [DONE]"
    small.wait_for("tinyllava_places", 0)
    assert small.post().status_code == 200


def test_a_client_that_goes_away_frees_its_place(small: Served, hold: Path) -> None:
    tokens = 'tinyllava_tokens_total{kind="answer"}'
    before = small.metric(tokens)
    hold.touch()
    with streaming(small, 480):
        assert small.metric("tinyllava_places") == 1
    small.wait_for("tinyllava_places", 0)
    hold.unlink()
    assert small.post(max_tokens=3).status_code == 200
    assert small.metric(tokens) - before <= 3, "the answer that nobody read went on to its end"


def test_a_client_that_does_not_wait_for_a_whole_answer_frees_its_place(small: Served) -> None:
    host, port = small.address.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "toy", "messages": [{"role": "user", "content": "Is there a dog?"}], "max_tokens": 480}
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    ended = 'tinyllava_requests_total{path="/v1/chat/completions"'
    gone = f'{ended},status="499"}}'
    for sent in (
        f"{head}Content-Length: {len(body)}\r\n\r\n{body}",
        f"{head}Content-Length: 100000\r\n\r\n{body}",
    ):
        before = small.metric(gone)
        while small.metric(gone) == before:  # again where the whole answer came before the client went
            num_ended = small.metric(ended)
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(sent.encode())
                while small.metric("tinyllava_places") != 1 and not select([connection], [], [], 0.05)[0]:
                    pass
            small.wait_for("tinyllava_places", 0)
            small.wait_for(ended, num_ended + 1)
    assert small.post().status_code == 200


def test_a_body_that_is_too_large_is_refused(small: Served) -> None:
    refused = small.post(messages=[{"role": "user", "content": "x" * 2**20}])
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    small.wait_for("tinyllava_places", 0)


def test_a_request_has_its_time(toy: Path) -> None:
    with serve(toy, "--timeout", "0.05", "--name", "toy") as served:
        whole = served.post(max_tokens=480)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        served.wait_for("tinyllava_places", 0)
        host, port = served.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=600) as connection:
            # A body that never comes.
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
                b"Content-Type: application/json\r\n\r\n{"
            )
            assert b"504" in connection.recv(1_000)
        served.wait_for("tinyllava_places", 0)


def accepts(served: Served) -> bool:
    try:
        return httpx.get(f"{served.address}/health", timeout=600).status_code == 200
    except httpx.TransportError:  # refused, or closed before it was read
        return False


def test_sigterm_finishes_what_is_running_and_takes_nothing_new(toy: Path) -> None:
    with serve(toy) as served:
        with streaming(served, 480) as lines:
            served.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 600
            while accepts(served):  # until uvicorn has seen the signal
                assert time.monotonic() < until, "still takes new requests"
            assert list(lines)[-2] == "data: [DONE]"
        assert served.process.wait(600) == 0
        assert served.process.stderr
        assert served.process.stderr.read().endswith("stopped.\n")


def test_keys_are_asked_for(toy: Path) -> None:
    with serve(toy, environment={"TINYLLAVA_API_KEY": "one, two"}) as served:
        address = f"{served.address}/v1/models"
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("oneone", 401)):
            response = httpx.get(address, headers={"Authorization": f"Bearer {key}"}, timeout=600)
            assert response.status_code == status, key
        refused = httpx.get(address, timeout=600)
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert httpx.get(f"{served.address}/metrics", timeout=600).status_code == 401
        for host in ("localhost/health?", "localhost?", "localhost#", "localhost/health\\", "a@localhost/x"):
            # Some frameworks read the path behind it.
            named = httpx.get(address, headers={"Host": host}, timeout=600)
            assert named.status_code in (401, 403), host
        assert served.post().status_code == 401
        assert httpx.get(f"{served.address}/health", timeout=600).status_code == 200
        assert httpx.get(served.address, timeout=600).status_code == 200, "the page asks for the key itself"


def test_what_is_sent_in_pieces_does_not_wait_for_the_client() -> None:
    with (
        _listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()[:2]),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_command_refuses_before_a_model_is_opened(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chat, "open", lambda *_, **__: pytest.fail("opened"))
    assert main(["serve", str(toy), "--host", "0.0.0.0"]) == 2
    assert "add --no-api-key to serve without one" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(toy), "--port", str(taken.getsockname()[1])]) == 2
    assert "Choose another one with --host and --port" in capsys.readouterr().err
    assert main(["serve", "nope"]) == 2
    assert "nope: no such folder" in capsys.readouterr().err
    for arguments, said in (
        ("--timeout nan", "--timeout must be above 0"),
        ("--api-key=", "is empty; give a key"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["serve", str(toy), *arguments.split()])
        assert said in capsys.readouterr().err
