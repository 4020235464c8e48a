"""Two encoders as one: the same features as each alone, and the model around them."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoImageProcessor, AutoModel, BitImageProcessorPil, ConvNextConfig, ConvNextModel

import toys
from tinyllava.cli import main
from tinyllava.config import FULL, DataConfig, ModelConfig, Stage, Tune, lora
from tinyllava.errors import ConfigError, TinyLlavaError
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.model.encoders import fuse
from tinyllava.model.tuning import apply_tuning
from tinyllava.parts.vision import find_vision_encoder
from tinyllava.planning.memory import count_trained
from tinyllava.planning.sizes import vision_encoder_size
from tinyllava.recipes.variants import variant


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    siglip, dino = toys.make_vision_encoder(root / "siglip", "siglip"), toys.make_dino(root / "dino")
    return {
        "root": root,
        "siglip": siglip,
        "dino": dino,
        "fused": fuse(str(siglip), str(dino), root / "fused"),
        "llm": toys.make_language_model(root / "llm", "chatml"),
    }


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy())


def test_its_features_are_those_of_both(folders: dict[str, Path], image: Image.Image) -> None:
    alone = []
    for name, num_prefix in (("siglip", 0), ("dino", 1)):
        pixels = AutoImageProcessor.from_pretrained(folders[name], backend="pil")(image, return_tensors="pt")
        outputs = AutoModel.from_pretrained(folders[name])(**pixels, output_hidden_states=True)
        alone.append(outputs.hidden_states[-2][:, num_prefix:])
    pixels = AutoImageProcessor.from_pretrained(folders["fused"], backend="pil")(image, return_tensors="pt")
    fused = AutoModel.from_pretrained(folders["fused"])(**pixels).last_hidden_state
    torch.testing.assert_close(fused, torch.cat(alone, dim=-1), atol=1e-5, rtol=1e-4)


def test_numbers_of_the_host_are_copied_to_a_device_once(folders: dict[str, Path]) -> None:
    """The first time without gradients, as in a stage that freezes the encoder."""
    model = AutoModel.from_pretrained(folders["fused"])
    pixels = torch.rand(2, 3, 28, 28)
    with torch.inference_mode(), Copies() as first:
        found = model.to_second(pixels)
    (mean1, mean2), (deviation1, deviation2) = (
        [torch.tensor(value).view(1, 3, 1, 1) for value in pair]
        for pair in (model.config.means, model.config.deviations)
    )
    torch.testing.assert_close(found, (pixels * deviation1 + mean1 - mean2) / deviation2, rtol=0, atol=0)
    with Copies() as second:
        model(pixels).last_hidden_state.sum().backward()
    assert (first.count, second.count) == (4, 0)
    assert model.to_second(pixels.double()).dtype == torch.float64  # another type has numbers of its own


class Copies(TorchDispatchMode):
    """Counts tensors that are made of the host's numbers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_it_is_described_as_any_folder(folders: dict[str, Path]) -> None:
    encoder = find_vision_encoder(str(folders["fused"]))
    assert (encoder.num_patches(), encoder.width, encoder.image_size_px) == (4, toys.WIDTH + 24, 28)
    model = AutoModel.from_pretrained(folders["fused"])
    assert encoder.num_parameters == sum(p.numel() for p in model.parameters())


def test_a_model_with_it_answers_and_comes_back_from_disk(
    folders: dict[str, Path], image: Image.Image, tmp_path: Path
) -> None:
    model, processor = assemble(
        ModelConfig(vision_encoder=str(folders["fused"]), language_model=str(folders["llm"]))
    )
    inputs = processor(images=[image], text="<image>\nWhat is it?")
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = open_checkpoint(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, logits, atol=0, rtol=0)


@pytest.mark.parametrize("order", [("siglip", "dino"), ("dino", "siglip")])
def test_two_names_with_a_plus_are_the_same_encoder(
    folders: dict[str, Path], image: Image.Image, order: tuple[str, str]
) -> None:
    name = "+".join(str(folders[part]) for part in order)
    described, folder = find_vision_encoder(name), find_vision_encoder(str(folders["fused"]))
    assert (described.name, described.abbreviation) == ("siglip+dino", "siglip+dino")
    for field in ("kind", "image_size_px", "patch_size_px", "width", "num_prefix_tokens", "family"):
        assert getattr(described, field) == getattr(folder, field)
    made = []
    for encoder in (name, str(folders["fused"])):
        model, processor = assemble(
            ModelConfig(vision_encoder=encoder, language_model=str(folders["llm"])), dtype=torch.float32
        )
        made.append(model.model.encode_images(processor.to_pixels([image])))
    torch.testing.assert_close(made[0], made[1], atol=0, rtol=0)
    parameters = sum(p.numel() for p in model.vision_encoder.parameters())
    assert vision_encoder_size(described).total == parameters == folder.num_parameters


@pytest.mark.parametrize("tune", [FULL, lora(3)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "parts", [("siglip", "dino"), ("dino",), ("fused",)], ids=["siglip+dino", "dino", "saved folder"]
)
def test_a_plan_counts_what_a_stage_trains_of_it(
    folders: dict[str, Path], parts: tuple[str, ...], tune: Tune
) -> None:
    name = "+".join(str(folders[part]) for part in parts)
    model, _ = assemble(ModelConfig(vision_encoder=name, language_model=str(folders["llm"])))
    apply_tuning(
        model, Stage(data=DataConfig(), learning_rate=1e-3, global_batch_size=4, vision_encoder=tune)
    )
    trained = {n: p.numel() for n, p in model.vision_encoder.named_parameters() if p.requires_grad}
    assert count_trained(vision_encoder_size(find_vision_encoder(name)), tune) == sum(trained.values()) > 0
    assert not any("mask_token" in name for name in trained)


def test_published_encoders_are_fused_by_their_names() -> None:
    both = find_vision_encoder("DINOv2+SigLIP")
    assert both == find_vision_encoder("Sig+Dino")
    assert (both.name, both.image_size_px) == ("SigLIP+DINOv2", 384)
    assert (both.num_patches(), both.width) == (729, 1152 + 1024)
    assert both.members[1].image_size_px == 27 * 14  # DINOv2 takes any size: that of SigLIP's grid
    assert variant("base-Dino+Sig-Phi").model.vision_encoder == "DINOv2+SigLIP"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("CLIP+SigLIP", "24 x 24 patches and SigLIP has 27 x 27"),
        ("SigLIP+ConvNeXt", "a CNN cannot be fused"),
        ("SigLIP+DINOv2+CLIP", "only two encoders can be fused"),
        ("SigLIP+DINO", "Did you mean 'DINOv2'"),
    ],
)
def test_names_that_cannot_be_fused_are_refused(name: str, says: str) -> None:
    with pytest.raises(TinyLlavaError, match=says):
        find_vision_encoder(name)


def test_grids_that_do_not_agree_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = toys.make_vision_encoder(tmp_path / "wide", "siglip", image_size_px=42)
    with pytest.raises(ConfigError, match=r"3 x 3 patches .* 2 x 2"):
        fuse(str(wide), str(folders["siglip"]), tmp_path / "fused")
    fused = fuse(str(wide), str(folders["dino"]), tmp_path / "fused")  # DINOv2 takes any size
    model = AutoModel.from_pretrained(fused)
    assert model(torch.rand(1, 3, 42, 42)).last_hidden_state.shape == (1, 9, toys.WIDTH + 24)


def test_a_cnn_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=32)
    ConvNextModel(config).save_pretrained(tmp_path / "cnn")
    with pytest.raises(ConfigError, match="a CNN cannot be fused"):
        fuse(str(folders["siglip"]), str(tmp_path / "cnn"), tmp_path / "fused")


@pytest.mark.parametrize("kind", ["dino", "convnext"])
def test_dinov2_and_convnext_make_models(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    encoder, side, grid = folders["dino"], 28, 2
    if kind == "convnext":
        config = ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=224)
        encoder, side, grid = tmp_path / "cnn", 64, 2
        ConvNextModel(config).save_pretrained(encoder)
        size = {"height": side, "width": side}
        BitImageProcessorPil(size=size, do_center_crop=False).save_pretrained(encoder)
    spec = find_vision_encoder(str(encoder))
    assert (spec.image_size_px, spec.num_patches()) == (side, grid**2)
    model, processor = assemble(ModelConfig(vision_encoder=str(encoder), language_model=str(folders["llm"])))
    assert model.model.encode_images(processor.to_pixels([Image.new("RGB", (50, 40))])).shape[1:] == (
        grid**2,
        spec.width,
    )


def test_it_is_never_called_a_cnn(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(vision_encoder=str(folders["fused"]), language_model=str(folders["llm"]))
    for part in assemble(model):
        part.save_pretrained(tmp_path / "model")
    for layout in ("llava", "vllm", "gguf"):
        assert main(["export", str(tmp_path / "model"), str(tmp_path / layout), "--format", layout]) == 2
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom tinyllava.config import ModelConfig\n"
        "from tinyllava.recipes.variants import variant\n"
        f"RUN = dataclasses.replace(variant('base-C-TL'), model={model!r})\n"
    )
    assert main(["show", f"{tmp_path / 'mine.py'}:RUN"]) == 0
    with pytest.raises(TinyLlavaError, match=r"from_layer needs one transformer encoder; .* two fused"):
        apply_tuning(
            assemble(model)[0],
            Stage(
                data=DataConfig(records=("x.json",)), connector=FULL, learning_rate=1e-3,
                global_batch_size=1, vision_encoder=Tune(kind="from_layer", first_layer=1),
            ),
        )  # fmt: skip
    told = capsys.readouterr()
    assert told.err.count("'fused_vision': two fused encoders") == 2
    assert "a CNN" not in (told.out + told.err).replace("a CNN or two fused encoders", "")
