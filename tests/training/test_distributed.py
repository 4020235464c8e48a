"""Two processes against one: equal weights on both, and those of one process, though one sees no image."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout

import toys
from processes import in_ranks, start, start_command
from tinyllava import cli
from tinyllava.config import FULL, Run, Validation, lora
from tinyllava.errors import ConfigError, Stopped, TrainingError
from tinyllava.files import held
from tinyllava.model.compat import decoder_layers
from tinyllava.planning import lost
from tinyllava.training import writing
from tinyllava.training.progress import StageProgress
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer, trained_tensors
from training_toys import sampled_order, toy_run, write_run


def train_in_two(run: Run) -> list[str]:
    """Train in two processes and return what each printed; what each saw is written beside the run."""
    folder = run.folder.parent
    folder.mkdir(exist_ok=True)

    def train_rank(rank: int) -> None:
        seen: list[bool] = []
        train_stage, step = StageTrainer.train, StageTrainer.training_step

        def noting(self, model, inputs, *args, **kwargs):
            seen.append("pixel_values" in inputs or "image_features" in inputs)
            return step(self, model, inputs, *args, **kwargs)

        def saving(self, *args, **kwargs):
            train_stage(self, *args, **kwargs)
            name = f"{Path(self.args.output_dir).name}-{rank}.safetensors"
            save_file(trained_tensors(self.whole), folder / name)

        StageTrainer.training_step, StageTrainer.train = noting, saving
        model = train(run)
        assert (model / "model.safetensors").is_file()  # whole, whichever rank asks
        (folder / f"seen-{rank}.json").write_text(json.dumps(seen))

    said = [folder / f"said-{rank}" for rank in (0, 1)]
    for path in said:
        path.unlink(missing_ok=True)
    ends = in_ranks(2, train_rank, folder / "said")
    assert ends == [0, 0], "".join(path.read_text()[-2000:] for path in said)
    return [path.read_text() for path in said]


def seen(folder: Path, rank: int) -> list[bool]:
    """Whether each batch of a rank had an image."""
    return json.loads((folder / f"seen-{rank}.json").read_text())


def make_records(folder: Path, text_only: set[int]) -> Path:
    """Eight records; those in ``text_only`` have no image."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(8):
        question = f"What colour is number {number}?"
        answer = ("red", "a blue circle", "green")[number % 3]
        record = {
            "id": str(number),
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        }
        if number not in text_only:
            Image.new("RGB", (30, 20 + number), (30 * number, 90, 255 - 30 * number)).save(
                folder / f"images/{number}.png"
            )
            record |= {"image": f"{number}.png"}
            record["conversations"][0]["value"] = f"<image>\n{question}"
        records.append(record)
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def compare_stage(folder: Path, stage: str) -> set[str]:
    """Both ranks have the same tensors, and those of one process; return their names."""
    one = load_file(folder / f"one/run/{stage}/trained.safetensors")
    two = [load_file(folder / f"two/{stage}-{rank}.safetensors") for rank in (0, 1)]
    assert one.keys() == two[0].keys() == two[1].keys()
    for name in one:
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], one[name], rtol=0, atol=1e-5, msg=name)
    return set(one)


def compare_models(folder: Path) -> None:
    """The saved models of one process and of two are the same."""
    saved = [load_file(folder / f"{name}/run/model/model.safetensors") for name in ("one", "two")]
    assert max((saved[0][name] - saved[1][name]).abs().max().item() for name in saved[0]) < 1e-5


def compare_one_with_two(run: Run, folder: Path) -> set[str]:
    """Train the stages of a run in two processes and in one; return the names of the trained tensors."""
    train_in_two(run)
    train(dataclasses.replace(run, output=str(folder / "one/run")))
    compare_models(folder)
    return set().union(*(compare_stage(folder, stage) for stage in run.stages))


def test_a_rank_without_images_neither_hangs_nor_changes_the_result(parts, tmp_path):
    """The connector alone in pre-training, encoder, connector and language model in fine-tuning."""
    order = sampled_order(8, seed=42)
    records = make_records(tmp_path, {index for place, index in enumerate(order) if place % 4 >= 2})
    run = toy_run(parts, records, tmp_path / "two/run", encoder="clip", llm="phi")
    finetune = dataclasses.replace(run.stages["finetune"], vision_encoder=FULL)
    # Captions have images; text alone reaches a stage that trains the connector by itself through a template
    # that keeps the questions.
    pretrain = dataclasses.replace(run.stages["pretrain"], data=finetune.data, template="")
    run = dataclasses.replace(run, stages={"pretrain": pretrain, "finetune": finetune})
    train_in_two(run)
    train(dataclasses.replace(run, output=str(tmp_path / "one/run")))

    assert seen(tmp_path / "two", 0) == [True] * 4  # two steps in each of two stages
    assert seen(tmp_path / "two", 1) == [False] * 4
    for stage in run.stages:
        compare_stage(tmp_path, stage)
        losses = [
            [
                json.loads(line)["loss"]
                for line in (tmp_path / f"{n}/run/{stage}/metrics.jsonl").read_text().splitlines()
            ]
            for n in ("one", "two")
        ]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)  # and written by one rank only
    compare_models(tmp_path)

    again = train_in_two(run)
    assert [output.count("already trained, reusing") for output in again] == [2, 0]  # both stages, said once


def test_dinov2_trained_in_two_processes_gives_the_weights_of_one(parts, tmp_path):
    """Its mask token never gets a gradient: two processes that wait for one would stop.

    Of five samples the last step has one, which only one of the processes gets.
    """
    dino = toys.make_dino(tmp_path / "dino")
    records = make_records(tmp_path, set())
    run = toy_run(parts | {"dino": dino}, records, tmp_path / "two/run", encoder="dino")
    five = dataclasses.replace(run.stages["finetune"].data, records=(f"{records},limit=5",))
    finetune = dataclasses.replace(run.stages["finetune"], vision_encoder=FULL, data=five, num_epochs=2)
    run = dataclasses.replace(run, stages={"finetune": finetune})
    names = compare_one_with_two(run, tmp_path)
    assert any("embeddings.cls_token" in name for name in names)
    assert not any("mask_token" in name for name in names)
    ledger = json.loads((tmp_path / "one/run/finetune/ledger.json").read_text())
    (mask,) = [row for row in ledger if row["name"].endswith("mask_token")]
    assert (mask["trained"], mask["moved"]) == (False, False)


def test_train_starts_its_processes_itself_and_gives_the_weights_of_one(parts, tmp_path):
    """As a user starts them, with nothing forked."""
    records = make_records(tmp_path, {2, 5})
    (tmp_path / "two").mkdir()
    run = toy_run(parts, records, tmp_path / "two/run")
    environment = {name: value for name, value in os.environ.items() if "WORLD_SIZE" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "tinyllava", "train", write_run(run, tmp_path / "two"), "--gpus", "2"],
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train(dataclasses.replace(run, output=str(tmp_path / "one/run")))
    compare_models(tmp_path)
    assert done.stdout.splitlines()[0] == "2 processes share each batch of 4 samples"
    assert done.stdout.count("model: ") == 1  # said once
    for stage in run.stages:
        files = [tmp_path / f"{name}/run/{stage}/metrics.jsonl" for name in ("one", "two")]
        steps = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        assert len(steps[0]) == len(steps[1]) == 2  # eight samples, four a step, however many share them
        for one, two in zip(*steps, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_what_a_process_is_refused_for_is_said_once(parts, tmp_path):
    records = make_records(tmp_path, set())
    run = write_run(toy_run(parts, records, tmp_path / "run"), tmp_path)
    command = start_command(["train", run, "--gpus", "3"], tmp_path / "said")
    command.join()
    printed = (tmp_path / "said").read_text()
    assert command.exitcode == 2, printed
    assert printed.count("not divisible by 3 ranks") == 2  # in two stages
    assert printed.startswith("error: ")
    assert printed.count("error: ") == 1
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run"):  # known to the first process only
        command = start_command(["train", run, "--gpus", "2"], tmp_path / "held")
        command.join()
    printed = (tmp_path / "held").read_text()
    assert command.exitcode == 2, printed
    assert printed.count("error: ") == 1
    assert "another process" in printed
    assert "Traceback" not in printed


def start_long(parts, tmp_path, prepare=int) -> tuple[BaseProcess, Path]:
    """Start a run of many steps in two processes, and wait for the first; return it and its metrics."""
    records = make_records(tmp_path, set())
    toy = toy_run(parts, records, tmp_path / "run")
    long = dataclasses.replace(toy.stages["finetune"], max_steps=2000)
    hardware = dataclasses.replace(toy.hardware, save_steps=2)
    run = dataclasses.replace(toy, stages={"finetune": long}, hardware=hardware)
    arguments = ["train", write_run(run, tmp_path), "--gpus", "2"]
    command = start_command(arguments, tmp_path / "said", prepare)
    metrics = tmp_path / "run/finetune/metrics.jsonl"
    while not metrics.exists() or not metrics.read_text().count("\n"):
        assert command.exitcode is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    return command, metrics


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_saves_in_all_processes(parts, tmp_path, number):
    command, metrics = start_long(parts, tmp_path)
    os.kill(command.pid, number)
    command.join()
    printed = (tmp_path / "said").read_text()
    assert command.exitcode == 128 + number, printed
    assert "stopping: saving after this step" in printed
    assert "Traceback" not in printed
    num_steps = metrics.read_text().count("\n")
    assert num_steps < 2000
    assert (tmp_path / f"run/finetune/checkpoint-{num_steps}/manifest.json").is_file()


@pytest.mark.parametrize("loses", ["killed", "raises"])
def test_a_process_that_is_lost_ends_the_others_and_one_error_is_told(parts, tmp_path, loses):
    """The first process, which speaks, only knows that it has lost the second."""
    saved = tmp_path / "run/finetune/checkpoint-2/manifest.json"  # a thread writes it during the third step

    def at_third_step(self, args, state, control, **_):
        if state.global_step == 3 and os.environ["RANK"] == "1":
            while not saved.is_file():
                time.sleep(0.05)
            if loses == "raises":
                raise TrainingError("this one alone")
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare():
        StageProgress.on_step_begin = at_third_step

    command, metrics = start_long(parts, tmp_path, prepare)
    command.join()
    printed = (tmp_path / "said").read_text()
    assert command.exitcode == 2, printed
    expected = {
        "killed": "error: process 1 of 2 was killed by SIGKILL, possibly because memory ran out.",
        "raises": "process 1:\nerror: this one alone",
    }
    assert expected[loses] in printed
    assert (printed.count("error: "), printed.count("Traceback")) == (1, 0)
    assert saved.is_file()
    assert metrics.read_text().count("\n") == 3


def hang_in(place: str, meet: Callable[[StageTrainer], object]) -> None:
    """Have a rank call a function in a place behind the checkpoint of the second step."""
    compute, save = StageTrainer.training_step, writing.save_moments

    def computing(self, model, *args, **kwargs):
        if self.state.global_step == 2:
            self.writer.wait()  # for that checkpoint
            if place == "forward":
                meet(self)
            elif place == "backward":
                layer = decoder_layers(self.model.language_model)[0]
                layer.register_full_backward_pre_hook(lambda *_: meet(self))
            else:
                writing.save_moments = lambda *args, **options: meet(self) or save(*args, **options)
        return compute(self, model, *args, **kwargs)

    StageTrainer.training_step = computing


@pytest.mark.parametrize(
    ("sharding", "place", "hung"),
    [
        ("none", "forward", 0),
        ("none", "backward", 1),
        ("all", "forward", 1),
        ("all", "backward", 0),
        ("all", "writing", 1),
    ],
)
def test_a_process_that_hangs_ends_the_others_within_the_limit_and_is_named(
    parts, tmp_path, monkeypatch, sharding, place, hung
):
    """Once it hangs, the limit of a minute is lowered to a second; a slow machine may need more before."""
    monkeypatch.setattr(lost, "PATIENCE_SECONDS", 0.2)
    toy = toy_run(parts, make_records(tmp_path, set()), tmp_path / "run")
    hardware = dataclasses.replace(toy.hardware, sharding=sharding, save_steps=2, timeout_seconds=60)
    long = dataclasses.replace(toy.stages["finetune"], max_steps=200)
    run = write_run(dataclasses.replace(toy, stages={"finetune": long}, hardware=hardware), tmp_path)

    def stop(_: StageTrainer) -> None:
        (tmp_path / "stopped").touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    def lower(trainer: StageTrainer) -> None:
        while not (tmp_path / "stopped").exists():
            time.sleep(0.01)
        for group in (_get_default_group(), trainer.writer._group):
            if group is not None:
                assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=1)
                _set_pg_timeout(timedelta(seconds=1), group)

    def train_rank(rank: int) -> int:
        hang_in(place, stop if rank == hung else lower)
        return cli.main(["train", run])

    ends = in_ranks(2, train_rank, tmp_path / "said", hung=[hung])
    printed = (tmp_path / f"said-{1 - hung}").read_text()
    assert ends[1 - hung] == 2, printed
    told = [line for line in printed.splitlines() if "error" in line.lower() or "Traceback" in line]
    expected = (
        f"error: process {hung} of 2 did not answer within 60 s: a process hangs, or a node is lost. Look at "
        "the messages there, and run the same command again to resume. If it only needs more time, raise "
        "--hardware.timeout-seconds."
    )
    assert told == [expected]
    assert (tmp_path / "run/finetune/checkpoint-2/manifest.json").is_file()


def test_a_signal_ends_a_process_that_waits_for_another(tmp_path, monkeypatch):
    """Which Python's handlers cannot: it waits in PyTorch, for a process that never comes."""
    (tmp_path / "bench/pope").mkdir(parents=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def wait(arguments) -> int:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "2"}
        (tmp_path / "waits").touch()
        TCPStore("127.0.0.1", store.port).wait(["never"], timedelta(hours=1))
        return 0

    monkeypatch.setattr("tinyllava.cli.runs.main", wait)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in (signal.SIGTERM, signal.SIGINT):
        (tmp_path / "waits").unlink(missing_ok=True)
        process = start(lambda: cli.main(["runs"]), tmp_path / "said")
        while not (tmp_path / "waits").exists():
            time.sleep(0.05)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == 128 + number


def signal_two(run: Run, signalled: dict[int, int], *, number: int = 0, step: int = -1) -> list[int | None]:
    """Train in two processes and return their exit statuses.

    Args:
        run: what they train.
        signalled: how often each rank gets the signal, while it computes that step.
    """

    def train_rank(rank: int) -> int:
        compute = StageTrainer.training_step

        def computing(self, *args, **kwargs):
            if self.state.global_step == step:
                for _ in range(signalled.get(rank, 0)):
                    os.kill(os.getpid(), number)
            return compute(self, *args, **kwargs)

        StageTrainer.training_step = computing
        try:
            train(run)
        except Stopped as stop:
            return 128 + stop.number
        return 0

    return in_ranks(2, train_rank)


def test_a_signal_to_one_process_or_to_all_stops_them_at_one_step_and_the_run_resumes(parts, tmp_path):
    """Launchers also signal twice: their own, and the one that is passed on."""
    records = make_records(tmp_path, set())
    toy = toy_run(parts, records, tmp_path / "two/run")
    long = dataclasses.replace(toy.stages["finetune"], max_steps=8)
    run = dataclasses.replace(toy, stages={"finetune": long})
    cases = (
        (2, signal.SIGTERM, {1: 1}, [143, 143]),
        (4, signal.SIGINT, {0: 1}, [130, 143]),
        (6, signal.SIGTERM, {0: 2, 1: 2}, [143, 143]),
        (7, signal.SIGINT, {0: 2, 1: 1}, [130, 130]),
    )
    for step, number, signalled, ends in cases:
        assert signal_two(run, signalled, number=number, step=step) == ends
        checkpoints = sorted(path.name for path in (tmp_path / "two/run/finetune").glob("checkpoint-*"))
        assert checkpoints[-1] == f"checkpoint-{step + 1}"
        assert (tmp_path / "two/run/finetune" / checkpoints[-1] / "manifest.json").is_file()
    assert signal_two(run, {}) == [0, 0]
    steps = (tmp_path / "two/run/finetune/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(1, 9))  # none lost, none twice
    train(dataclasses.replace(run, output=str(tmp_path / "one/run")))
    compare_models(tmp_path)


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(parts, records, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"global_batch_size = 4: not divisible by 3 ranks"):
        train(toy_run(parts, records, tmp_path / "run"))


def test_over_weights_in_few_bits_two_processes_give_the_weights_of_one(parts, tmp_path):
    records = make_records(tmp_path, set())
    run = toy_run(parts, records, tmp_path / "two/run")
    stages = {
        f"in-{bits}-bits": dataclasses.replace(run.stages["finetune"], language_model=lora(4, bits=bits))
        for bits in (4, 8)
    }
    compare_one_with_two(dataclasses.replace(run, stages=stages), tmp_path)


def guide_commands() -> tuple[str, str]:
    """The two commands of the guide for several nodes: torchrun, and the script for Slurm."""
    text = (Path(__file__).parents[2] / "docs/guides/train.md").read_text().partition("## Several nodes")[2]
    plain, script = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return plain, script


def make_slurm(folder: Path) -> None:
    """A Slurm of two nodes that are both this machine."""
    folder.mkdir()
    commands = {
        "srun": 'for node in 0 1; do SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=2 "$@" & pids="$pids $!"; done\n'
        "code=0; for pid in $pids; do wait $pid || code=$?; done; exit $code",
        "scontrol": "echo localhost; echo second",
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)


def test_two_nodes_give_the_weights_of_one_process(parts, tmp_path, port):
    """The guide's own script, with one process a node, this machine as both nodes and a toy run."""
    records = make_records(tmp_path, {1, 6})
    run = toy_run(parts, records, tmp_path / "two/run")
    run = dataclasses.replace(run, stages={"finetune": run.stages["finetune"]})
    (tmp_path / "two").mkdir()
    make_slurm(tmp_path / "bin")
    plain, script = guide_commands()
    options = re.compile(r"--(?:nnodes|nproc-per-node|rdzv-\w+) ")
    assert options.findall(plain) == options.findall(script)
    for written, ours in {
        "share-Sig-Phi --data FOLDER --output SHARED/share-Sig-Phi": write_run(run, tmp_path / "two"),
        "--nproc-per-node 8": "--nproc-per-node 1",
        "29500": port,
    }.items():
        assert written in script
        script = script.replace(written, ours)
    environment = {name: value for name, value in os.environ.items() if "WORLD_SIZE" not in name}
    environment |= {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "here[1-2]",
    }
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model: ") == 1  # the first process of the first node speaks
    train(dataclasses.replace(run, output=str(tmp_path / "one/run")))
    compare_models(tmp_path)
    steps = (tmp_path / "two/run/finetune/metrics.jsonl").read_text().splitlines()
    assert len(steps) == 2  # eight samples, four a step


def test_two_processes_measure_held_out_records_as_one_does(parts, records, tmp_path):
    """The one pads; two that pack have other micro-batches, and the same steps: of 9 samples 4, 4 and 1."""
    curves = []
    for name, size, packing in (("one", 2, False), ("two", 1, False), ("packed", 1, True)):
        run = toy_run(parts, records, tmp_path / name / "run")
        wanted = Validation(held_out="25%", every_steps=3, num_answers=1)  # 3 of 12
        stage = dataclasses.replace(run.stages["finetune"], num_epochs=2, validation=wanted)
        hardware = dataclasses.replace(run.hardware, device_batch_size=size, packing=packing)
        run = dataclasses.replace(run, stages={"finetune": stage}, hardware=hardware)
        train(run) if name == "one" else train_in_two(run)
        lines = map(json.loads, (run.folder / "finetune/metrics.jsonl").read_text().splitlines())
        curves.append([(one["step"], one["validation_loss"]) for one in lines if "validation_loss" in one])
    for curve in curves[1:]:
        assert [step for step, _ in curves[0]] == [step for step, _ in curve] == [0, 3, 6]
        assert [loss for _, loss in curves[0]] == pytest.approx([loss for _, loss in curve], rel=1e-5)
