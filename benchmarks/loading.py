"""How fast images are opened for training, and how much of the time the device would wait for them.

``images``: CPU seconds of one core for JPEGs of COCO's size, to pixel values (as the image processor makes
them) and to bytes that the device unpacks; the pixels have to be equal. ``overlap``: workers and device sleep
for as long as they would work, the device a quarter longer, so that it need not wait. The training takes all
micro-batches of a step at once, as the Trainer does, and the evaluation gathers a window of batches.

    OMP_NUM_THREADS=1 python benchmarks/loading.py
"""

import argparse
import io
import json
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from tinyllava.conversation import ImageRef, ask
from tinyllava.data.images import open_image
from tinyllava.data.workers import PREFETCHED, begin_worker, usable_workers
from tinyllava.inference import batches
from tinyllava.inference.shared_prefix import ImageGroup, grow_tree
from tinyllava.model.packing import ImagePacking
from tinyllava.model.processing import TinyLlavaProcessor
from train_samples import make_tokenizer

WORKERS = 2
LOAD_SECONDS = 0.024  # of a micro-batch, in one worker
COMPUTE_SECONDS = 1.25 * LOAD_SECONDS / WORKERS  # of a micro-batch, on the device
ENCODERS = {
    "CLIP-L/14 at 336 px": CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ),
    "SigLIP-so400m/14 at 384 px": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
}


def make_processor(image_processor: Any) -> TinyLlavaProcessor:
    """Return a processor of LLaVA's kind around an image processor."""
    return TinyLlavaProcessor(
        image_processor=image_processor, tokenizer=make_tokenizer(), chat_template="", num_image_tokens=576
    )


def make_jpegs(number: int, width: int = 640, height: int = 480) -> list[ImageRef]:
    """Return JPEGs with coarse structure, of the size of COCO's images."""
    noise = np.random.default_rng(0)
    found = []
    for _ in range(number):
        coarse = noise.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
            data, "JPEG", quality=90
        )
        found.append(ImageRef(data=data.getvalue()))
    return found


def measure_images(num_images: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time both ways in turn, image by image, and take the medians."""
    torch.set_num_threads(1)
    refs, found = make_jpegs(num_images), {}
    for name, image_processor in ENCODERS.items():
        processor = make_processor(image_processor)
        packing = ImagePacking(processor)
        times: dict[str, list[float]] = {"pixels": [], "bytes": [], "unpack": []}
        for _ in range(rounds):
            for ref in refs:
                image, clock = [], [time.process_time()]
                for way in (processor.to_pixels, packing.pack):
                    image.append(way([open_image(ref)]))
                    clock.append(time.process_time())
                unpacked = packing.unpack(image[1])
                clock.append(time.process_time())
                assert torch.equal(unpacked, image[0]), "the pixels differ"
                for way, seconds in zip(times.values(), np.diff(clock), strict=True):
                    way.append(seconds)
        medians = {way: float(np.median(seconds)) for way, seconds in times.items()}
        found[name] = {
            "images_per_second_before": 1 / medians["pixels"],
            "images_per_second": 1 / medians["bytes"],
            "over_before": medians["pixels"] / medians["bytes"],
            "unpack_milliseconds": 1000 * medians["unpack"],
            "shared_memory_over_before": image[1].nbytes / image[0].nbytes,
        }
    return found


class _Sleeping(Dataset[int]):
    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> int:
        time.sleep(LOAD_SECONDS)
        return index


def train(accumulation: int, prefetch_factor: int, num_steps: int) -> float:
    """Return the share of the ideal rate of a training, its first step not counted."""
    loader = DataLoader(
        _Sleeping(accumulation * (num_steps + 3)),
        batch_size=None,
        num_workers=WORKERS,
        prefetch_factor=prefetch_factor,
        worker_init_fn=begin_worker,
    )
    taken = iter(loader)
    start = 0.0
    for step in range(num_steps + 1):
        for _ in range(accumulation):
            next(taken)
        if step == 0:
            start = time.perf_counter()  # the second step's batches are being prepared
        time.sleep(accumulation * COMPUTE_SECONDS)
    return (num_steps + 1) * accumulation * COMPUTE_SECONDS / (time.perf_counter() - start)


def evaluate(prefetched: bool, num_groups: int, batch_tokens: int) -> float:
    """Return the share of the ideal rate of an evaluation, its first window not counted."""
    processor = make_processor(ENCODERS["CLIP-L/14 at 336 px"])
    talks = [ask("What is it?", ImageRef(name=str(number))) for number in range(num_groups)]
    tree = grow_tree(
        [[processor.image_token_id] * processor.num_image_tokens + [1] * 30], processor.image_token_id
    )

    def prepare_slowly(*_: object) -> ImageGroup:
        time.sleep(LOAD_SECONDS)
        return ImageGroup(tree=tree)

    def groups() -> Iterator[Any]:
        yield from batches.prepare(
            processor,
            talks,
            [(number,) for number in range(num_groups)],
            num_workers=WORKERS,
            batch_tokens=batch_tokens if prefetched else 0,
        )

    with patch.object(batches, "prepare_group", prepare_slowly):
        start, busy = 0.0, 0.0
        for batch in batches.fill_batches(groups(), batch_tokens):
            start = start or time.perf_counter()
            seconds = len(batch) * COMPUTE_SECONDS
            time.sleep(seconds)
            busy += seconds
    return busy / (time.perf_counter() - start)


def main() -> None:
    """Measure both and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("images", "overlap"), default=["images", "overlap"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accumulation", nargs="+", type=int, default=[16, 32, 128])
    parser.add_argument("--steps", type=int, default=4)
    known = parser.parse_args()
    found: dict[str, Any] = {}
    if "images" in known.parts:
        found["images"] = measure_images(known.images, known.rounds)
    if "overlap" in known.parts:
        for accumulation in known.accumulation:
            ahead = usable_workers(WORKERS, 1, ahead=accumulation).prefetch_factor
            found[f"accumulation {accumulation}"] = {
                "prefetch_factor": ahead,
                "share_of_ideal": train(accumulation, ahead, known.steps),
                "share_of_ideal_before": train(accumulation, PREFETCHED, known.steps),
            }
        found["evaluation"] = {
            "share_of_ideal": evaluate(True, 300, 8192),
            "share_of_ideal_before": evaluate(False, 300, 8192),
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
