"""Estimated against measured peak memory of training steps, each case in a process of its own, on the CPU.

    python benchmarks/memory.py                                 the table, a row for each case
    python benchmarks/memory.py --case "LoRA" "encoder only"    some rows

The measured number is the highest resident size of two optimizer steps less that before the model was made.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from tinyllava.config import FROZEN, FULL, DataConfig, Stage, from_layer, lora
from tinyllava.parts.connectors import CONNECTORS
from tinyllava.parts.language import LanguageModel
from tinyllava.parts.vision import VisionEncoder
from tinyllava.planning.memory import Memory, PlannedParts, estimate_memory
from tinyllava.planning.sizes import connector_size, language_model_size, vision_encoder_size

LLAMA = LanguageModel(
    name="llama",
    abbreviation="",
    path="",
    template="llama",
    eos_token="</s>",
    context_tokens=2048,
    width=384,
    num_layers=6,
    vocab_size=8_000,
    num_heads=8,
    num_kv_heads=8,
    mlp_width=1024,
    num_parameters=0,
)
LANGUAGES = {
    "llama": LLAMA,
    "grouped": replace(LLAMA, name="grouped", num_kv_heads=2),
    "phi": replace(LLAMA, name="phi", family="phi", mlp_width=1536),
    "stablelm": replace(LLAMA, name="stablelm", family="stablelm"),
    "large vocabulary": replace(LLAMA, name="vocabulary", vocab_size=48_000, num_layers=4, tied=True),
}
CLIP = VisionEncoder(
    name="clip",
    abbreviation="",
    path="",
    kind="transformer",
    family="clip_vision_model",
    image_size_px=168,
    patch_size_px=14,
    width=384,
    num_layers=9,
    num_prefix_tokens=1,
    mlp_width=1536,
)
ENCODERS = {
    "clip": CLIP,
    "siglip": replace(CLIP, name="siglip", family="siglip_vision_model", num_prefix_tokens=0),
}
STAGE = Stage(data=DataConfig(), learning_rate=1e-3, global_batch_size=4)


@dataclass(frozen=True)
class Case:
    """A stage on parts of a size that a laptop holds."""

    stage: Stage
    language: str = "llama"
    encoder: str = "clip"
    batch: int = 4
    num_tokens: int = 320
    num_supervised: int = 96
    bf16: bool = False
    options: dict[str, bool] = field(default_factory=dict)


PRETRAIN = replace(STAGE, template="caption")
SHARE = replace(PRETRAIN, vision_encoder=from_layer(4), language_model=FULL)
FINETUNE = replace(STAGE, language_model=FULL)
ADAPTERS = replace(STAGE, language_model=lora(64, dropout=0.05))
CASES: dict[str, Case] = {
    "base pretrain": Case(PRETRAIN),
    "base pretrain, Phi": Case(PRETRAIN, language="phi"),
    "base finetune": Case(FINETUNE),
    "base finetune, grouped heads": Case(FINETUNE, language="grouped"),
    "base finetune, Phi": Case(FINETUNE, language="phi"),
    "base finetune, StableLM": Case(FINETUNE, language="stablelm"),
    "base finetune, large vocabulary": Case(FINETUNE, language="large vocabulary", num_supervised=256),
    "base finetune, one sample": Case(FINETUNE, batch=1),
    "base finetune, long": Case(FINETUNE, batch=1, num_tokens=1536, num_supervised=512),
    "base finetune, accumulated": Case(FINETUNE, options={"accumulates": True}),
    "base finetune, checkpointing": Case(FINETUNE, options={"checkpointing": True}),
    "base finetune, bf16": Case(FINETUNE, bf16=True),
    "base finetune, bf16, one sample": Case(FINETUNE, bf16=True, batch=1),
    "base pretrain, bf16": Case(PRETRAIN, bf16=True),
    "share pretrain, bf16": Case(SHARE, bf16=True),
    "share pretrain": Case(SHARE),
    "share pretrain, SigLIP": Case(SHARE, encoder="siglip"),
    "share pretrain, checkpointing": Case(SHARE, options={"checkpointing": True}),
    "LoRA": Case(ADAPTERS),
    "encoder only": Case(replace(STAGE, vision_encoder=FULL, language_model=FROZEN)),
    "encoder only, checkpointing": Case(
        replace(STAGE, vision_encoder=FULL, language_model=FROZEN), options={"checkpointing": True}
    ),
}


def estimate(case: Case) -> Memory:
    """Return what the closed form says."""
    encoder, language = ENCODERS[case.encoder], LANGUAGES[case.language]
    parts = PlannedParts(
        encoder=encoder,
        language=language,
        template="llama",
        encoder_size=vision_encoder_size(encoder),
        connector_size=connector_size(CONNECTORS["mlp"], encoder.width, language.width, {}),
        language_size=language_model_size(language),
        num_patches=encoder.num_patches(),
        num_image_tokens=encoder.num_patches(),
    )
    return estimate_memory(
        parts,
        case.stage,
        batch=case.batch,
        num_tokens=case.num_tokens,
        num_supervised=case.num_supervised,
        bf16=case.bf16,
        **case.options,
    )


def measure(case: Case) -> int:
    """Train two steps and return by how many bytes the process grew at its peak."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, PhiConfig, SiglipVisionConfig, StableLmConfig

    from tinyllava.model.configuration import TinyLlavaConfig
    from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
    from tinyllava.model.tuning import apply_tuning
    from tinyllava.training.precision import hold_frozen_in_half

    encoder, language = ENCODERS[case.encoder], LANGUAGES[case.language]
    vision_class = CLIPVisionConfig if case.encoder == "clip" else SiglipVisionConfig
    text_class = {"phi": PhiConfig, "stablelm": StableLmConfig}.get(language.family, LlamaConfig)
    more = {"use_qkv_bias": True} if language.family == "stablelm" else {}
    head = {"vision_use_head": False} if case.encoder == "siglip" else {}
    config = TinyLlavaConfig(
        vision_config=vision_class(
            hidden_size=encoder.width,
            intermediate_size=encoder.mlp_width,
            num_attention_heads=6,
            num_hidden_layers=encoder.num_kept_layers,
            image_size=encoder.image_size_px,
            patch_size=14,
            **head,
        ).to_dict(),
        text_config=text_class(
            vocab_size=language.vocab_size,
            hidden_size=language.width,
            intermediate_size=language.mlp_width,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_heads,
            num_key_value_heads=language.num_kv_heads,
            max_position_embeddings=2048,
            **more,
        ).to_dict(),
        image_token_index=5,
        connector="mlp",
        connector_options={},
        num_patches=encoder.num_patches(),
        num_prefix_tokens=encoder.num_prefix_tokens,
        vision_width=encoder.width,
        lm_head_bias=language.family == "phi",
        tie_word_embeddings=language.tied,
    )
    torch.set_num_threads(1)
    torch.nn.functional.linear(torch.ones(64, 64, requires_grad=True), torch.ones(64, 64)).sum().backward()
    before = resident_bytes("VmRSS")
    model = TinyLlavaForConditionalGeneration(config)
    apply_tuning(model, case.stage)
    if case.options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad():
        for parameter in model.parameters():  # as those of a published model are
            parameter.copy_(parameter.bfloat16())
    hold_frozen_in_half(model, "bf16" if case.bf16 else "fp32")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        for _ in range(2 if case.options.get("accumulates") else 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
                loss = model(**make_batch(case, encoder)).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident_bytes("VmHWM") - before


def make_batch(case: Case, encoder: VisionEncoder) -> dict[str, object]:
    """A batch of one image and text a sample."""
    import torch

    input_ids = torch.randint(6, 1000, (case.batch, case.num_tokens))
    input_ids[:, 2 : 2 + encoder.num_patches()] = 5
    labels = torch.full_like(input_ids, -100)
    labels[:, -case.num_supervised :] = input_ids[:, -case.num_supervised :]
    side = encoder.image_size_px
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.rand(case.batch, 3, side, side),
    }


def resident_bytes(field_name: str) -> int:
    """Read a field of the process's status: VmRSS is the size now, VmHWM the highest so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field_name))


def run(name: str) -> dict[str, float]:
    """Measure a case in a fresh process and put the estimate beside it."""
    # What is freed is given back at once; otherwise the holes of the C library's heap are measured too, which
    # for the halved tensors of bf16 are a third on top.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    measured = int(json.loads(done.stdout.splitlines()[-1])["measured"])
    estimated = estimate(CASES[name]).peak
    return {"measured_mb": measured / 1e6, "estimated_mb": estimated / 1e6, "ratio": estimated / measured}


def main() -> None:
    """Print the table, of all cases or of some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--measure", choices=list(CASES), default="", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.measure:
        print(json.dumps({"measured": measure(CASES[known.measure])}))
        return
    print("| step | measured, MB | estimated, MB | estimated / measured |\n|---|---|---|---|")
    for name in known.case:
        row = run(name)
        print(
            f"| {name} | {row['measured_mb']:,.0f} | {row['estimated_mb']:,.0f} | {row['ratio']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
