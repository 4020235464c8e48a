"""Workers: no more than the shared memory serves, on a really small one too; a dead one ends in one line."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tinyllava.config import Hardware, to_json
from tinyllava.data.dataset import Examples
from tinyllava.data.workers import naming_dead_workers, usable_workers
from tinyllava.errors import DataError
from tinyllava.model.assemble import assemble
from tinyllava.model.tuning import apply_tuning
from tinyllava.training.prepare import prepare
from tinyllava.training.run import make_trainer, train
from training_toys import toy_run

MB = 10**6


@pytest.mark.parametrize(
    ("free", "wanted", "batch", "held", "processes", "usable"),
    [
        (64 * MB, 4, MB, 1, 1, 4),
        (64 * MB, 0, 100 * MB, 1, 1, 0),
        (64 * MB, 4, 7 * MB, 1, 1, 4),  # 9 batches of 7 MB
        (64 * MB, 4, 8 * MB, 1, 1, 3),  # 7 of the 8 that fit
        (64 * MB, 4, 8 * MB, 8, 1, 0),
        (64 * MB, 4, 7 * MB, 1, 2, 1),
        (64 * MB, 2, 0, 1, 1, 2),
    ],
)
def test_as_many_workers_as_the_shared_memory_serves(
    monkeypatch, free, wanted, batch, held, processes, usable
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(free, 0, free))
    number, each, why = usable_workers(wanted, batch, held, processes)
    assert (number, each) == (usable, 2)
    assert bool(why) == (number < wanted)
    if why:
        assert "has 64 MB of shared memory free, 4 workers need " in why
        assert f"MB: {number or 'no'} workers are used. Start the container with --shm-size=1g" in why
    assert (2 * number + held) * batch * processes <= free or number == 0


@pytest.mark.parametrize(
    ("free", "wanted", "batch", "ahead", "usable", "each"),
    [
        (640 * MB, 4, MB, 16, 4, 4),
        (640 * MB, 4, MB, 128, 4, 32),
        (640 * MB, 3, MB, 16, 3, 6),  # 18 batches hold the 16
        (64 * MB, 4, MB, 128, 4, 15),  # 62 batches of the 128
        (64 * MB, 4, 8 * MB, 128, 3, 2),
    ],
)
def test_workers_prepare_a_step_ahead_or_as_much_as_fits(
    monkeypatch, free, wanted, batch, ahead, usable, each
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(free, 0, free))
    found = usable_workers(wanted, batch, 2, 1, ahead)
    assert (found.num_workers, found.prefetch_factor) == (usable, each)
    assert (usable * each + 2) * batch <= free
    assert bool(found.why) == (usable * each < ahead)
    if usable == wanted and found.why:
        assert f"each prepares {each} batches ahead. Start the container with --shm-size=1g" in found.why


def test_a_step_is_taken_out_of_the_shared_memory_and_the_next_one_prepared(parts, records, tmp_path):
    """And held-out records and those that are trained on come as bytes: a quarter of the memory."""
    hardware = Hardware(num_workers=2, precision="fp32", device_batch_size=2)
    run = toy_run(parts, records, tmp_path / "run", hardware=hardware)
    stage = dataclasses.replace(run.stages["pretrain"], global_batch_size=8)
    model, processor = assemble(run.model)
    apply_tuning(model, stage)
    prepared = prepare(run, stage, model, processor)
    trainer = make_trainer(run, stage, model, processor, prepared, tmp_path / "stage", [])
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor) == (2, 2)
    batches, num_tokens = trainer.get_batch_samples(iter(loader), 4, torch.device("cpu"))
    assert len(batches) == 4
    assert not any(
        value.is_shared() for batch in batches for value in batch.values() if torch.is_tensor(value)
    )
    assert {batch["pixel_values"].dtype for batch in batches} == {torch.uint8}
    assert num_tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)


PROGRAM = """
import sys
from pathlib import Path
from tinyllava.config import run_from_json
from tinyllava.data.reporting import reporting
from tinyllava.training.run import train
with reporting(is_shown=True):  # as the command does
    train(run_from_json(Path(sys.argv[1]).read_text()))
"""


def test_training_ends_on_a_small_shared_memory_and_says_how_it_is_faster(parts, records, tmp_path):
    hardware = Hardware(num_workers=2, precision="fp32", device_batch_size=4)
    run = toy_run(parts, records, tmp_path / "run", hardware=hardware)
    (tmp_path / "run.json").write_text(
        to_json(dataclasses.replace(run, stages={"pretrain": run.stages["pretrain"]}))
    )
    assert shutil.which("unshare") is not None, "a small memory of one's own needs Linux and util-linux"
    mount = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", PROGRAM, tmp_path / "run.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "/dev/shm has 0 MB of shared memory free, 2 workers need 0 MB: no workers are used" in done.stdout
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("lose", "limit_seconds", "told"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            600,
            r"images died.*--hardware\.num-workers 0 loads images",
        ),
        (
            lambda: time.sleep(600),
            1,
            r"delivered none within 1 s:.*If .* raise --hardware\.timeout-seconds\.",
        ),
    ],
    ids=["dies", "hangs"],
)
def test_a_worker_that_dies_or_hangs_ends_in_one_line(
    parts, records, tmp_path, monkeypatch, lose, limit_seconds, told
):
    original = Examples.__getitem__

    def lost(self, index):
        if get_worker_info() is not None and index == 5:
            lose()
        return original(self, index)

    monkeypatch.setattr(Examples, "__getitem__", lost)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # in which they may end
    hardware = Hardware(num_workers=2, precision="fp32", device_batch_size=2, timeout_seconds=limit_seconds)
    before = multiprocessing.active_children()
    with pytest.raises(DataError, match=told) as caught:
        train(toy_run(parts, records, tmp_path / "run", hardware=hardware))
    assert "\n" not in str(caught.value)
    assert set(multiprocessing.active_children()) <= set(before)  # PyTorch would raise again as one ends


class _Images(Dataset):
    """Whose second image ends its worker; the other worker sleeps on the third."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if index > 1:
            time.sleep(600)
        return index


def test_no_worker_outlives_an_error_that_interrupted_another():
    """As where another process ends while the error is on its way: PyTorch raises it once more."""

    def interrupted():
        try:
            list(DataLoader(_Images(), num_workers=2, batch_size=1))
        finally:
            raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")

    before = multiprocessing.active_children()
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    other.start()
    try:
        with pytest.raises(DataError, match="images died") as caught, naming_dead_workers("--workers"):
            interrupted()
        assert caught.value.__cause__  # its frames are held, as by the caller who reports them
        left = set(multiprocessing.active_children())
        assert {other} <= left <= {other, *before}  # which were there before
    finally:
        other.kill()
        other.join()


def test_other_errors_stay_what_they_are():
    said = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: mine"
    with pytest.raises(RuntimeError, match="mine"), naming_dead_workers("--workers"):
        raise RuntimeError(said)
