"""Clients that mean harm: slow headers and bodies, many of them, answers that nobody reads, other paths."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from fastapi import Request
from fastapi.responses import JSONResponse

from served import Served
from tinyllava.serving import wire
from tinyllava.serving.limits import Limits, Places, RequestError
from tinyllava.serving.queue import End
from tinyllava.serving.server import Settings, make_app


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Read a body as the server does, and say how long it is."""
    try:
        with Places(64, 10**6).take() as place:
            response = JSONResponse(len(await wire.read_body(Request(scope, receive), 10**6, place)))
    except RequestError as error:
        response = JSONResponse(error.body, status_code=error.status, headers=error.headers)
    await response(scope, receive, send)


@contextmanager
def running(app: Any) -> Iterator[tuple[str, int]]:
    """Serve an application in a thread, as the command does."""
    listening = socket.create_server(("127.0.0.1", 0))
    keep = {"timeout_keep_alive": 600}  # so that idle connections are left to the protocol's own limits
    config = uvicorn.Config(app, http=wire.ImpatientProtocol, log_level="critical", **keep)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    with running(app) as address:
        yield address


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_slow_headers_and_bodies_are_given_up(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each limit is a second from where nothing more has to come in time, and minutes before."""
    monkeypatch.setattr(wire, "_HEADER_SECONDS", 600.0)
    monkeypatch.setattr(wire, "_BODY_SECONDS", 600.0)
    with (
        socket.create_connection(address, timeout=600) as slow_body,
        socket.create_connection(address, timeout=600) as kept,
    ):
        for body in (b"1", b"23"):
            kept.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            said = kept.recv(10_000)
            while not said.endswith(b"%d" % len(body)) or b"\r\n\r\n" not in said:
                piece = kept.recv(10_000)
                assert piece, said
                said += piece
            assert said.startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(wire, "_BODY_SECONDS", 1.0)
        slow_body.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        said = b""
        while piece := slow_body.recv(10_000):  # and closed behind it
            said += piece
        assert said.startswith(b"HTTP/1.1 408")
        assert b"1 bytes of the body came within 1 s; send at least 16,384 a second" in said
        monkeypatch.setattr(wire, "_HEADER_SECONDS", 1.0)
        with (
            socket.create_connection(address, timeout=600) as silent,
            socket.create_connection(address, timeout=600) as slow_header,
        ):
            kept.sendall(HEAD[:20])  # a connection that was good before
            with suppress(ConnectionError):  # closed already, if this process slept
                slow_header.sendall(HEAD)
            for connection in (silent, slow_header, kept):
                with suppress(ConnectionResetError):
                    assert connection.recv(10_000) == b""


def test_headers_without_end_are_refused(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=600) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000)
        assert connection.recv(10_000).startswith(b"HTTP/1.1 400")


class _Waiting:
    """An engine whose answers wait until they are let go."""

    context_tokens = 512

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()

    async def answer(self, question: object) -> AsyncIterator[str | End]:
        await self.goes_on.wait()
        yield End(reason="stop", num_prompt_tokens=1, num_answer_tokens=1)

    def counts(self) -> dict[str, int]:
        return {"running": 0}

    def close(self) -> None:
        pass


def test_all_requests_together_hold_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that come whole and wait, that stop half-way, and that are announced without an end."""
    monkeypatch.setattr(wire, "_BODY_SECONDS", 600.0)
    engine: Any = _Waiting()
    limits = Limits(max_body_bytes=10_000)  # eight times that for all
    with running(make_app(engine, Settings(model="m", limits=limits))) as (host, port):
        url = f"http://{host}:{port}"
        question = {"model": "m", "messages": [{"role": "user", "content": "What?"}], "user": "x" * 9_800}
        body = json.dumps(question).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        length, pieces = b"Content-Length: %d\r\n\r\n" % len(body), b"Transfer-Encoding: chunked\r\n\r\n"

        def held() -> float:
            lines = httpx.get(f"{url}/metrics", timeout=600).text.splitlines()
            return sum(float(line.split()[1]) for line in lines if line.startswith("tinyllava_held_bytes "))

        def wait_until(num_bytes: int) -> None:
            until = time.monotonic() + 600
            while held() != num_bytes:
                assert time.monotonic() < until, (held(), num_bytes)
                time.sleep(0.01)

        def send(stack: ExitStack, content: bytes) -> socket.socket:
            client = stack.enter_context(socket.create_connection((host, port), timeout=600))
            client.sendall(head + content)
            return client

        with ExitStack() as stack:
            for _ in range(4):
                send(stack, length + body)
            for _ in range(4):
                send(stack, length + body[:-100])
            wait_until(8 * len(body) - 400)
            refused = httpx.post(f"{url}/v1/chat/completions", json=question, timeout=600)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            assert "more would be above 80,000. Try again" in refused.json()["error"]["message"]
            unannounced = send(stack, pieces + b"%x\r\n%b\r\n" % (9_000, body[:9_000]))
            assert unannounced.recv(1_000).startswith(b"HTTP/1.1 429")
            assert send(stack, b"Content-Length: 10001\r\n\r\n").recv(1_000).startswith(b"HTTP/1.1 413")
            assert held() == 8 * len(body) - 400
        wait_until(0)
        engine.goes_on.set()
        assert httpx.post(f"{url}/v1/chat/completions", json=question, timeout=600).status_code == 200
        assert held() == 0


def test_an_answer_that_nobody_reads_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_UNREAD_SECONDS", 0.1)
    freed: list[str] = []

    async def events() -> AsyncIterator[bytes]:
        while True:
            yield b"data: x\n\n"

    async def send(message: Any) -> None:
        await asyncio.Event().wait()  # as when the client's window is full

    async def answer() -> None:
        held = AsyncExitStack()
        held.callback(freed.append, "place")
        response = wire.EventStream(events(), held, asyncio.get_running_loop().time() + 0.1)
        await asyncio.wait_for(response({"type": "http", "asgi": {}}, asyncio.Event().wait, send), 30)

    asyncio.run(answer())
    assert freed == ["place"]


@pytest.mark.parametrize(
    "path",
    ["/../../../etc/hostname", "/page/..%2f..%2fserver.py", "/%2e%2e/server.py", "//etc/hostname",
     "/page.js/", "/page.js%00.html", "/..\\server.py",
     "http://localhost/page.css/../index.html", "/page/index.html"],
)  # fmt: skip
def test_no_path_leads_out_of_the_page(served: Served, path: str) -> None:
    host, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=600) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        said = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert said.split(b" ")[1] in (b"404", b"400", b"307")
    assert b"import " not in said
