"""Outputs that cannot be written end in one line, whichever command meets them; so does SIGTERM."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tinyllava.cli import main
from tinyllava.files import held

FULL = "the disk is full. Free some space and run the command again."
ERRORS = {
    "full": (OSError(errno.ENOSPC, "No space left on device", "/out/optimizer.pt"),
             "the disk is full at /out/optimizer.pt. Free some space and run the command again."),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), FULL),
    "weights": (SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
    "optimizer": (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), FULL),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/out/run.json"),
                  "/out/run.json: Read-only file system. Check its permissions, or use another path."),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied", "/out"), "/out: Permission denied"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_the_machine_refuses_is_one_line_in_every_command(case, capsys, monkeypatch):
    error, message = ERRORS[case]

    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("tinyllava.cli.show.main", fail)
    assert main(["show"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_a_full_disk_behind_another_error_is_found_and_own_errors_keep_their_traceback(capsys, monkeypatch):
    def fail(arguments: list[str]) -> int:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the writer ended") from error

    monkeypatch.setattr("tinyllava.cli.show.main", fail)
    assert main(["show"]) == 2
    assert capsys.readouterr().err == f"error: {FULL}\n"

    def be_wrong(arguments: list[str]) -> int:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("tinyllava.cli.show.main", be_wrong)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["show"])


def test_an_output_that_is_full_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tinyllava", "show", "variants"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2, "error: cannot write the output: its disk is full. Free some space and run the command again.\n"
    )  # fmt: skip


@pytest.mark.parametrize("place", ["/dev/full", "/dev/stdout", "/proc/nowhere"])
def test_a_folder_that_cannot_be_made_is_one_line(place, capsys):
    with pytest.raises(OSError, match=rf"^{place}: cannot be written \([^\n]*\)\. Choose another output\.$"):  # noqa: SIM117
        with held(Path(place)):
            pytest.fail("held")


def test_sigterm_ends_a_command_in_order(capsys, monkeypatch):
    left = []

    def wait(arguments: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")
        finally:
            left.append("files in order")

    monkeypatch.setattr("tinyllava.cli.show.main", wait)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["show"]) == 128 + signal.SIGTERM
    assert left == ["files in order"]
    assert "Traceback" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lock_leaves_nothing_behind_and_holds_until_the_end(tmp_path):
    with held(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
        with pytest.raises(OSError, match="another process is writing there"), held(tmp_path / "out"):
            pytest.fail("held twice")
    assert not list((tmp_path / "out").iterdir())
    with held(tmp_path / "out"):
        pass
