"""What each benchmark needs on disk: what is there, what is missing, where it comes from."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class NeededFile:
    """A file or folder of a benchmark, by one or several names (the first that is found serves)."""

    names: tuple[str, ...]
    """Paths or glob patterns relative to the benchmark's folder."""
    purpose: str
    source: str
    """Where it is to be had."""
    size: str = "size not known"
    licence: str = "not stated"
    num_files: int | None = None
    """How much a complete folder holds (nothing is counted where a file serves in its place)."""
    known_md5: Mapping[str, str] = field(default_factory=dict)
    """MD5 of known releases -> the release's name."""
    is_optional: bool = False


@dataclass(frozen=True, kw_only=True)
class FileStatus:
    """What was found of a needed file: the paths, and what is wrong with them, if anything."""

    needed: NeededFile
    found: tuple[Path, ...]
    problem: str = ""
    release: str = ""
    """Which known release it is, told by its MD5."""

    @property
    def is_present(self) -> bool:
        """Whether the file is there and whole, as far as can be told."""
        return bool(self.found) and not self.problem

    def __str__(self) -> str:
        needed = self.needed
        state = "present" if self.is_present else "missing" if not self.found else "doubtful"
        extra = "".join(f" ({remark})" for remark in (self.problem, self.release) if remark)
        optional = ", optional" if needed.is_optional else ""
        return (
            f"{state}{extra}{optional}: {' or '.join(needed.names)}: {needed.purpose}; "
            f"from {needed.source}; {needed.size}; licence: {needed.licence}"
        )


def find_files(folder: Path, needed: NeededFile) -> FileStatus:
    """Look for one needed file below ``folder``."""
    for name in needed.names:
        found = tuple(sorted(folder.glob(name)))
        if found:
            problem, release = _count(found, needed), _name_release(found[0], needed)
            return FileStatus(needed=needed, found=found, problem=problem, release=release)
    return FileStatus(needed=needed, found=())


def check_files(folder: Path, needed: Sequence[NeededFile]) -> tuple[FileStatus, ...]:
    """Look for all the needed files below ``folder``."""
    return tuple(find_files(folder, one) for one in needed)


def _count(found: tuple[Path, ...], needed: NeededFile) -> str:
    if needed.num_files is None or not found[0].is_dir():
        return ""
    inside = sum(1 for _ in found[0].iterdir())
    return f"{inside:,} of {needed.num_files:,} files" if inside < needed.num_files else ""


def _name_release(path: Path, needed: NeededFile) -> str:
    if not needed.known_md5 or not path.is_file():
        return ""
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return f"{needed.known_md5.get(md5, 'unknown release')}, md5 {md5}"
