"""ONNX exports in other runtimes give our tokens: transformers.js in Node, the page in Chromium, OpenVINO."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import browser
from documents import ROOT, blocks, commands
from exporting_toys import InOpenVino
from served import save_toy
from tinyllava.checkpoints import exporting
from tinyllava.checkpoints.exporting import export_checkpoint, web
from tinyllava.checkpoints.exporting.onnx import OpenGraphs
from tinyllava.cli import main
from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.errors import PackageError
from tinyllava.files import cache_folder
from tinyllava.inference.chat import Chat, encode_prompt

NUM_TOKENS = 12
GUIDE = commands(
    (ROOT / "docs" / "guides" / "ship.md").read_text(encoding="utf-8").partition("\n## Export")[2]
)
QUESTIONS = ("What is in the picture?", "Is there a dog?")
SIZES = ((70, 45), (200, 330))
SCRIPT = """
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from "@huggingface/transformers"
const { folder, images, questions, limit } = JSON.parse(process.argv[2])
env.allowRemoteModels = false
env.localModelPath = "/"
const processor = await AutoProcessor.from_pretrained(folder)
const model = await AutoModelForImageTextToText.from_pretrained(folder)
const answers = []
for (const image of images) for (const question of questions) {
  const messages = [{ role: "user", content: [{ type: "image" }, { type: "text", text: question }] }]
  const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true })
  const inputs = await processor(await RawImage.read(image), prompt)
  const output = await model.generate({ ...inputs, max_new_tokens: limit, do_sample: false })
  answers.push(output.slice(0, [inputs.input_ids.dims.at(-1), null]).tolist().map(Number))
}
console.log(JSON.stringify(answers))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy = save_toy(tmp_path_factory.mktemp("checkpoint"))
    return toy.rename(toy.with_name("my-model"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    """The toy as a page, by the guide's command; its model folder opens in Node too."""
    return run_command("--format web", checkpoint)


@pytest.fixture(scope="module")
def for_onnx(checkpoint: Path) -> Path:
    """The toy's graphs, by the guide's command."""
    return run_command("--format onnx", checkpoint)


@pytest.fixture(scope="module")
def in_int8(checkpoint: Path) -> Path:
    """The toy as a page in int8."""
    out = checkpoint.with_name("in-int8")
    export_checkpoint(checkpoint, out, layout="web", precision="int8")
    return out


def run_command(option: str, checkpoint: Path) -> Path:
    """Do what the guide's command with this option does; return the folder that it writes."""
    (line,) = (line for line in GUIDE if option in line)
    _, *words = shlex.split(line)
    assert words[1] == "./my-model"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkpoint.parent)
        assert main(words) == 0
    return checkpoint.parent / words[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def our_tokens(chat: Chat, image: Path, *turns: str) -> list[int]:
    """The greedy answer to the last of some turns, which begin with a question about the image."""
    messages = tuple(
        Message(role="assistant" if n % 2 else "user", text=text, images=() if n else (ImageRef(path=image),))
        for n, text in enumerate(turns)
    )
    prompt, _ = chat.processor.render(Conversation(messages=messages), open_answer=True)
    inputs = chat.processor(images=Image.open(image), text=prompt)
    with torch.no_grad():
        found = chat.model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def node_folder() -> Path:
    """transformers.js as a user of Node installs it, once for all runs of the tests."""
    folder = cache_folder() / "packages" / f"node-transformers-{web.TRANSFORMERS_JS.version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            begun = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir()
            package = f"{web.TRANSFORMERS_JS.name}@{web.TRANSFORMERS_JS.version}"
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", package]
            subprocess.run(command, cwd=begun, check=True, capture_output=True)
            begun.rename(folder)
    return folder


def test_node_gives_our_tokens(checkpoint: Path, exported: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "ask.mjs").write_text(SCRIPT)
    (tmp_path / "node_modules").symlink_to(node_folder() / "node_modules")
    request = {
        "folder": str(exported / "model"), "images": list(map(str, images)), "questions": QUESTIONS,
        "limit": NUM_TOKENS,
    }  # fmt: skip
    done = subprocess.run(
        ["node", "ask.mjs", json.dumps(request)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    chat = Chat.open(checkpoint)
    expected = [our_tokens(chat, image, question) for image in images for question in QUESTIONS]
    assert json.loads(done.stdout) == expected
    assert len({tuple(ids) for ids in expected}) > 1


def test_the_code_of_the_card_runs_in_node(
    checkpoint: Path, for_onnx: Path, images: list[Path], tmp_path: Path
) -> None:
    (code,) = blocks((for_onnx / "README.md").read_text(), "js")
    (tmp_path / "ask.mjs").write_text(code)
    (tmp_path / for_onnx.name).symlink_to(for_onnx)
    (tmp_path / "node_modules").symlink_to(node_folder() / "node_modules")
    shutil.copy(images[0], tmp_path / "image.jpg")
    done = subprocess.run(["node", "ask.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = Chat.open(checkpoint).ask("What is in the image?", images[0], max_new_tokens=64)
    assert done.stdout.strip() == expected


def greedy(graphs: OpenGraphs, chat: Chat, image: Path) -> list[int]:
    """Answer the first question with the graphs."""
    turns = (Message(role="user", text=QUESTIONS[0], images=(ImageRef(path=image),)),)
    ids = np.array([encode_prompt(chat.processor, Conversation(messages=turns))])
    embeds = graphs.embed.run(None, {"input_ids": ids})[0]
    pixels = np.asarray(Image.open(image), dtype=np.float32).transpose(2, 0, 1)[None]
    embeds[ids == chat.processor.image_token_id] = graphs.vision.run(None, {"pixel_values": pixels})[0][0]
    logits = graphs.feed_embeds(embeds)
    answer: list[int] = []
    while len(answer) < NUM_TOKENS and chat.processor.tokenizer.eos_token_id not in answer:
        answer.append(int(logits[0, -1].argmax()))
        logits = graphs.feed_embeds(graphs.embed.run(None, {"input_ids": np.array([answer[-1:]])})[0])
    return answer


def test_openvino_gives_our_tokens(checkpoint: Path, for_onnx: Path, images: list[Path]) -> None:
    """int8 is compared in test_onnx.py."""
    chat = Chat.open(checkpoint)
    for image in images:
        graphs = OpenGraphs(for_onnx / "onnx", chat.model.config)
        graphs.vision, graphs.embed, graphs.decoder = (
            InOpenVino(for_onnx / "onnx" / f"{name}.onnx")
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )
        assert greedy(graphs, chat, image) == our_tokens(chat, image, QUESTIONS[0])


@contextmanager
def site(folder: Path, port: str) -> Iterator[str]:
    """A page behind the guide's web server."""
    (line,) = (line for line in GUIDE if "http.server" in line)
    _, *words = shlex.split(line.replace(" 8000", f" {port}").replace("./for-browsers", str(folder)))
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", int(port))):
            break
        time.sleep(0.1)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def address(exported: Path, port: str) -> Iterator[str]:
    with site(exported, port) as address:
        yield address


DROP = """async url => {
  const given = new DataTransfer()
  given.items.add(new File([await (await fetch(url)).blob()], "image.png", { type: "image/png" }))
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true }))
}"""


def ask_page(page: browser.Page, image: Path) -> list[int]:
    """Ask the first question about an image."""
    url = "data:image/png;base64," + b64encode(image.read_bytes()).decode()
    page.run(f"({DROP})({json.dumps(url)})")
    page.run("answers.length = 0")
    page.run("document.getElementById('question').focus()")
    page.call("Input.insertText", text=QUESTIONS[0])
    page.press("Enter", 13)
    page.wait_for("answers.length > 0")
    return list(page.run("answers[0].ids")[:NUM_TOKENS])


def test_the_page_answers_with_our_tokens_and_loads_nothing_from_elsewhere(
    checkpoint: Path, exported: Path, images: list[Path], address: str, tmp_path: Path
) -> None:
    chat = Chat.open(checkpoint)
    with browser.chromium(tmp_path, browser.Page) as page:
        page.call("Page.navigate", url=address)
        page.wait_for("document.body?.dataset.device || document.getElementById('error')?.textContent")
        assert page.run("document.body.dataset.device") == "wasm"
        assert page.run("document.getElementById('error').textContent") == ""
        assert page.run("document.title") == "for-browsers"
        for image in images:
            url = "data:image/png;base64," + b64encode(image.read_bytes()).decode()
            page.run(f"({DROP})({json.dumps(url)})")
            page.run("answers.length = 0")
            said = []
            for number, question in enumerate(QUESTIONS):
                page.run("document.getElementById('question').focus()")
                page.call("Input.insertText", text=question)
                page.press("Enter", 13)
                page.wait_for(f"answers.length > {number}")
                said += [question, page.run(f"answers[{number}].text")]
                found = page.run(f"answers[{number}].ids")[:NUM_TOKENS]
                assert found == our_tokens(chat, image, *said[:-1])
        shown = page.run("[...document.querySelectorAll('.turn')].map(turn => turn.textContent)")
        assert [text.removesuffix(" [cut off]") for text in shown] == said
        others = [url for url in page.fetched if not url.startswith((address, "data:", "blob:"))]
        said_by_browser = [line for line in page.console if "No available adapters" not in line]  # no GPU
        assert (said_by_browser, others) == ([], [])
    sources = [path.read_text() for path in exported.iterdir() if path.suffix in (".html", ".js")]
    assert len(sources) == 2
    assert not any("://" in source for source in sources)


# SwiftShader computes WebGPU on the CPU, so that the page takes it as a device like any GPU.
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")


def test_the_page_answers_on_webgpu_with_our_tokens(
    checkpoint: Path, exported: Path, images: list[Path], address: str, tmp_path: Path
) -> None:
    flags = [flag for flag in browser.FLAGS if flag != "--disable-gpu"]
    with browser.chromium(tmp_path, browser.Page, *flags, *WEBGPU) as page:
        page.call("Page.navigate", url=address)
        loaded = "document.body?.dataset.device || document.getElementById('error')?.textContent"
        page.wait_for(loaded)
        assert page.run("document.body.dataset.device") == "webgpu", page.run("document.body.innerText")
        assert page.run("document.getElementById('error').textContent") == ""
        found = ask_page(page, images[1])
    assert found == our_tokens(Chat.open(checkpoint), images[1], QUESTIONS[0])


def test_the_page_in_int8_gives_the_tokens_of_onnxruntime(
    checkpoint: Path, in_int8: Path, images: list[Path], tmp_path: Path, port: str
) -> None:
    with site(in_int8, port) as address, browser.chromium(tmp_path, browser.Page) as page:
        page.call("Page.navigate", url=address)
        page.wait_for("document.body?.dataset.device || document.getElementById('error')?.textContent")
        assert page.run("document.body.dataset.device") == "wasm"
        assert page.run("document.getElementById('error').textContent") == "", "its example differs"
        found = ask_page(page, images[1])
    chat = Chat.open(checkpoint)
    assert found == greedy(OpenGraphs(in_int8 / "model" / "onnx", chat.model.config), chat, images[1])


def test_a_page_whose_example_is_answered_otherwise_says_so(
    exported: Path, address: str, tmp_path: Path
) -> None:
    settings = exported / "settings.json"
    whole = settings.read_text()
    try:
        changed = json.loads(whole)
        changed["example"]["ids"][0] += 1
        settings.write_text(json.dumps(changed))
        with browser.chromium(tmp_path, browser.Page) as page:
            page.call("Page.navigate", url=address)
            page.wait_for("document.body?.dataset.device")
            assert "Do not rely on its answers" in page.run("document.getElementById('error').textContent")
    finally:
        settings.write_text(whole)


def test_every_command_of_the_guide_is_followed() -> None:
    """Here, in test_formats.py and in tests/inference/test_bits.py; what it installs exists."""
    run = ("--format web", "http.server", "--format onnx", "--formats", "--bits")
    install = [line for line in GUIDE if not any(words in line for words in run)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert install == [f"pip install 'tinyllava[{extra}]'" for extra in ("onnx", "quantized")]
    assert {"onnx", "quantized"} <= set(project["optional-dependencies"])


def test_without_npm_nothing_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(exporting, "open_merged", lambda *given: pytest.fail("weights before the runtime"))
    with pytest.raises(PackageError, match="'npm', which is not installed"):
        export_checkpoint(checkpoint, tmp_path / "out", layout="web")
    assert not (tmp_path / "out").exists()
