"""What it costs to bring a data set of the paper's size to its first step: reading, checking, measuring.

Makes a look-alike of LLaVA-1.5-mix-665k (its sources, turns and lengths, with the words of docs/), then reads
it the first and the second time. Run: python benchmarks/records.py FOLDER TOKENIZER [--records 665298]
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

SOURCES = {
    # source: (records of 665,298, their images, question and answer pairs, words of a question, of an answer)
    "coco/train2017": (364_100, 118_000, 5, 9, 16),
    "vg/VG_100K": (86_417, 86_417, 10, 9, 4),
    "ocr_vqa/images": (80_000, 80_000, 6, 9, 5),
    "gqa/images": (72_140, 72_140, 9, 9, 2),
    "textvqa/train_images": (21_953, 21_953, 1, 40, 14),
    "": (40_688, 0, 3, 30, 220),
}
"""Of the published file: records by source; turns and words so that a record has about 250 tokens of text."""
TOTAL = 665_298
NUM_FILES = 500  # different images of a source: its other names are links to them


def make_records(folder: Path, num_records: int, seed: int = 0) -> Path:
    """Write records.json with images beside it; the same arguments give the same bytes."""
    path = folder / f"records-{num_records}.json"
    if path.exists():
        return path
    rng = random.Random(seed)
    docs = sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    stream = re.findall(r"[A-Za-z]+[,.;]?", " ".join(file.read_text(encoding="utf-8") for file in docs))
    num_images = {
        source: -(-counts[1] * num_records // TOTAL) for source, counts in SOURCES.items() if source
    }
    for source, number in num_images.items():
        make_images(folder / source, number)
    sources = rng.choices(list(SOURCES), [counts[0] for counts in SOURCES.values()], k=num_records)
    with path.open("w", encoding="utf-8") as file:
        for index, source in enumerate(sources):
            record = make_record(index, source, rng, stream, num_images)
            file.write(("[" if index == 0 else ",\n") + json.dumps(record))
        file.write("]\n")
    return path


def make_images(folder: Path, number: int) -> None:
    """Write images, the first ``NUM_FILES`` of them as files of their own; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        image = folder / f"{index:012}.jpg"
        if image.exists():
            continue
        if index < NUM_FILES:
            Image.new("RGB", (64, 48), (index % 256, index // 256, 90)).save(image)
        else:
            image.hardlink_to(folder / f"{index % NUM_FILES:012}.jpg")


def make_record(
    index: int, source: str, rng: random.Random, stream: list[str], num_images: dict[str, int]
) -> dict[str, object]:
    """Return one record of a source."""
    _, _, num_pairs, num_asked, num_said = SOURCES[source]
    turns = []
    for pair in range(max(1, round(rng.expovariate(1 / num_pairs)))):
        for speaker, mean in (("human", num_asked), ("gpt", num_said)):
            start = rng.randrange(len(stream) - 2000)
            text = " ".join(stream[start : start + max(1, min(1500, round(rng.gauss(mean, mean / 3))))])
            mark = "<image>\n" if source and not turns else ""
            turns.append({"from": speaker, "value": mark + text.capitalize() + "?."[speaker == "gpt"]})
        if pair > 60:
            break
    record: dict[str, object] = {"id": f"{index:012}", "conversations": turns}
    if source:
        record["image"] = f"{source}/{rng.randrange(num_images[source]):012}.jpg"
    else:
        record["model"] = ""
    return record


def private_megabytes() -> float:
    """Return the memory that this process has written and shares with no other.

    Clean pages of mapped files are cache, which the system takes back when it needs memory.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1000


def cpu_seconds() -> float:
    """Return the time that cores have spent on this process and those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def make_processor(tokenizer: Path) -> Any:
    """Return a processor with the ChatML template."""
    from transformers import CLIPImageProcessorPil

    from tinyllava.model.processing import TinyLlavaProcessor
    from tinyllava.model.tokenizer import open_tokenizer
    from tinyllava.parts.templates import read_template

    opened = open_tokenizer(tokenizer)
    opened.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return TinyLlavaProcessor(
        image_processor=CLIPImageProcessorPil(), tokenizer=opened, chat_template=read_template("chatml")
    )


def measure_run(path: Path, tokenizer: Path, store: Path) -> dict[str, float]:
    """Read and measure the records as a stage does before its first step; a second call is a second start."""
    from tinyllava.config import DataConfig
    from tinyllava.data.conversion import read_stored
    from tinyllava.data.dataset import Examples, measure
    from tinyllava.data.distinct_images import DistinctImages
    from tinyllava.data.hashes import ImageHashes, images_digest, records_digest
    from tinyllava.data.store import kept_digest

    processor = make_processor(tokenizer)
    found: dict[str, float] = {}
    before = private_megabytes()
    start = clock = time.perf_counter()
    spent = first = cpu_seconds()

    def lap(name: str) -> None:
        nonlocal clock, spent
        found[f"{name}_seconds"], clock = round(time.perf_counter() - clock, 2), time.perf_counter()
        found[f"{name}_cpu_seconds"], spent = round(cpu_seconds() - spent, 2), cpu_seconds()
        found[f"{name}_private_megabytes"] = round(private_megabytes() - before, 1)
        print(name, found[f"{name}_seconds"], found[f"{name}_cpu_seconds"], file=sys.stderr, flush=True)

    data = DataConfig(records=(str(path),))
    records = read_stored(data, "", store)
    lap("records")
    examples = Examples(conversations=records.conversations, processor=processor)
    examples, _ = measure(examples, 2048, ("too_long",))
    lap("lengths")
    found["lengths_milliseconds_a_record"] = round(1000 * found["lengths_cpu_seconds"] / len(examples), 3)
    talks = examples.conversations
    kept_digest(talks, "records", records_digest)
    lap("records_digest")
    hashes = ImageHashes(store / "hashes.sqlite").find(DistinctImages(talks))
    kept_digest(talks, f"images-{hashes.digest[:24]}", lambda _: images_digest(hashes))
    lap("images")
    examples.encode(examples.conversations[len(examples) // 2])
    found["seconds"] = round(time.perf_counter() - start, 2)
    found["cpu_seconds"] = round(cpu_seconds() - first, 2)
    found["load_average"] = round(os.getloadavg()[0], 1)
    found["private_megabytes"] = round(private_megabytes() - before, 1)
    found["mean_tokens"] = round(sum(examples.lengths) / len(examples), 1)
    found["worker_private_megabytes"] = _worker_memory(examples)
    return found


def measure_alone(path: Path, tokenizer: Path, store: Path) -> dict[str, float]:
    """Return CPU milliseconds a record of parts of the work, each alone in one process, on 2,048 records."""
    from tinyllava.config import DataConfig
    from tinyllava.data.conversion import read_stored

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    processor = make_processor(tokenizer)
    talks = read_stored(DataConfig(records=(str(path),)), "", store).conversations[:2048]
    known = list(talks)
    texts = [processor.render(talk)[0] for talk in known]
    pipeline = processor.tokenizer.backend_tokenizer
    with path.open(encoding="utf-8") as file:
        head = "".join(islice(file, len(known))).rstrip(",\n") + "]"
    works = {
        "json": lambda: json.loads(head),
        "unpack": lambda: list(talks),
        "template": lambda: [processor.render(talk) for talk in known],
        "tokenizer": lambda: [pipeline.encode_batch(texts[n : n + 256]) for n in range(0, len(texts), 256)],
        "tokenise": lambda: [processor.encode_all(known[n : n + 256]) for n in range(0, len(known), 256)],
    }
    found = {}
    for name, work in works.items():
        times = []
        for _ in range(5):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        found[f"{name}_milliseconds"] = round(1000 * min(times) / len(known), 4)
    return found


def measure_check(path: Path) -> dict[str, float]:
    """Check the records as ``tinyllava data check`` does, and watch the memory of this process."""
    from tinyllava.cli import main

    peak, is_done = [0.0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.1):
            peak[0] = max(peak[0], private_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with redirect_stdout(sys.stderr):
        assert main(["data", "check", str(path)]) == 0
    is_done.set()
    watcher.join()
    return {"seconds": round(time.perf_counter() - start, 1), "peak_private_megabytes": round(peak[0], 1)}


DEFECTS = ("missing_image", "unanswered", "empty_answer", "roles", "malformed", "image_count")


def plant_defects(path: Path, number: int) -> tuple[Path, dict[str, list[int]]]:
    """Write a copy of the records with defects at even distances; return it, and where each kind is."""
    target = path.with_name(f"{path.stem}-{number}-defects.json")
    planted: dict[str, list[int]] = {name: [] for name in DEFECTS}
    with path.open(encoding="utf-8") as file:
        total = sum(1 for _ in file) - 1
    step = max(1, total // number)
    with path.open(encoding="utf-8") as source, target.open("w", encoding="utf-8") as file:
        for index, line in enumerate(source):
            body = line.strip().removeprefix("[").removesuffix(",")
            name = DEFECTS[index // step % len(DEFECTS)]
            if index % step == 0 and index // step < number and body != "]":
                record = json.loads(body)
                if name != "missing_image" or "image" in record:
                    damage(record, name)
                    planted[name].append(index)
                    line = line.replace(body, json.dumps(record))
            file.write(line)
    return target, planted


def damage(record: dict[str, Any], name: str) -> None:
    """Give a record a defect."""
    turns = record["conversations"]
    if name == "missing_image":
        record["image"] = record["image"].replace(".jpg", "-gone.jpg")
    elif name == "unanswered":
        turns.pop()
    elif name == "empty_answer":
        turns[-1]["value"] = " "
    elif name == "roles":
        turns.insert(0, {"from": "human", "value": "And?"})
    elif name == "malformed":
        turns[0]["value"] = None
    else:
        turns[0]["value"] += " <image>"


def measure_defects(path: Path, store: Path, number: int) -> dict[str, float]:
    """Convert a file with planted defects, and compare the report with what was planted."""
    from tinyllava.config import DataConfig
    from tinyllava.data.conversion import read_stored
    from tinyllava.data.defects import Defects

    target, planted = plant_defects(path, number)
    start, before = cpu_seconds(), private_megabytes()
    found = None
    try:
        read_stored(DataConfig(records=(str(target),)), "", store)
    except Defects as error:
        found = error
    assert found is not None
    assert found.counts == {name: len(places) for name, places in planted.items()}, found.counts
    report = str(found)
    for name, places in planted.items():
        shown = re.findall(r"record (\d+) ", report.partition(f"  {name} (")[2])[:3]
        assert shown == [str(place) for place in places[:3]], (name, shown, places[:3])
    print(report, file=sys.stderr)
    return {
        "defects": sum(map(len, planted.values())),
        "cpu_seconds": round(cpu_seconds() - start, 2),
        "private_megabytes": round(private_megabytes() - before, 1),
        "report_lines": report.count("\n") + 1,
    }


def _worker_memory(examples: Any) -> float:
    """Return what a forked worker holds for itself after it has read 2,000 records of all the file."""
    from tinyllava.data.workers import begin_worker

    reader, writer = os.pipe()
    if os.fork() == 0:
        begin_worker()
        before = private_megabytes()
        step = max(1, len(examples) // 2000)
        for place in range(0, len(examples), step):
            examples.encode(examples.conversations[place])
        os.write(writer, f"{private_megabytes() - before:.1f}".encode())
        os._exit(0)
    os.wait()
    return float(os.read(reader, 100))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer", type=Path, help="folder of a tokenizer, such as that of SmolLM2")
    parser.add_argument("--records", type=int, default=TOTAL)
    parser.add_argument("--once", choices=("start", "alone", "check"), help="measure this one and print it")
    parser.add_argument("--defects", type=int, default=0, help="plant so many, and measure their report")
    known = parser.parse_args()
    path = make_records(known.folder, known.records)
    store = known.folder / f"store-{known.records}"
    if known.defects:
        print(json.dumps(measure_defects(path, store, known.defects)))
    elif known.once == "check":
        print(json.dumps(measure_check(path)))
    elif known.once:
        work = measure_run if known.once == "start" else measure_alone
        print(json.dumps(work(path, known.tokenizer, store)))
    else:
        shutil.rmtree(store, ignore_errors=True)
        for name, what in (("first start", "start"), ("second start", "start"), ("alone", "alone")):
            command = [sys.executable, __file__, known.folder, known.tokenizer, "--once", what]
            command += ["--records", known.records]  # each is a process of its own
            done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
            print(f"{name}:", done.stdout.strip().splitlines()[-1], flush=True)
