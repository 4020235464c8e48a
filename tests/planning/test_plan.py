"""Plans against what can be counted: published steps, torch's own operations, tensors that autograd keeps."""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    StableLmConfig,
)

from tinyllava.config import FROZEN, FULL, DataConfig, Stage, from_layer, lora
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.quantised import quantised_layers
from tinyllava.model.tuning import apply_tuning, component_of
from tinyllava.parts.connectors import CONNECTORS
from tinyllava.parts.language import LanguageModel
from tinyllava.parts.vision import VisionEncoder
from tinyllava.planning.check import find_problems
from tinyllava.planning.memory import PlannedParts, count_trained, estimate_memory
from tinyllava.planning.plan import FORMS, count_flops, plan_run
from tinyllava.planning.rules import batch_problems
from tinyllava.planning.sizes import PartSize, connector_size, language_model_size, vision_encoder_size
from tinyllava.recipes.variants import RECIPES, VARIANTS, variant
from tinyllava.training import compiling
from tinyllava.training.compiling import compile_layers

BATCH, NUM_TOKENS, NUM_SUPERVISED, VOCABULARY = 2, 96, 24, 512
CLIP = VisionEncoder(
    name="clip",
    abbreviation="",
    path="",
    kind="transformer",
    family="clip_vision_model",
    image_size_px=84,
    patch_size_px=14,
    width=64,
    num_layers=7,
    num_prefix_tokens=1,
    mlp_width=256,
)
SIGLIP = replace(CLIP, family="siglip_vision_model", num_prefix_tokens=0)
LLAMA = LanguageModel(
    name="llama",
    abbreviation="",
    path="",
    template="llama",
    eos_token="</s>",
    context_tokens=256,
    width=128,
    num_layers=4,
    vocab_size=VOCABULARY,
    num_heads=4,
    num_kv_heads=4,
    mlp_width=352,
    num_parameters=0,
)
LANGUAGES = {
    "llama": LLAMA,
    "phi": replace(LLAMA, family="phi", mlp_width=512),
    "stablelm": replace(LLAMA, family="stablelm"),
}
PRETRAIN = Stage(data=DataConfig(), template="caption", learning_rate=1e-3, global_batch_size=2)
FINETUNE = replace(PRETRAIN, template="", language_model=FULL)
SHARE = replace(PRETRAIN, vision_encoder=from_layer(3), language_model=FULL)
STAGES = {
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "share": SHARE,
    "LoRA": replace(FINETUNE, language_model=lora(8)),
    "partial": replace(PRETRAIN, vision_encoder=from_layer(1), language_model=from_layer(2)),
    "encoder": replace(PRETRAIN, vision_encoder=FULL, connector=FROZEN),
}


def make_parts(encoder: VisionEncoder, language: LanguageModel) -> PlannedParts:
    return PlannedParts(
        encoder=encoder,
        language=language,
        template="llama",
        encoder_size=vision_encoder_size(encoder),
        connector_size=connector_size(CONNECTORS["mlp"], encoder.width, language.width, {}),
        language_size=language_model_size(language),
        num_patches=36,
        num_image_tokens=36,
    )


def make_model(encoder: VisionEncoder, language: LanguageModel) -> TinyLlavaForConditionalGeneration:
    vision = CLIPVisionConfig if encoder is CLIP else SiglipVisionConfig
    text: dict[str, type[PreTrainedConfig]] = {
        "llama": LlamaConfig,
        "phi": PhiConfig,
        "stablelm": StableLmConfig,
    }
    config = TinyLlavaConfig(
        vision_config=vision(
            hidden_size=encoder.width,
            intermediate_size=encoder.mlp_width,
            num_attention_heads=4,
            num_hidden_layers=encoder.num_kept_layers,
            image_size=encoder.image_size_px,
            patch_size=14,
            **({} if encoder is CLIP else {"vision_use_head": False}),
        ).to_dict(),
        text_config=text[language.family](
            vocab_size=VOCABULARY,
            hidden_size=language.width,
            intermediate_size=language.mlp_width,
            num_hidden_layers=language.num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            **({"use_qkv_bias": True} if language.family == "stablelm" else {}),
        ).to_dict(),
        image_token_index=5,
        connector="mlp",
        connector_options={},
        num_patches=36,
        num_prefix_tokens=encoder.num_prefix_tokens,
        vision_width=encoder.width,
        lm_head_bias=language.family == "phi",
        tie_word_embeddings=False,
    )
    return TinyLlavaForConditionalGeneration(config)


def make_batch() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(6, VOCABULARY, (BATCH, NUM_TOKENS))
    input_ids[:, 2:38] = 5
    labels = torch.full_like(input_ids, -100)
    labels[:, -NUM_SUPERVISED:] = input_ids[:, -NUM_SUPERVISED:]
    pixels = torch.rand(BATCH, 3, 84, 84)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "pixel_values": pixels,
        "attention_mask": torch.ones_like(input_ids),
    }


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("encoder", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_as_many_parameters_are_counted_as_a_stage_trains(
    stage: str, language: str, encoder: VisionEncoder
) -> None:
    parts, model = make_parts(encoder, LANGUAGES[language]), make_model(encoder, LANGUAGES[language])
    apply_tuning(model, STAGES[stage])
    sizes = {
        "vision_encoder": parts.encoder_size,
        "connector": parts.connector_size,
        "language_model": parts.language_size,
    }
    for component, size in sizes.items():
        trained = sum(
            p.numel() for n, p in model.named_parameters() if p.requires_grad and component_of(n) == component
        )
        assert count_trained(size, STAGES[stage].tune(component)) == trained  # type: ignore[arg-type]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("stage", ["pretrain", "finetune", "share"])
def test_the_operations_are_those_that_torch_counts(stage: str, language: str) -> None:
    parts, model = make_parts(CLIP, LANGUAGES[language]), make_model(CLIP, LANGUAGES[language])
    apply_tuning(model, STAGES[stage])
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**make_batch()).loss.backward()
    counted = counter.get_total_flops() / BATCH
    masked = (
        3 * 2 * parts.language.width * NUM_TOKENS**2 * parts.language.num_layers
    )  # torch counts it, we do not
    estimated = count_flops(parts, STAGES[stage], NUM_TOKENS, NUM_SUPERVISED)
    assert estimated + masked == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("stage", ["pretrain", "finetune", "share", "LoRA"])
@pytest.mark.parametrize("encoder", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_a_forward_pass_keeps_as_many_bytes_as_estimated(
    stage: str, language: str, encoder: VisionEncoder
) -> None:
    check_activations(stage, language, encoder)


def check_activations(stage: str, language: str, encoder: VisionEncoder, *, compiled: bool = False) -> None:
    parts, model = make_parts(encoder, LANGUAGES[language]), make_model(encoder, LANGUAGES[language])
    apply_tuning(model, STAGES[stage])
    if compiled:
        compile_layers(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=compiled),
    ):
        loss = model(**make_batch()).loss
    estimated = estimate_memory(
        parts,
        STAGES[stage],
        batch=BATCH,
        num_tokens=NUM_TOKENS,
        num_supervised=NUM_SUPERVISED,
        bf16=compiled,
        compiled=compiled,
    ).activations
    # Logits are kept once in fp32; the estimate counts two gradients too, in bf16 another cast of them.
    logits = BATCH * NUM_SUPERVISED * VOCABULARY * (10 if compiled else 8)
    assert estimated - logits == pytest.approx(sum(kept.values()), rel=0.15)
    assert loss.isfinite()


@pytest.mark.parametrize(("language", "stage"), [("llama", "share"), ("phi", "share"), ("phi", "LoRA")])
def test_compiled_layers_keep_as_many_bytes_as_estimated(
    stage: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch divides a layer into forward and backward as for Triton, and does not make code of it."""
    divide = partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(
        fw_compiler=nop, bw_compiler=nop, partition_fn=divide, decompositions=select_decomp_table()
    )
    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch._dynamo.reset()
    check_activations(stage, language, SIGLIP, compiled=True)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("language", LANGUAGES)
def test_weights_below_adapters_take_as_many_bytes_as_estimated(
    language: str, bits: Literal[4, 8, 16]
) -> None:
    parts, model = make_parts(CLIP, LANGUAGES[language]), make_model(CLIP, LANGUAGES[language])
    stage = replace(FINETUNE, vision_encoder=lora(4, bits=bits), language_model=lora(8, bits=bits))
    apply_tuning(model, stage)
    tensors = list(model.parameters())
    # The 272 values that the codes of a layer in 4 bits stand for do not grow with it; nor is the scale of a
    # row in 8 bits counted, 4 bytes for thousands of weights in a published model.
    for layer in quantised_layers(model).values():
        left_out = "levels" if bits == 4 else "scales"
        tensors += [tensor for name, tensor in layer.named_buffers() if left_out not in name]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for encoder_size in (parts.encoder_size, PartSize(outer=0, members=(parts.encoder_size,))):
        estimated = estimate_memory(
            replace(parts, encoder_size=encoder_size),
            stage,
            batch=BATCH,
            num_tokens=NUM_TOKENS,
            num_supervised=NUM_SUPERVISED,
            bf16=False,
        )
        assert estimated.weights == pytest.approx(held, rel=1e-3)


STEPS = {"base": [2181, 5198], "share": [2181, 4868, 5196]}


@pytest.mark.parametrize("recipe", STEPS)
def test_the_steps_are_those_of_the_published_runs(recipe: str) -> None:
    stages = plan_run(variant(f"{recipe}-Sig-Phi")).stages
    assert [stage.load.num_steps for stage in stages if stage.load] == STEPS[recipe]


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("gpu", ["RTX-4090", "A100-40G", "H200"])
def test_a_proposed_batch_keeps_the_global_one_and_fits(gpu: str, num_gpus: int) -> None:
    run = variant("share-Sig-TL")
    for plan in plan_run(run, gpu=gpu, num_gpus=num_gpus).stages:
        for form in plan.forms.values():
            global_batch = form.device_batch_size * form.accumulation * num_gpus
            assert global_batch == run.stages[plan.name].global_batch_size


def test_adapters_shards_and_checkpointing_take_less() -> None:
    run = variant("base-Sig-Phi")
    one = replace(run, hardware=replace(run.hardware, device_batch_size=1))
    forms = plan_run(one).stages[1].forms
    full, adapters, quantised, half, sharded = (form.memory.peak for form in forms.values())
    assert quantised < adapters < full
    assert sharded < half < full
    thrifty = replace(one, hardware=replace(one.hardware, gradient_checkpointing=True))
    assert plan_run(thrifty).stages[1].forms["as the recipe"].memory.peak < full


def test_every_variant_has_a_form_that_fits_and_train_takes_each_on_every_machine() -> None:
    """Those of Table A1, and every other recipe; with GPUs of 24, 32, 40 and 80 GB."""
    others = [recipe for recipe in RECIPES if recipe not in ("base", "share")]
    for name in [*VARIANTS, *(f"{recipe}-{parts}" for recipe in others for parts in ("C-TL", "Sig-Phi"))]:
        run = variant(name)
        machines = product(("RTX-4090", "V100-32G", "A100-40G", "A100-80G"), (1, 2, 4, 8))
        for gpu, num_gpus in machines:
            for planned in plan_run(run, gpu=gpu, num_gpus=num_gpus).stages:
                fitting = {label: form for label, form in planned.forms.items() if form.fits}
                assert fitting, (name, gpu, num_gpus, planned.name)
                for label, form in fitting.items():
                    hardware = replace(
                        run.hardware,
                        device_batch_size=form.device_batch_size,
                        gradient_checkpointing=form.checkpointing,
                        sharding=label.removeprefix("sharding ") if label.startswith("sharding") else "none",
                    )
                    stage = run.stages[planned.name]
                    tune = FORMS.get(label, stage.language_model)
                    stages = {**run.stages, planned.name: replace(stage, language_model=tune)}
                    shown = replace(run, stages=stages, hardware=hardware)
                    problems = find_problems(shown, on_this_machine=False)
                    problems += batch_problems(stage, hardware, num_gpus)
                    # Of other stages, which may have other forms, only the batch is checked with this one's.
                    assert [p for p in problems if "device_batch_size" not in p or planned.name in p] == []


@pytest.mark.parametrize(
    ("gpu", "wanted", "is_half"),
    [
        ("V100-32G", "auto", False),
        ("V100-32G", "fp16", True),
        ("A100-40G", "auto", True),
        ("A100-40G", "fp32", False),
        ("A100-40G", "tf32", False),
    ],
)
def test_hours_and_memory_are_those_of_the_precision_on_the_gpu(
    gpu: str, wanted: Literal["auto", "fp16", "fp32", "tf32"], is_half: bool
) -> None:
    run = variant("base-C-TL")
    run = replace(run, hardware=replace(run.hardware, precision=wanted, device_batch_size=1))
    plan = plan_run(run, gpu=gpu).stages[1]
    peak = {"V100-32G": (15.7e12, 125e12), "A100-40G": (19.5e12, 312e12)}[gpu][is_half]
    peak = 156e12 if wanted == "tf32" else peak
    bandwidth = {"V100-32G": 0.9e12, "A100-40G": 1.555e12}[gpu]
    assert plan.load is not None
    flops = plan.load.flops + plan.load.recomputed_flops * plan.forms["as the recipe"].checkpointing
    assert plan.seconds is not None
    optimizer = plan.load.num_steps * 40 * sum(plan.trained.values()) / (0.85 * bandwidth)
    assert plan.seconds.computing == pytest.approx(flops / (8 * peak * plan.utilisation) + optimizer)
    half = replace(run, hardware=replace(run.hardware, precision="bf16"))
    same = plan_run(half).stages[1].forms["as the recipe"].memory
    assert (plan.forms["as the recipe"].memory == same) is is_half
