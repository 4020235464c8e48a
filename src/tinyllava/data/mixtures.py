"""Table 2: the four mixtures of the paper, and the places of their records and images under one data root.

Paper: section 4.1.2, Table 2.
The layout is the published one: record files in ``text_files/``, and next to it one folder of images per
source. ``tinyllava show data`` prints what to download and where to put it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinyllava.config import DataConfig
from tinyllava.data.readers.containers import is_record_file
from tinyllava.data.readers.hub import PREFIX, find_records, is_hub_name, licence_of, parse_hub_name
from tinyllava.data.sources import Source, parse_source, refuse_both
from tinyllava.errors import ConfigError, DataError, look_up
from tinyllava.files import read_object

LICENCES = "licences.json"
"""Beside record files of a user's own: ``{"name of the data": "licence"}``. A model's folder keeps those of
its records by file, and those of the checkpoint that it started from under an empty name."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One row of Table 2."""

    name: str
    stage: Literal["PT", "SFT"]
    records: str
    """Record file below the data root; it may also stand in the root itself."""
    images: str
    """Folder below the data root that the records' image paths start from."""
    folders: tuple[str, ...]
    """Folders of images that the records name, below ``images``."""
    num_samples: int
    num_text_only: int = 0
    """Records without an image."""
    mean_text_tokens: int
    """Text of a record, estimated from the size of the file at 4.5 characters a token."""
    size_bytes: int
    """Of the record file; the images are far larger."""
    source: str
    licence: str


_SFT_FOLDERS = (
    "coco/train2017",
    "gqa/images",
    "ocr_vqa/images",
    "textvqa/train_images",
    "vg/VG_100K",
    "vg/VG_100K_2",
)
_SHARE_FOLDERS = (
    "llava/llava_pretrain/images",
    "sam/images",
    "share_textvqa/images",
    "web-celebrity/images",
    "web-landmark/images",
    "wikiart/images",
)

MIXTURES: dict[str, Mixture] = {
    mixture.name: mixture
    for mixture in (
        Mixture(
            name="LLaVA-1.5-558k",
            stage="PT",
            records="text_files/blip_laion_cc_sbu_558k.json",
            images="llava/llava_pretrain/images",
            folders=("00000",),
            num_samples=558_128,
            mean_text_tokens=20,
            size_bytes=181_000_000,
            source="https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
            licence="that of CC-3M and BLIP",
        ),
        Mixture(
            name="LLaVA-1.5-mix-665k",
            stage="SFT",
            records="text_files/llava_v1_5_mix665k.json",
            images="",
            folders=_SFT_FOLDERS,
            num_samples=665_298,
            num_text_only=40_688,
            mean_text_tokens=250,
            size_bytes=1_030_000_000,
            source="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
            licence="CC-BY-4.0 and OpenAI's terms of use",
        ),
        Mixture(
            name="ShareGPT4V-PT-1246k",
            stage="PT",
            records="text_files/share-captioner_coco_lcs_sam_1246k_1107.json",
            images="",
            folders=("coco/train2017", "llava/llava_pretrain/images", "sam/images"),
            num_samples=1_246_000,
            mean_text_tokens=190,
            size_bytes=1_500_000_000,
            source="https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
            licence="CC-BY-NC-4.0",
        ),
        Mixture(
            name="ShareGPT4V-mix-665k",
            stage="SFT",
            records="text_files/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
            images="",
            folders=_SFT_FOLDERS + _SHARE_FOLDERS,
            num_samples=665_000,
            num_text_only=40_688,
            mean_text_tokens=290,
            size_bytes=1_200_000_000,
            source="https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
            licence="CC-BY-NC-4.0",
        ),
    )
}
"""By the source that Table 2 names; the two of ShareGPT4V have the paper's rounded number of samples."""


def find_mixture(record: str) -> Mixture | None:
    """Return the mixture that an entry of ``DataConfig.records`` names, or None for a file of the user's.

    Raises:
        ConfigError: see ``parse_source``.
        UnknownNameError: neither a mixture nor a record file or folder.
    """
    name = parse_source(record).name
    if name not in MIXTURES and (is_hub_name(name) or is_record_file(name) or Path(name).exists()):
        return None
    return look_up(MIXTURES, name, "mixture (or record file or folder)")


def missing_files(mixture: Mixture, data_root: Path) -> list[tuple[Path, str]]:
    """Return the files of a mixture that are missing below a data root, each with a description."""
    places = [data_root / mixture.records, data_root / Path(mixture.records).name]
    missing = (
        []
        if any(place.is_file() for place in places)
        else [(places[0], f"its records; download them from {mixture.source}")]
    )
    folders = [data_root / mixture.images / folder for folder in mixture.folders]
    return missing + [(folder, "images that it names") for folder in folders if not folder.is_dir()]


Place = tuple[Path, Path]
"""A record file, and the folder that its image paths start from."""


def resolve(data: DataConfig, data_root: str | Path = "") -> list[tuple[Source, list[Place]]]:
    """Return the sources of a stage, each with its record files and the folders of their images.

    Args:
        data: mixtures by name, or record files and folders of the user.
        data_root: folder of the mixtures; not needed for the user's own files.

    Raises:
        UnknownNameError: a name that is neither a mixture nor looks like a file.
        ConfigError: a mixture is asked for without a data root; or see ``parse_source``.
        DataError: files or folders are missing; all of them are listed, each with where it comes from.
    """
    sources = [parse_source(record) for record in data.records]
    refuse_both(sources)
    found = [_resolve_source(source.name, data.images, data_root) for source in sources]
    missing = [line for _, lines in found for line in lines]
    if missing:
        raise DataError("data is missing:\n" + "\n".join(f"  {line}" for line in missing))
    return [(one, places) for one, (places, _) in zip(sources, found, strict=True)]


def _resolve_source(name: str, images: str, data_root: str | Path) -> tuple[list[Place], list[str]]:
    """Return the places of a source, and a description of what is missing."""
    if is_hub_name(name):
        files = find_records(name, has_images=bool(images))
        return [(file, Path(images or (file if file.is_dir() else file.parent))) for file in files], []
    path, root, lines = _resolve_one(name, images, data_root)
    return [(path, root)], lines


def _resolve_one(record: str, images: str, data_root: str | Path) -> tuple[Path, Path, list[str]]:
    """Return record file, image root, and a description of what is missing."""
    mixture = find_mixture(record)
    if mixture is None:
        path = Path(record)
        root = Path(images) if images else (path if path.is_dir() else path.parent)
        lines = [] if path.exists() else [f"{path}: no such record file. Check the path."]
        return path, root, lines + _missing_folder(root)
    if not str(data_root):
        raise ConfigError(
            f"data.records = {record!r} is a mixture of Table 2 and needs data_root, the folder with "
            f"{mixture.records}; see `tinyllava show data`."
        )
    candidates = [Path(data_root) / mixture.records, Path(data_root) / Path(mixture.records).name]
    path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    lines = (
        []
        if path.is_file()
        else [f"{path}: missing record file of {record}. Download it from {mixture.source}."]
    )
    root = Path(images) if images else Path(data_root) / mixture.images
    return path, root, lines + _missing_folder(root)


def _missing_folder(root: Path) -> list[str]:
    if root.is_dir():
        return []
    return [f"{root}: no such image folder. Set data.images (--images), or put the images there."]


def read_licences(folder: Path) -> dict[str, str]:
    """Return the licences that a folder of records or a checkpoint names, by the name of the data."""
    found: dict[str, str] = {}
    for name, value in (read_object(folder / LICENCES) or {}).items():
        found |= {k: str(v) for k, v in value.items()} if isinstance(value, dict) else {name: str(value)}
    return found


def gather_licences(records: Iterable[str], start_from: str) -> dict[str, dict[str, str]]:
    """Return the licences to save with a model: by record file, those of its start under an empty name."""
    names = [parse_source(record).name for record in records]
    files = [Path(name) for name in names if name not in MIXTURES and not is_hub_name(name)]
    found = {file.name: read_licences(file.parent) for file in files}
    found |= {name: hub_licence(name) for name in names if is_hub_name(name)}
    found[""] = read_licences(Path(start_from)) if start_from else {}
    return {name: licences for name, licences in found.items() if licences}


def hub_licence(name: str) -> dict[str, str]:
    """Return the licence of a data set of the hub that was read; empty if its card states none."""
    licence = licence_of(name)
    return {PREFIX + parse_hub_name(name).repository: licence} if licence else {}
