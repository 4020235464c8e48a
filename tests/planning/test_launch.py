"""How many processes a command starts, and what an optimizer step then takes in all of them together."""

import functools
import json
import logging
import os
import signal

import pytest
import torch
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException

from tinyllava.cli import main
from tinyllava.config import FULL, DataConfig, Hardware, ModelConfig, Run, Stage
from tinyllava.errors import ConfigError, JudgeError
from tinyllava.planning import lost
from tinyllava.planning.launch import choose_processes, launch
from tinyllava.training import trainer
from tinyllava.training.run import train
from training_toys import toy_run, write_run

# Under each of these other processes are there already.
LAUNCHERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "ACCELERATE_MIXED_PRECISION")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHERS, "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def put_in_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def run_of(*batches: int, device_batch_size: int = 0) -> Run:
    stage = functools.partial(Stage, data=DataConfig(records=("x.json",)), connector=FULL, learning_rate=1e-3)
    return Run(
        name="some",
        model=ModelConfig(vision_encoder="CLIP", language_model="TinyLlama"),
        stages={str(number): stage(global_batch_size=size) for number, size in enumerate(batches)},
        hardware=Hardware(device_batch_size=device_batch_size),
    )


@pytest.mark.parametrize(
    ("visible", "gpus", "run", "expected"),
    [
        (0, 0, run_of(256, 128), 1),
        (0, 2, run_of(256, 128), 2),
        (1, 0, run_of(256, 128), 1),
        (8, 0, run_of(256, 128), 8),
        (8, 3, run_of(256, 128), 3),  # the run's check refuses it: what was asked for is not changed
        (7, 0, run_of(256, 128), 4),
        (8, 0, run_of(256, 12), 4),
        (8, 0, run_of(16, device_batch_size=4), 4),
        (8, 0, run_of(7), 7),
        (4, 0, run_of(7), 1),
        (8, 0, None, 8),
    ],
)
def test_there_is_one_process_for_each_gpu_that_the_batches_divide_by(
    monkeypatch, visible, gpus, run, expected
):
    put_in_gpus(monkeypatch, visible)
    assert choose_processes(gpus, run) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "3"},  # torchrun, accelerate launch
        {"WORLD_SIZE": "8", "RANK": "3"},
        {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"},
        {"ACCELERATE_MIXED_PRECISION": "no"},  # accelerate launch with one process
    ],
)
def test_under_a_launcher_no_further_processes_are_started(monkeypatch, environment):
    put_in_gpus(monkeypatch, 8)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_processes(0, run_of(256)) == 1
    with pytest.raises(ConfigError, match=r"--gpus 2: the launcher has already started [18] process"):
        choose_processes(2, run_of(256))


def test_wrong_numbers_of_gpus_are_refused(monkeypatch):
    put_in_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"--gpus 3: this machine has 2 GPU\(s\). Give at most 2."):
        choose_processes(3)
    with pytest.raises(ConfigError, match="--gpus -1: must be 1 or more"):
        choose_processes(-1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match="srun has started 8 independent tasks"):
        choose_processes(0)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # accelerate launch --cpu --num_processes 2
    with pytest.raises(ConfigError, match="accelerate launch has started one process instead of several"):
        choose_processes(0)


@pytest.mark.parametrize(
    ("variable", "value", "setting"),
    [
        ("ACCELERATE_USE_FSDP", "true", "--hardware.sharding all"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--hardware.sharding all"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--hardware.compile True"),
    ],
)
def test_settings_of_accelerate_that_change_the_model_are_refused(
    monkeypatch, parts, records, tmp_path, variable, value, setting
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable} = '{value}'.* use {setting} if") as caught:
        train(toy_run(parts, records, tmp_path / "run"))
    assert "1 problem(s)" in str(caught.value)


@pytest.mark.parametrize("gpus", [[], ["--gpus", "4"]])
def test_commands_start_a_process_for_each_gpu(monkeypatch, parts, records, tmp_path, gpus):
    """With eight GPUs; what is started is put down, not run."""
    started = []
    for command in ("train", "evaluate"):
        monkeypatch.setattr(f"tinyllava.cli.{command}.launch", lambda *args: started.append(args) or 0)
    put_in_gpus(monkeypatch, 8)
    run = write_run(toy_run(parts, records, tmp_path / "run"), tmp_path)
    hardware = ["--hardware.device-batch-size", "1"]
    train_it = [run, *hardware, *gpus]
    assert main(["train", *train_it]) == 0
    (tmp_path / "bench/pope").mkdir(parents=True)
    ask = ["no-model", "--data", str(tmp_path / "bench"), "--benchmarks", "pope", *gpus]
    assert main(["evaluate", *ask]) == 0
    expected = 4 if gpus else 8
    assert started == [(["train", *train_it], 4), (["evaluate", *ask], expected)]  # a batch of 4 samples


def test_after_a_launch_the_process_is_as_it_was_before(monkeypatch):
    """Signals, environment and the messages that the caller has switched off; the agent raises at once."""

    def stopped(*program):
        assert logging.root.manager.disable == logging.CRITICAL
        os.environ["LEFT_BEHIND"] = "1"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SignalException("stopped", signal.SIGTERM)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda config, program: stopped)
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    logging.disable(logging.INFO)
    try:
        assert launch(["show"], 2) == 128 + signal.SIGTERM
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == before


def test_a_python_call_with_several_gpus_uses_one_and_keeps_the_batch(monkeypatch, parts, records, tmp_path):
    """The Trainer sees eight devices: alone it would take eight times the batch, in nn.DataParallel."""
    arguments = trainer.StageArguments
    seen = []

    def on_devices(**settings):  # the path that a machine with GPUs takes
        with monkeypatch.context() as machine:
            put_in_gpus(machine, 8)
            made = arguments(**{**settings, "use_cpu": False})
            assert super(arguments, made).n_gpu == 8  # what the Trainer would have used
        assert made.mixed_precision == "no"
        seen.append(made.train_batch_size * made.gradient_accumulation_steps * made.world_size)
        return made

    monkeypatch.setattr(trainer, "StageArguments", on_devices)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # of its configuration; the run says fp32
    run = toy_run(parts, records, tmp_path / "run")
    train(run)
    assert seen == [stage.global_batch_size for stage in run.stages.values()]
    samples = json.loads(records.read_text())
    for name, stage in run.stages.items():
        lines = (tmp_path / "run" / name / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == -(-len(samples) // stage.global_batch_size)


def test_those_that_wait_in_vain_name_the_others(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(lost, "PATIENCE_SECONDS", 0)
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    timed_out = RuntimeError("[gloo] Timed out waiting 5000ms")
    gone = RuntimeError("[gloo] Connection closed by peer")
    given_up = RuntimeError("Application timeout caused pair closure")
    assert all(map(lost.is_of_another_process, (timed_out, gone, given_up)))
    own = "mat1 and mat2 shapes cannot be multiplied", "the launch timed out and was terminated"
    assert not any(lost.is_of_another_process(RuntimeError(said)) for said in own)
    assert not lost.is_of_another_process(JudgeError("the judge timed out behind gloo.example"))
    store.set("tinyllava/0/waits/2", "")
    assert lost.name_lost(lost.lost_process(timed_out, 3600)).startswith(
        "processes 1, 3 of 4 did not answer within 3,600 s: a process hangs, or a node is lost."
    )
    store.set("tinyllava/0/waits/1", "")
    assert lost.name_lost(lost.lost_process(gone)).startswith("process 3 of 4 ended. Look at")
    monkeypatch.setenv("RANK", "3")
    assert lost.name_lost(lost.lost_process(gone)).startswith("another process of this run ended.")
    assert [lost.is_first_to_tell() for _ in range(2)] == [True, False]
