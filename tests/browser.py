"""Headless Chromium, driven through DevTools on two pipes: pages are opened, run code, and are typed into."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from typing import Any, TypeVar

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)
PageT = TypeVar("PageT", bound="Page")


class Page:
    """A page that DevTools drives through two pipes (messages end with a NUL byte)."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")
        self.number, self.held, self.session = 0, b"", ""
        self.console: list[str] = []
        self.fetched: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        self.writing.write(
            json.dumps({"id": self.number, "method": method, "params": params, **session}).encode() + b"\0"
        )
        self.writing.flush()
        while True:
            message = self.receive()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return dict(message["result"])
            self.note(message)

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.held:
            piece = os.read(self.reading.fileno(), 1 << 20)
            assert piece, "Chromium ended"
            self.held += piece
        message, _, self.held = self.held.partition(b"\0")
        return dict(json.loads(message))

    def note(self, message: dict[str, Any]) -> None:
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.console.append(json.dumps(message["params"]))
        if message.get("method") == "Network.requestWillBeSent":
            self.fetched.append(message["params"]["request"]["url"])

    def run(self, code: str) -> Any:
        """Return the value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, code: str) -> None:
        until = time.monotonic() + 600
        while not self.run(code):
            assert time.monotonic() < until, (code, self.run("document.body.innerText"), self.console)
            time.sleep(0.05)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text
            )


@contextmanager
def chromium(folder: Path, kind: type[PageT], *flags: str) -> Iterator[PageT]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no Chromium: install it (`apt-get install -y --no-install-recommends chromium`)"
    # Chromium reads from descriptor 3 and writes to 4; ours are moved out of the way first.
    theirs_in, ours_out = (fcntl(fd, F_DUPFD, 10) for fd in os.pipe())
    ours_in, theirs_out = (fcntl(fd, F_DUPFD, 10) for fd in os.pipe())
    command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", command, browser, *(flags or FLAGS), f"--user-data-dir={folder}", "about:blank"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    page = kind(ours_in, ours_out)
    try:
        targets = page.call("Target.getTargets")["targetInfos"]
        (target,) = [one["targetId"] for one in targets if one["type"] == "page"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        with suppress(OSError):
            page.writing.close()
        process.kill()
        process.wait()
