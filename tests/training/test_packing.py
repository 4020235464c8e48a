"""Samples in one row: loss and gradients of padded rows, none sees another, and training goes as before."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, MistralConfig

import toys
from tinyllava.config import FULL, Hardware, ModelConfig, Stage, lora
from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.dataset import Collator, Example, Examples
from tinyllava.errors import ConfigError
from tinyllava.model import compat
from tinyllava.model.assemble import assemble
from tinyllava.model.compat import causal_without_looking, set_checkpointing
from tinyllava.model.tuning import apply_tuning
from tinyllava.training.packing import check_packing, keeps_apart
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer
from training_toys import toy_run

UNMINDED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
KINDS = ("llama", "phi", "stablelm", "gemma", "qwen2")
WORDS = st.lists(
    st.sampled_from(["red", "circle", "blue", "dog", "yes", "no", "12", "picture"]), min_size=1, max_size=9
)
TALKS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.booleans()),
    min_size=1,
    max_size=5,
)
"""Of each conversation its images, its turns, and whether its questions are branches."""


@pytest.fixture(scope="module")
def models(parts, tmp_path_factory):
    torch.manual_seed(0)
    found, folder = {}, tmp_path_factory.mktemp("models")
    for kind in KINDS:
        language = parts.get(kind) or toys.make_language_model(folder / kind, kind)
        config = ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(language))
        model, processor = assemble(config)
        full = {"vision_encoder": FULL, "connector": FULL, "language_model": FULL}
        apply_tuning(model, Stage(learning_rate=1e-3, global_batch_size=1, **full))
        found[kind] = (model, processor)
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("images") / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        Image.effect_noise((30, 20), 40 + 30 * n).convert("RGB").save(path)
    return paths


def make_examples(talks, images, processor) -> list[Example]:
    made = []
    for number, (num_images, turns, separate) in enumerate(talks):
        messages = []
        for place, (question, answer) in enumerate(turns):
            refs = tuple(ImageRef(path=path) for path in images[: num_images if place == 0 else 0])
            messages.append(Message(role="user", text=" ".join(question), images=refs))
            messages.append(Message(role="assistant", text=" ".join(answer)))
        talk = Conversation(messages=tuple(messages), id=str(number), source="data.json")
        [example] = Examples(conversations=[talk], processor=processor, separate_questions=separate)
        made.append(example)
    return made


def run(model, processor, examples, *, packs: bool):
    """Return the summed loss, the gradients, and the last hidden states of each example alone."""
    batch = Collator(0, processor.image_token_id, packs)(examples)
    for name in ("sample_ids", "num_tokens", "attention_mask"):
        batch.pop(name, None)
    model.zero_grad()
    hidden: list[torch.Tensor] = []
    handle = model.model.register_forward_hook(lambda *_: hidden.append(_[2].last_hidden_state))
    with causal_without_looking(model.language_model):
        loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
    handle.remove()
    lengths = [len(example.input_ids) - 1 for example in examples]
    if packs:
        rows = list(hidden[0][0].detach().split(lengths))
    else:
        rows = [row[:n] for row, n in zip(hidden[0].detach(), lengths, strict=True)]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, rows


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))


@pytest.mark.parametrize("kind", KINDS)
@given(talks=TALKS)
@settings(max_examples=6, deadline=None, suppress_health_check=UNMINDED)
def test_loss_gradients_and_every_position_are_those_of_padded_rows(models, images, kind, talks):
    model, processor = models[kind]
    examples = make_examples(talks, images, processor)
    loss, gradients, rows = run(model, processor, examples, packs=True)
    expected, expected_gradients, expected_rows = run(model, processor, examples, packs=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    whole = torch.cat([g.flatten() for g in expected_gradients.values()])
    assert relative(torch.cat([g.flatten() for g in gradients.values()]), whole) < 1e-5
    for example, row, alone in zip(examples, rows, expected_rows, strict=True):
        seen = slice(None) if example.branches is None else example.branches[:-1] >= 0
        assert relative(row[seen], alone[seen]) < 1e-5


@given(talks=TALKS, others=TALKS)
@settings(max_examples=10, deadline=None, suppress_health_check=UNMINDED)
def test_a_sample_is_the_same_whatever_its_neighbours_are(models, images, talks, others):
    model, processor = models["llama"]
    own, *before = make_examples(talks, images, processor)
    behind = make_examples(others, images, processor)
    *_, rows = run(model, processor, [*before, own, *behind], packs=True)
    *_, alone = run(model, processor, [own], packs=True)
    assert relative(rows[len(before)], alone[0]) < 1e-5


def test_recomputed_activations_and_adapters_see_no_neighbour_either(parts, images):
    torch.manual_seed(0)
    talks = [
        (1, [(["red"], ["dog", "no"])], False),
        (0, [(["12"], ["yes"] * 5)], False),
        (2, [(["blue"], ["no"])], False),
    ]
    for llm in ("phi", "chatml"):
        config = ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts[llm]))
        model, processor = assemble(config)
        apply_tuning(model, Stage(learning_rate=1e-3, global_batch_size=1, language_model=lora(4)))
        examples = make_examples(talks, images, processor)
        expected, gradients, _ = run(model, processor, examples, packs=False)
        set_checkpointing(model, True)
        loss, recomputed, _ = run(model, processor, examples, packs=True)
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_the_kernel_of_a_gpu_is_called_with_what_it_asks_for(models, images, monkeypatch, kind):
    """It runs on GPUs alone: here a stand-in of the same arguments attends in plain words."""
    calls = []

    def stand_in(query, key, value, starts, ends, most_q, most_k, *, scale, window_size, enable_gqa):
        assert (starts.dtype, window_size) == (torch.int32, (-1, 0))
        assert query.dtype == key.dtype == value.dtype
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert torch.equal(starts, ends)
        assert most_q == most_k == starts.diff().max()
        calls.append(len(starts) - 1)
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        rows = []
        for start, end in pairwise(starts):
            q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
            scores = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            rows.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(rows)

    model, processor = models[kind]
    examples = make_examples(
        [(1, [(["red"], ["dog"])], False), (0, [(["12"], ["yes"])], False)], images, processor
    )
    expected, gradients, _ = run(model, processor, examples, packs=True)
    monkeypatch.setattr(compat, "varlen_attn", stand_in)
    monkeypatch.setattr(compat, "_has_packed_kernel", lambda *_: True)
    loss, found, _ = run(model, processor, examples, packs=True)
    assert calls == [2, 2]  # both samples in one call of each layer
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_that_does_not_keep_samples_apart_is_found_out(models, monkeypatch):
    model, _ = models["llama"]
    assert not keeps_apart(model, torch.device("cpu"))  # outside of training its attention is another
    with causal_without_looking(model.language_model):
        assert keeps_apart(model, torch.device("cpu"))
        assert keeps_apart(model, torch.device("cpu"), "bf16")
        mixing = torch.nn.Conv1d(1, 1, 2)  # as in layers that are no attention
        layer = model.language_model.layers[0].mlp
        handle = layer.register_forward_hook(lambda _, __, out: out + out.roll(1, 1) * mixing.weight.sum())
        assert not keeps_apart(model, torch.device("cpu"))
        handle.remove()
    assert model.training


def test_a_model_that_the_device_cannot_hold_whole_is_tried_on_the_host(models, monkeypatch):
    model, _ = models["llama"]
    places = []

    def trying(model, device, precision):
        places.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return keeps_apart(model, device, precision)

    monkeypatch.setattr("tinyllava.training.packing.keeps_apart", trying)
    device = SimpleNamespace(device=torch.device("meta"))
    monkeypatch.setattr("tinyllava.training.packing.PartialState", lambda: device)
    with causal_without_looking(model.language_model):
        check_packing(model, "fp32", is_divided=True)
    assert places == ["meta", "cpu"]
    with pytest.raises(ConfigError, match="would see each other"):  # as outside of training
        check_packing(model, "fp32", is_divided=True)


def toy(parts, records, folder, *, packing, **changes):
    settings = {"num_workers": 0} | changes.pop("hardware", {})
    hardware = Hardware(precision="fp32", packing=packing, **settings)
    toys = toy_run(parts, records, folder, hardware=hardware)
    stages = {name: dataclasses.replace(stage, **changes) for name, stage in toys.stages.items()}
    return dataclasses.replace(toys, stages=stages)


@pytest.mark.parametrize("group_by", ["none", "modality_length"])
def test_steps_have_the_samples_and_losses_of_padded_ones(parts, records, tmp_path, monkeypatch, group_by):
    drawn: list[int] = []
    original = Examples.__getitem__
    monkeypatch.setattr(Examples, "__getitem__", lambda self, i: (drawn.append(i), original(self, i))[1])
    found = {}
    for packing in (True, False):
        drawn.clear()
        run = toy(
            parts,
            records,
            tmp_path / f"{packing}/run",
            packing=packing,
            group_by=group_by,
            global_batch_size=5,
            num_epochs=2,
            hardware={"device_batch_size": 1},
        )
        folder = train(dataclasses.replace(run, stages={"finetune": run.stages["finetune"]}))
        lines = (tmp_path / f"{packing}/run/finetune/metrics.jsonl").read_text().splitlines()
        steps = [sorted(drawn[start : start + 5]) for epoch in (0, 12) for start in (epoch, epoch + 5)]
        found[packing] = (
            steps,
            [json.loads(line)["loss"] for line in lines],
            load_file(folder / "model.safetensors"),
        )
    assert found[True][0] == found[False][0]
    assert len(found[True][1]) == 6
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-4)
    for name, tensor in found[False][2].items():
        torch.testing.assert_close(found[True][2][name], tensor, rtol=0, atol=2e-5, msg=name)


def test_a_micro_batch_holds_as_many_tokens_as_the_longest_samples(parts, records, tmp_path, monkeypatch):
    rows: list[tuple[int, int]] = []
    original = StageTrainer.training_step

    def noting(self, model, inputs, *args, **kwargs):
        rows.append((inputs["input_ids"].shape[1], len(inputs["sample_ids"])))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", noting)
    run = toy(
        parts, records, tmp_path / "run", packing=True, hardware={"device_batch_size": 2, "num_workers": 1}
    )
    train(dataclasses.replace(run, stages={"finetune": run.stages["finetune"]}))
    summary = json.loads((tmp_path / "run/finetune/stage.json").read_text())["data"]
    assert max(tokens for tokens, _ in rows) <= 2 * summary["longest_tokens"]
    assert sum(samples for _, samples in rows) == 12
    assert len(rows) % 3 == 0  # as many in each of the three steps


def test_a_killed_run_resumes_in_the_middle_of_an_epoch_bit_by_bit(parts, records, tmp_path, monkeypatch):
    from tinyllava.training.stopping import StopRequests

    def make(name):
        run = toy(
            parts,
            records,
            tmp_path / name,
            packing=True,
            num_epochs=3,
            language_model=lora(2, dropout=0.2),
            hardware={"device_batch_size": 1, "save_steps": 1},
        )
        return dataclasses.replace(run, stages={"finetune": run.stages["finetune"]})

    whole = train(make("whole/run")).joinpath("model.safetensors").read_bytes()
    on_step_end = StopRequests.on_step_end
    for stop in (2, 5):  # in the middle of the first epoch and of the second

        def ending(self, args, state, control, stop=stop, **kwargs):
            on_step_end(self, args, state, control, **kwargs)
            if state.global_step == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(StopRequests, "on_step_end", ending)
            with pytest.raises(KeyboardInterrupt):
                train(make("broken/run"))
    assert train(make("broken/run")).joinpath("model.safetensors").read_bytes() == whole


def test_packing_that_cannot_be_is_refused_and_padding_trains(parts, records, tmp_path):
    with pytest.raises(ConfigError, match=r"loss_norm = 'micro'.*set hardware\.packing False"):
        train(toy(parts, records, tmp_path / "micro", packing=True, loss_norm="micro"))
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    windows = tmp_path / "windows"
    rows = len(assemble(toy(parts, records, tmp_path, packing=True).model)[1].tokenizer)
    AutoModel.from_config(
        MistralConfig(vocab_size=rows, num_key_value_heads=2, sliding_window=4, **sizes)
    ).save_pretrained(windows)
    for file in parts["llama"].glob("token*"):
        (windows / file.name).write_bytes(file.read_bytes())
    run = toy(parts, records, tmp_path / "run", packing=True)
    model = dataclasses.replace(run.model, language_model=str(windows), template="llama")
    run = dataclasses.replace(run, model=model, stages={"finetune": run.stages["finetune"]})
    with pytest.raises(ConfigError, match="'mistral' has attention windows"):
        train(run)
    train(dataclasses.replace(run, hardware=dataclasses.replace(run.hardware, packing=False)))
