"""How a server answers many clients: speed against one client at a time, first tokens, and a long load.

``speed`` compares within one run: N clients one after another and at once, each with an image and a question
of its own (the model is a copy of MODEL with another end token: every answer has the asked length); the first
token of a conversation's first and second turn; and a streamed answer over HTTP against ``Chat.stream`` here.
The last two are times of the processor: with one thread, what an idle machine takes. The first tokens are
also timed by the clock, the shortest of all conversations: what two threads take if nobody else computes.
With ``--language-model`` the turns are measured again, with that model behind a random ViT of 576
image tokens. ``turns`` measures the first tokens alone. ``passes`` compares forward passes with linear
layers as torch has them and packed, as ``Chat.open`` does on AMD CPUs and in 16 bits. ``load`` lets clients
ask for minutes, some of which leave early, and counts what was lost.

    OMP_NUM_THREADS=1 python benchmarks/serve.py speed MODEL
    OMP_NUM_THREADS=2 python benchmarks/serve.py turns MODEL
    OMP_NUM_THREADS=1 python benchmarks/serve.py passes MODEL
    OMP_NUM_THREADS=2 python benchmarks/serve.py load MODEL --clients 200 --minutes 5
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
import numpy as np
from PIL import Image

WORDS = ("red", "blue", "dog", "cat", "ship", "car", "bird", "small", "left", "water", "street", "tree")
ASKED = "Tell me in several long sentences what is in the image, and what a {} and a {} have to do with it."


def random_image(generator: random.Random, side: int = 480) -> str:
    """Return a data URL of blurred noise, about as large as a photo of that size."""
    noise = np.random.default_rng(generator.randrange(2**32)).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return "data:image/jpeg;base64," + b64encode(buffer.getvalue()).decode()


def make_endless(model: Path, folder: Path) -> str:
    """Return a copy of a model that does not end its answers by itself."""
    folder.mkdir()
    for file in model.iterdir():
        if file.is_file() and file.name != "generation_config.json":
            (folder / file.name).symlink_to(file.resolve())
    settings = json.loads((model / "generation_config.json").read_text())
    unused = json.loads((model / "config.json").read_text())["image_token_index"]  # forbidden in answers
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": unused}))
    return str(folder)


def make_wide(language_model: str, folder: Path) -> str:
    """Return a model of a language model behind a random ViT-S/14 of 336 pixels: 576 image tokens."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    from tinyllava.config import ModelConfig
    from tinyllava.model.assemble import assemble

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 12}
    side = {"height": 336, "width": 336}
    CLIPVisionModel(CLIPVisionConfig(image_size=336, patch_size=14, **sizes)).save_pretrained(folder / "v")
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side).save_pretrained(folder / "v")
    parts = ModelConfig(vision_encoder=str(folder / "v"), language_model=language_model, template="chatml")
    for part in assemble(parts):
        part.save_pretrained(folder / "wide")
    return str(folder / "wide")


def question(generator: random.Random, url: str) -> dict[str, Any]:
    text = ASKED.format(*generator.sample(WORDS, 2))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


@dataclass(frozen=True)
class Server:
    address: str
    process: "subprocess.Popen[str]"
    client: httpx.Client

    @property
    def processor_s(self) -> float:
        """Time that the processor has spent on the server, over all threads."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    @property
    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def body(self, messages: list[dict[str, Any]], max_tokens: int, **fields: Any) -> bytes:
        return json.dumps({"model": "m", "messages": messages, "max_tokens": max_tokens, **fields}).encode()

    def ask(self, messages: list[dict[str, Any]], max_tokens: int) -> "Timed":
        """Stream an answer and time it."""
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        body, timed = self.body(messages, max_tokens, **usage), Timed()
        with self.client.stream("POST", "/v1/chat/completions", content=body, headers=JSON) as got:
            assert got.status_code == 200, got.read()
            for line in got.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                    timed.piece(text)
                if event.get("usage"):
                    timed.num_tokens = event["usage"]["completion_tokens"]
        timed.stop()
        return timed


JSON = {"Content-Type": "application/json"}
PAUSE_S = 0.5  # in which nobody asks: a person reads the answer for longer
CLOCKS = ("medians of the processor's time", "the shortest by the clock")
NO_LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=60)


@dataclass
class Timed:
    """A streamed answer."""

    text: str = ""
    first_s: float = 0.0
    total_s: float = 0.0
    num_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def piece(self, text: str) -> None:
        self.first_s = self.first_s or time.perf_counter() - self.started
        self.text += text

    def stop(self) -> None:
        self.total_s = time.perf_counter() - self.started


@contextmanager
def serving(model: str, *options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "tinyllava", "serve", model, "--port", "0", "--name", "m", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        with httpx.Client(base_url=address, timeout=900, limits=NO_LIMITS) as client:
            yield Server(address, process, client)
    finally:
        process.terminate()
        process.wait()


def measure_many(server: Server, num_clients: int, num_tokens: int, rounds: int) -> None:
    """Print tokens a second of clients one after another and at once; no two ask the same."""
    generator, ratios, speeds = random.Random(0), [], []
    for _ in range(rounds):
        speed = []
        for width in (1, num_clients):
            asked = [[question(generator, random_image(generator))] for _ in range(num_clients)]
            started = time.perf_counter()
            with ThreadPoolExecutor(width) as clients:
                answers = list(clients.map(lambda one: server.ask(one, num_tokens), asked))
            speed.append(sum(one.num_tokens for one in answers) / (time.perf_counter() - started))
        ratios.append(speed[1] / speed[0])
        speeds.append(speed)
        mean = statistics.mean(one.num_tokens for one in answers)
        print(f"  {speed[0]:.1f} and {speed[1]:.1f} tokens/s, {mean:.0f} tokens an answer", file=sys.stderr)
    one, many = (statistics.median(column) for column in zip(*speeds, strict=True))
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    print(f"{num_clients} clients: one after another {one:.1f} tokens/s, at once {many:.1f}: ", end="")
    print(f"{statistics.median(ratios):.2f}x ({spread})")


def measure_turns(server: Server, rounds: int) -> None:
    """Print the time to the first token of a first and a second turn: the processor's, and by the clock."""
    generator = random.Random(1)
    clocks: tuple[list[tuple[float, float]], ...] = ([], [])

    def take(messages: list[dict[str, Any]]) -> tuple[float, float]:
        start = server.processor_s
        timed = server.ask(messages, 1)
        return server.processor_s - start, timed.total_s

    for number in range(rounds + 1):
        messages = [question(generator, random_image(generator, 960))]
        first = take(messages)
        messages += [
            {"role": "assistant", "content": server.ask(messages, 24).text},
            {"role": "user", "content": "What colour is it?"},
        ]
        time.sleep(PAUSE_S)
        if number:  # the first one warms up
            for took, pair in zip(clocks, zip(first, take(messages), strict=True), strict=True):
                took.append(pair)
    for name, choose, took in zip(CLOCKS, (statistics.median, min), clocks, strict=True):
        one, two = (1000 * choose(column) for column in zip(*took, strict=True))
        ratios = [b / a for a, b in took]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"first token, {name}: {one:.0f} ms, of the second turn {two:.0f} ms: ", end="")
        print(f"{two / one:.2f}x ({spread})")


def measure_overhead(server: Server, model: str, num_tokens: int, rounds: int) -> None:
    """Print how much more of the processor an answer takes than from ``Chat.stream``; the two alternate."""
    from tinyllava.conversation import ask
    from tinyllava.inference.chat import Chat

    chat, generator = Chat.open(model), random.Random(2)
    more: dict[int, list[float]] = {1: [], num_tokens: []}
    for number in range(rounds + 1):
        for limit, differences in more.items():
            url = random_image(generator)
            message = question(generator, url)
            start = server.processor_s
            served = server.ask([message], limit).text
            middle = server.processor_s
            began = time.process_time()
            direct = "".join(chat.stream(ask(message["content"][1]["text"], url), limit))
            took = time.process_time() - began
            assert direct == served, (direct, served)
            if number:  # the first one warms up
                differences.append(1000 * (middle - start - took))
    first, whole = (statistics.median(differences) for differences in more.values())
    print(
        f"over Chat.stream, same answers: first token {first:+.1f} ms, whole answer {whole:+.1f} ms ", end=""
    )
    print(f"of the processor (medians of {rounds})")


def measure_passes(model: str, rounds: int) -> None:
    """Print the processor time of passes over new tokens behind 50 others; plain and packed alternate."""
    import torch

    from tinyllava.inference.chat import Chat
    from tinyllava.inference.ragged import KeysValues, RaggedModel
    from tinyllava.model.assemble import open_checkpoint

    print("| weights | new tokens | as torch has them | packed | ratio |\n|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        plain = open_checkpoint(model, dtype=dtype)[0].eval()
        models = [RaggedModel(plain), RaggedModel(Chat.open(model, device="cpu", dtype=dtype).model)]
        embeds = plain.get_input_embeddings().weight.detach()
        pasts = [KeysValues(512), KeysValues(512)]
        with torch.inference_mode():
            for num_new in (50, 1, 4, 16, 40, 200):
                took: list[list[float]] = [[], []]
                for times, ragged, past in zip(took * rounds, models * rounds, pasts * rounds, strict=True):
                    start = time.process_time()
                    ragged.model.lm_head(ragged.forward([(past, embeds[:num_new])]))
                    times.append(1000 * (time.process_time() - start))
                    past.length = 50
                before, after = map(min, took)
                row = f"| {dtype} | {num_new} | {before:.0f} ms | {after:.0f} ms | {before / after:.2f} |"
                print(row, flush=True)


@dataclass
class Load:
    """What became of the requests of a load; threads share it."""

    counts: "Counter[str]" = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    lost: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


def be_client(server: Server, number: int, load: Load, until: Callable[[], bool], max_tokens: int) -> None:
    """Ask until the end; one in four streams is left after its first piece; 429 is obeyed."""
    generator = random.Random(number)
    images = [random_image(generator, 240) for _ in range(2)]
    while not until():
        messages = [question(generator, generator.choice(images))]
        is_streamed, leaves = generator.random() < 0.6, generator.random() < 0.25
        body = server.body(messages, generator.randint(1, max_tokens), stream=is_streamed)
        try:
            with server.client.stream("POST", "/v1/chat/completions", content=body, headers=JSON) as got:
                if got.status_code == 429:
                    load.note("429")
                    got.read()
                    wait = int(got.headers["Retry-After"])
                    time.sleep(min(5, wait) * generator.uniform(0.5, 1))
                    continue
                if got.status_code == 200 and is_streamed and leaves:
                    next(got.iter_lines())
                    load.note("left early")
                    continue
                text = got.read().decode()
                is_whole = "[DONE]" in text if is_streamed else '"finish_reason"' in text
                is_good = got.status_code == 200 and is_whole and '"error"' not in text
                load.note("answered" if is_good else "lost")
                if not is_good:
                    load.lost.append(f"{got.status_code} {text[-300:]}")
        except httpx.HTTPError as error:
            load.note("lost")
            load.lost.append(repr(error))


def run_load(server: Server, num_clients: int, seconds: float, max_tokens: int) -> Load:
    """Let clients ask for some time; prints the memory of the server as it goes."""
    load, end, memory = Load(), time.monotonic() + seconds, [server.memory_mib]
    clients = [
        threading.Thread(target=be_client, args=(server, n, load, lambda: time.monotonic() > end, max_tokens))
        for n in range(num_clients)
    ]
    for client in clients:
        client.start()
    while any(client.is_alive() for client in clients):
        time.sleep(min(10, seconds / 10))
        memory.append(server.memory_mib)
        print(f"  {dict(load.counts)}, {memory[-1]:,.0f} MiB", file=sys.stderr)
    middle = max(memory[: len(memory) // 2 + 1])
    counts = ", ".join(f"{name} {number}" for name, number in sorted(load.counts.items()))
    print(f"{num_clients} clients, {seconds:g} s: {counts}; lost: {load.counts['lost']}")
    print(f"memory of the server: {memory[0]:,.0f} MiB at first, ", end="")
    print(f"at most {middle:,.0f} in the first half and {max(memory):,.0f} in all")
    for line in load.lost[:5]:
        print(line)
    return load


def main(stack: ExitStack) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "turns", "passes", "load"])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--language-model", default="", help="folder of a language model, see above")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--options", default="", help="more options of `tinyllava serve`")
    known = parser.parse_args()
    print(
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads, load {os.getloadavg()[0]:.1f}", file=sys.stderr
    )
    options = known.options.split()
    if known.what == "passes":
        measure_passes(known.model, 4 * known.rounds)
        return
    if known.what == "load":
        with serving(known.model, *options) as server:
            load = run_load(server, known.clients, 60 * known.minutes, known.tokens)
        sys.exit(1 if load.counts["lost"] else 0)
    folder = stack.enter_context(TemporaryDirectory())
    if known.what == "speed":
        with serving(make_endless(Path(known.model), Path(folder) / "endless"), *options) as server:
            server.ask([{"role": "user", "content": "What?"}], 2)
            measure_many(server, known.clients, known.tokens, known.rounds)
    with serving(known.model, *options) as server:
        server.ask([{"role": "user", "content": "What?"}], 2)
        measure_turns(server, 5 * known.rounds)
        if known.what == "speed":
            measure_overhead(server, known.model, known.tokens, 5 * known.rounds)
    if known.language_model:
        with serving(make_wide(known.language_model, Path(folder)), *options) as server:
            server.ask([{"role": "user", "content": "What?"}], 2)
            measure_turns(server, known.rounds)


if __name__ == "__main__":
    with ExitStack() as stack:
        main(stack)
