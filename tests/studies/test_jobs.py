"""Jobs: Slurm through stand-ins that really run the scripts, and processes of this machine.

Training is a stand-in too (fake_training): these tests are about who starts what, when, and how often.
"""

import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

import grid_toys
import slurm_stand_in
from tinyllava.cli import main
from tinyllava.data.cores import num_cores
from tinyllava.studies.study import load_study

FAKE = Path(__file__).parent / "fake_training"


class Workshop:
    """A folder with a grid, its benchmark, and the environment in which all work is a stand-in."""

    def __init__(self, folder: Path, parts: dict[str, Path], records: Path) -> None:
        self.folder = folder
        self.grid = grid_toys.write_grid(folder, parts, records)
        self.benchmarks = grid_toys.write_benchmark(folder / "benchmarks")
        self.environment = {
            **slurm_stand_in.install(folder / "slurm"),
            "FAKE_LOG": str(folder / "log"),
            "FAKE_GATE": str(folder / "gate"),
            "PYTHONPATH": os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")]),
        }

    def start(self, *options: str, **environment: str) -> subprocess.Popen:
        """Start the grid."""
        places = ["--benchmarks", str(self.benchmarks), "--runs", str(self.folder / "runs")]
        return grid_toys.start(
            str(self.grid),
            *places,
            "--output",
            str(self.folder / "study"),
            *options,
            **self.environment,
            **environment,
        )

    def lines(self) -> list[str]:
        """What the work has written down."""
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def wait_for(self, *, begun: int) -> None:
        """Wait until so much work has begun; none goes on before the gate is opened."""
        while sum(line.startswith("begin") for line in self.lines()) < begun:
            time.sleep(0.05)

    def open_gate(self) -> None:
        (self.folder / "gate").touch()


@pytest.fixture
def workshop(tmp_path, parts, records) -> Workshop:
    """Two connectors times two rates: ten nodes."""
    return Workshop(tmp_path, parts, records)


def jobs_of(workshop: Workshop) -> list[str]:
    return sorted((job / "name").read_text() for job in (workshop.folder / "slurm" / "jobs").iterdir())


def test_slurm_runs_each_node_as_one_job_also_when_the_submitter_is_killed(workshop):
    first = workshop.start("--jobs", "slurm", "--job", "slurm_partition=small")
    workshop.wait_for(begun=2)  # both connectors' first stages run at the same time
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    workshop.open_gate()
    second = workshop.start("--jobs", "slurm", "--job", "slurm_partition=small")
    output, _ = second.communicate()
    assert second.returncode == 0, output
    assert output.splitlines()[-1] == str(workshop.folder / "study" / "report.html")
    counts = Counter(workshop.lines())
    assert len(counts) == 20
    assert set(counts.values()) == {1}  # every node began and ended once
    names = jobs_of(workshop)
    assert len(names) == len(set(names)) == 10
    header = (workshop.folder / "slurm" / "jobs" / "1" / "header").read_text()
    assert "--partition=small" in header
    study = load_study(workshop.folder / "study")
    assert [cell.status for cell in study.cells] == ["done"] * 4


def test_a_job_that_slurm_ends_is_reported_and_the_others_go_on(workshop, monkeypatch):
    environment = {**os.environ, **workshop.environment}
    running = workshop.start("--jobs", "slurm", "--at-once", "1")
    workshop.wait_for(begun=1)
    subprocess.run(["scancel", "1"], env=environment, check=True)
    workshop.open_gate()
    output, _ = running.communicate()
    assert running.returncode == 1
    lost = workshop.lines()[0].removeprefix("begin ")
    # The job writes its number when it starts to work; it may be ended before.
    assert re.search(rf"failed: {lost}: the job slurm(:1)? ended without a result", output)
    study = load_study(workshop.folder / "study")
    assert sorted(cell.status for cell in study.cells) == ["done", "done", "failed", "failed"]
    again = workshop.start("--jobs", "slurm")
    output, _ = again.communicate()
    assert again.returncode == 0, output


def test_processes_of_this_machine_and_a_failing_cell(workshop):
    workshop.open_gate()
    running = workshop.start("--jobs", "local", "--at-once", "2", FAKE_FAILURE="finetune")
    output, _ = running.communicate()
    assert running.returncode == 1
    assert sum(line.startswith("failed: finetune-") for line in output.splitlines()) == 4
    assert "was told to fail" in output
    assert Counter(line.split("-")[0] for line in workshop.lines()) == {
        "begin pretrain": 2,
        "end pretrain": 2,
        "begin finetune": 4,
    }
    # Two jobs at a time share the cores, unless the user has decided.
    share = str(max(1, num_cores() // 2))
    threads = (workshop.folder / "log.threads").read_text().split()
    assert set(threads) == {os.environ.get("OMP_NUM_THREADS", share)}


def test_what_the_scheduler_refuses_is_said(workshop):
    running = workshop.start("--jobs", "slurm", "--job", "no_such_option=1")
    output, _ = running.communicate()
    assert running.returncode == 2
    assert "error: --jobs slurm:" in output
    assert "no_such_option" in output


@pytest.mark.parametrize("option", ["tasks_per_node", "slurm_ntasks_per_node"])
def test_several_tasks_on_a_machine_are_refused_before_anything_is_submitted(workshop, capsys, option):
    """Each task would start all processes of its machine."""
    places = ["--benchmarks", str(workshop.benchmarks), "--runs", str(workshop.folder / "runs")]
    jobs = ["--jobs", "slurm", "--job", f"{option}=8"]
    assert main(["reproduce", str(workshop.grid), *places, *jobs]) == 2
    assert capsys.readouterr().err == (
        f"error: --job {option}=8: one task per machine starts its processes. Give --gpus 8 instead.\n"
    )
    assert not jobs_of(workshop)
