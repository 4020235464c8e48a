"""What each benchmark needs on disk: what is there, what is missing, where it comes from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
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
    licence: str = "see the source"
    num_files: int | None = None
    """How many files a complete folder (or pattern) has."""
    md5: str | None = None
    is_optional: bool = False


@dataclass(frozen=True, kw_only=True)
class FileStatus:
    """What was found of a needed file: the paths, and what is wrong with them, if anything."""

    needed: NeededFile
    found: tuple[Path, ...]
    problem: str = ""

    @property
    def is_present(self) -> bool:
        """Whether the file is there and whole, as far as can be told."""
        return bool(self.found) and not self.problem

    def __str__(self) -> str:
        needed = self.needed
        state = "present" if self.is_present else "missing" if not self.found else "doubtful"
        extra = f" ({self.problem})" if self.problem else ""
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
            return FileStatus(needed=needed, found=found, problem=_find_problem(found, needed))
    return FileStatus(needed=needed, found=())


def check_files(folder: Path, needed: Sequence[NeededFile]) -> tuple[FileStatus, ...]:
    """Look for all the needed files below ``folder``."""
    return tuple(find_files(folder, one) for one in needed)


def _find_problem(found: tuple[Path, ...], needed: NeededFile) -> str:
    if needed.num_files is not None:
        inside = sum(1 for _ in found[0].iterdir()) if found[0].is_dir() else len(found)
        if inside < needed.num_files:
            return f"{inside:,} of {needed.num_files:,} files"
    if needed.md5 is not None:
        with found[0].open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != needed.md5:
            return f"md5 {md5}, expected {needed.md5}"
    return ""
