"""Weights, gradients and moments divided among processes (FSDP2) give the weights of one process."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaAttention

import toys
from processes import in_ranks
from tinyllava.config import FULL, Hardware, Run, Stage, Validation, from_layer, lora
from tinyllava.planning.rules import DIVIDED_OPTIMIZERS
from tinyllava.training import devices, lean
from tinyllava.training import run as training
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer
from training.test_distributed import make_records
from training_toys import sampled_order, toy_run

KILLED = 9


def train_in(num_ranks: int, run: Run, *, dies_at: int = 0) -> list[list[int]]:
    """Train in forked processes; return each one's trained values: held, and of the whole model.

    Args:
        dies_at: optimizer step in which all of them end without a word, when the checkpoint of the one before
            is written; 0 means never.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)

    def train_rank(rank: int) -> None:
        compute = StageTrainer.training_step

        def computing(self, *args, **kwargs):
            if dies_at and self.state.global_step + 1 == dies_at:
                self.writer.wait()  # for the checkpoint of the step before
                os._exit(KILLED)
            loss = compute(self, *args, **kwargs)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            held = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
            sizes = [sum(p.numel() for p in some) for some in (held, trained)]
            (run.folder.parent / f"held-{rank}.json").write_text(json.dumps(sizes))
            return loss

        StageTrainer.training_step = computing
        train(run)

    assert in_ranks(num_ranks, train_rank) == [KILLED if dies_at else 0] * num_ranks
    return [json.loads((run.folder.parent / f"held-{i}.json").read_text()) for i in range(num_ranks)]


def sharded(run: Run, sharding: str, folder: Path, **changes) -> Run:
    hardware = dataclasses.replace(run.hardware, sharding=sharding, **changes)
    return dataclasses.replace(run, hardware=hardware, output=str(folder / "run"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/model/model.safetensors")


def compare(folder: Path, other: Path, *, exactly: bool = False) -> None:
    """Compare the models of two runs."""
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=0 if exactly else 1e-5, msg=name)


def long_stage(run: Run, **changes) -> Run:
    """Only fine-tuning, of four steps."""
    stage: Stage = dataclasses.replace(run.stages["finetune"], max_steps=4, **changes)
    return dataclasses.replace(run, stages={"finetune": stage})


def test_all_stages_with_a_rank_without_images(parts, tmp_path):
    """The second rank sees text only, in training and in the validation of a trained encoder."""
    order = sampled_order(8, seed=42)
    records = make_records(tmp_path, {index for place, index in enumerate(order) if place % 4 >= 2})
    run = toy_run(parts, records, tmp_path, encoder="clip", llm="phi")
    finetune = dataclasses.replace(
        run.stages["finetune"],
        vision_encoder=from_layer(1),
        validation=Validation(held_out=str(records), every_steps=1),
    )
    run = dataclasses.replace(run, stages={**run.stages, "finetune": finetune})
    train_in(1, sharded(run, "none", tmp_path / "one"))
    for sharding in ("gradients", "all"):
        held = train_in(2, sharded(run, sharding, tmp_path / sharding))
        for own, whole in held:
            assert own < 0.55 * whole  # so it is divided
        compare(tmp_path / "one", tmp_path / sharding)


def test_where_memory_runs_out_in_one_process_all_train_in_a_smaller_form(
    parts, tmp_path, monkeypatch, capfd
):
    """In the middle of a pass of two samples, when the other process waits for its share of the weights."""
    attend = LlamaAttention.forward

    def attending(self, hidden_states, *args, **kwargs):
        if os.environ.get("RANK") == "1" and len(hidden_states) > 1 and self.layer_idx == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return attend(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", attending)
    monkeypatch.setattr(devices, "can_run_out", lambda: True)
    run = toy_run(parts, make_records(tmp_path, {2}), tmp_path, llm="llama")
    run = long_stage(dataclasses.replace(run, hardware=Hardware(num_workers=0, precision="fp32")))
    train_in(1, sharded(run, "none", tmp_path / "one"))
    for sharding in ("none", "gradients", "all"):
        capfd.readouterr()
        train_in(2, sharded(run, sharding, tmp_path / sharding / "two"))
        assert (
            "out of memory with a device batch of 2 and activations kept; training with a device batch of 1 "
            "and activations recomputed instead, still 4 samples per step"
        ) in capfd.readouterr().out
        compare(tmp_path / "one", tmp_path / sharding / "two")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Run, Path]:
    """A run of four steps that two processes have trained, and one that they left behind the third."""
    folder = tmp_path_factory.mktemp("sharding")
    parts = {
        "clip": toys.make_vision_encoder(folder / "clip", "clip"),
        "phi": toys.make_language_model(folder / "phi", "phi"),
    }
    run = toy_run(parts, make_records(folder, {1, 6}), folder, encoder="clip", llm="phi")
    hardware = dataclasses.replace(run.hardware, device_batch_size=1)
    run = long_stage(dataclasses.replace(run, hardware=hardware), vision_encoder=FULL)
    train_in(2, sharded(run, "all", folder / "undisturbed"))
    train_in(2, sharded(run, "all", folder / "stopped", save_steps=1), dies_at=4)
    return run, folder


@pytest.mark.parametrize(("sharding", "num_ranks"), [("all", 2), ("gradients", 4), ("none", 1)])
def test_it_resumes_bit_by_bit_and_in_other_forms(stopped, tmp_path, sharding, num_ranks):
    run, folder = stopped
    moments = folder / "stopped/run/finetune/checkpoint-3/moments"
    assert len(list(moments.glob("*.safetensors"))) == 2  # a share from each process
    shutil.copytree(folder / "stopped", tmp_path / "again")
    train_in(num_ranks, sharded(run, sharding, tmp_path / "again"))
    steps = (tmp_path / "again/run/finetune/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3, 4]  # so it did resume
    compare(folder / "undisturbed", tmp_path / "again", exactly=sharding == "all")


def test_it_resumes_what_a_single_process_has_left(stopped, tmp_path):
    run, folder = stopped
    train_in(1, sharded(run, "none", tmp_path, save_steps=1), dies_at=4)
    train_in(2, sharded(run, "all", tmp_path))
    compare(folder / "undisturbed", tmp_path)


@pytest.mark.parametrize(("sharding", "dies_at"), [("gradients", 0), ("all", 3)])
def test_packed_rows_give_the_weights_of_padded_ones_in_one_process(parts, tmp_path, sharding, dies_at):
    """Two images and text; a stage of the whole model and one of adapters; one run is killed, and resumes."""
    records = make_records(tmp_path, {1, 6})
    run = long_stage(
        toy_run(parts, records, tmp_path),
        vision_encoder=from_layer(1),
        validation=Validation(held_out=str(records)),
    )
    adapters = dataclasses.replace(run.stages["finetune"], max_steps=1, language_model=lora(4))
    run = dataclasses.replace(run, stages={**run.stages, "adapters": adapters})
    train_in(1, sharded(run, "none", tmp_path / "one"))
    packed = sharded(run, sharding, tmp_path / "two", packing=True, save_steps=1)
    if dies_at:
        train_in(2, packed, dies_at=dies_at)
    held = train_in(2, packed)
    assert all(own < 0.55 * whole for own, whole in held)
    compare(tmp_path / "one", tmp_path / "two")
    for name, num_steps in (("finetune", 4), ("adapters", 1)):
        one, two = (losses(tmp_path / folder / "run" / name) for folder in ("one", "two"))
        assert len(two) == num_steps
        assert two == pytest.approx(one, abs=1e-5)


def losses(stage: Path) -> list[float]:
    lines = (json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_adapters_and_other_optimizers(parts, tmp_path):
    """A stage each; with dropout no two numbers of processes would give the same, so there is none.

    Of five samples the last step has one, which only one of the processes gets.
    """
    records = make_records(tmp_path, {2})
    run = toy_run(parts, records, tmp_path)
    stage = run.stages["finetune"]
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, records=(f"{records},limit=5",)))
    stages = {
        f"in-{bits}-bits": dataclasses.replace(stage, language_model=lora(4, bits=bits))
        for bits in (16, 4, 8)
    }
    for name in DIVIDED_OPTIMIZERS[1:]:
        stages[name] = dataclasses.replace(stage, optimizer=name)
    run = dataclasses.replace(run, stages=stages)
    train_in(1, sharded(run, "all", tmp_path / "one"))
    ((own, whole), _) = train_in(2, sharded(run, "all", tmp_path / "two"))
    assert own < 0.55 * whole
    compare(tmp_path / "one", tmp_path / "two")
    for name in stages:
        one, two = (load_file(tmp_path / f"{n}/run/{name}/trained.safetensors") for n in ("one", "two"))
        for tensor in one:
            torch.testing.assert_close(two[tensor], one[tensor], rtol=0, atol=1e-5, msg=f"{name} {tensor}")


def test_frozen_layers_in_half_precision_are_divided_and_give_the_same_bits(parts, tmp_path, monkeypatch):
    run = toy_run(parts, make_records(tmp_path, {2}), tmp_path)
    stages = {
        "pretrain": run.stages["pretrain"],
        "finetune": dataclasses.replace(run.stages["finetune"], language_model=lora(4)),
    }
    stages = {name: dataclasses.replace(stage, max_steps=1) for name, stage in stages.items()}
    run = dataclasses.replace(run, stages=stages)
    monkeypatch.setattr(lean, "FEW_ROWS", 0)  # a head that is not held would multiply few rows in fp32
    train_in(2, sharded(run, "all", tmp_path / "held", precision="bf16"))
    monkeypatch.setattr(training, "hold_frozen_in_half", lambda model, precision: lambda: None)
    train_in(2, sharded(run, "all", tmp_path / "plain", precision="bf16"))
    compare(tmp_path / "held", tmp_path / "plain", exactly=True)
