"""A disk that really fills up while a run trains: the reason is said, and with some room it goes on."""

import dataclasses
import json
import sys
from pathlib import Path

from small_disk import run_on_small_disk
from tinyllava.config import Hardware, to_json
from training_toys import toy_run

# What is left of the disk is taken as soon as the first step is logged.
PROGRAM = """
import json, sys, torch
from pathlib import Path
from tinyllava.config import run_from_json
from tinyllava.errors import TrainingError
from tinyllava.training.progress import StageProgress
from tinyllava.training.run import train

run = run_from_json(Path(sys.argv[1]).read_text())
filler = run.folder.parent / "filler"
log = StageProgress.on_log

def fill(*args, **kwargs):
    log(*args, **kwargs)
    StageProgress.on_log = log
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == 28, error

torch.set_num_threads(1)
StageProgress.on_log = fill
try:
    train(run)
    said = "nothing"
except TrainingError as error:
    said = str(error)
filler.unlink()
num_steps = len((run.folder / "pretrain/metrics.jsonl").read_text().splitlines())
files = [path.name for path in train(run).iterdir()]
print(json.dumps({"said": said, "num_steps": num_steps, "files": files}))
"""


def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_when_there_is_room(
    parts: dict[str, Path], records: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    hardware = Hardware(num_workers=0, precision="fp32", device_batch_size=2, save_steps=3)
    run = toy_run(parts, records, disk / "run", hardware=hardware)
    stages = {name: dataclasses.replace(stage, num_epochs=4) for name, stage in run.stages.items()}
    config = tmp_path / "run.json"
    config.write_text(to_json(dataclasses.replace(run, stages=stages)))
    done = run_on_small_disk(disk, "24m", sys.executable, "-c", PROGRAM, config)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["said"] == (
        f"{disk / 'run' / 'pretrain'}: the disk is full. Free some space and run the same command again."
    )
    assert 1 <= report["num_steps"] < 12  # it was stopped on the way
    assert "model.safetensors" in report["files"]
