"""The page in headless Chromium: images added, asked, streamed, stopped, tried again; phone width; errors."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
from served import Served, data_url, serve
from tinyllava.inference.chat import Chat

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


class Page(browser.Page):
    """The served page."""

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

    def wait_for_answer(self) -> str:
        self.wait_for("!document.getElementById('send').hidden")
        return str(self.run("[...document.querySelectorAll('.assistant span')].at(-1)?.textContent ?? ''"))

    def error(self) -> str:
        return str(self.run("document.getElementById('error').textContent"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser.chromium(tmp_path_factory.mktemp("profile"), Page) as page:
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
    page.wait_for_answer()  # its text may be blank: what the toy says depends on how much was streamed
    assert page.run("document.querySelectorAll('.turn').length") == 4
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
    """The settings are folded until they are opened."""
    colours = []
    for scheme in ("light", "dark"):
        page.open(served.address, 390, scheme)
        page.give("drop", RED)
        colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2
    settings = [
        f"document.getElementById('{name}').checkVisibility()" for name in ("temperature", "tokens", "key")
    ]
    assert not any(page.run(setting) for setting in settings)
    page.run("document.querySelector('summary').click()")
    assert all(page.run(setting) for setting in settings)
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


def test_an_example_of_the_models_report_is_asked_with_two_clicks(
    page: Page, toy: Path, chat: Chat, tmp_path: Path
) -> None:
    shutil.copytree(toy, tmp_path / "run" / "model")
    (tmp_path / "run" / "report").mkdir()
    shown = [{"image": BLUE, "question": "What?"}, {"image": RED, "question": "Is there a dog?"}]
    (tmp_path / "run" / "report" / "examples.json").write_text(json.dumps([*shown, {"no": 1}]))
    page.console.clear()
    with serve(tmp_path / "run" / "model", "--name", "toy") as served:
        page.open(served.address, 390)
        page.run("document.getElementById('tokens').value = 12")
        page.wait_for("document.querySelectorAll('#examples button').length === 2")
        page.run("document.querySelectorAll('#examples button')[1].click()")
        assert page.run("document.getElementById('question').value") == "Is there a dog?"
        page.run("document.getElementById('send').click()")
        page.wait_for("document.querySelectorAll('.turn').length === 2")
        expected = chat.ask("Is there a dog?", RED, max_new_tokens=12)
        assert page.wait_for_answer() == expected + " [cut off]" * expected.is_cut
        assert not page.run("document.getElementById('examples').checkVisibility()")
    assert page.console == []
