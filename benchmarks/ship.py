"""First token, tokens a second, size and agreement of a model in PyTorch, `serve` and llama.cpp.

Every format is written into a folder that goes away and opened in its runtime, all on the same number of
threads (``--threads``). Each runtime answers questions about images to their end, which is compared with our
own answers in fp32; then it answers one of them with 1 and with 33 tokens in turn. Medians count. Seconds are
of the processor, over all threads of the runtime's process: with one thread, what an idle machine takes.

    python benchmarks/ship.py MODEL
    python benchmarks/ship.py --language-model DIR        behind a SigLIP of the base size with random weights
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
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
from tinyllava.config import ModelConfig
from tinyllava.conversation import ask
from tinyllava.inference.chat import Chat, encode_prompt
from tinyllava.model.assemble import assemble
from tinyllava.model.processing import TinyLlavaProcessor

NUM_TOKENS, REPEATS, LONGEST = 32, 3, 16
QUESTIONS = ("What is in the image?", "Is there a dog?", "What colour is it?", "Describe the image.")
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
    found.append([time.process_time() - start, text.strip()])
print(json.dumps(found))
"""
Asked = tuple[str, str, int, bool]
"""Image, question, most tokens, and whether the answer has to be that long."""
Found = list[tuple[float, str]]
"""Seconds and text of each answer."""


class Bench:
    """The questions, the answers to compare with, and the table."""

    def __init__(self, folder: Path, side: int, num_images: int, only: str) -> None:
        self.expected, self.only = [""], only.split(",")
        random = np.random.default_rng(0)
        self.images = []
        for number in range(num_images):
            # Square and of the encoder's size: llama.cpp's own clients resize before they pad.
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            self.images.append(str(folder / f"{number}.png"))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(self.images[-1])
        self.whole: list[Asked] = [(i, q, LONGEST, False) for i in self.images for q in QUESTIONS]
        timed: list[Asked] = [(self.images[0], QUESTIONS[0], n, True) for n in (1, 1 + NUM_TOKENS)]
        self.asked: list[Asked] = [*self.whole, *timed, *timed * REPEATS]
        print("| runtime | weights | first token | tokens a second | same answers |")
        print("|---|---|---|---|---|", flush=True)

    def row(self, runtime: str, write: Callable[[], Path], run: Callable[[Path], Found]) -> None:
        """Measure and print a row, if it is wanted; the first one is what the others are compared with."""
        if self.expected != [""] and not any(word in runtime for word in self.only):
            return
        folder = write()
        found = run(folder)
        texts = [text for _, text in found[: len(self.whole)]]
        self.expected = texts if self.expected == [""] else self.expected
        seconds = [took for took, _ in found[len(self.whole) + 2 :]]
        first, whole = (statistics.median(seconds[place::2]) for place in (0, 1))
        same = sum(one == other for one, other in zip(texts, self.expected, strict=True))
        size, rate = f"{megabytes(folder):,.0f} MB", NUM_TOKENS / (whole - first)
        print(f"| {runtime} | {size} | {first:.2f} s | {rate:.1f} | {same} of {len(texts)} |", flush=True)


def clock(
    asked: Sequence[Asked], answer: Callable[[Asked], str], used: Callable[[], float] = time.process_time
) -> Found:
    """Ask one after another."""
    found = []
    for one in asked:
        start = time.process_time()
        text = answer(one)
        found.append((time.process_time() - start, text))
    return found


def in_torch(folder: Path, asked: Sequence[Asked], dtype: str = "float32") -> Found:
    chat = Chat.open(folder, device="cpu", dtype=dtype)

    @torch.inference_mode()
    def answer(one: Asked) -> str:
        image, question, count, is_forced = one
        conversation = ask(question, image)
        prompt = encode_prompt(chat.processor, conversation)
        inputs = chat._collate([conversation], [prompt])
        least = {"min_new_tokens": count} if is_forced else {}
        ids = chat.model.generate(**inputs, **least, do_sample=False, max_new_tokens=count)
        text: str = chat.processor.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
        return text.strip()

    return clock(asked, answer)


def in_llama_cpp(folder: Path, asked: Sequence[Asked], threads: int) -> Found:
    """Ask llama.cpp in a process of its own: what it prints and keeps goes with it."""
    return in_process([sys.executable, "-c", LLAMA_CPP, folder, None, str(threads)], asked)


def in_process(command: list[Any], request: Any, **options: Any) -> Found:
    """Ask another program, which reads a file and prints its answers."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        words = [file.name if word is None else word for word in command]
        done = subprocess.run(words, capture_output=True, text=True, check=True, **options)
    return [(took, text) for took, text in json.loads(done.stdout.strip().splitlines()[-1])]


def in_server(folder: Path, endless: str, asked: Sequence[Asked], *options: str) -> Found:
    """Ask `tinyllava serve`; for long answers a copy of the model that does not end them by itself."""
    found: Found = []
    for is_forced, model in ((False, str(folder)), (True, endless)):
        with serving(model, *options) as server:
            process = psutil.Process(server.process.pid)
            for one in (one for one in asked if one[3] == is_forced):
                # Each image differs in a pixel: nothing of an earlier prompt is remembered.
                image, buffer = Image.open(one[0]), BytesIO()
                if is_forced:
                    image.putpixel((0, 0), (len(found), 0, 0))
                image.save(buffer, "PNG")
                url = "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
                content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": one[1]}]
                start = sum(process.cpu_times()[:2])
                text = server.ask([{"role": "user", "content": content}], one[2]).text
                found.append((sum(process.cpu_times()[:2]) - start, text))
    return found


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


def megabytes(folder: Path) -> float:
    kinds = (".safetensors", ".gguf", ".onnx", ".onnx_data")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in kinds) / 1e6


def measure(model: Path, place: Path, bench: Bench, threads: int) -> None:
    """Print the table of a model."""
    chat, asked = Chat.open(model, device="cpu"), bench.asked

    def write(name: str, **options: Any) -> Path:
        if not (place / name).exists():
            start = time.perf_counter()
            done = export_checkpoint(model, place / name, **options)
            took = f"{name}: exported and compared in {time.perf_counter() - start:.0f} s"
            print(f"{took}; {done.measured or done.in_short}", file=sys.stderr)
        return place / name

    bench.row("PyTorch, fp32", lambda: model, lambda folder: in_torch(folder, asked))
    bench.row("PyTorch, bf16", lambda: model, lambda folder: in_torch(folder, asked, "bfloat16"))
    endless = make_endless(model, place / "endless")
    bench.row("`serve`, fp32", lambda: model, lambda folder: in_server(folder, endless, asked))
    for kind in ("f16", "q8_0", "q4_0") if not reasons_against(chat.model.config, "gguf") else ():
        export = partial(write, f"gguf-{kind}", layout="gguf", quantized=kind)
        bench.row(f"llama.cpp, {kind}", export, lambda folder: in_llama_cpp(folder, asked, threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="checkpoint folder")
    parser.add_argument("--language-model", default="", help="folder, instead of a model; see above")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=5, help="each is asked four questions")
    parser.add_argument("--only", default="", help="rows whose name has one of these words, comma-separated")
    known = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(known.threads)  # of `serve`
    torch.set_num_threads(known.threads)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = known.model or make_model(known.language_model, place)
        print(f"{known.threads} threads, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        side = TinyLlavaProcessor.from_pretrained(model).image_size_px
        bench = Bench(place, side, known.images, known.only)
        measure(model, place, bench, known.threads)


if __name__ == "__main__":
    main()
