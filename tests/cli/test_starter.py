"""The starter's command line: what it says to a wrong name before anything is fetched."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllava import cli


def test_an_unknown_data_set_is_answered_with_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path))
    assert cli.main(["starter", "--with", "tux_paint,cifar"]) != 0
    message = capsys.readouterr().err
    assert "unknown data set 'cifar'; known: cifar10, tux_paint. Did you mean 'cifar10'?" in message
    assert not list(tmp_path.iterdir())


def test_a_wrong_name_is_answered_in_less_than_three_tenths_of_a_second_and_without_torch() -> None:
    code = "import sys; from tinyllava.cli import main; main(['starter', '--with', 'x']); print(*sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "known: cifar10, tux_paint" in done.stderr
    assert {"torch", "transformers", "numpy"}.isdisjoint(done.stdout.split())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
