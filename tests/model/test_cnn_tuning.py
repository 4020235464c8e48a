"""What a stage trains of a CNN encoder is what the plan counts; adapters only where a linear layer is."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
)

import toys
from tinyllava.config import FROZEN, FULL, DataConfig, ModelConfig, Run, Stage, Tune, lora
from tinyllava.errors import ConfigError
from tinyllava.model.assemble import assemble
from tinyllava.model.encoders import EfficientNetLiteConfig, EfficientNetLiteModel
from tinyllava.model.tuning import apply_tuning
from tinyllava.parts.vision import find_vision_encoder
from tinyllava.planning.check import find_problems
from tinyllava.planning.memory import count_trained, estimate_memory
from tinyllava.planning.plan import plan_parts
from tinyllava.planning.sizes import vision_encoder_size
from tinyllava.recipes.variants import variant

SIZES = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 2, 1, 1]}


def make_cnn(kind: str) -> PreTrainedModel:
    if kind == "efficientnet_lite":
        return EfficientNetLiteModel(EfficientNetLiteConfig(width_multiplier=0.1, depth_multiplier=0.3))
    if kind == "resnet":
        return ResNetModel(ResNetConfig(embedding_size=8, layer_type="basic", **SIZES))
    return (
        ConvNextModel(ConvNextConfig(**SIZES))
        if kind == "convnext"
        else ConvNextV2Model(ConvNextV2Config(**SIZES))
    )


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_language_model(tmp_path_factory.mktemp("llm"), "chatml")


def save(kind: str, folder: Path) -> str:
    make_cnn(kind).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    BitImageProcessorPil(size=size, do_center_crop=False).save_pretrained(folder)
    return str(folder)


def stage(tune: Tune) -> Stage:
    return Stage(
        data=DataConfig(records=("LLaVA-1.5-mix-665k",)),
        learning_rate=1e-3,
        global_batch_size=4,
        vision_encoder=tune,
        max_length_tokens=512,
    )


@pytest.mark.parametrize(
    ("kind", "tune"),
    [
        ("convnext", lora(3)),
        ("convnextv2", lora(3)),
        ("convnext", FULL),
        ("convnextv2", FULL),
        ("resnet", FULL),
        ("efficientnet_lite", FULL),
    ],
)
def test_a_plan_counts_what_is_trained(kind: str, tune: Tune, llm: Path, tmp_path: Path) -> None:
    folder = save(kind, tmp_path)
    model, _ = assemble(ModelConfig(vision_encoder=folder, language_model=str(llm)))
    apply_tuning(model, stage(tune))
    trained = sum(p.numel() for p in model.vision_encoder.parameters() if p.requires_grad)
    assert count_trained(vision_encoder_size(find_vision_encoder(folder)), tune) == trained > 0


TINY = {"depths": [3, 3, 9, 3], "hidden_sizes": [24, 48, 96, 192]}
FULL_DEPTH = {
    "convnext": lambda: ConvNextModel(ConvNextConfig(**TINY)),
    "convnextv2": lambda: ConvNextV2Model(ConvNextV2Config(**TINY)),
    "resnet": lambda: ResNetModel(ResNetConfig()),
    "efficientnet_lite": lambda: EfficientNetLiteModel(
        EfficientNetLiteConfig(width_multiplier=1.1, depth_multiplier=1.2)
    ),
}


@pytest.mark.parametrize("kind", FULL_DEPTH)
def test_training_keeps_as_many_bytes_of_an_image_as_estimated(kind: str, tmp_path: Path) -> None:
    model = FULL_DEPTH[kind]()
    model.save_pretrained(tmp_path)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # as a stage has them
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)  # so that no storage is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.rand(1, 3, 128, 128))
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    counted = sum(size for place, size in kept.items() if place not in own)
    encoder = replace(find_vision_encoder(str(tmp_path)), image_size_px=128)
    parts = replace(plan_parts(variant("base-CNX-TL")), encoder=encoder)
    estimate = partial(estimate_memory, parts, batch=1, num_tokens=512, num_supervised=8, bf16=False)
    frozen, trained = (estimate(stage(tune)).activations for tune in (FROZEN, FULL))
    assert trained - frozen == pytest.approx(counted, rel=0.15)


def test_a_family_that_was_never_counted_is_estimated_as_the_largest() -> None:
    """A user's own spec of a CNN is planned, not a KeyError."""
    known = replace(find_vision_encoder("EfficientNet-Lite2"), image_size_px=128)
    parts = plan_parts(variant("base-CNX-TL"))
    trained = [
        estimate_memory(
            replace(parts, encoder=replace(known, family=family)),
            stage(FULL),
            batch=1,
            num_tokens=512,
            num_supervised=8,
            bf16=False,
        ).activations
        for family in ("regnet", "efficientnet_lite", "resnet")
    ]
    assert trained[0] == max(trained)


@pytest.mark.parametrize("kind", ["resnet", "efficientnet_lite"])
def test_adapters_on_convolutions_are_refused_before_and_in_training(
    kind: str, llm: Path, tmp_path: Path
) -> None:
    config = ModelConfig(vision_encoder=save(kind, tmp_path / kind), language_model=str(llm))
    run = Run(name="run", model=config, stages={"finetune": stage(lora(3))})
    says = "no linear layers for adapters; choose full or frozen"
    (problem,) = find_problems(run, on_this_machine=False)
    assert problem.startswith("stages.finetune.vision_encoder.kind = 'lora'")
    assert says in problem
    model, processor = assemble(config)
    with pytest.raises(
        ConfigError, match="vision_encoder: lora needs a linear layer, but this component has none"
    ):
        apply_tuning(model, stage(lora(3)))
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    tuned = Run(
        name="tuned",
        model=ModelConfig(vision_encoder="", language_model=""),
        stages={"finetune": stage(lora(3))},
        start_from=str(tmp_path / "checkpoint"),
    )
    (problem,) = find_problems(tuned, on_this_machine=False)
    assert says in problem


def test_adapters_on_a_connector_are_counted(llm: Path, tmp_path: Path) -> None:
    folder = save("convnext", tmp_path)
    for connector in ("mlp", "resampler"):
        config = ModelConfig(vision_encoder=folder, language_model=str(llm), connector=connector)
        adapted = replace(stage(FULL), connector=lora(5))
        model, _ = assemble(config)
        apply_tuning(model, adapted)
        trained = sum(p.numel() for p in model.connector.parameters() if p.requires_grad)
        size = plan_parts(Run(name="run", model=config, stages={"finetune": adapted})).connector_size
        assert count_trained(size, adapted.connector) == trained > 0
