"""First token, tokens a second, size and agreement of a model in every runtime that it can be shipped to.

Every format is written into a folder that goes away and opened in its runtime, all on the same number of
threads (``--threads``). Each runtime answers questions about images to their end, which is compared with our
own answers in fp32; then it answers one of them with 1 and with 33 tokens in turn. Medians count. Seconds are
of the processor, over all threads of the runtime's process: with one thread, what an idle machine takes.

    python benchmarks/ship.py MODEL --node DIR
    python benchmarks/ship.py --language-model DIR        behind a SigLIP of the base size with random weights
    python benchmarks/ship.py MODEL --tiny                one image, one question, few tokens: does it run?
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from serve import make_endless, serving
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.checkpoints.exporting.formats import reasons_against
from tinyllava.checkpoints.exporting.gguf import MMPROJ, MODEL
from tinyllava.checkpoints.exporting.onnx import OpenGraphs
from tinyllava.config import ModelConfig
from tinyllava.conversation import ask
from tinyllava.errors import CheckpointError
from tinyllava.inference.chat import Chat, encode_prompt
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.model.processing import TinyLlavaProcessor

QUESTIONS = ("What is in the image?", "Is there a dog?", "What colour is it?", "Describe the image.")
NODE = """
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from "@huggingface/transformers"
import { readFileSync } from "fs"
const { folder, asked, threads, dtype } = JSON.parse(readFileSync(process.argv[2]))
env.allowRemoteModels = false
env.localModelPath = "/"
const processor = await AutoProcessor.from_pretrained(folder)
const options = { dtype, session_options: { intraOpNumThreads: threads, interOpNumThreads: 1 } }
const model = await AutoModelForImageTextToText.from_pretrained(folder, options)
const used = () => { const { user, system } = process.cpuUsage(); return (user + system) / 1e6 }
const found = []
for (const [image, question, count, isForced] of asked) {
  const start = used()
  const messages = [{ role: "user", content: [{ type: "image" }, { type: "text", text: question }] }]
  const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true })
  const inputs = await processor(await RawImage.read(image), prompt)
  const least = isForced ? { min_new_tokens: count } : {}
  const output = await model.generate({ ...inputs, ...least, max_new_tokens: count, do_sample: false })
  const answer = output.slice(null, [inputs.input_ids.dims.at(-1), null])
  const text = processor.batch_decode(answer, { skip_special_tokens: true })[0].trim()
  found.push([used() - start, text, output.dims.at(-1) - inputs.input_ids.dims.at(-1)])
}
console.log(JSON.stringify(found))
"""
OPEN_PAGE = """async () => {
  const worker = new Worker("worker.js", { type: "module" })
  const told = (kind, ...sent) => new Promise((done, fail) => {
    worker.onmessage = ({ data }) => {
      if (data.kind === kind) done(data)
      if (data.kind === "error") fail(new Error(data.text))
    }
    sent.forEach(data => worker.postMessage(data))
  })
  globalThis.ask = async (url, text, limit) => {
    const blob = await (await fetch(url)).blob()
    return told("answer", { kind: "image", blob }, { kind: "ask", turns: [{ role: "user", text }], limit })
  }
  await told("ready", { kind: "start", device: "wasm" })
}"""
LLAMA_CPP = """
import json
import sys
import time
from base64 import b64encode
from pathlib import Path

import xllamacpp as llama

folder, asked, num_threads = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
settings = llama.CommonParams()
settings.model.path, settings.mmproj.path = str(folder / "model.gguf"), str(folder / "mmproj.gguf")
settings.mmproj_use_gpu, settings.n_gpu_layers, settings.n_ctx = False, 0, 1024
settings.n_parallel, settings.cache_ram_mib = 1, 0
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = num_threads
settings.warmup = settings.fit_params = settings.ui = False
settings.use_jinja = True
server = llama.Server(settings)
found = []
for image, question, count, is_forced in asked:
    start = time.process_time()
    url = "data:image/png;base64," + b64encode(Path(image).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": count, "temperature": 0.0}
    answer = server.handle_chat_completions({**body, "ignore_eos": is_forced, "cache_prompt": False})
    assert not is_forced or answer["usage"]["completion_tokens"] == count, answer
    text = answer["choices"][0]["message"]["content"]
    took = time.process_time() - start
    found.append([took, text.strip(), answer["usage"]["completion_tokens"]])
print(json.dumps(found))
"""
Asked = tuple[str, str, int, bool]
"""Image, question, most tokens, and whether the answer has to be that long."""
Found = list[tuple[float, str, int]]
"""Seconds, text and tokens of each answer."""


class Bench:
    """The questions, the answers to compare with, and the table."""

    def __init__(self, folder: Path, side: int, num_images: int, only: str, tiny: bool) -> None:
        self.expected, self.only = [""], re.compile(only)
        num_tokens, repeats, longest = (4, 1, 3) if tiny else (32, 3, 16)
        random = np.random.default_rng(0)
        images = []
        for number in range(1 if tiny else num_images):
            # Square and of the encoder's size: llama.cpp's own clients resize before they pad.
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            images.append(str(folder / f"{number}.png"))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(images[-1])
        questions = QUESTIONS[-1:] if tiny else QUESTIONS
        self.whole: list[Asked] = [(i, q, longest, False) for i in images for q in questions]
        timed: list[Asked] = [(images[0], QUESTIONS[-1], n, True) for n in (1, 1 + num_tokens)]
        self.asked: list[Asked] = [*self.whole, *timed, *timed * repeats]
        print("| runtime | weights | first token | tokens per second | same answers |")
        print("|---|---|---|---|---|", flush=True)

    def row(self, runtime: str, write: Callable[[], Path], run: Callable[[Path], Found]) -> None:
        """Measure and print a row, if it is wanted; the first one is what the others are compared with."""
        if self.expected != [""] and not self.only.search(runtime):
            return
        try:
            folder = write()
        except CheckpointError as error:  # too far from the model: there is nothing to run
            reason = str(error).partition("not exported: ")[2] or str(error)
            print(f"| {runtime} | rejected: {reason} | | | |", flush=True)
            return
        found = run(folder)
        texts = [text for _, text, _ in found[: len(self.whole)]]
        self.expected = texts if self.expected == [""] else self.expected
        timed = found[len(self.whole) + 2 :]
        first, whole = (statistics.median(took for took, *_ in timed[place::2]) for place in (0, 1))
        num_tokens = timed[1][2] - timed[0][2]
        same = sum(one == other for one, other in zip(texts, self.expected, strict=True))
        size = f"{megabytes(folder):,.0f} MB"
        # The clock of another process has steps of 10 ms, which a toy's answer may not take.
        is_long = num_tokens > 0 and whole > first
        rate = f"{num_tokens / (whole - first):.1f}" if is_long else "not measurable"
        print(f"| {runtime} | {size} | {first:.2f} s | {rate} | {same} of {len(texts)} |", flush=True)


def clock(asked: Iterable[Asked], answer: Callable[[Asked], tuple[str, int]]) -> Found:
    """Ask one after another."""
    found = []
    for one in asked:
        start = time.process_time()
        text, num_tokens = answer(one)
        found.append((time.process_time() - start, text.strip(), num_tokens))
    return found


def in_torch(
    folder: Path, asked: Sequence[Asked], dtype: str = "float32", *, is_packed: bool = True
) -> Found:
    """Let transformers generate, with linear layers packed by ``Chat.open`` or as PyTorch has them."""
    chat = (
        Chat.open(folder, device="cpu", dtype=dtype)
        if is_packed
        else Chat(*open_checkpoint(folder, dtype=dtype))
    )

    @torch.inference_mode()
    def answer(one: Asked) -> tuple[str, int]:
        image, question, count, is_forced = one
        conversation = ask(question, image)
        prompt = encode_prompt(chat.processor, conversation)
        inputs = chat._collate([conversation], [prompt])
        least = {"min_new_tokens": count} if is_forced else {}
        ids = chat.model.generate(**inputs, **least, do_sample=False, max_new_tokens=count)
        new = ids[0, len(prompt) :]
        return chat.processor.tokenizer.decode(new, skip_special_tokens=True), len(new)

    return clock(asked, answer)


def in_graphs(graphs: OpenGraphs, chat: Chat, asked: Sequence[Asked]) -> Found:
    """Decode with ONNX graphs, in onnxruntime or in what is put in the place of its sessions."""
    empty, tokenizer = graphs.cached, chat.processor.tokenizer
    ends = set(np.atleast_1d(chat.model.generation_config.eos_token_id).tolist())

    def answer(one: Asked) -> tuple[str, int]:
        image, question, count, is_forced = one
        ids = np.array([encode_prompt(chat.processor, ask(question, image))])
        embeds = graphs.embed.run(None, {"input_ids": ids})[0]
        pixels = np.asarray(Image.open(image), dtype=np.float32).transpose(2, 0, 1)[None]
        features = graphs.vision.run(None, {"pixel_values": pixels})[0]
        embeds[ids == chat.processor.image_token_id] = features.reshape(-1, features.shape[-1])
        graphs.cached, graphs.length, new = empty, 0, list[int]()
        while True:
            logits = graphs.feed_embeds(embeds)[0, -1]
            if is_forced:
                logits[list(ends)] = -np.inf
            new.append(int(logits.argmax()))
            if len(new) == count or new[-1] in ends:
                return tokenizer.decode(new, skip_special_tokens=True), len(new)
            embeds = graphs.embed.run(None, {"input_ids": np.array([new[-1:]])})[0]

    return clock(asked, answer)


def in_onnxruntime(folder: Path, chat: Chat, asked: Sequence[Asked]) -> Found:
    return in_graphs(OpenGraphs(folder / "onnx", chat.model.config), chat, asked)


def in_llama_cpp(folder: Path, asked: Sequence[Asked], threads: int) -> Found:
    """Ask llama.cpp in a process of its own: what it prints and keeps goes with it."""
    return in_process([sys.executable, "-c", LLAMA_CPP, folder, None, str(threads)], asked)


def in_openvino(folder: Path, chat: Chat, asked: Sequence[Asked], threads: int) -> Found:
    import openvino  # type: ignore[import-untyped]

    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads})
    graphs = OpenGraphs(folder / "onnx", chat.model.config)

    class Graph:
        """What onnxruntime calls a session."""

        def __init__(self, name: str) -> None:
            (path,) = (folder / "onnx").glob(f"{name}*.onnx")
            self.compiled = core.compile_model(path, "CPU")

        def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
            return [value.copy() for value in self.compiled(inputs).values()]

    graphs.vision, graphs.embed, graphs.decoder = map(
        Graph, ("vision_encoder", "embed_tokens", "decoder_model_merged")
    )
    return in_graphs(graphs, chat, asked)


def in_process(command: list[Any], request: Any, **options: Any) -> Found:
    """Ask another program, which reads a file and prints its answers."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        words = [file.name if word is None else word for word in command]
        done = subprocess.run(words, capture_output=True, text=True, check=True, **options)
    return [(took, text, n) for took, text, n in json.loads(done.stdout.strip().splitlines()[-1])]


def in_node(folder: Path, packages: Path, asked: Sequence[Asked], threads: int, dtype: str) -> Found:
    """Run transformers.js of a folder in which `npm install @huggingface/transformers` was run."""
    script = packages / "ship.mjs"
    script.write_text(NODE, encoding="utf-8")
    request = {"folder": str(folder.resolve()), "asked": asked, "threads": threads, "dtype": dtype}
    return in_process(["node", script, None], request, cwd=packages)


def in_server(folder: Path, endless: str, asked: Sequence[Asked], *options: str) -> Found:
    """Ask `tinyllava serve`; for long answers a copy of the model that does not end them by itself."""
    found: Found = []
    for model in (str(folder), endless) if endless else (str(folder),):
        with serving(model, *options) as server:
            process = psutil.Process(server.process.pid)
            for one in (one for one in asked if not endless or one[3] == (model == endless)):
                # Each image differs in a pixel: nothing of an earlier prompt is remembered.
                image, buffer = Image.open(one[0]), BytesIO()
                if one[3]:
                    image.putpixel((0, 0), (len(found), 0, 0))
                image.save(buffer, "PNG")
                url = "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
                content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": one[1]}]
                start = sum(process.cpu_times()[:2])
                answer = server.ask([{"role": "user", "content": content}], one[2])
                found.append((sum(process.cpu_times()[:2]) - start, answer.text, answer.num_tokens))
    return found


def in_engine(folder: Path, asked: Sequence[Asked]) -> Found:
    """Ask `tinyllava serve --engine llama.cpp`."""
    with tempfile.TemporaryDirectory() as place:
        endless = make_endless_gguf(folder, Path(place) / "endless")
        return in_server(folder, str(endless), asked, "--engine", "llama.cpp", "--max-running", "1")


def make_endless_gguf(folder: Path, endless: Path) -> Path:
    """Copy an export, with other names for all tokens by which llama.cpp would end an answer."""
    import gguf

    endless.mkdir()
    (endless / MMPROJ).symlink_to((folder / MMPROJ).resolve())
    shutil.copyfile(folder / MODEL, endless / MODEL)
    fields = gguf.GGUFReader(endless / MODEL, "r+").fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    ends = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    tokens = fields["tokenizer.ggml.tokens"]
    names = [tokens.parts[tokens.data[i]] for i in ends]
    texts = [tokens, fields["tokenizer.chat_template"]]
    for name in names:
        old = bytes(name)
        new = old[:1] + old[1:-1][::-1] + old[-1:]  # as long
        for part in (field.parts[place] for field in texts for place in field.data):
            changed = bytes(part).replace(old, new)
            if changed != bytes(part):
                part[:] = np.frombuffer(changed, dtype=np.uint8)
    end = fields["tokenizer.ggml.eos_token_id"]
    unused = next(i for i, kind in enumerate(kinds) if kind == gguf.TokenType.UNUSED)
    end.parts[end.data[0]][:] = unused
    return endless


def in_browser(folder: Path, asked: Sequence[Asked]) -> Found:
    """Ask the page of an export in headless Chromium, which computes in WebAssembly in one thread."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from browser import FLAGS, Page, chromium

    found: Found = []
    with tempfile.TemporaryDirectory() as place:
        endless = Path(place) / "endless"
        shutil.copytree(folder, endless, copy_function=os.symlink)
        settings = endless / "model" / "generation_config.json"
        unused = json.loads((folder / "model" / "config.json").read_text())["image_token_index"]
        values = {**json.loads(settings.read_text()), "eos_token_id": unused}
        settings.unlink()
        settings.write_text(json.dumps(values))
        for is_forced, site in ((False, folder), (True, endless)):
            with (
                web_server(site) as address,
                chromium(Path(place) / f"profile-{is_forced}", Page, *FLAGS) as page,
            ):
                page.call(
                    "Page.navigate", url=f"{address}/settings.json"
                )  # a page without a worker of its own
                page.wait_for("!!document.body")
                page.run(f"({OPEN_PAGE})()")
                processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
                processes = [one for one in processes if "chrom" in one.name()]
                for image, question, count, _ in (one for one in asked if one[3] == is_forced):
                    url = "data:image/png;base64," + b64encode(Path(image).read_bytes()).decode()
                    start = sum(sum(one.cpu_times()[:2]) for one in processes)
                    answer = page.run(f"ask({json.dumps(url)}, {json.dumps(question)}, {count})")
                    took = sum(sum(one.cpu_times()[:2]) for one in processes) - start
                    found.append((took, answer["text"], len(answer["ids"])))
    return found


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serve a folder as the guide does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "http.server",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(folder),
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def make_model(language_model: str, folder: Path) -> Path:
    """Put a language model behind a SigLIP of the base size with random weights."""
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    size = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12}
    config = SiglipVisionConfig(**size, num_attention_heads=12, intermediate_size=3072)
    SiglipVisionModel(config).save_pretrained(folder / "vision")
    side = {"height": 224, "width": 224}
    SiglipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder / "vision"
    )
    parts = assemble(ModelConfig(vision_encoder=str(folder / "vision"), language_model=language_model))
    for part in parts:
        part.save_pretrained(folder / "model")
    return folder / "model"


def processor_seconds() -> float:
    """Return the time of the processor that this process and its ended children took."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def megabytes(folder: Path) -> float:
    kinds = (".safetensors", ".gguf", ".onnx", ".onnx_data")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in kinds) / 1e6


def measure(model: Path, place: Path, bench: Bench, node: Path | None, threads: int) -> None:
    """Print the table of a model."""
    chat, asked = Chat.open(model, device="cpu"), bench.asked

    def write(name: str, **options: Any) -> Path:
        if not (place / name).exists():
            start = processor_seconds()
            done = export_checkpoint(model, place / name, **options)
            took = f"{name}: exported and compared in {processor_seconds() - start:.0f} s of the processor"
            print(f"{took}; {done.measured or done.in_short}", file=sys.stderr, flush=True)
        return place / name

    bench.row("PyTorch, fp32", lambda: model, lambda folder: in_torch(folder, asked))
    bench.row(
        "PyTorch, fp32, not packed", lambda: model, lambda folder: in_torch(folder, asked, is_packed=False)
    )
    bench.row("PyTorch, bf16", lambda: model, lambda folder: in_torch(folder, asked, "bfloat16"))
    endless = make_endless(model, place / "endless")
    bench.row("`serve`, fp32", lambda: model, lambda folder: in_server(folder, endless, asked))
    for kind in ("f16", "q8_0", "q4_0") if not reasons_against(chat.model.config, "gguf") else ():
        export = partial(write, f"gguf-{kind}", layout="gguf", quantized=kind)
        bench.row(f"llama.cpp, {kind}", export, lambda folder: in_llama_cpp(folder, asked, threads))
        bench.row(f"`serve --engine llama.cpp`, {kind}", export, lambda folder: in_engine(folder, asked))
    for bits in (8, 4):
        export = partial(write, f"{bits}-bits", bits=bits)
        bench.row(f"PyTorch, `--bits {bits}`", export, lambda folder: in_torch(folder, asked))
    for kind in ("fp32", "int8"):
        export = partial(write, f"onnx-{kind}", layout="onnx", precision=kind)
        bench.row(f"ONNX Runtime, {kind}", export, lambda folder: in_onnxruntime(folder, chat, asked))
        bench.row(f"OpenVINO, {kind}", export, lambda folder: in_openvino(folder, chat, asked, threads))
        if node:
            run = partial(in_node, packages=node, asked=asked, threads=threads, dtype=kind)
            bench.row(f"transformers.js in Node, {kind}", export, run)
        export = partial(write, f"web-{kind}", layout="web", precision=kind)
        bench.row(f"the page in Chromium (WASM), {kind}", export, lambda folder: in_browser(folder, asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="checkpoint folder")
    parser.add_argument("--language-model", default="", help="folder, instead of a model; see above")
    parser.add_argument("--node", type=Path, help="folder with node_modules/@huggingface/transformers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=5, help="each is asked four questions")
    parser.add_argument("--tiny", action="store_true", help="one question and few tokens, to try the script")
    parser.add_argument("--only", default="", help="a pattern for the names of the rows to measure")
    known = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(known.threads)  # of `serve`
    torch.set_num_threads(known.threads)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = known.model or make_model(known.language_model, place)
        print(f"{known.threads} threads, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        side = TinyLlavaProcessor.from_pretrained(model).image_size_px
        bench = Bench(place, side, known.images, known.only, known.tiny)
        measure(model, place, bench, known.node, known.threads)


if __name__ == "__main__":
    main()
