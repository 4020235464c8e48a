"""How fast questions about images are answered, against the published loop and plain batching.

The published loop asks one question at a time through transformers' own ``generate`` and encodes the image
each time; plain batching gives the same ``generate`` several questions; repeating encodes the image and its
tokens once and copies their keys and values for every question. Models have random weights in real layouts,
prompts the lengths of the benchmarks. The limit is what images and the tokens that have to be computed
once take at the speed that plain forward passes reach in the same run. On a GPU all is done in bfloat16.

    OMP_NUM_THREADS=1 python benchmarks/evaluate.py --shape pope
    python benchmarks/evaluate.py --shape pope gqa vqav2 --image-tokens 576 729 --model tinyllama-shape
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, SiglipVisionConfig

from tinyllava.evaluation.run import suitable_batch_tokens
from tinyllava.inference.batches import Prepared, fill_batches
from tinyllava.inference.shared_prefix import ImageGroup, answer_groups, grow_tree
from tinyllava.model import TinyLlavaConfig, TinyLlavaForConditionalGeneration

T = TypeVar("T")
WAYS = ("published", "batched", "repeated", "shared")
NUM_SYSTEM_TOKENS = 35  # "A chat between a curious user ...", "USER:"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a benchmark asks of an image. Token counts are of Llama's tokenizer, suffix and role included."""

    num_questions: int
    num_opening_tokens: int
    """First tokens of a question, drawn from few: "Is there a", "What", "Is the"."""
    num_openings: int
    num_own_tokens: int
    num_answer_tokens: int
    """End of the answer included."""


SHAPES = {
    "pope": Shape(
        num_questions=18, num_opening_tokens=3, num_openings=1, num_own_tokens=21, num_answer_tokens=2
    ),
    "gqa": Shape(
        num_questions=31, num_opening_tokens=2, num_openings=8, num_own_tokens=24, num_answer_tokens=2
    ),
    "vqav2": Shape(
        num_questions=3, num_opening_tokens=2, num_openings=8, num_own_tokens=22, num_answer_tokens=2
    ),
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "starter": {  # SmolLM2-135M
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "tinyllama-shape": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
}


def build_model(
    language_model: str, num_image_tokens: int, depth: float
) -> TinyLlavaForConditionalGeneration:
    """Return a model of random weights: CLIP-L/14 at 336 (576 tokens) or SigLIP-so400m/14 at 384 (729).

    ``depth`` is the share of the layers that are kept, of encoder and language model alike.
    """
    if num_image_tokens == 576:
        vision = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=round(23 * depth),
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
    else:
        vision = SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=round(26 * depth),
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        )
    sizes = dict(LANGUAGE_MODELS[language_model])
    sizes["num_hidden_layers"] = round(sizes["num_hidden_layers"] * depth)
    text = LlamaConfig(**sizes, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    config = TinyLlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=3,
        image_seq_length=num_image_tokens,
        connector="mlp",
        num_patches=num_image_tokens,
        num_prefix_tokens=int(num_image_tokens == 576),
        vision_width=vision.hidden_size,
        tie_word_embeddings=bool(sizes.get("tie_word_embeddings", False)),
    )
    torch.manual_seed(0)
    model = TinyLlavaForConditionalGeneration(config)
    model.train(False)
    model.generation_config.update(
        eos_token_id=None, pad_token_id=0, do_sample=False
    )  # answers of set length
    return model


def make_prompts(
    shape: Shape, num_images: int, num_image_tokens: int, vocab_size: int
) -> list[list[list[int]]]:
    """Return token ids of the questions about each image."""
    generator = random.Random(0)

    def draw(num: int) -> list[int]:
        return [generator.randrange(4, vocab_size) for _ in range(num)]

    trunk = draw(NUM_SYSTEM_TOKENS) + [3] * num_image_tokens
    openings = [draw(shape.num_opening_tokens) for _ in range(shape.num_openings)]
    return [
        [trunk + generator.choice(openings) + draw(shape.num_own_tokens) for _ in range(shape.num_questions)]
        for _ in range(num_images)
    ]


class Bench:
    """The four ways to answer, and the speed of plain forward passes."""

    def __init__(self, known: argparse.Namespace) -> None:
        self.device = known.device
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        with torch.device(self.device):
            self.model = build_model(known.model, known.image_tokens, known.depth).to(dtype)
        self.shape = SHAPES[known.shape]
        vocab_size = self.model.config.text_config.vocab_size
        self.prompts = make_prompts(self.shape, known.images, known.image_tokens, vocab_size)
        side = self.model.config.vision_config.image_size
        self.pixels = torch.randn(known.images, 3, side, side)
        self.num_tokens = self.shape.num_answer_tokens
        self.batch_tokens = suitable_batch_tokens(self.model)
        self.clock = time.process_time if known.clock == "cpu" else time.perf_counter
        groups = [grow_tree(prompts, 3) for prompts in self.prompts]
        self.groups = [
            Prepared(indices=(i,), group=ImageGroup(tree=tree, pixel_values=self.pixels[i : i + 1]))
            for i, tree in enumerate(groups)
        ]

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """Return what ``work`` gives and the seconds it takes."""
        self._wait()
        start = self.clock()
        given = work()
        self._wait()
        return given, self.clock() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def generate(self, questions: list[tuple[int, int]]) -> list[list[int]]:
        """Answer (image, question) pairs in one batch of transformers' own generate; all of one length."""
        ids = torch.tensor([self.prompts[p][q] for p, q in questions], device=self.device)
        pixels = self.pixels[[p for p, _ in questions]].to(self.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=self.num_tokens,
        )
        answers: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return answers

    def share(self) -> list[list[list[int]]]:
        """Answer everything with shared prefixes."""
        answers: dict[int, list[list[int]]] = {}
        for batch in fill_batches(self.groups, self.batch_tokens):
            found = answer_groups(self.model, [prepared.group for prepared in batch], self.num_tokens)
            answers.update((p.indices[0], ids) for p, ids in zip(batch, found, strict=True))
        return [answers[i] for i in range(len(self.groups))]

    @torch.inference_mode()
    def repeat(self) -> list[list[list[int]]]:
        """Answer image by image; keys and values of its tokens are repeated for every question.

        Two images are enough to time, because none is done together with another.
        """
        language_model, embed = self.model.language_model, self.model.get_input_embeddings()
        answers = []
        for prompts, pixels in zip(self.prompts[:2], self.pixels[:2], strict=True):
            ids = torch.tensor(prompts, device=self.device)
            num_shared = NUM_SYSTEM_TOKENS + int((ids[0] == 3).sum())
            trunk = embed(ids[:1, :num_shared]).clone()
            features = self.model.model.get_image_features(pixels[None].to(self.device, self.model.dtype))
            trunk[0, NUM_SYSTEM_TOKENS:] = features[0].to(trunk.dtype)
            cache = DynamicCache()
            language_model(inputs_embeds=trunk, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(prompts))
            new, found = ids[:, num_shared:], []
            for _ in range(self.num_tokens):
                output = language_model(inputs_embeds=embed(new), past_key_values=cache, use_cache=True)
                new = self.model.lm_head(output.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
                found.append(new)
            answers.append(torch.cat(found, dim=1).tolist())
        return answers

    def warm_up(self, sample: list[tuple[int, int]], batch: list[tuple[int, int]]) -> None:
        """Do once what the first calls on a device take longer for."""
        self.generate(sample[:1])
        self.forward_seconds()
        if self.device == "cuda":
            self.generate(batch)
            self.share()
            self.repeat()

    @torch.inference_mode()
    def forward_seconds(self) -> tuple[float, float]:
        """Return seconds an image (encoder, connector) and seconds a token (language model)."""
        num = min(len(self.pixels), 32 if self.device == "cuda" else 4)
        pixels = self.pixels[:num].to(self.device)
        length = len(self.groups[0].group.tree.trunk)
        rows = max(1, min(self.batch_tokens // length, len(self.groups)))
        embeds = torch.randn(rows, length, self.model.config.text_config.hidden_size, device=self.device)
        embeds = embeds.to(self.model.dtype)
        encode = self.timed(lambda: self.model.model.get_image_features(pixels))[1] / num
        _, forward = self.timed(lambda: self.model.language_model(inputs_embeds=embeds, use_cache=False))
        return encode, forward / (rows * length)


def measure(known: argparse.Namespace) -> dict[str, float]:
    """Run the ways in turn, ``known.rounds`` times, and take the median of each."""
    bench = Bench(known)
    pairs = [(p, q) for p in range(known.images) for q in range(bench.shape.num_questions)]
    sample = random.Random(0).sample(pairs, min(known.sample, len(pairs)))
    size = max(1, min(bench.batch_tokens // len(bench.prompts[0][0]), len(pairs)))
    batch = pairs[:size]
    bench.warm_up(sample, batch)
    times: dict[str, list[float]] = {name: [] for name in (*WAYS, "encode", "token")}
    num_same = 0
    for _ in range(known.rounds):
        alone = [bench.timed(partial(bench.generate, [pair])) for pair in sample]
        times["published"] += [seconds for _, seconds in alone]
        times["batched"].append(bench.timed(lambda: bench.generate(batch))[1] / len(batch))
        before = bench.forward_seconds()
        shared, seconds = bench.timed(bench.share)
        after = bench.forward_seconds()  # before and after: another program may have come or gone
        times["shared"].append(seconds / len(pairs))
        repeated, seconds = bench.timed(bench.repeat)
        times["repeated"].append(seconds / sum(map(len, repeated)))
        times["encode"] += [before[0], after[0]]
        times["token"] += [before[1], after[1]]
        num_same = sum([shared[p][q]] == ids for (p, q), (ids, _) in zip(sample, alone, strict=True))
        print(f"answers equal to one at a time: {num_same} of {len(sample)}", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    unique = sum(g.group.tree.num_tokens for g in bench.groups) + len(pairs) * (bench.num_tokens - 1)
    limit = (known.images * medians["encode"] + unique * medians["token"]) / len(pairs)
    return {
        **medians,
        "num_images": known.images,
        "num_questions": len(pairs),
        "unique_tokens": unique,
        "same_answers": num_same,
        "sample": len(sample),
        "over_published": medians["published"] / medians["shared"],
        "over_batched": medians["batched"] / medians["shared"],
        "over_repeated": medians["repeated"] / medians["shared"],
        "share_of_limit": limit / medians["shared"],
    }


def report(known: argparse.Namespace) -> dict[str, Any]:
    """Measure one combination and print it."""
    found = measure(known)
    questions = found["num_questions"] / found["num_images"]
    print(
        f"{known.shape}: {questions:.0f} questions an image, {known.image_tokens} image tokens, "
        f"{known.model}, depth {known.depth:g}, {known.device}"
    )
    for way in WAYS:
        rate = 1 / found[way]
        print(f"  {way:10} {rate:9.2f} questions/s  {rate / questions:8.3f} images/s")
    print(f"over the published loop: {found['over_published']:.1f}x")
    print(f"over plain batching: {found['over_batched']:.1f}x")
    print(f"over a repeated cache: {found['over_repeated']:.1f}x")
    print(f"share of the limit: {100 * found['share_of_limit']:.0f}%", flush=True)
    return {**vars(known), **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=["pope"])
    add(
        "--model",
        nargs="+",
        choices=LANGUAGE_MODELS,
        default=["starter"],
        help="layout of the language model",
    )
    add("--image-tokens", nargs="+", type=int, choices=[576, 729], default=[576])
    add("--depth", type=float, default=1.0, help="share of the layers of both parts, for slow machines")
    add("--images", type=int, default=4)
    add("--sample", type=int, default=4, help="questions timed by the published loop")
    add("--rounds", type=int, default=1)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine busy with other work")
    add("--json", default="", help="file for the numbers, written after every combination")
    given = vars(parser.parse_args())
    results = []
    for model, tokens, shape in product(given["model"], given["image_tokens"], given["shape"]):
        known = argparse.Namespace(**{**given, "model": model, "image_tokens": tokens, "shape": shape})
        results.append(report(known))
        if known.json:
            Path(known.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
