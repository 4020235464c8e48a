"""The page in headless Chromium: images added, asked, streamed, stopped, tried again; phone width; errors."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from typing import Any

import pytest

from served import Served, data_url
from tinyllava.inference.chat import Chat

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)
RED, BLUE = data_url(220, 20, 20), data_url(20, 40, 230)
# Files as a user drops or pastes them; the page's own listeners handle the events.
GIVE = """async (kind, urls) => {
  const given = new DataTransfer()
  for (const [i, url] of urls.entries()) {
    const bytes = Uint8Array.from(atob(url.split(",")[1]), c => c.charCodeAt(0))
    given.items.add(new File([bytes], `image ${i}.png`, { type: "image/png" }))
  }
  const tell = event => document.body.dispatchEvent(event)
  if (kind === "drop") tell(new DragEvent("drop", { dataTransfer: given, bubbles: true }))
  if (kind === "paste") tell(new ClipboardEvent("paste", { clipboardData: given, bubbles: true }))
  if (kind === "choose") {
    document.getElementById("file").files = given.files
    document.getElementById("file").dispatchEvent(new Event("change"))
  }
}"""


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
        until = time.monotonic() + 120
        while not self.run(code):
            assert time.monotonic() < until, (code, self.run("document.body.innerText"), self.console)
            time.sleep(0.05)

    def open(self, address: str, width_px: int, scheme: str = "light") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=address)
        self.wait_for("document.title === 'toy'")

    def give(self, kind: str, *urls: str) -> None:
        before = self.run("document.querySelectorAll('#images img').length")
        self.run(f"({GIVE})({json.dumps(kind)}, {json.dumps(urls)})")
        self.wait_for(f"document.querySelectorAll('#images img').length === {before + len(urls)}")

    def type(self, text: str) -> None:
        """Type a question and press Enter."""
        self.run("document.getElementById('question').focus()")
        self.call("Input.insertText", text=text)
        self.press("Enter", 13)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text
            )

    def wait_for_answer(self) -> str:
        self.wait_for("!document.getElementById('send').hidden")
        return str(self.run("[...document.querySelectorAll('.assistant span')].at(-1)?.textContent ?? ''"))

    def error(self) -> str:
        return str(self.run("document.getElementById('error').textContent"))


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no Chromium: install it (`apt-get install -y --no-install-recommends chromium`)"
    # Chromium reads from descriptor 3 and writes to 4; ours are moved out of the way first.
    theirs_in, ours_out = (fcntl(fd, F_DUPFD, 10) for fd in os.pipe())
    ours_in, theirs_out = (fcntl(fd, F_DUPFD, 10) for fd in os.pipe())
    command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", command, browser, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    page = Page(ours_in, ours_out)
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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def chat(toy: Path) -> Chat:
    return Chat.open(toy)


@pytest.mark.parametrize("width_px", [390, 1280])
def test_images_are_asked_about_and_the_next_turn_knows_them(
    page: Page, served: Served, chat: Chat, width_px: int
) -> None:
    page.console.clear()
    page.fetched.clear()
    page.open(served.address, width_px)
    page.run("document.getElementById('tokens').value = 20")
    page.give("drop", RED)
    page.give("paste", BLUE)
    page.give("choose", RED)
    page.run("document.querySelectorAll('#images button')[2].click()")
    page.type("What is in the picture?")
    first = page.wait_for_answer()
    expected = chat.ask("What is in the picture?", RED, BLUE, max_new_tokens=20)
    assert first == expected + " [cut off]" * expected.is_cut, page.error()
    page.type("Is there a dog?")
    second = page.wait_for_answer()
    dialogue = chat.start(RED, BLUE)
    assert dialogue.ask("What is in the picture?", max_new_tokens=20) == expected
    answer = dialogue.ask("Is there a dog?", max_new_tokens=20)
    assert second == answer + " [cut off]" * answer.is_cut
    page.run("document.getElementById('again').click()")
    assert page.wait_for_answer() == second
    assert page.run("document.querySelectorAll('.turn').length") == 4
    root = "document.documentElement"
    assert page.run(f"{root}.scrollWidth <= {root}.clientWidth")
    assert page.run("innerWidth") == width_px
    assert page.run("document.activeElement.id") == "question"
    others = [url for url in page.fetched if not url.startswith((served.address, "data:", "blob:"))]
    assert (page.console, others) == ([], [])


def test_an_answer_streams_and_can_be_stopped(page: Page, served: Served) -> None:
    page.open(served.address, 1280)
    page.run("document.getElementById('tokens').value = 400")
    page.run(
        "(() => { window.seen = new Set(); const log = document.getElementById('log');"
        "new MutationObserver(() => seen.add(log.textContent)).observe(log,"
        "{ childList: true, subtree: true, characterData: true }) })()"
    )
    page.type("What?")
    page.wait_for("seen.size > 2 || !document.getElementById('send').hidden")
    page.press("Escape", 27)
    page.wait_for_answer()
    assert page.run("seen.size") > 2, "the answer did not come in pieces"
    served.wait_for("tinyllava_places", 0)
    page.run("document.getElementById('tokens').value = 4")
    page.type("And now?")
    assert page.wait_for_answer()
    assert page.error() == ""


def test_what_is_refused_is_shown_and_the_question_comes_back(page: Page, served: Served) -> None:
    page.open(served.address, 390)
    page.run("document.getElementById('tokens').value = 99999")
    page.give("drop", RED)
    page.type("What?")
    page.wait_for_answer()
    page.wait_for("document.getElementById('error').checkVisibility()")
    assert "max_tokens = 99999: at most 2048" in page.error()
    assert page.run("document.getElementById('question').value") == "What?"
    assert page.run("document.querySelectorAll('#images img').length") == 1
    assert page.run("document.querySelectorAll('.turn').length") == 0
    page.run("document.getElementById('tokens').value = 4")
    page.press("Enter", 13)
    page.wait_for("document.querySelectorAll('.turn').length === 2")
    assert page.wait_for_answer()
    assert page.error() == ""


def test_every_control_has_a_name_and_the_colours_follow_the_system(page: Page, served: Served) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page.open(served.address, 390, scheme)
        page.give("drop", RED)
        colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "spinbutton", "image", "log", "form", "list")
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert [role for role, name in named if not name] == []
    assert {("textbox", "Question"), ("button", "Remove image 0.png"), ("log", "Conversation")} <= set(named)
