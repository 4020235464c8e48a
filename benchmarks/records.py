"""What it costs to bring a data set of the paper's size to its first step: reading, checking, measuring.

Makes a look-alike of LLaVA-1.5-mix-665k (its sources, turns and lengths, with the words of docs/), then reads
it the first and the second time. Run: python benchmarks/records.py FOLDER TOKENIZER [--records 665298]
"""

import argparse
import json
import random
import re
from pathlib import Path

from PIL import Image

SOURCES = {
    # source: (records of 665,298, question and answer pairs, words of a question, words of an answer)
    "coco/train2017": (364_100, 5, 9, 16),
    "vg/VG_100K": (86_417, 10, 9, 4),
    "ocr_vqa/images": (80_000, 6, 9, 5),
    "gqa/images": (72_140, 9, 9, 2),
    "textvqa/train_images": (21_953, 1, 40, 14),
    "": (40_688, 3, 30, 220),
}
"""Of the published file: records by source; turns and words so that a record has about 250 tokens of text."""
TOTAL = 665_298
NUM_FILES = 500  # images of a source: a record names one of them


def make_records(folder: Path, num_records: int, seed: int = 0) -> Path:
    """Write records.json with images beside it; the same arguments give the same bytes."""
    path = folder / f"records-{num_records}.json"
    if path.exists():
        return path
    rng = random.Random(seed)
    docs = sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    stream = re.findall(r"[A-Za-z]+[,.;]?", " ".join(file.read_text(encoding="utf-8") for file in docs))
    for source in filter(None, SOURCES):
        (folder / source).mkdir(parents=True, exist_ok=True)
        for number in range(NUM_FILES):
            image = folder / source / f"{number:012}.jpg"
            if not image.exists():
                Image.new("RGB", (64, 48), (number % 256, number // 256, 90)).save(image)
    sources = rng.choices(list(SOURCES), [counts[0] for counts in SOURCES.values()], k=num_records)
    with path.open("w", encoding="utf-8") as file:
        for index, source in enumerate(sources):
            record = make_record(index, source, rng, stream)
            file.write(("[" if index == 0 else ",\n") + json.dumps(record))
        file.write("]\n")
    return path


def make_record(index: int, source: str, rng: random.Random, stream: list[str]) -> dict[str, object]:
    """Return one record of a source."""
    _, num_pairs, num_asked, num_said = SOURCES[source]
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
        record["image"] = f"{source}/{rng.randrange(NUM_FILES):012}.jpg"
    else:
        record["model"] = ""
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=TOTAL)
    known = parser.parse_args()
    print(make_records(known.folder, known.records))
