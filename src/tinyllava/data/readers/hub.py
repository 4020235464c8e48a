"""Data sets of the Hugging Face Hub by name: the record files of a split, downloaded once per revision.

Paper: none. The files are read like a user's own files. The data set's card defines the splits, or else the
names of files and folders do.
"""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from posixpath import commonpath
from typing import Any

from tinyllava.conversation import IMAGE_SUFFIXES
from tinyllava.data.readers.containers import is_record_file
from tinyllava.errors import ConfigError, DataError, first_line
from tinyllava.files import files_below

PREFIX = "hf:"
_NAME = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?"
    r"(?:@(?P<revision>[\w./-]+))?"
)
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What a file or folder is called that belongs to a split."""
_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".7z", ".rar")
_CARD = "README.md"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class HubName:
    """``hf:owner/name[/config][:split][@revision]``."""

    repository: str
    config: str = ""
    split: str = ""
    revision: str = ""
    """A commit, branch or tag; empty means the newest on the main branch."""

    def __str__(self) -> str:
        parts = (("/", self.config), (":", self.split), ("@", self.revision))
        return PREFIX + self.repository + "".join(mark + value for mark, value in parts if value)


def is_hub_name(name: str) -> bool:
    """Whether an entry names a data set of the hub."""
    return name.startswith(PREFIX)


def parse_hub_name(name: str) -> HubName:
    """Return the parts of a name.

    Raises:
        ConfigError: it has another form.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise ConfigError(f"{name}: write hf:owner/name, hf:owner/name:split, or hf:owner/name/config:split.")
    return HubName(**{key: value or "" for key, value in found.groupdict().items()})


def pinned(name: str) -> str:
    """Return a name with the commit that it currently refers to.

    Raises:
        ConfigError, DataError: see ``parse_hub_name`` and ``find_records``.
    """
    hub = parse_hub_name(name)
    return str(replace(hub, revision=_list_files(hub)[0]))


def find_records(name: str, *, has_images: bool = False) -> list[Path]:
    """Return the record files of a split, or its folder of images; they are downloaded unless they are here.

    Args:
        has_images: whether the images are in a folder of the user's.

    Raises:
        ConfigError: see ``parse_hub_name``.
        DataError: no such data set, config or split; nothing in it can be read; its images are in an archive;
            or the hub cannot be reached.
    """
    hub = parse_hub_name(name)
    commit, files = _list_files(hub)
    chosen = _choose(hub, _splits(hub, commit, files))
    images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    holds_images = all(file.endswith((".parquet", ".tar")) for file in chosen)
    if not is_record_file(chosen[0]):
        folder = _image_folder(hub, chosen, images)
        paths = _download(hub, commit, chosen)
        return [_root(paths[0], chosen[0]) / folder]
    archives = [file for file in files if file.lower().endswith(_ARCHIVES)]
    if archives and not (holds_images or images or has_images):
        raise DataError(
            f"{hub}: its images are in {archives[0]}. Download it with `hf download {hub.repository} "
            f"{archives[0]} --repo-type dataset --local-dir FOLDER`, unpack it, and give --images FOLDER."
        )
    return _download(hub, commit, [*chosen, *([] if holds_images or has_images else images)])[: len(chosen)]


def record_files(name: str | Path) -> list[Path]:
    """Return the path of a file of the user's, or the files of a split of the hub in their order.

    Raises:
        ConfigError, DataError: see ``find_records``.
    """
    return find_records(str(name)) if is_hub_name(str(name)) else [Path(name)]


def licence_of(name: str) -> str:
    """Return the licence that the card of a downloaded data set states; empty if it states none.

    Raises:
        ConfigError: see ``parse_hub_name``.
    """
    from huggingface_hub import metadata_load, try_to_load_from_cache

    hub = parse_hub_name(name)
    path = try_to_load_from_cache(hub.repository, _CARD, revision=hub.revision or None, repo_type="dataset")
    found = (metadata_load(path) if isinstance(path, str) else None) or {}
    given = found.get("license") or ""
    listed = given if isinstance(given, list) else [given]
    named = str(found.get("license_name") or "")
    return ", ".join(named if named and one == "other" else str(one) for one in listed)


def _image_folder(hub: HubName, chosen: Sequence[str], images: Sequence[str]) -> PurePosixPath:
    """Return the folder of a split whose folders are labels.

    Raises:
        DataError: images of another split are in it too.
    """
    parents = {str(PurePosixPath(file).parent) for file in chosen}
    folder = PurePosixPath(commonpath(parents) if "." not in parents else ".")
    if len(parents) == 1 and folder.name.lower() not in sum(_SPLITS.values(), ()):
        folder = folder.parent
    others = {file for file in images if folder in PurePosixPath(file).parents} - set(chosen)
    if others:
        raise DataError(
            f"{hub}: {min(others)} of another split is in the same folder. Download the data set with `hf "
            f"download {hub.repository} --repo-type dataset --local-dir FOLDER`, and give a folder for each "
            "split."
        )
    return folder


def _splits(hub: HubName, commit: str, files: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each split.

    Raises:
        DataError: no such config, or several and none is named.
    """
    card = _read_card(hub, commit) if _CARD in files else {}
    listed = card.get("configs")
    configs = {str(one.get("config_name")): one for one in listed or () if isinstance(one, dict)}
    usable = [file for file in files if is_record_file(file)]
    usable = usable or [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    if hub.config and hub.config not in configs:
        usable = [file for file in usable if file == hub.config or file.startswith(f"{hub.config}/")]
        if not usable:
            known = ", ".join(configs) or "none is named in its card"
            raise DataError(f"{hub}: no config or file {hub.config!r}; known configs: {known}.")
        return _by_name(usable)
    defaults = [name for name, one in configs.items() if one.get("default") or name == "default"]
    names = [hub.config] if hub.config else defaults or list(configs)
    with_files = [name for name in names if configs[name].get("data_files")]
    if len(with_files) > 1:
        raise DataError(
            f"{hub}: has the configs {', '.join(with_files)}. Choose one: "
            f"{PREFIX}{hub.repository}/{with_files[0]}."
        )
    return _by_patterns(configs[with_files[0]], files) if with_files else _by_name(usable)


def _by_patterns(config: dict[str, Any], files: Sequence[str]) -> dict[str, list[str]]:
    given = config["data_files"]
    entries = given if isinstance(given, list) else [given]
    found: dict[str, list[str]] = {}
    for entry in entries:
        one = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        patterns = one.get("path") or ()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matching = [file for file in files if fnmatch(file, str(pattern).replace("**/", "*"))]
            found.setdefault(str(one.get("split", "train")), []).extend(matching)
    return {split: list(dict.fromkeys(matching)) for split, matching in found.items() if matching}


def _by_name(files: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in files:
        words = set(re.split(r"[^a-z]+", file.lower()))
        split = next((name for name, known in _SPLITS.items() if words & set(known)), "train")
        found.setdefault(split, []).append(file)
    return found


def _choose(hub: HubName, splits: dict[str, list[str]]) -> list[str]:
    if not splits:
        raise DataError(
            f"{hub}: no file that can be read (Parquet, JSON, CSV, tar, images). Download it, and give its "
            "files."
        )
    wanted = hub.split or ("train" if "train" in splits else "")
    if not wanted and len(splits) == 1:
        wanted = next(iter(splits))
    if wanted not in splits:
        raise DataError(
            f"{hub}: no split {wanted or 'train'!r}; it has {', '.join(splits)}. "
            f"Write {replace(hub, split=next(iter(splits)))}."
        )
    return sorted(splits[wanted])


def _list_files(hub: HubName) -> tuple[str, list[str]]:
    """Return the commit of a data set and its files, from the Hub or, if offline, from the cache."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, constants

    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().dataset_info(hub.repository, revision=hub.revision or None)
            return str(info.sha), sorted(file.rfilename for file in info.siblings or ())
        except (OSError, ValueError, RuntimeError, HTTPError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            if getattr(getattr(error, "response", None), "status_code", 500) < 500:
                raise DataError(
                    f"{hub}: the hub has no such data set or revision ({reason}). Check the name. A "
                    "private or gated data set needs `hf auth login`."
                ) from error
    return _list_cached(hub, reason)


def _list_cached(hub: HubName, reason: str) -> tuple[str, list[str]]:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE) / f"datasets--{hub.repository.replace('/', '--')}"  # as documented
    ref = place / "refs" / (hub.revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else hub.revision
    folder = place / "snapshots" / commit
    files = (
        sorted(p.relative_to(folder).as_posix() for p in files_below(folder) if p.is_file()) if commit else []
    )
    if not files:
        raise DataError(
            f"{hub}: not in the cache ({place}), and the hub cannot be reached ({reason}). Run the command "
            "once with a network, or give a file of your own."
        )
    return commit, files


def _read_card(hub: HubName, commit: str) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    [path] = _download(hub, commit, [_CARD])
    found = metadata_load(path)
    return found if isinstance(found, dict) else {}


def _root(path: Path, file: str) -> Path:
    return path.parents[len(PurePosixPath(file).parts) - 1]


def _download(hub: HubName, commit: str, files: Sequence[str]) -> list[Path]:
    """Return where files are; the first is asked for by the revision's name, which notes it for offline use.

    Raises:
        DataError: one cannot be downloaded.
    """
    from httpx2 import HTTPError
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    def find(file: str, revision: str = commit) -> Path:
        known = try_to_load_from_cache(hub.repository, file, revision=commit, repo_type="dataset")
        is_noted = revision == commit or constants.HF_HUB_OFFLINE
        if isinstance(known, str) and is_noted:
            return Path(known)
        return Path(hf_hub_download(hub.repository, file, repo_type="dataset", revision=revision))

    named = hub.revision or "main"
    try:
        first = find(files[0], commit if _COMMIT.fullmatch(named) else named)
        with ThreadPoolExecutor(8) as threads:
            return [first, *threads.map(find, files[1:])]
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(
            f"{hub}: a file cannot be downloaded ({reason}). Check the network and the space on the disk, "
            "and run the command again."
        ) from error
