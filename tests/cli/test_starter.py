"""The starter's command line: what it says to a wrong name before anything is fetched."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllava import cli
from tinyllava.starter import run
from tinyllava.starter.records import Amount
from tinyllava.starter.run import Work


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


def test_the_seed_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Work] = []
    monkeypatch.setattr(run, "run_starter", lambda output, work: given.append(work) or output)
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path))
    assert cli.main(["starter"]) == 0
    assert cli.main(["starter", "--seed", "7", "--captions", "3", "--conversations", "4"]) == 0
    assert [work.seed for work in given] == [42, 7]
    assert given[1].total == Amount(captions=3, conversations=4)


def test_a_wrong_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["starter", "--seed", "-1"])
    assert "--seed -1: must be 0 to 4294967295" in capsys.readouterr().err
