"""What a GPU shows that a CPU cannot, in eight minutes and one JSON.

    python benchmarks/gpu.py --json-file gpu.json
    python benchmarks/gpu.py --table-of gpu.json  the same as the rows of docs/guides/performance.md
    python benchmarks/gpu.py --tiny               toy sizes, on any machine

Each part runs in a process of its own with a limit in seconds. If one fails, its error is reported, the
others go on, and the exit status is 1. Weights are random.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image

from gpu_training import CUDA, DEVICE, LAYOUTS, build, qlora, train, train_forms

HERE = Path(__file__).parent


@torch.no_grad()
def decode(name: str, num_new: int) -> dict[str, Any]:
    """Tokens a second behind one image, and the share of what reading the weights allows."""
    layout = LAYOUTS[name]
    model, processor = build(layout)
    model = model.to(torch.bfloat16 if CUDA else torch.float32).eval()
    side = layout.side_px
    image = Image.new("RGB", (side, side), "red")
    found: dict[str, Any] = {}
    for batch in (1, 8):
        inputs = processor(images=[image] * batch, text=["<image>What is it?"] * batch).to(DEVICE)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        seconds = []
        for count in (num_new, 1, num_new):  # the first is for warming up
            start = time.perf_counter()
            model.generate(
                **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )
            _finish()
            seconds.append(time.perf_counter() - start)
        per_token = (seconds[2] - seconds[1]) / (num_new - 1)
        read = [*model.language_model.parameters(), *model.lm_head.parameters()]
        num_bytes = sum(p.numel() * p.element_size() for p in read)
        found[f"batch {batch}"] = {
            "tokens_per_second": batch / per_token,
            "share_of_bandwidth": num_bytes / bandwidth() / per_token,
        }
    return found


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**30 if CUDA else 2**26, dtype=torch.uint8, device=DEVICE)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        source.clone()
        _finish()
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / min(seconds[1:])


def _finish() -> None:
    if CUDA:
        torch.cuda.synchronize()


def run_tests(paths: list[str]) -> dict[str, Any]:
    """The core of the tests, which train and answer on the device that is here."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout.splitlines()[-1])
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed or not counts:
        raise RuntimeError(f"{counts}: {', '.join(failed) or done.stderr[-300:]}")
    return counts


def run_script(script: str, *options: str) -> Any:
    """Run another benchmark of this folder, whose last option takes a file, and return its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        done = subprocess.run(
            [sys.executable, script, *options, str(path)],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-500:])
        return json.loads(path.read_text())


def over_stock(found: dict[str, Any]) -> dict[str, Any]:
    """Median speed and memory of our step over stock's in the same run, of ``train_step.py``'s JSON."""
    return {
        stage: {
            "speed_over_stock": statistics.median(found[stage]["ours"]["speed"]),
            "memory_over_stock": found[stage]["ours"]["peak_memory"],
        }
        for stage in ("pretrain", "finetune")
        if stage in found
    }


def over_published(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Questions a second against the published loop and against the limit, of ``evaluate.py``'s JSON."""
    kept = ("num_questions", "over_published", "over_batched", "share_of_limit", "same_answers", "sample")
    return {"questions_per_second": 1 / found[0]["shared"]} | {name: found[0][name] for name in kept}


def stock(shape: str, rounds: str) -> dict[str, Any]:
    """Our step against stock's."""
    options = ("--batches", "1", "--shape", shape, "--rounds", rounds, "--json-file")
    return over_stock(run_script("train_step.py", *options))


def answer(*sizes: str) -> dict[str, Any]:
    """Questions in the shape of VQAv2."""
    return over_published(run_script("evaluate.py", "--shape", "vqav2", *sizes, "--json"))


TESTS = [
    "tests/training/test_run.py",
    "tests/training/test_quantised.py",
    "tests/model/test_checkpointing.py",
]
PARTS: dict[str, tuple[int, Callable[[], Any], Callable[[], Any]]] = {
    "tests": (80, lambda: run_tests(TESTS), lambda: run_tests(["tests/model/test_devices.py"])),
    "train C-TL": (60, lambda: train("C-TL", 30), lambda: train("tiny", 8)),
    "train Sig-Phi": (105, lambda: train("Sig-Phi", 30), lambda: train("tiny", 6)),
    "forms C-TL": (75, lambda: train_forms("C-TL", 12), lambda: train_forms("tiny", 6)),
    "stock": (50, lambda: stock("tinyllama", "3"), lambda: stock("tiny", "1")),
    "answer": (
        50,
        lambda: answer("--model", "tinyllama-shape", "--images", "667", "--sample", "16"),
        lambda: answer("--depth", "0.05", "--images", "2", "--sample", "2"),
    ),
    "decode": (20, lambda: decode("C-TL", 64), lambda: decode("tiny", 8)),
    "qlora": (40, lambda: qlora("C-TL"), lambda: qlora("tiny")),
}
"""Name -> limit in seconds, 480 in all; what it does; and the same at toy sizes."""


def run_part(name: str, tiny: bool) -> dict[str, Any]:
    """Run a part in a process of its own."""
    limit = PARTS[name][0] * (1 if CUDA else 5)
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if tiny else [])]
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        lines = done.stdout.splitlines()
        found = json.loads(lines[-1]) if not done.returncode else {"error": done.stderr.strip()[-800:]}
    except subprocess.TimeoutExpired:
        found = {"error": f"not done in {limit} seconds"}
    return {"seconds": round(time.monotonic() - start, 1), **found}


def table(found: dict[str, Any]) -> str:
    """Return the measurements as the rows of a table in Markdown."""

    def rows(name: str, value: Any) -> list[str]:
        if isinstance(value, dict):
            return [row for key, inner in value.items() for row in rows(f"{name} {key}".strip(), inner)]
        return [
            f"| {name.replace('_', ' ')} | {value:,.3g} |"
            if isinstance(value, float)
            else f"| {name} | {value} |"
        ]

    head = [f"| {found['device']}, torch {found['torch']} | |", "|---|---|"]
    return "\n".join(head + rows("", found["parts"]))


def main(
    tiny: bool = False,
    part: str = "",
    parts: tuple[str, ...] = tuple(PARTS),
    json_file: Path | None = None,
    table_of: Path | None = None,
) -> None:
    """Measure what only a GPU shows.

    Args:
        tiny: toy sizes, on any machine.
        part: run this part here and print its JSON.
        parts: which parts to run.
        json_file: where the JSON is written too.
        table_of: print the table of such a file and measure nothing.
    """
    if table_of:
        print(table(json.loads(table_of.read_text())))
        return
    if part:
        _, large, small = PARTS[part]
        print("\n" + json.dumps((small if tiny else large)()))
        return
    if not (CUDA or tiny):
        sys.exit("no GPU here: --tiny runs toy sizes on a CPU")
    start = time.monotonic()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "torch": torch.__version__,
        "tiny": tiny,
        "parts": {name: run_part(name, tiny) for name in parts},
    }
    found["seconds"] = round(time.monotonic() - start, 1)
    text = json.dumps(found, indent=1)
    print(text)
    if json_file:
        json_file.write_text(text + "\n", encoding="utf-8")
    sys.exit(any("error" in value for value in found["parts"].values()))


if __name__ == "__main__":
    tyro.cli(main)
