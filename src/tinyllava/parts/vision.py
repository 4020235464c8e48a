"""Table 1, lower half: the vision encoders, and how each one's output becomes patch features.

Paper: section 3.1, V = {v_j}, j = 1..M, from a Vision Transformer or from the grid of a CNN.
"""

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from tinyllava.errors import CheckpointError, ConfigError, look_up
from tinyllava.parts.families import VISION_FAMILIES, has_usual_settings
from tinyllava.parts.folders import check_weight_files, download, is_hub_name, read_config
from tinyllava.parts.user_code import is_reference, recall_as


@dataclass(frozen=True, kw_only=True)
class VisionEncoder:
    """The properties of an encoder that are needed before its weights are loaded."""

    name: str
    abbreviation: str
    path: str
    """Hugging Face path, or a local folder."""
    kind: Literal["transformer", "cnn"]
    """transformer: the output of the feature layer; cnn: the last grid, flattened row by row."""
    image_size_px: int
    """Side of the square image that the encoder was trained on."""
    patch_size_px: int
    """Side of the square that one patch feature stands for."""
    width: int
    """Length X of one patch feature."""
    num_layers: int
    feature_layer: int = -2
    """Layer whose output is used, as transformers counts hidden states; what lies above is not computed."""
    num_prefix_tokens: int = 0
    """Leading outputs that are no patches (CLS, registers) and are dropped."""
    num_dropped_patches: int = 0
    """Patches that are dropped as if they were prefix tokens; Factory's code drops SigLIP's first."""
    num_parameters: int = 0
    """Of the whole encoder as published."""
    mlp_width: int = 0
    licence: str = ""
    family: str = ""
    """Architecture, as config.json's model_type names it."""
    any_size: bool = False
    """Whether it takes images of any side: a CNN, or a transformer that interpolates its positions."""
    num_positions: int = 0
    """Rows of the table of positions where it is not one per patch and prefix token; 0 means it is."""
    rounds_up: bool = False
    """Whether a partial cell at the border counts as one (convolutions padded as SAME) or is dropped."""
    stages: tuple[tuple[int, int], ...] = ()
    """Blocks and width of each stage of a CNN whose blocks hold two linear layers (ConvNeXt)."""
    is_usual: bool = True
    """Whether its size follows from the record of its family; otherwise it is built and counted."""
    members: "tuple[VisionEncoder, ...]" = ()
    """The two encoders of a fused one, each at the size of its own image; the first one's is prepared."""

    @property
    def num_kept_layers(self) -> int:
        """Layers up to the feature layer; those above are cut off when a model is assembled."""
        return self.num_layers + 1 + self.feature_layer if self.feature_layer < 0 else self.feature_layer

    def num_patches(self, image_size_px: int = 0) -> int:
        """Return M, the number of patch features of one image of that side."""
        return self.grid_side(image_size_px) ** 2 - self.num_dropped_patches

    def grid_side(self, image_size_px: int = 0) -> int:
        """Return the number of patches along one side."""
        side = image_size_px or self.image_size_px
        return -(-side // self.patch_size_px) if self.rounds_up else side // self.patch_size_px


VISION_ENCODERS: dict[str, VisionEncoder] = {
    encoder.name: encoder
    for encoder in (
        VisionEncoder(
            name="CLIP",
            abbreviation="C",
            path="openai/clip-vit-large-patch14-336",
            kind="transformer",
            family="clip_vision_model",
            image_size_px=336,
            patch_size_px=14,
            width=1024,
            num_layers=24,
            num_prefix_tokens=1,
            num_parameters=303_507_456,
            mlp_width=4096,
            licence="MIT",
        ),
        VisionEncoder(
            name="SigLIP",
            abbreviation="Sig",
            path="google/siglip-so400m-patch14-384",
            kind="transformer",
            family="siglip_vision_model",
            image_size_px=384,
            patch_size_px=14,
            width=1152,
            num_layers=27,
            num_parameters=428_225_600,
            mlp_width=4304,
            licence="Apache-2.0",
        ),
        VisionEncoder(
            name="SigLIP2",
            abbreviation="Sig2",
            path="google/siglip2-so400m-patch14-384",
            kind="transformer",
            family="siglip_vision_model",
            image_size_px=384,
            patch_size_px=14,
            width=1152,
            num_layers=27,
            num_parameters=428_225_600,
            mlp_width=4304,
            licence="Apache-2.0",
        ),
        VisionEncoder(
            name="DINOv2",
            abbreviation="Dino",
            path="facebook/dinov2-large",
            kind="transformer",
            family="dinov2",
            image_size_px=224,
            patch_size_px=14,
            width=1024,
            num_layers=24,
            num_prefix_tokens=1,
            num_parameters=304_368_640,
            mlp_width=4096,
            any_size=True,
            num_positions=1370,
            licence="Apache-2.0",
        ),
        VisionEncoder(
            name="ConvNeXt",
            abbreviation="CNX",
            path="facebook/convnext-large-384-22k-1k",
            kind="cnn",
            family="convnext",
            image_size_px=384,
            patch_size_px=32,
            width=1536,
            num_layers=0,
            feature_layer=-1,
            num_parameters=196_230_336,
            any_size=True,
            licence="Apache-2.0",
            stages=((3, 192), (3, 384), (27, 768), (3, 1536)),
        ),
        VisionEncoder(
            name="EfficientNet-Lite2",
            abbreviation="EN2",
            path="starter:efficientnet-lite2",
            kind="cnn",
            family="efficientnet_lite",
            image_size_px=260,
            patch_size_px=32,
            width=1280,
            num_layers=0,
            feature_layer=-1,
            num_parameters=4_811_072,
            any_size=True,
            rounds_up=True,
            licence="Apache-2.0",
        ),
    )
}


def find_vision_encoder(name: str, code: str = "") -> VisionEncoder:
    """Return the encoder of that name, abbreviation or hub path, or the description of a local folder.

    Two of them with a plus between, ``DINOv2+SigLIP``, are the encoder that gives the features of both.

    Args:
        code: published code that is reproduced: TinyLLaVA Factory's drops the first output of every encoder.

    Raises:
        UnknownNameError: neither a known name nor a folder.
        CheckpointError: a folder without a readable config.json, or a hub path that cannot be downloaded.
        ConfigError: a folder of a family that is not known, or two encoders that cannot be fused.
    """
    if code == "factory":
        encoder = find_vision_encoder(name)
        drops_patch = encoder.kind == "transformer" and not encoder.num_prefix_tokens and not encoder.members
        return replace(encoder, num_prefix_tokens=1, num_dropped_patches=1) if drops_patch else encoder
    if Path(name).is_dir():
        return _describe_folder(Path(name))
    if "+" in name:
        first, _, second = name.partition("+")
        if "+" in second:
            raise ConfigError(
                f"vision encoder {name!r}: only two encoders can be fused; name two, as in 'DINOv2+SigLIP'."
            )
        return join_encoders(find_vision_encoder(first), find_vision_encoder(second))
    if is_reference(name):
        return recall_as(name, VisionEncoder)
    by_abbreviation = {encoder.abbreviation: encoder for encoder in VISION_ENCODERS.values()}
    by_path = {encoder.path: encoder for encoder in VISION_ENCODERS.values()}
    if found := by_abbreviation.get(name) or by_path.get(name):
        return found
    if is_hub_name(name):
        return _describe_on_hub(name)
    return look_up(VISION_ENCODERS, name, "vision encoder (or local folder, owner/name, or FILE.py:NAME)")


def _describe_on_hub(name: str) -> VisionEncoder:
    """Describe an encoder by its settings on the hub; its weights are downloaded when they are needed."""
    described = _describe_folder(download(name, only=("*.json",)))
    short = name.rpartition("/")[2]
    # Without weights, those of a CNN cannot be read out of their file's head: it is built and counted.
    is_usual = described.is_usual and described.kind == "transformer"
    return replace(described, name=short, abbreviation=short, path=name, is_usual=is_usual)


def join_encoders(first: VisionEncoder, second: VisionEncoder) -> VisionEncoder:
    """Describe two transformer encoders as one that gives the features of both for each patch.

    The image is prepared for the first; if only the second is of a fixed size, the two change places.

    Raises:
        ConfigError: a CNN, or grids that do not agree.
    """
    if first.any_size and not second.any_size:
        first, second = second, first
    for encoder in (first, second):
        if encoder.members or encoder.family == "fused_vision":
            raise ConfigError(
                f"{encoder.name}: it already consists of two fused encoders, and only two can be fused."
            )
        if encoder.kind == "cnn":
            raise ConfigError(f"{encoder.name}: a CNN cannot be fused; choose two transformer encoders.")
    grid = first.grid_side()
    if second.any_size:
        second = replace(second, image_size_px=grid * second.patch_size_px)
    if second.grid_side() != grid:
        raise ConfigError(
            f"{first.name} has {grid} x {grid} patches and {second.name} has {second.grid_side()} x "
            f"{second.grid_side()}; fuse encoders with equal grids, or use one that supports any image "
            "size."
        )
    return VisionEncoder(
        name=f"{first.name}+{second.name}",
        abbreviation=f"{first.abbreviation}+{second.abbreviation}",
        path=first.path,
        kind="cnn",
        family="fused_vision",
        image_size_px=first.image_size_px,
        patch_size_px=first.patch_size_px,
        width=first.width + second.width,
        num_layers=0,
        feature_layer=-1,
        num_parameters=first.num_parameters + second.num_parameters,
        members=(first, second),
        licence=" and ".join(dict.fromkeys((first.licence, second.licence))),
    )


def _describe_folder(folder: Path) -> VisionEncoder:
    config = read_config(folder)
    check_weight_files(folder)
    if config.get("model_type") in ("clip", "siglip", "siglip2"):
        config = config.get("vision_config", config)
    return _describe(folder, config)


def _describe(folder: Path, config: dict[str, Any]) -> VisionEncoder:
    """Describe the encoder of a config in a folder."""
    model_type = str(config.get("model_type", ""))
    if model_type not in VISION_FAMILIES:
        model_type = f"{model_type}_vision_model"
    family = VISION_FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is not a known vision "
            f"encoder; known: {', '.join(VISION_FAMILIES)}. Describe it in a Python file of yours as a "
            "VisionEncoder, and name it FILE.py:NAME (docs/guides/models.md)."
        )
    is_cnn = family.kind == "cnn"
    hidden_sizes = config.get("hidden_sizes") or [0]
    width, side = int(config.get("hidden_size") or hidden_sizes[-1]), int(config.get("image_size", 224))
    patch = 32 if is_cnn and family.any_size else int(config.get("patch_size", 32))
    described = VisionEncoder(
        name=folder.name,
        abbreviation=folder.name,
        path=str(folder),
        kind=family.kind,
        family=model_type,
        image_size_px=side,
        patch_size_px=patch,
        width=width,
        num_layers=int(config.get("num_hidden_layers", 0)),
        feature_layer=-1 if is_cnn else -2,
        num_prefix_tokens=family.num_prefix_tokens,
        any_size=family.any_size,
        rounds_up=family.rounds_up,
        mlp_width=int(config.get("intermediate_size") or width * config.get("mlp_ratio", 0)),
        num_parameters=_saved_parameters(folder),
        is_usual=has_usual_settings(family, config),
    )
    described = replace(described, **_inner_parts(folder, config))
    if described.any_size:
        described = replace(
            described,
            image_size_px=_processed_side(folder) or side,
            num_positions=(side // patch) ** 2 + described.num_prefix_tokens,
        )
    return described


def _inner_parts(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Read what a config says of an encoder's inside: a ConvNeXt's stages, the members of a fused one."""
    model_type = config["model_type"]
    try:
        if model_type.startswith("convnext"):
            return {"stages": tuple(zip(config["depths"], config["hidden_sizes"], strict=True))}
        if model_type != "fused_vision":
            return {}
        sides = (config["image_size"], config["second_image_size"])
        return {
            "members": tuple(
                replace(
                    _describe(folder, config[name]),
                    path="",
                    feature_layer=-1,
                    num_prefix_tokens=num_prefix,
                    image_size_px=side,
                    any_size=False,
                    num_parameters=0,
                )
                for name, num_prefix, side in zip(
                    ("first_config", "second_config"), config["num_prefix_tokens"], sides, strict=True
                )
            )
        }
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'}: has no {error}; download it again.") from error


def _saved_parameters(folder: Path) -> int:
    """Return the size of a folder's tensors as the head of its safetensors file lists them; 0 without one."""
    path = folder / "model.safetensors"
    if not path.is_file():
        return 0
    try:
        with path.open("rb") as file:
            tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{path}: the file's header cannot be read; download the folder again."
        ) from error
    names = (name for name in tensors if name != "__metadata__" and "running_" not in name)
    return sum(prod(tensors[name]["shape"]) for name in names if tensors[name]["shape"])


def _processed_side(folder: Path) -> int:
    """Return the side of the image that a folder's image processor makes; 0 if it does not say.

    What takes any size is often used at another one than it was trained at (DINOv2: 518 and 224 pixels).
    """
    name = "preprocessor_config.json"
    if not (folder / name).is_file():
        return 0
    config = read_config(folder, name)
    sizes = [config.get("crop_size") if config.get("do_center_crop", True) else None, config.get("size")]
    size = next((value for value in sizes if value), 0)
    return int(size if isinstance(size, int) else size.get("height") or size.get("shortest_edge") or 0)
