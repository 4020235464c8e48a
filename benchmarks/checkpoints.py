"""What training waits for when a checkpoint is written, and how fast it must be by the plan.

    python benchmarks/checkpoints.py --megabytes 600

The first table is measured: a checkpoint of trained weights and AdamW's moments, in seconds of this process's
CPU time and of the clock, for what training waits for (a copy in main memory) and for what a thread does
meanwhile (files, disk, hashes). The second follows from the plan: the rates at which ten checkpoints take 2%
of each stage.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tinyllava.files import describe_files, flush
from tinyllava.planning.plan import plan_run
from tinyllava.recipes.variants import variant
from tinyllava.training.writing import CheckpointWriter

PER_STAGE = 10
SHARE = 0.02


def timed(action: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of an action by the clock and of the process's CPU time."""
    clock, cpu = time.perf_counter(), time.process_time()
    action()
    return {"clock": round(time.perf_counter() - clock, 2), "cpu": round(time.process_time() - cpu, 2)}


def measure(num_bytes: int, folder: Path) -> dict[str, dict[str, float]]:
    """Write one checkpoint of so many bytes."""
    side = int((num_bytes / 12 / 8) ** 0.5)
    model = torch.nn.Sequential(*(torch.nn.Linear(side, side, bias=False) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    writer = CheckpointWriter()
    optimizer.register_state_dict_post_hook(writer.take_state)

    def take() -> None:
        writer.take(folder, {n: p.detach() for n, p in model.named_parameters()}, model, optimizer)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")  # as the Trainer does

    def finish(where: Path) -> None:
        names = [path.name for path in where.iterdir()]
        for name in names:
            flush(where / name)
        describe_files(where, names)

    def write() -> None:
        writer.write(finish)
        writer.close()
        writer.wait()

    return {"training waits for": timed(take), "a thread does": timed(write)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--variants", nargs="+", default=["base-C-TL", "share-Sig-Phi"])
    parser.add_argument("--gpu", default="H100-80G")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--json-file", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(arguments.megabytes * 10**6, Path(folder))
    plans = {
        f"{name} {stage.name}": {
            "checkpoint_gb": round(stage.checkpoint_bytes / 1e9, 1),
            "hours": round(stage.hours, 2),
            "gb_per_second_for_2_percent": round(
                PER_STAGE * stage.checkpoint_bytes / 1e9 / (SHARE * stage.hours * 3600), 2
            ),
        }
        for name in arguments.variants
        for stage in plan_run(variant(name), gpu=arguments.gpu, num_gpus=arguments.gpus).stages
    }
    result = json.dumps({"megabytes": arguments.megabytes, "measured": measured, "plans": plans}, indent=2)
    print(result)
    if arguments.json_file:
        arguments.json_file.write_text(result + "\n")


if __name__ == "__main__":
    main()
