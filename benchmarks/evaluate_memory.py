"""Peak main memory of an evaluation against the number of questions, each size in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/evaluate_memory.py
    OMP_NUM_THREADS=1 python benchmarks/evaluate_memory.py --answerer model --sizes 2000 20000

With ``--answerer stand-in`` this is real: reading the official file of questions, looking for every image,
grouping by image, writing answers as they come, reading them again, normalising, and writing predictions,
LLaVA's answer file and the file for the server. The answers themselves are made up: no image is opened,
nothing is tokenised, no model runs. ``--answerer model`` does all of it, with a background process that opens
images and tokenises, and a model that is real in its code but has two layers, 4 image tokens and answers of
at most two tokens. What a model of a useful size takes comes on top, whatever the number of questions.

Questions (5.49 an image, as in VQAv2's test set) and images (64 x 64, a few files under many names) are
made up in both.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from tinyllava.conversation import Answer

QUESTIONS_A_IMAGE = 447_793 / 81_434
NUM_FILES = 16
TEXT = """
what is the color of man woman dog cat table sky left right on in near how many people are there
does this look like an image which animal sport sign number time day wearing holding standing
behind bus train food
"""

WORDS = TEXT.split()


def make_data(folder: Path, num_questions: int) -> None:
    """Write questions and images as VQAv2's test set has them."""
    from PIL import Image

    generator = random.Random(0)
    images = folder / "test2015"
    images.mkdir(parents=True)
    for number in range(NUM_FILES):
        Image.frombytes("RGB", (64, 64), generator.randbytes(3 * 64 * 64)).save(folder / f"{number}.jpg")
    num_images = round(num_questions / QUESTIONS_A_IMAGE)
    for number in range(num_images):
        os.link(folder / f"{number % NUM_FILES}.jpg", images / f"COCO_test2015_{number:012d}.jpg")
    questions = [
        {
            "image_id": number * num_images // num_questions,
            "question": " ".join(generator.choices(WORDS, k=generator.randint(4, 9))).capitalize() + "?",
            "question_id": number,
        }
        for number in range(num_questions)
    ]
    path = folder / "v2_OpenEnded_mscoco_test2015_questions.json"
    path.write_text(json.dumps({"questions": questions}), encoding="utf-8")


def make_model(folder: Path) -> None:
    """Save a checkpoint of toy size with a tokenizer that was trained on the words of the questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    from tinyllava.config import ModelConfig
    from tinyllava.model.assemble import assemble

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=0, bos_token_id=0, **sizes
    )
    LlamaForCausalLM(text).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **sizes)).save_pretrained(
        folder / "vision"
    )
    side = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side).save_pretrained(folder / "vision")
    model, processor = assemble(
        ModelConfig(
            vision_encoder=str(folder / "vision"), language_model=str(folder / "language"), template="phi"
        )
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def make_up_answers(
    chat: object, conversations: object, groups: Sequence[tuple[int, ...]], *_: object
) -> Iterator[list[tuple[int, Answer]]]:
    """Take the place of ``tinyllava.evaluation.run.ask_groups``: an answer in the form of a benchmark's."""
    for group in groups:
        yield [(index, Answer(WORDS[index % len(WORDS)].capitalize() + ".")) for index in group]


def measure(folder: Path, answerer: str) -> dict[str, float]:
    """Evaluate what is in the folder, and return this process's memory before and at its peak, in MB."""
    from tinyllava.evaluation import run as evaluation
    from tinyllava.evaluation.benchmarks import BENCHMARKS
    from tinyllava.inference.chat import Chat

    chat = Chat.open(folder / "model", device="cpu")
    before = resident_mb("VmRSS")
    benchmark = replace(BENCHMARKS["vqav2-test"], max_new_tokens=2)
    start = time.perf_counter()
    ask_groups = make_up_answers if answerer == "stand-in" else evaluation.ask_groups
    with patch.object(evaluation, "ask_groups", ask_groups):
        result = evaluation.evaluate(
            chat,
            benchmark,
            folder / "data",
            folder / "output",
            model=str(folder / "model"),
            settings=evaluation.Settings(num_workers=1),
        )
    seconds = time.perf_counter() - start
    assert result is not None
    written = sum(path.stat().st_size for path in (folder / "output").rglob("*") if path.is_file())
    return {
        "questions": result.num_questions,
        "images": result.num_images,
        "missing": result.num_missing,
        "before_mb": before,
        "peak_mb": resident_mb("VmHWM"),
        "worker_peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
        "written_mb": written / 1e6,
        "seconds": seconds,
    }


def resident_mb(field_name: str) -> float:
    """Read a field of the process's status: VmRSS is the size now, VmHWM the highest so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field_name)) / 1e6


def run(num_questions: int, answerer: str) -> dict[str, float]:
    """Make the data and measure in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="tinyllava-") as name:
        folder = Path(name)
        make_data(folder / "data", num_questions)
        make_model(folder)
        command = [sys.executable, __file__, "--folder", name, "--answerer", answerer]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found


def main() -> None:
    """Print one row for each size, or measure one folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 447_793])
    parser.add_argument("--answerer", choices=["stand-in", "model"], default="stand-in")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.folder:
        print(json.dumps(measure(Path(known.folder), known.answerer)))
        return
    print("| questions | images | before, MB | peak, MB | bytes a question | worker, MB | written, MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in known.sizes:
        row = run(size, known.answerer)
        assert (row["questions"], row["missing"]) == (size, 0), row
        growth = 1e6 * (row["peak_mb"] - row["before_mb"]) / size
        print(
            f"| {size:,} | {row['images']:,.0f} | {row['before_mb']:,.0f} | {row['peak_mb']:,.0f} | "
            f"{growth:,.0f} | {row['worker_peak_mb']:,.0f} | {row['written_mb']:,.0f} |",
            flush=True,
        )
        print(f"{size:,} questions in {row['seconds']:,.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
