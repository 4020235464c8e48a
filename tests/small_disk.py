"""Programs on a disk that is really small: a file system of a few kilobytes that only they see."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'


def run_on_small_disk(
    disk: Path, size: str, *command: str | os.PathLike[str]
) -> subprocess.CompletedProcess[str]:
    """Make a folder a disk of this size (``24m``) and run a program that sees it; skip where nobody may."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("a small disk of one's own needs Linux and user namespaces")
    disk.mkdir()
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", _MOUNT, "sh", size, disk, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
