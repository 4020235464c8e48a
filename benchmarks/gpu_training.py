"""Training on one device by the package's own Trainer, for ``gpu.py``: shapes, samples, rates, memory.

Paper: section 4.1.2, both stages of the base recipe, at one GPU's share of an eight-GPU batch. Samples have
JPEGs of 640 x 480 pixels and texts as long as in the published sets. The device batch is the plan's. Inside a
micro-batch the host may not wait for the device: CUDA's own check raises.
"""

import io
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PhiConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    TrainerCallback,
)

from tinyllava.config import Hardware, ModelConfig, Run, Stage
from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.dataset import Examples, measure
from tinyllava.model.compat import causal_without_looking
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.tuning import apply_tuning, merge_adapters
from tinyllava.parts.templates import read_template
from tinyllava.planning.forms import Machine, choose_forms
from tinyllava.planning.plan import count_flops, plan_parts
from tinyllava.planning.speed import find_gpu
from tinyllava.recipes.paper import ADAPTERS_ON_4_BITS, BASE
from tinyllava.training.precision import choose_precision
from tinyllava.training.prepare import Prepared
from tinyllava.training.run import make_trainer, release
from tinyllava.training.trainer import StageTrainer
from train_samples import make_tokenizer, matmul_peak

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NUM_WARM_UP = 5
"""Steps that are not timed."""
SUPERVISED = {"pretrain": (20, 8), "finetune": (190, 150)}
"""Words of a sample's text in the mixtures of Table 2: mean and deviation, roughly."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model by its shape; ``parts`` are names of the tables, empty for a toy."""

    parts: tuple[str, str]
    vision: Callable[[], Any]
    text: Callable[[], Any]
    side_px: int
    num_patches: int
    num_prefix_tokens: int


def _clip(layers: int, width: int, heads: int, side: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return CLIPVisionConfig(num_hidden_layers=layers, image_size=side, patch_size=14, **sizes)


LAYOUTS = {
    "C-TL": Layout(
        parts=("C", "TL"),
        vision=lambda: _clip(23, 1024, 16, 336),
        text=lambda: LlamaConfig(
            vocab_size=32_000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        ),
        side_px=336,
        num_patches=576,
        num_prefix_tokens=1,
    ),
    "Sig-Phi": Layout(
        parts=("Sig", "Phi"),
        vision=lambda: SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        ),
        text=lambda: PhiConfig(
            vocab_size=51_200,
            hidden_size=2560,
            intermediate_size=10_240,
            num_hidden_layers=32,
            num_attention_heads=32,
            partial_rotary_factor=0.4,
        ),
        side_px=384,
        num_patches=729,
        num_prefix_tokens=0,
    ),
    "tiny": Layout(
        parts=("", ""),
        vision=lambda: _clip(2, 32, 4, 28),
        text=lambda: LlamaConfig(
            vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        ),
        side_px=28,
        num_patches=4,
        num_prefix_tokens=1,
    ),
}


def build(layout: Layout) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor]:
    """Return a model of random weights on the device, and its processor."""
    tokenizer = make_tokenizer()
    text, vision = layout.text(), layout.vision()
    config = TinyLlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_width=vision.hidden_size,
        num_patches=layout.num_patches,
        num_prefix_tokens=layout.num_prefix_tokens,
        image_seq_length=layout.num_patches,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        lm_head_bias=text.model_type == "phi",
    )
    torch.manual_seed(0)
    with DEVICE:
        model = TinyLlavaForConditionalGeneration(config)
    side = layout.side_px
    images = (
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        if vision.model_type == "clip_vision_model"
        else SiglipImageProcessorPil(size={"height": side, "width": side})
    )
    template = read_template("chatml")
    return model, TinyLlavaProcessor(images, tokenizer, template, num_image_tokens=layout.num_patches)


def make_records(stage: str, number: int, most_words: int) -> list[Conversation]:
    """Samples with a JPEG and as many words as the published sets have."""
    draw, (mean, deviation) = random.Random(0), SUPERVISED[stage]
    records = []
    for index in range(number):
        pixels = Image.frombytes("RGB", (40, 30), draw.randbytes(3600)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        file = io.BytesIO()
        pixels.save(file, "JPEG", quality=90)
        num_words = min(most_words, max(3, round(draw.gauss(mean, deviation))))
        image = ImageRef(data=file.getvalue(), name=f"{index}.jpg")
        answer = " ".join(draw.choice(["red", "circle", "shape", "yes"]) for _ in range(num_words))
        turns = (
            Message(role="user", text="What is it?", images=(image,)),
            Message(role="assistant", text=answer),
        )
        records.append(Conversation(messages=turns, id=str(index), source=stage))
    return records


class Clock(TrainerCallback):
    """Times the steps behind the first few, and on a GPU how long kernels ran in the last three."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.first = num_steps, min(NUM_WARM_UP, num_steps - 1)
        self.profiles = CUDA and num_steps > NUM_WARM_UP + 3
        self.trainer: Any = None
        self.start, self.end, self.samples = 0.0, 0.0, 0
        self.busy: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The loss was logged, so the device has finished the step."""
        now = time.perf_counter()
        if state.global_step == self.first:
            self.start, self.samples = now, -self.trainer.num_samples
        if state.global_step == self.num_steps - 3 and self.profiles:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.end, self.samples = now, self.samples + self.trainer.num_samples
            self.profile.start()
            self.profiled = time.perf_counter()
        if state.global_step == self.num_steps:
            if self.profiles:
                wall = time.perf_counter() - self.profiled
                self.profile.stop()
                events = self.profile.key_averages()
                self.busy = sum(event.self_device_time_total for event in events) / 1e6 / wall
            else:
                self.end, self.samples = now, self.samples + self.trainer.num_samples


def forbid_waiting() -> None:
    """Let CUDA raise where the host waits for the device inside a micro-batch; two steps may compile."""
    if not CUDA:
        return
    step = StageTrainer.training_step

    def strict(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if self.state.global_step > 1 else "default")
        try:
            return step(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    StageTrainer.training_step = strict  # type: ignore[method-assign]


def train_stage(
    layout: Layout, stage: str, settings: Stage, num_steps: int, model: Any, processor: Any, **form: bool
) -> dict[str, Any]:
    """Train some steps of a stage; return rates, use of the peak, and memory against the estimate.

    Args:
        form: hardware settings other than the usual ones.
    """
    per_step = settings.global_batch_size
    room = settings.max_length_tokens - layout.num_patches - 40
    records = make_records(stage, per_step * min(num_steps, 4), room)
    examples = Examples(conversations=records, processor=processor)
    examples, _ = measure(examples, settings.max_length_tokens, ())
    prepared = Prepared(examples=examples, skipped={}, records_digest="", images_digest="")
    encoder, language = layout.parts
    run = Run(
        name="gpu",
        model=ModelConfig(vision_encoder=encoder, language_model=language),
        stages={stage: settings},
        hardware=Hardware(num_workers=8 if CUDA else 0, save_steps=10**6, **form),
    )
    apply_tuning(model, settings)
    clock = Clock(num_steps)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, causal_without_looking(model.language_model):
        trainer = make_trainer(run, settings, model, processor, prepared, Path(folder), [clock])
        trainer.args.save_strategy = "no"
        clock.trainer = trainer
        trainer.train()
        release(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses), losses
    rate = clock.samples / (clock.end - clock.start)
    found = {
        "samples_per_second": rate,
        "device_batch_size": trainer.args.per_device_train_batch_size,
        "recomputed": model.is_gradient_checkpointing,
        "mean_tokens": sum(examples.lengths) / len(examples),
        "last_loss": losses[-1],
        "gpu_computes": clock.busy,
    }
    if CUDA:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    if not encoder:
        return found
    hardware = Hardware(
        device_batch_size=found["device_batch_size"],
        gradient_checkpointing=found["recomputed"],
        compile=run.hardware.compile,
    )
    return found | _against_plan(replace(run, hardware=hardware), settings, examples, rate)


def _against_plan(run: Run, stage: Stage, examples: Examples, rate: float) -> dict[str, Any]:
    """Share of the GPU's stated peak and of the largest matrix product's speed in this run."""
    parts, number = plan_parts(run), len(examples)
    flops = count_flops(
        parts, stage, sum(examples.lengths) / number, sum(examples.supervised_lengths) / number
    )
    dtype = torch.float32 if choose_precision("auto") == "fp32" else torch.bfloat16
    machine = Machine(memory_bytes=0, is_half=dtype is not torch.float32, num_ranks=1)
    longest = max(examples.lengths), max(examples.supervised_lengths)
    (form,) = choose_forms(parts, stage, run.hardware, machine, *longest)
    found: dict[str, Any] = {
        "estimated_bytes": form.memory.peak,
        "share_of_matmul_peak": rate * flops / matmul_peak(dtype),
    }
    name = torch.cuda.get_device_name() if CUDA else ""
    if gpu := find_gpu(name):
        found["mfu"] = rate * flops / gpu.half_flops
    return found


def train(name: str, num_steps: int) -> dict[str, Any]:
    """Both stages of the base recipe at one GPU's share of an eight-GPU batch."""
    forbid_waiting()
    layout = LAYOUTS[name]
    model, processor = build(layout)
    found = {}
    for stage in BASE.stages:
        settings = _settings(layout, stage, num_steps)
        found[stage] = train_stage(layout, stage, settings, num_steps, model, processor)
        model.requires_grad_(False)
    return found


def _settings(layout: Layout, stage: str, num_steps: int) -> Stage:
    settings = BASE.stages[stage]
    return replace(
        settings,
        template="",
        max_steps=num_steps,
        global_batch_size=settings.global_batch_size // 8 if layout.parts[0] else 4,
        max_length_tokens=min(settings.max_length_tokens, 2048),
    )


FORMS: dict[str, dict[str, bool]] = {
    "packed": {"packing": True},
    "packed compiled": {"packing": True, "compile": True},
    "packed compiled recomputed": {"packing": True, "compile": True, "gradient_checkpointing": True},
}


def train_forms(name: str, num_steps: int) -> dict[str, Any]:
    """Fine-tuning in the forms that ``train`` does not measure; the first steps compile."""
    forbid_waiting()
    layout = LAYOUTS[name]
    model, processor = build(layout)
    settings, found = _settings(layout, "finetune", num_steps), {}
    for label, form in FORMS.items():
        found[label] = train_stage(layout, "finetune", settings, num_steps, model, processor, **form)
        model.requires_grad_(False)
    return found


def qlora(name: str) -> dict[str, Any]:
    """Two steps over weights in 4 bits, and the adapters merged: logits stay, to rounding."""
    layout = LAYOUTS[name]
    model, processor = build(layout)
    settings = replace(
        BASE.stages["finetune"], language_model=ADAPTERS_ON_4_BITS, global_batch_size=4, max_steps=2
    )
    found = train_stage(layout, "finetune", settings, 2, model, processor)
    model.eval()
    ids = torch.randint(10, 900, (2, 32), device=DEVICE)
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        merge_adapters(model)
        after = model.to(DEVICE)(input_ids=ids).logits.float()
    found["merged_differs"] = ((after - before).abs().max() / before.abs().max()).item()
    return found
