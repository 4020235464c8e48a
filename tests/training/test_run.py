"""Training: the Trainer against a plain loop, what moves and what does not, batches and their split."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import set_seed

from tinyllava.cli import main
from tinyllava.config import FROZEN, FULL, Hardware, from_layer, lora
from tinyllava.data.defects import Defect, Defects
from tinyllava.errors import TrainingError
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.model.devices import fastest_attention
from tinyllava.model.tuning import apply_tuning, component_of
from tinyllava.parts.templates import read_template
from tinyllava.training import checkpoints
from tinyllava.training.run import train
from tinyllava.training.trainer import StageTrainer
from training_toys import make_captions, plain_loop, toy_run, write_run


def losses(folder, stage):
    return [json.loads(line)["loss"] for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("llm", "encoder"), [("llama", "siglip"), ("phi", "clip"), ("stablelm", "siglip")])
def test_the_trainer_gives_the_losses_of_a_ten_line_loop(
    parts, records, tmp_path, llm, encoder, trainer_order
):
    run = toy_run(parts, records, tmp_path / "run", llm=llm, encoder=encoder)
    train(run)
    set_seed(run.seed)
    model, processor = assemble(run.model)
    for name, stage in run.stages.items():
        apply_tuning(model, stage)
        template = read_template(stage.template) if stage.template else None
        expected = plain_loop(model, processor, stage, trainer_order[name], template)
        assert losses(tmp_path / "run", name) == pytest.approx(expected, abs=2e-5)
        model.requires_grad_(False)


@pytest.mark.parametrize(
    ("bf16", "length", "fused"), [(True, 160, False), (True, 161, True), (False, 10, True)]
)
@pytest.mark.parametrize("packs", [False, True])
def test_the_slow_attention_kernel_is_passed_over_and_nothing_else_is(bf16, length, fused, packs):
    inputs = {"input_ids": torch.zeros(2, length, dtype=torch.long)}
    if packs:
        inputs = {"input_ids": torch.zeros(1, 900), "segments": {"lengths": [7, length]}}
    with fastest_attention(inputs, bf16=bf16):
        assert torch.backends.cuda.flash_sdp_enabled() == fused
        query = torch.randn(2, 3, 8, 4, dtype=torch.bfloat16)
        chosen = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(*[query.float()] * 3, is_causal=True)
    assert torch.allclose(chosen.float(), expected, atol=0.03)


def test_every_stage_runs_in_the_precision_that_was_asked_for(parts, records, tmp_path, monkeypatch):
    from tinyllava.model.modeling import TinyLlavaModel

    seen = []
    original = TinyLlavaModel.forward

    def recording(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        trained = "finetune" if next(self.language_model.parameters()).requires_grad else "pretrain"
        product = self.language_model.layers[0].self_attn.q_proj(output.last_hidden_state)
        seen.append((trained, product.dtype))
        return output

    monkeypatch.setattr(TinyLlavaModel, "forward", recording)
    hardware = Hardware(num_workers=0, device_batch_size=2, precision="bf16")
    train(toy_run(parts, records, tmp_path / "run", hardware=hardware))
    assert set(seen) == {("pretrain", torch.bfloat16), ("finetune", torch.bfloat16)}


@pytest.fixture
def trainer_order(monkeypatch):
    """Record in which order the Trainer really asked for samples, by stage."""
    from tinyllava.data.dataset import Examples

    order = {"pretrain": [], "finetune": []}
    original = Examples.__getitem__

    def recording(self, index):
        order["pretrain" if self.template else "finetune"].append(index)
        return original(self, index)

    monkeypatch.setattr(Examples, "__getitem__", recording)
    return order


def test_the_split_of_a_batch_does_not_change_the_losses(parts, records, tmp_path):
    found = []
    for device_batch in (4, 2, 1):
        folder = tmp_path / str(device_batch) / "run"  # apart, or the second would reuse the first's stages
        train(
            toy_run(
                parts,
                records,
                folder,
                hardware=Hardware(num_workers=0, precision="fp32", device_batch_size=device_batch),
            )
        )
        found.append(losses(folder, "pretrain") + losses(folder, "finetune"))
    assert found[1] == pytest.approx(found[0], abs=2e-5)
    assert found[2] == pytest.approx(found[0], abs=2e-5)


def test_four_samples_are_learnt_by_heart(parts, tmp_path):
    from conftest import make_records

    records = make_records(tmp_path, num_records=4, text_only_every=100)
    run = toy_run(parts, records, tmp_path / "run")
    stage = dataclasses.replace(run.stages["finetune"], learning_rate=1e-2, num_epochs=60)
    folder = train(dataclasses.replace(run, stages={"finetune": stage}))
    assert losses(tmp_path / "run", "finetune")[-1] < 0.05
    from tinyllava.data.images import open_image
    from tinyllava.data.records import read_records

    model, processor = open_checkpoint(folder)
    for conversation in read_records(records, records.parent / "images").conversations:
        first = dataclasses.replace(conversation, messages=conversation.messages[:1])
        prompt, _ = processor.render(first, open_answer=True)
        inputs = processor(images=[open_image(ref) for ref in first.images], text=prompt)
        ids = model.generate(**inputs, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
        assert (
            processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == conversation.messages[1].text
        )


def test_what_was_frozen_did_not_move_and_what_was_trained_did(parts, records, tmp_path):
    train(toy_run(parts, records, tmp_path / "run", encoder="clip"))
    for stage, trained in (("pretrain", {"connector"}), ("finetune", {"connector", "language_model"})):
        rows = json.loads((tmp_path / "run" / stage / "ledger.json").read_text())
        assert {row["component"] for row in rows} == {"vision_encoder", "connector", "language_model"}
        assert {row["component"] for row in rows if row["trained"]} == trained
        assert [row["name"] for row in rows if row["moved"] != row["trained"]] == []


def test_share_trains_the_encoder_from_a_layer_on(parts, records, tmp_path):
    run = toy_run(parts, records, tmp_path / "run")
    stage = dataclasses.replace(
        run.stages["finetune"], vision_encoder=from_layer(2), vision_encoder_learning_rate=5e-3
    )
    train(dataclasses.replace(run, stages={"share_pretrain": stage}))
    rows = json.loads((tmp_path / "run/share_pretrain/ledger.json").read_text())
    encoder = [row for row in rows if row["component"] == "vision_encoder"]
    assert {row["name"] for row in encoder if row["moved"]} == {
        row["name"] for row in encoder if ".layers.2." in row["name"]
    }


def test_each_component_has_its_own_learning_rate(parts, records, tmp_path):
    """With Adam the first step's size is the learning rate, whatever the gradient."""
    run = toy_run(parts, records, tmp_path / "run")
    stage = dataclasses.replace(
        run.stages["finetune"],
        vision_encoder=FULL,
        learning_rate=1e-3,
        vision_encoder_learning_rate=4e-3,
        connector_learning_rate=2e-3,
        warmup_ratio=0.0,
        max_steps=1,
    )
    folder = train(dataclasses.replace(run, stages={"finetune": stage}))
    set_seed(run.seed)
    before, after = (
        dict(assemble(run.model)[0].named_parameters()),
        dict(open_checkpoint(folder)[0].named_parameters()),
    )
    steps = {"vision_encoder": 0.0, "connector": 0.0, "language_model": 0.0}
    for name, start in before.items():
        moved = (after[name] - start).abs().max().item()
        steps[component_of(name)] = max(steps[component_of(name)], moved)
    assert steps == pytest.approx(
        {"vision_encoder": 4e-3, "connector": 2e-3, "language_model": 1e-3}, rel=0.05
    )


def test_cached_features_change_nothing(parts, records, tmp_path):
    for cache in (False, True):
        train(
            toy_run(
                parts,
                records,
                tmp_path / f"{cache}" / "run",
                hardware=Hardware(num_workers=0, precision="fp32", device_batch_size=2, cache_features=cache),
            )
        )
    assert losses(tmp_path / "True/run", "finetune") == pytest.approx(
        losses(tmp_path / "False/run", "finetune"), abs=2e-6
    )
    assert len(list((tmp_path / "True/.features").glob("*/index.txt"))) == 1


def test_adapters_are_trained_merged_and_leave_the_rest_alone(parts, records, tmp_path):
    run = toy_run(parts, records, tmp_path / "run", llm="stablelm")
    stage = dataclasses.replace(run.stages["finetune"], language_model=lora(4), learning_rate=1e-2)
    folder = train(dataclasses.replace(run, stages={"finetune": stage}))
    set_seed(run.seed)
    before, after = assemble(run.model)[0].state_dict(), open_checkpoint(folder)[0].state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {component_of(name) for name in moved} == {"connector", "language_model"}
    assert not any(
        "norm" in name or "embed" in name or "vision" in name or "lm_head" in name for name in moved
    )


def test_a_model_of_reused_stages_is_the_trained_one_byte_for_byte(parts, records, tmp_path):
    folders = [tmp_path / name / "model" for name in ("first", "second")]
    for folder in folders:
        train(toy_run(parts, records, folder.parent))
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        first, second = (folder / name for folder in folders)
        assert first.read_bytes() == second.read_bytes(), name


def test_a_finished_stage_is_reused_by_its_content(parts, records, tmp_path, capsys):
    train(toy_run(parts, records, tmp_path / "first"))
    run = toy_run(parts, records, tmp_path / "second")
    changed = dataclasses.replace(run.stages["finetune"], learning_rate=2e-3)
    train(dataclasses.replace(run, name="other", stages={**run.stages, "finetune": changed}))
    assert "pretrain: already trained" in capsys.readouterr().out
    assert not (tmp_path / "second/pretrain/trained.safetensors").exists()
    assert (tmp_path / "second/finetune/trained.safetensors").exists()
    train(toy_run(parts, records, tmp_path / "third", seed=7))
    assert "already trained" not in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"connector_options": {"side": 2}}, {"image_aspect": "square"}])
def test_a_stage_of_another_model_with_the_same_weights_is_not_reused(
    parts, records, tmp_path, capsys, changes
):
    """Averaging to one token or to four, a padded image or a squeezed one: the tensors do not tell."""
    for name, further in (("first", {}), ("second", changes), ("again", changes)):
        run = toy_run(parts, records, tmp_path / name)
        model = dataclasses.replace(run.model, connector="pool", connector_options={"side": 1})
        train(dataclasses.replace(run, name=name, model=dataclasses.replace(model, **further)))
        assert ("already trained" in capsys.readouterr().out) == (name == "again")


def test_the_model_folder_tells_where_it_came_from(parts, records, tmp_path):
    folder = train(toy_run(parts, records, tmp_path / "run"))
    names = {path.name for path in folder.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "processor_config.json",
        "run.json",
        "provenance.json",
    } <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    metadata = json.loads((folder / "provenance.json").read_text())
    assert metadata["stages"]["pretrain"]["data"]["num_samples"] == 12
    assert metadata["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_is_trained_in_fp32(parts, records, tmp_path, saved):
    first = toy_run(parts, records, tmp_path / "run")
    finetune = dataclasses.replace(first.stages["finetune"], learning_rate=1e-5)  # less than half can hold
    half, processor = open_checkpoint(train(first), dtype=saved)
    trained = {}
    for name, model in (("half", half), ("fp32", copy.deepcopy(half).float())):
        start = tmp_path / "starts" / name
        model.save_pretrained(start)
        processor.save_pretrained(start)
        run = dataclasses.replace(
            first, start_from=str(start), stages={"finetune": finetune}, output=str(tmp_path / name)
        )
        trained[name] = load_file(train(run) / "model.safetensors")
    before = load_file(tmp_path / "starts/fp32/model.safetensors")
    for key, tensor in trained["half"].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, trained["fp32"][key]), key
        if component_of(key) != "vision_encoder":
            assert not torch.equal(tensor, before[key]), f"{key} did not move"


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(parts, records, tmp_path):
    run = toy_run(parts, records, tmp_path / "run")
    weights = train(run) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.multi_modal_projector.linear_2.weight"].fill_(3e38)  # finite, but their products are not
    save_file(tensors, weights, metadata={"format": "pt"})
    overflowing = dataclasses.replace(
        run,
        start_from=str(weights.parent),
        stages={"finetune": run.stages["finetune"]},
        output=str(tmp_path / "on"),
    )
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 1; samples: .*records\.json: record \d"
    ):
        train(overflowing)


class Waits(TorchDispatchMode):
    """Counts operations whose result the host needs before it goes on, or whose shape it does."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if (
            "index" in str(func) and len(args) > 1 and isinstance(args[1], list)
        ):  # boolean masks are looked for
            tags = any(place is not None and place.dtype == torch.bool for place in args[1])
        if tags or "masked_scatter_backward" in str(func):  # which selects by a mask
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("llm", "encoder", "connector", "settings", "tune"),
    [
        ("llama", "clip", "mlp", {}, FULL),
        ("phi", "siglip", "mlp", {"gradient_checkpointing": True}, FULL),
        ("stablelm", "siglip", "mlp", {}, FULL),
        ("llama", "siglip", "resampler", {"packing": True}, lora(2, dropout=0.1)),
    ],
)
def test_the_host_waits_for_nothing_inside_a_micro_batch(
    parts, records, tmp_path, monkeypatch, llm, encoder, connector, settings, tune
):
    original, counts = StageTrainer.training_step, []

    def counting(self, *args, **kwargs):
        with Waits() as waits:
            loss = original(self, *args, **kwargs)
        counts.append(waits.names)
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", counting)
    hardware = Hardware(num_workers=0, precision="bf16", **settings)
    run = toy_run(parts, records, tmp_path / "run", llm=llm, encoder=encoder, hardware=hardware)
    model = dataclasses.replace(run.model, connector=connector)
    share = dataclasses.replace(run.stages["finetune"], vision_encoder=from_layer(1), language_model=tune)
    train(dataclasses.replace(run, model=model, stages=run.stages | {"finetune": share}))
    assert counts == [[]] * 6


def test_what_the_host_waits_for_is_counted():
    """The six of a micro-batch that counts and looks for its positions itself."""
    values, mask = torch.randn(3, 4, requires_grad=True), torch.tensor([True, False, True])
    with Waits() as waits:
        int(mask.sum())
        picked = values[mask]
        mixed = values.masked_scatter(mask.unsqueeze(1), picked)
        mixed.sum().backward()
        mask.nonzero()
        bool(torch.isfinite(values.sum()))
    names = [name.removeprefix("aten.") for name in waits.names]
    assert sum(name.startswith("_local_scalar_dense") for name in names) == 2
    assert sum("index" in name or name.startswith(("masked_", "nonzero")) for name in names) == 4


def test_stage_one_checkpoints_hold_the_connector_alone(parts, records, tmp_path, monkeypatch):
    run = toy_run(
        parts,
        records,
        tmp_path / "run",
        hardware=Hardware(num_workers=0, precision="fp32", device_batch_size=2, save_steps=2),
    )
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_stage", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception, match="stopped"):
            train(run)
    saved = load_file(next((tmp_path / "run/pretrain").glob("checkpoint-*")) / "model.safetensors")
    assert {component_of(name) for name in saved} == {"connector"}
    assert run.stages["pretrain"].vision_encoder == FROZEN


def test_a_stage_says_how_many_records_it_cut_at_a_turns_end(parts, records, tmp_path, capsys):
    listed = json.loads(records.read_text())
    for record in listed[:3]:
        more = [{"from": "human", "value": "And " * 200}, {"from": "gpt", "value": "then"}]
        record["conversations"] = record["conversations"] + more
    path = records.with_name("long.json")
    path.write_text(json.dumps(listed))
    run = toy_run(parts, path, tmp_path / "run")
    stage = dataclasses.replace(run.stages["finetune"], truncate=True, max_steps=1)
    run = dataclasses.replace(run, stages={"finetune": stage})
    assert main(["train", write_run(run, tmp_path)]) == 0
    assert "truncated: 3 records end after an earlier answer, to fit 256 tokens" in capsys.readouterr().out
    data = json.loads((tmp_path / "run/finetune/stage.json").read_text())["data"]
    assert data["truncated"] == 3
    assert data["num_samples"] == len(listed)
    assert data["longest_tokens"] <= 256
    whole = dataclasses.replace(stage, truncate=False)
    with pytest.raises(Defects, match=r"too_long .*: 3"):
        train(dataclasses.replace(run, output=str(tmp_path / "whole"), stages={"finetune": whole}))


def test_a_broken_image_of_the_last_stage_is_told_before_the_first_trains(parts, records, tmp_path):
    listed = json.loads(records.read_text())
    images = records.parent / "images"
    cut = images / listed[1]["image"]
    (images / "cut.png").write_bytes(cut.read_bytes()[:-30])
    listed[1]["image"] = "cut.png"
    path = records.with_name("cut.json")
    path.write_text(json.dumps(listed))
    run = toy_run(parts, path, tmp_path / "run")
    captions = dataclasses.replace(run.stages["pretrain"].data, records=(str(make_captions(records)),))
    stages = {
        "pretrain": dataclasses.replace(run.stages["pretrain"], data=captions, max_steps=1),
        "finetune": dataclasses.replace(run.stages["finetune"], max_steps=1),
    }
    run = dataclasses.replace(run, stages=stages)
    with pytest.raises(
        Defect, match=r"cut\.json: record 1 \(id r1\): .*cut\.png: damaged .* \[broken_image\]"
    ):
        train(run)
    assert not list((tmp_path / "run").glob("*/metrics.jsonl"))
    skipping = dataclasses.replace(stages["finetune"].data, skip=("broken_image",))
    stages["finetune"] = dataclasses.replace(stages["finetune"], data=skipping)
    train(dataclasses.replace(run, stages=stages))
    data = json.loads((tmp_path / "run/finetune/stage.json").read_text())["data"]
    assert data["skipped"] == {"broken_image": 1}
    assert data["num_samples"] == len(listed) - 1
