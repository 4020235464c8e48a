"""Our training step against stock LLaVA's: speed, memory and loss, as ratios taken in one run.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py --shape starter

Paper: sections 3.2 and 4.1.2, both stages of the base recipe.

Four ways to train run in fresh processes, take turns batch by batch, and see the same weights and samples.
`stock` is transformers' own class, processor and loss; `ours` is this package's step; `packed` is ours with
the samples of a batch in one row; `cached` is ours with the features of the frozen encoder kept and batches
of similar length, as the starter trains. The optimizer does its whole work at a learning rate of zero, so
that the loss of a round must be the same.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from memory import resident_bytes
from tinyllava.config import FROZEN, FULL, Stage
from tinyllava.data.batches import GroupedSampler
from tinyllava.data.dataset import Collator, Examples, measure
from tinyllava.data.features import FeatureCache
from tinyllava.data.images import open_image
from tinyllava.model.compat import causal_without_looking
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.devices import fastest_attention
from tinyllava.model.modeling import IGNORED, TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.tuning import apply_tuning
from tinyllava.parts.templates import read_template
from tinyllava.training.lean import make_lean
from tinyllava.training.packing import WINDOW
from tinyllava.training.precision import hold_frozen_in_half
from train_samples import (
    COUNTED,
    SHAPES,
    Shape,
    fill_weights,
    forget_peak,
    make_samples,
    make_tokenizer,
    matmul_peak,
)

Way = Literal["stock", "ours", "packed", "cached"]
WAYS: tuple[Way, ...] = ("stock", "ours", "packed", "cached")
TEMPLATES = {"pretrain": "caption", "finetune": "chatml"}
STAGES = {
    "pretrain": Stage(learning_rate=0.0, global_batch_size=1, vision_encoder=FROZEN, connector=FULL),
    "finetune": Stage(
        learning_rate=0.0, global_batch_size=1, vision_encoder=FROZEN, connector=FULL, language_model=FULL
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of the loss; bf16 keeps three digits of each logit
SHARED_CLOCK = "seconds" if torch.cuda.is_available() else "cpu_seconds"


class Contestant:
    """One way to train: its model, its batches and its step.

    Args:
        way: one of ``WAYS``.
        num_batches: batches of a round.
        folder: where features may be kept.
        precision: fp32, or bf16 by autocast as the Trainer does.
    """

    def __init__(
        self, way: Way, stage: str, shape: Shape, num_batches: int, folder: Path, precision: str
    ) -> None:
        self.way, self.stage, self.shape, self.dtype = way, stage, shape, DTYPES[precision]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = make_tokenizer()
        side = shape.vision_encoder["image_size"]
        self.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        with self.device:
            self.model = self._stock_model() if way == "stock" else self._our_model()
        self.model.config.text_config.use_cache = False  # as the Trainer sets it
        fill_weights(self.model)
        self.examples = self._make_examples(num_batches, folder)
        if way != "stock":  # as training does
            hold_frozen_in_half(self.model, precision)
            make_lean(self.model, precision)
        self.batches = [self._make_batch(rows) for rows in self._group(num_batches)]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=0.0, weight_decay=0.0, fused=True
        )  # the Trainer's

    def _parts(self) -> dict[str, Any]:
        return {
            "text_config": LlamaConfig(**self.shape.language_model),
            "image_seq_length": self.shape.num_image_tokens,
            "image_token_index": self.tokenizer.convert_tokens_to_ids("<image>"),
            "tie_word_embeddings": self.shape.language_model["tie_word_embeddings"],
        }

    def _stock_model(self) -> Any:
        vision = CLIPVisionConfig(**self.shape.vision_encoder)
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, **self._parts()))
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        if self.stage == "finetune":
            model.model.language_model.requires_grad_(True)
            model.lm_head.requires_grad_(True)
        return model.train()

    def _our_model(self) -> Any:
        sizes = self.shape.vision_encoder
        cut = sizes | {"num_hidden_layers": sizes["num_hidden_layers"] - 1}  # at the feature layer -2
        config = TinyLlavaConfig(
            vision_config=CLIPVisionConfig(**cut),
            vision_width=sizes["hidden_size"],
            num_patches=self.shape.num_image_tokens,
            **self._parts(),
        )
        model = TinyLlavaForConditionalGeneration(config)
        apply_tuning(model, STAGES[self.stage])
        return model

    def _make_examples(self, num_batches: int, folder: Path) -> Examples:
        samples = make_samples(self.stage, num_batches * self.shape.batch_size, self.shape)
        processor = TinyLlavaProcessor(
            self.image_processor,
            self.tokenizer,
            read_template("chatml"),
            num_image_tokens=self.shape.num_image_tokens,
        )
        template = read_template(TEMPLATES[self.stage])
        examples = Examples(conversations=samples, processor=processor, template=template)
        examples, _ = measure(examples, max_length_tokens=4096, skip=())
        if self.way == "cached":
            examples.features = FeatureCache(folder, self.model, processor)
            examples.features.fill(examples.conversations)
        return examples

    def _group(self, num_batches: int) -> list[list[int]]:
        size, order = self.shape.batch_size, list(range(len(self.examples)))
        if self.way == "cached":
            lengths = self.examples.lengths
            sampler = GroupedSampler(lengths=lengths, with_image=None, batch_size=size, seed=0, window=WINDOW)
            order = list(sampler)
        return [order[i * size : (i + 1) * size] for i in range(num_batches)]

    def _make_batch(self, rows: list[int]) -> dict[str, Any]:
        if self.way == "stock":
            batch = self._stock_collation(rows)
        else:
            image_token = self.examples.processor.image_token_id
            collate = Collator(self.tokenizer.pad_token_id, image_token, packs=self.way == "packed")
            batch = collate([self.examples[i] for i in rows])
            batch["samples"] = len(batch.pop("sample_ids"))
        return send_to_device(batch, self.device)

    def _stock_collation(self, rows: list[int]) -> dict[str, Tensor]:
        """LlavaProcessor pads to the longest; labels are the ids, -100 where the assistant does not speak."""
        examples = self.examples
        processor = LlavaProcessor(
            self.image_processor,
            self.tokenizer,
            patch_size=self.shape.vision_encoder["patch_size"],
            num_additional_image_tokens=1,
            vision_feature_select_strategy="default",
        )
        conversations = [examples.conversations[i] for i in rows]
        encoded = [examples.processor.encode(c, template=examples.template) for c in conversations]
        images = [open_image(image) for c in conversations for image in c.images]
        inputs = processor(images=images, text=[e.text for e in encoded], padding=True, return_tensors="pt")
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, ids, e in zip(labels, inputs["input_ids"], encoded, strict=True):
            assert ids[: len(e.input_ids)].tolist() == e.input_ids, "both processors give the same tokens"
            supervised = torch.tensor(e.supervised).nonzero()
            row[supervised] = ids[supervised]
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        counts = {"samples": len(rows), "num_tokens": int(inputs["attention_mask"].sum())}
        return given | counts | {"labels": labels}

    def step(self, index: int) -> dict[str, float]:
        """Train on one batch and return what it took."""
        batch = dict(self.batches[index])
        num_samples, num_tokens = batch.pop("samples"), batch.pop("num_tokens")
        wall, cpu = time.perf_counter(), time.process_time()
        bf16 = self.dtype is not torch.float32
        with ExitStack() as choices:
            if self.way != "stock":  # as StageTrainer does
                batch.pop("attention_mask", None)
                choices.enter_context(fastest_attention(batch, bf16=bf16))
                choices.enter_context(causal_without_looking(self.model.language_model))
            with torch.autocast(self.device.type, self.dtype, enabled=bf16):
                loss = self.model(**batch).loss
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean_loss = loss.item()  # waits for a GPU
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        num_supervised = int((batch["labels"][:, 1:] != IGNORED).sum())
        return {
            "seconds": wall,
            "cpu_seconds": cpu,
            "samples": num_samples,
            "tokens": num_tokens,
            "positions": batch["labels"].numel(),
            "supervised": num_supervised,
            "loss_sum": mean_loss * num_supervised,
            "gradient_norm": norm.item(),
        }

    def peak_bytes(self) -> int:
        """Most memory of all steps: of the GPU's tensors, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM")


def serve(connection: Connection, *args: Any) -> None:
    """Be one contestant in a process of its own: warm up, then train on the batch that is asked for."""
    contestant = Contestant(*args)
    forget_peak()
    for index in range(len(contestant.batches)):
        contestant.step(index)
    connection.send("ready")
    while (index := connection.recv()) is not None:
        connection.send(contestant.step(index))
    connection.send(contestant.peak_bytes())
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:  # which holds tensors for longer
        for index in range(len(contestant.batches)):
            contestant.step(index)
    connection.send(counter.get_total_flops())


@dataclass
class Measured:
    """One way in one stage, over all rounds."""

    rounds: list[dict[str, float]]
    """Sums over the batches of a round; ``gradient_norm`` is the first batch's."""
    peak_bytes: int = 0
    flops: float = 0
    """Of the matrix products of one round."""

    def each(self, name: str, per: str | None = None) -> list[float]:
        """A sum of each round, or its ratio to another sum."""
        return [r[name] / (r[per] if per else 1) for r in self.rounds]


def compare(
    stage: str, shape: Shape, num_batches: int, num_rounds: int, precision: str, ways: Sequence[Way]
) -> tuple[dict[Way, Measured], list[float]]:
    """Let the ways take turns; return what each measured and the matmul peak of each round."""
    spawn = multiprocessing.get_context("spawn")
    lines: dict[Way, Connection] = {}
    measured: dict[Way, Measured] = {}
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            lines[way], theirs = spawn.Pipe()
            args = (theirs, way, stage, shape, num_batches, Path(folder), precision)
            spawn.Process(target=serve, args=args, daemon=True).start()
            theirs.close()  # so that a process that dies ends the wait for it
            lines[way].recv()  # one warms up after the other
            measured[way] = Measured(rounds=[])
        for _ in range(num_rounds):
            peaks.append(matmul_peak(DTYPES[precision]))
            _run_round(lines, measured, num_batches)
        for way, line in lines.items():
            line.send(None)
            measured[way].peak_bytes, measured[way].flops = line.recv(), line.recv()
    return measured, peaks


def _run_round(lines: dict[Way, Connection], measured: dict[Way, Measured], num_batches: int) -> None:
    """Every way trains on every batch, in turns, so that whatever else runs slows all of them."""
    sums: dict[Way, dict[str, float]] = {way: {} for way in lines}
    for index in range(num_batches):
        for way, line in lines.items():
            line.send(index)
            for name, value in line.recv().items():
                if name != "gradient_norm" or index == 0:
                    sums[way][name] = sums[way].get(name, 0) + value
    for way, m in measured.items():
        m.rounds.append(sums[way])


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(stage: str, measured: dict[Way, Measured], peaks: list[float], tolerance: float) -> dict[str, Any]:
    """Print the table of a stage, require equal losses, and return the numbers."""
    print(f"\n{stage:<9}{'samples/s':>22}{'tokens/s':>22}{'MiB':>8}{'loss':>10}{'padding':>9}{'of peak':>9}")
    result: dict[str, Any] = {"matmul_peak": statistics.median(peaks)}
    stock = measured["stock"]
    for way, m in measured.items():
        loss = m.each("loss_sum", "supervised")
        share = [m.flops / r[SHARED_CLOCK] / peak for r, peak in zip(m.rounds, peaks, strict=True)]
        padding = 1 - m.rounds[0]["tokens"] / m.rounds[0]["positions"]
        rates = spread(m.each("samples", "seconds")), spread(m.each("tokens", "seconds"), 0)
        print(
            f"{way:<9}{rates[0]:>22}{rates[1]:>22}{m.peak_bytes / 2**20:>8,.0f}{loss[0]:>10.5f}"
            f"{padding:>9.0%}{statistics.median(share):>9.0%}"
        )
        expected = stock.each("loss_sum", "supervised")[0]
        assert all(abs(x - expected) < tolerance for x in loss), f"{way}: loss {loss} is not {expected}"
        result[way] = asdict(m) | {"share_of_peak": share}
    norms = [measured[way].rounds[0]["gradient_norm"] for way in measured if way in ("stock", "ours")]
    assert abs(norms[0] - norms[-1]) < 10 * tolerance * norms[0], f"gradient norms differ: {norms}"
    for way in list(measured)[1:]:
        result[way] |= _print_ratios(way, stock, measured[way])
    print(f"matmul peak {spread([p / 1e9 for p in peaks], 0)} GFLOP/s")
    return result


def _print_ratios(way: Way, stock: Measured, m: Measured) -> dict[str, Any]:
    """Ratios of rounds that were run next to each other."""
    speed, by_cpu = (
        [a / b for a, b in zip(stock.each(clock), m.each(clock), strict=True)]
        for clock in ("seconds", "cpu_seconds")
    )
    operations, memory = m.flops / stock.flops, m.peak_bytes / stock.peak_bytes
    print(
        f"{way} against stock: speed {spread(speed)}x, by CPU time {spread(by_cpu)}x, "
        f"operations {operations:.2f}x, peak memory {memory:.2f}x"
    )
    return {"speed": speed, "speed_by_cpu_time": by_cpu, "operations": operations, "peak_memory": memory}


def main(
    shape: Literal["starter", "tinyllama", "tiny"] = "starter",
    stages: tuple[Literal["pretrain", "finetune"], ...] = ("pretrain", "finetune"),
    image_tokens: int = 0,
    batch_size: int = 0,
    batches: int = 2,
    rounds: int = 3,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    ways: tuple[Literal["ours", "packed", "cached"], ...] = ("ours", "packed", "cached"),
    alone: bool = False,
    json_file: Path | None = None,
) -> None:
    """Measure our training step against stock LLaVA's.

    Args:
        shape: sizes of model and samples.
        stages: what to measure.
        image_tokens: tokens of an image, a square number; 0 means the shape's own.
        batch_size: samples of a step; 0 means the shape's own.
        batches: steps of a round.
        rounds: how often each way goes through all batches.
        precision: auto is bf16 on a GPU and fp32 elsewhere, where losses can be compared closely.
        ways: what is compared with stock. All processes hold their memory to the end.
        alone: run one way after the other, where memory is short; the ratios of speed are less exact.
        json_file: where every number is written.
    """
    sizes = SHAPES[shape].with_image_tokens(image_tokens) if image_tokens else SHAPES[shape]
    sizes = replace(sizes, batch_size=batch_size or sizes.batch_size)
    on_gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"{shape}, {sizes.num_image_tokens} image tokens, batch {sizes.batch_size}, {precision}, {where}")
    print(f"median (min-max) of {rounds} rounds of {batches} batches")
    result: dict[str, Any] = {"sizes": asdict(sizes), "where": where, "precision": precision}
    for stage in stages:
        measured: dict[Way, Measured] = {}
        peaks: list[float] = []
        each: tuple[Way, ...] = ("stock", *ways)
        for together in [(way,) for way in each] if alone else [each]:
            found, peaks = compare(stage, sizes, batches, rounds, precision, together)
            measured |= found
        result[stage] = report(stage, measured, peaks, TOLERANCE[precision])
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tyro.cli(main)
