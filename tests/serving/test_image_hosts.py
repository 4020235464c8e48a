"""Images at addresses: only those of listed hosts, never a private address, and only what is an image."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpcore2 as httpcore
import pytest

from served import data_url, serve
from tinyllava.conversation import to_ref
from tinyllava.errors import ConfigError, ImageError
from tinyllava.serving import fetch
from tinyllava.serving.fetch import ImageHosts

RED = to_ref(data_url(220, 20, 20)).data or b""
ANSWERS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "/red.png": (200, {"Content-Type": "image/png"}, RED),
    "/a%20b.png?x=1": (200, {"Content-Type": "image/png"}, RED),
    "/moved": (302, {"Location": "/red.png"}, b""),
    "/round": (302, {"Location": "/round"}, b""),
    "/to-file": (302, {"Location": "file:///etc/hostname"}, b""),
    "/to-other": (302, {"Location": "http://169.254.169.254/latest/meta-data"}, b""),
    "/page": (200, {"Content-Type": "text/html"}, b"<html>"),
    "/gone": (404, {"Content-Type": "image/png"}, b""),
    "/zipped": (200, {"Content-Type": "image/png", "Content-Encoding": "gzip"}, b"\x1f\x8b"),
    "/large": (200, {"Content-Type": "image/png"}, b"x" * 60_000),
    "/broken.png": (200, {"Content-Type": "image/png"}, b"no image"),
}


class _Host(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, headers, body = ANSWERS[self.path]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def open_at(entry: str, url: str) -> bytes:
    return ImageHosts([entry], 50_000).begin().open(url)


def test_an_image_of_a_listed_host_is_opened(host: str) -> None:
    held: list[int] = []
    downloads = ImageHosts([host], 50_000).begin(held.append)
    assert downloads.open(f"http://{host}/red.png") == RED
    assert downloads.open(f"http://{host}/a b.png?x=1#part") == RED
    assert downloads.open(f"http://{host}/moved") == RED
    assert sum(held) == 3 * len(RED)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/round", "more than 3 redirects"),
        ("/to-file", r"redirects to 'file:///etc/hostname'\): this server never opens files"),
        ("/to-other", r"redirects to 'http://169\.254\.169\.254/latest/meta-data'\)"),
        ("/page", "answered 200 with 'text/html'"),
        ("/gone", "answered 404"),
        ("/zipped", "gzip"),
        ("/large", "larger than 50,000 bytes"),
    ],
)
def test_what_comes_back_has_to_be_an_image(host: str, path: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_at(host, f"http://{host}{path}")


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png",
        "http://images.example.evil.example/a.png",
        "http://images.example:8080/a.png",
        "http://user@images.example/a.png",
        "http://images.example@evil.example/a.png",
        "http://images.example\\@evil.example/a.png",
        "ftp://images.example/a.png",
        "file://images.example/etc/hostname",
        "//images.example/a.png",
        "images.example/a.png",
        "http://images.example:99999/a.png",
        "http://[::1/a.png",
        "http://",
        "",
    ],
)
def test_an_address_elsewhere_is_refused_before_anything_is_opened(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("looked up"))
    with pytest.raises(ImageError, match=r"never opens files, and downloads images only|not a valid address"):
        open_at("images.example", url)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "::1", "fe80::1%eth0",
     "fc00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "0.0.0.0", "224.0.0.1",
     "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "::127.0.0.1", "::"],
)  # fmt: skip
def test_a_listed_name_that_leads_to_a_private_address_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(2, 1, 6, "", ("93.184.215.14", 80)), (2, 1, 6, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(ImageError, match=r"images\.example resolves to an address that is not public"):
        open_at("images.example", "http://images.example/a.png")


def test_the_address_that_was_checked_is_the_one_that_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def connect(self: object, host: str, port: int, **options: object) -> Any:
        opened.append((host, port))
        return httpcore.MockStream(
            [b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 2\r\n\r\n", b"ok"]
        )

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect)
    found = [(2, 1, 6, "", ("93.184.215.14", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    assert open_at("images.example", "http://images.EXAMPLE./a.png") == b"ok"
    assert opened == [("93.184.215.14", 80)]


def test_the_images_of_a_request_have_their_bytes_together(host: str) -> None:
    downloads = ImageHosts([host], 2 * len(RED)).begin()
    for _ in range(2):
        downloads.open(f"http://{host}/red.png")
    with pytest.raises(ImageError, match="with the request's images before it"):
        downloads.open(f"http://{host}/red.png")


GOOD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 60000\r\n\r\n"
SLOW = {
    "silent": (b"", b""),
    "headers": (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "body": (GOOD, b"a"),
    "informational": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
}


@contextmanager
def trickling(start: bytes, piece: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A host that sends a piece now and then, for half a minute or until its client has gone.

    Yields its address, and the starts of what it sent to its end.
    """
    whole: list[bytes] = []

    def serve(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                with client, suppress(OSError):
                    client.sendall(start)
                    for _ in range(600):
                        client.sendall(piece)
                        if not piece and client.recv(1_000) == b"":
                            break
                        time.sleep(0.05)
                    else:
                        whole.append(start)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}", whole
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("name", SLOW)
def test_a_host_that_sends_a_byte_now_and_then_does_not_hold_up_the_server(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_SECONDS", 0.4)
    with trickling(*SLOW[name]) as (host, whole):
        downloads = ImageHosts([host], 50_000).begin()
        for _ in range(2):  # the second one has no time of its own
            with pytest.raises(ImageError, match=r"longer than the 0\.4 s that all images of a request have"):
                downloads.open(f"http://{host}/a.png")
            assert not whole, "it waited for the host"


@pytest.mark.parametrize("entry", ["http://a.example", "a.example/path", "*.example", "user@a", "", "a:b"])
def test_an_entry_that_is_no_host_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="expected a host, such as"):
        ImageHosts([entry], 50_000)


def test_a_server_answers_about_an_image_at_an_address(toy: Path, host: str) -> None:
    def messages(url: str) -> list[dict[str, Any]]:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        return [{"role": "user", "content": parts}]

    with serve(toy, "--allow-image-hosts", f"{host}, images.example") as served:
        answers = [
            served.post(messages=messages(url)).json()["choices"][0]["message"]
            for url in (f"http://{host}/red.png", data_url(220, 20, 20))
        ]
        assert answers[0] == answers[1]
        refused = served.post(messages=messages(f"http://{host}/broken.png"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_image")
        elsewhere = served.post(messages=messages("http://127.0.0.1:1/red.png")).json()["error"]
        assert elsewhere["code"] == "invalid_image_url"
        assert "127.0.0.1, images.example. Send" in elsewhere["message"]
