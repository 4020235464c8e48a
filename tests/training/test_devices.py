"""Device batch and recomputed activations: the plan's, smaller where memory runs out, the same result."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tinyllava.config import FULL, Hardware
from tinyllava.data.batches import GroupedSampler, PaddedBatches, pack
from tinyllava.data.reporting import reporting
from tinyllava.errors import TrainingError
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration, TinyLlavaModel
from tinyllava.planning.forms import Machine, choose_forms
from tinyllava.planning.plan import plan_parts, plan_run
from tinyllava.recipes.variants import VARIANTS, variant
from tinyllava.training import devices
from tinyllava.training.run import train
from training_toys import toy_run

AUTO = Hardware(num_workers=0, precision="fp32")


@pytest.fixture
def small_device(monkeypatch):
    """A device on which a forward pass of more than one sample that keeps its activations runs out."""
    passes: list[tuple[int, bool]] = []
    original = TinyLlavaModel.forward

    def forward(self, input_ids=None, **kwargs):
        recomputes = self.language_model.is_gradient_checkpointing
        segments = kwargs.get("segments")
        num_samples = len(segments["lengths"]) if segments else len(input_ids)
        passes.append((num_samples, recomputes))
        if num_samples > 1 and not recomputes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(TinyLlavaModel, "forward", forward)
    monkeypatch.setattr(devices, "can_run_out", lambda: True)
    return passes


def finetuning(parts, records, folder, hardware, **changes):
    run = toy_run(parts, records, folder, hardware=hardware)
    stage = dataclasses.replace(run.stages["finetune"], vision_encoder=FULL, **changes)
    return dataclasses.replace(run, stages={"finetune": stage})


def steps(folder):
    return [json.loads(line) for line in (folder / "finetune/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("keep", "packing", "tried", "chosen"),
    [
        (None, False, (4, False), (4, True)),
        (None, True, (4, False), (4, True)),
        (False, False, (4, False), (1, False)),
    ],
)
def test_where_memory_runs_out_a_smaller_form_trains_the_same(
    parts, records, tmp_path, small_device, monkeypatch, capsys, keep, packing, tried, chosen
):
    hardware = dataclasses.replace(AUTO, gradient_checkpointing=keep, packing=packing)
    with reporting(is_shown=True):
        train(finetuning(parts, records, tmp_path / "small/run", hardware))
    printed = capsys.readouterr().out
    assert "out of memory with a device batch of 4 and activations kept; training with a device" in printed
    assert "still 4 samples per step" in printed
    assert small_device[0] == tried
    assert small_device[-1] == chosen
    monkeypatch.undo()
    train(finetuning(parts, records, tmp_path / "large/run", dataclasses.replace(AUTO, device_batch_size=4)))
    found, expected = (
        load_file(tmp_path / name / "run/model/model.safetensors") for name in ("small", "large")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert (
        len(steps(tmp_path / "small/run")) == len(steps(tmp_path / "large/run")) == 3
    )  # 12 samples, 4 a step


def test_trying_leaves_everything_as_it_was(parts, records, tmp_path, monkeypatch):
    """With dropout, random numbers that a trial took would change the run."""
    weights = []
    for tries in (False, True):
        monkeypatch.setattr(devices, "can_run_out", lambda tries=tries: tries)
        run = finetuning(
            parts, records, tmp_path / f"{tries}/run", dataclasses.replace(AUTO, device_batch_size=2)
        )
        weights.append(load_file(train(run) / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@given(
    samples=st.lists(st.tuples(*[st.integers(1, 40), st.integers(0, 5), st.integers(1, 30)]), min_size=1),
    size=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
def test_no_micro_batch_of_any_epoch_takes_more_than_those_that_are_tried(samples, size, seed):
    measures = [np.array(of) for of in zip(*samples, strict=True)]
    lengths, batch_size = measures[0].tolist(), 4 * size

    def takes(parts, pads):
        rows = ([len(part) * max(lengths[i] for i in part)] if pads else [] for part in parts)
        return [
            [*row, *(int(of[part].sum()) for of in measures)] for row, part in zip(rows, parts, strict=True)
        ]

    order = GroupedSampler(lengths=lengths, with_image=None, batch_size=batch_size, seed=seed)
    padded = PaddedBatches(order, size)
    packed = pack(order, lengths, 2 * max(lengths), num_epochs=3)
    drawn: list[list[int]] = []
    for epoch in range(3):
        padded.set_epoch(epoch)
        drawn += padded
    of_all = list(packed.of_all_epochs())
    for some, given_to, pads in ((drawn, None, True), (of_all, packed, False)):
        tried = takes(devices.largest_parts(size, measures, given_to), pads)
        largest, bound = (np.max(values, axis=0) for values in (takes(some, pads), tried))
        assert (largest <= bound).all()
        assert pads or (largest == bound).all()
    packed.set_epoch(2)
    assert of_all[-len(list(packed)) :] == list(packed)


def test_what_was_asked_for_and_does_not_fit_is_refused_with_what_helps(
    parts, records, tmp_path, small_device
):
    hardware = dataclasses.replace(AUTO, device_batch_size=2, gradient_checkpointing=False)
    with pytest.raises(
        TrainingError, match=r"out of memory with a device batch of 2\. Try .*device-batch-size 1, "
    ) as caught:
        train(finetuning(parts, records, tmp_path / "run", hardware))
    assert "--hardware.gradient-checkpointing True" in str(caught.value)
    assert "CUDA" not in str(caught.value)


def test_the_mean_of_means_keeps_its_device_batch(parts, records, tmp_path, small_device):
    """With loss_norm micro the device batch decides the result, so memory must not."""
    hardware = dataclasses.replace(AUTO, gradient_checkpointing=False)
    with pytest.raises(TrainingError, match="out of memory with a device batch of 4"):
        train(finetuning(parts, records, tmp_path / "run", hardware, loss_norm="micro"))


def test_memory_that_runs_out_later_ends_in_advice_and_resumes(parts, records, tmp_path, monkeypatch):
    original, passes = TinyLlavaForConditionalGeneration.forward, []

    def forward(self, *args, **kwargs):
        passes.append(1)
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TinyLlavaForConditionalGeneration, "forward", forward)
    hardware = dataclasses.replace(AUTO, save_steps=1)
    with pytest.raises(
        TrainingError, match=r"device batch of 4\. Try --hardware.device-batch-size 2.*to resume"
    ):
        train(finetuning(parts, records, tmp_path / "run", hardware))
    assert (tmp_path / "run/finetune/checkpoint-2").is_dir()
    train(finetuning(parts, records, tmp_path / "run", dataclasses.replace(hardware, device_batch_size=2)))
    assert [step["step"] for step in steps(tmp_path / "run")] == [1, 2, 3]


def test_several_processes_are_told_to_divide_the_model():
    assert "--hardware.sharding all" in devices.out_of_memory(1, True, can_divide=True)
    assert "sharding" not in devices.out_of_memory(1, True)


def test_a_checkpoint_whose_parts_are_not_here_is_trained_all_the_same(parts, records, tmp_path, monkeypatch):
    first = train(finetuning(parts, records, tmp_path / "first", AUTO))
    run = finetuning(parts, records, tmp_path / "second", AUTO)
    gone = dataclasses.replace(run.model, vision_encoder="", language_model="")
    train(dataclasses.replace(run, start_from=str(first), model=gone))
    assert len(steps(tmp_path / "second")) == 3


@pytest.mark.parametrize("gpu", ["RTX-4090", "A100-80G"])
@pytest.mark.parametrize("name", VARIANTS)
def test_train_chooses_what_show_prints(name, gpu):
    run, plan = variant(name), plan_run(variant(name), gpu=gpu)
    parts = plan_parts(run)
    memory = {"RTX-4090": 24 * 2**30, "A100-80G": 80 * 2**30}[gpu]
    for stage in plan.stages:
        longest = stage.load.longest_tokens
        forms = choose_forms(
            parts,
            run.stages[stage.name],
            run.hardware,
            Machine(memory_bytes=memory, is_half=True, num_ranks=8),
            longest,
            longest - parts.num_image_tokens,
        )
        shown = stage.forms["as the recipe"]
        assert forms[0] == shown
        for form in forms:
            assert form.fits == (form.memory.peak <= 0.92 * memory)
            assert form.fits or len(forms) == 1
            assert form.checkpointing or form.device_batch_size > 1
