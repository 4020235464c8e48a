"""Our own layout on its way out: adapters merged, shards, the model card."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import make_records
from layouts import chat_logits, make_adapter, make_checkpoint, make_toy, write_factory
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.checkpoints.exporting.card import Provenance, write_card
from tinyllava.checkpoints.exporting.compare import example_image
from tinyllava.checkpoints.importing import import_checkpoint
from tinyllava.cli import main
from tinyllava.config import FROZEN, FULL, DataConfig, ModelConfig, Run, Stage, from_layer, lora, to_json
from tinyllava.errors import CheckpointError, ConfigError
from tinyllava.evaluation.results import Metric, Result, save_results
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.recipes.variants import variant
from tinyllava.starter.datasets import licence_of
from tinyllava.training.run import train
from training_toys import toy_run

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4983497056\n"


@pytest.mark.parametrize("layout", ["tinyllava", "llava"])
def test_adapters_are_merged(parts: dict[str, Path], tmp_path: Path, layout: Any) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    adapted = make_adapter(checkpoint, tmp_path / "adapter")
    export_checkpoint(tmp_path / "adapter", tmp_path / "out", layout=layout)
    inputs, before = chat_logits(checkpoint, "How many?")
    with torch.no_grad():
        expected = adapted(**inputs).logits
    assert not torch.allclose(expected, before, atol=0.01)
    if layout == "tinyllava":
        assert torch.allclose(chat_logits(tmp_path / "out", "How many?")[1], expected, atol=1e-5)
    else:
        from transformers import LlavaForConditionalGeneration

        stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            assert torch.allclose(stock(**inputs).logits, expected, atol=1e-5)


def test_adapters_that_do_not_fit(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    make_adapter(checkpoint, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.other.lora_A.weight": torch.ones(4, 4)}, file)
    with pytest.raises(CheckpointError, match=r"without a counterpart in .*other.lora_A"):
        export_checkpoint(tmp_path / "adapter", tmp_path / "out")
    save_file({name: torch.ones(1, 1) for name in tensors}, file)
    with pytest.raises(CheckpointError, match="the adapter does not fit"):
        export_checkpoint(tmp_path / "adapter", tmp_path / "out")
    config = tmp_path / "adapter" / "adapter_config.json"
    for named, match in ((None, "Give --base DIR"), ("/gone", "/gone, which does not exist. .*--base DIR")):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
        with pytest.raises(CheckpointError, match=match):
            export_checkpoint(tmp_path / "adapter", tmp_path / "out")
    save_file(tensors, file)
    export_checkpoint(tmp_path / "adapter", tmp_path / "out", base=checkpoint)


def test_shards_open_again_and_carry_no_path(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "phi", "siglip", connector="resampler")
    exported = export_checkpoint(checkpoint, tmp_path / "out", max_shard_size="100KB")
    assert exported.largest_difference == 0.0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    texts = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md")]
    assert str(parts["phi"]) not in "".join(texts)
    assert str(tmp_path) not in "".join(texts)


def make_run() -> Run:
    rate: dict[str, Any] = {"learning_rate": 2e-5, "global_batch_size": 256}
    stages = {
        "pretrain": Stage(
            data=DataConfig(records=("ShareGPT4V-PT-1246k",)),
            vision_encoder=from_layer(12),
            connector=FULL,
            language_model=FULL,
            **rate,
        ),
        "finetune": Stage(
            data=DataConfig(records=("data/mine/own.json",)),
            vision_encoder=FROZEN,
            connector=FULL,
            language_model=lora(128),
            **rate,
        ),
    }
    model = ModelConfig(vision_encoder="SigLIP", language_model="TinyLlama")
    return Run(name="toy", model=model, stages=stages, recipe="share", data_root="data/mine")


def result(benchmark: str, **changes: Any) -> Result:
    metric = Metric(name="accuracy", value=61.234, num_questions=900, interval=(59.0, 63.5))
    base = Result(
        benchmark=benchmark,
        protocol="llava",
        split="testdev",
        model="toy",
        metric="accuracy",
        metrics=(metric,),
        num_questions=900,
        num_images=30,
    )
    return dataclasses.replace(base, **changes)


def test_the_card_tells_parts_training_scores_and_licences(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    (checkpoint / "run.json").write_text(to_json(make_run()))
    partial = result("POPE", num_expected=1000, judge="gpt-4", metrics=())
    save_results([result("GQA"), partial], tmp_path / "results.json")
    results = tmp_path / "results.json"
    export_checkpoint(checkpoint, tmp_path / "out", layout="llava", name="alice/toy", results=results)
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["base_model"] == ["google/siglip-so400m-patch14-384", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"]
    assert data["datasets"] == ["Lin-Chen/ShareGPT4V"]
    assert data["license"] == "other"  # the parts are Apache-2.0, the data is not
    assert data["pipeline_tag"] == "image-text-to-text"
    scores = data["model-index"][0]["results"]
    assert [(s["dataset"]["name"], s["metrics"][0]["value"]) for s in scores] == [("GQA", 61.23)]
    lines = body.splitlines()
    assert "| GQA | accuracy | 61.2 | 59.0 to 63.5 | 900 | llava |  |" in lines
    assert "| POPE | accuracy | not recorded |  | 900 | llava | 900 of 1000 questions; judge gpt-4 |" in lines
    assert any(
        line.startswith(
            "| pretrain | ShareGPT4V-PT-1246k | vision encoder from layer 12, connector full, language"
        )
        for line in lines
    )
    assert any(
        "| finetune | own.json |" in line and "language model LoRA of rank 128" in line for line in lines
    )
    assert "| data: ShareGPT4V-PT-1246k | CC-BY-NC-4.0 |" in lines
    assert "| language model | Apache-2.0 |" in lines
    assert 'LlavaForConditionalGeneration.from_pretrained("alice/toy")' in body
    assert "data/mine" not in card
    model, _ = open_checkpoint(checkpoint)
    total = sum(p.numel() for p in model.parameters())
    rows = [line.split("|") for line in lines]
    counted = [
        int(r[3].replace(",", "")) for r in rows if len(r) == 5 and r[3].strip().replace(",", "").isdigit()
    ]
    assert sum(counted) == total


def follow_console(card: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the one command of a card in a folder with an image, and return the answer."""
    (command,) = re.findall(r"^\$ tinyllava (.+)$", card, re.MULTILINE)
    example_image().save(folder / "image.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*shlex.split(command), "--max-tokens", "4"]) == 0
    return capsys.readouterr().out


def test_the_card_says_what_is_not_recorded(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    export_checkpoint(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not recorded: the checkpoint has no run.json" in card
    assert follow_console(card, tmp_path, capsys)
    (checkpoint / "import.json").write_text(json.dumps({"kind": "TinyLLaVABench, LoRA"}))
    save_results([result("GQA")], checkpoint / "results.json")
    export_checkpoint(checkpoint, tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Imported from TinyLLaVABench, LoRA" in card
    assert "| GQA | accuracy | 61.2" in card
    assert "| vision encoder | not recorded |" in card


def test_the_card_of_an_import_names_the_parts_that_its_source_names(tmp_path: Path) -> None:
    names = {"llm_model_name_or_path": "microsoft/phi-2", "vision_model_name_or_path": "someone/their-siglip"}
    source = write_factory(make_toy(tmp_path, "phi", "siglip"), tmp_path / "source", **names)
    import_checkpoint(source, tmp_path / "own")
    export_checkpoint(tmp_path / "own", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| language model | Phi-2 (microsoft/phi-2) |" in card
    assert "| language model | MIT |" in card
    assert "| vision encoder | someone/their-siglip |" in card
    assert "| vision encoder | not recorded |" in card
    assert "| the source checkpoint and its data | not recorded |" in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["microsoft/phi-2"]


def test_the_card_of_a_merged_adapter_claims_no_score_of_what_is_below_it(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    (checkpoint / "run.json").write_text(
        to_json(dataclasses.replace(make_run(), start_from="/far/runs/a/model"))
    )
    save_results([result("GQA")], checkpoint / "results.json")
    make_adapter(checkpoint, tmp_path / "adapter")
    export_checkpoint(tmp_path / "adapter", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A LORA adapter of rank 4 was merged into the weights. Its training is not recorded." in card
    assert "started from the checkpoint `a`, whose own training is not listed" in card
    assert "/far" not in card
    assert "61.2" not in card
    save_results([result("GQA")], tmp_path / "adapter" / "results.json")
    export_checkpoint(tmp_path / "adapter", tmp_path / "again")
    assert "| GQA | accuracy | 61.2" in (tmp_path / "again" / "README.md").read_text()


def test_the_card_of_two_fused_encoders_names_both(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    model = ModelConfig(vision_encoder="DINOv2+SigLIP", language_model="Phi-2")
    (checkpoint / "run.json").write_text(to_json(dataclasses.replace(make_run(), model=model)))
    export_checkpoint(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "(google/siglip-so400m-patch14-384, facebook/dinov2-large)" in card
    assert len(yaml.safe_load(card.split("---\n")[1])["base_model"]) == 3


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("adapter_config.json", b"{", r"adapter_config\.json: not JSON"),
        ("adapter_model.safetensors", LFS, r"adapter_model\.safetensors: is a pointer of Git LFS"),
        ("adapter_model.safetensors", None, r"adapter_model\.safetensors: is missing"),
    ],
)
def test_damaged_adapters_are_named(
    parts: dict[str, Path], tmp_path: Path, name: str, content: bytes | None, match: str
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    make_adapter(checkpoint, tmp_path / "adapter")
    (tmp_path / "adapter" / name).unlink()
    if content is not None:
        (tmp_path / "adapter" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        export_checkpoint(tmp_path / "adapter", tmp_path / "out")


def test_adapters_are_not_merged_twice(parts: dict[str, Path], tmp_path: Path) -> None:
    """What a run leaves beside its result is in its result already."""
    checkpoint = make_checkpoint(parts, tmp_path / "run" / "model", "llama", "clip")
    adapter = tmp_path / "run" / "finetune" / "adapters" / "language_model"
    make_adapter(checkpoint, adapter)
    with pytest.raises(CheckpointError, match=r"already contains these adapters.*--base DIR"):
        export_checkpoint(adapter, tmp_path / "out", base=checkpoint)


def test_weights_and_origins_that_are_damaged_are_named(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    (checkpoint / "import.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"import\.json: has no 'kind'"):
        export_checkpoint(checkpoint, tmp_path / "out")
    (checkpoint / "model.safetensors").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a pointer of Git LFS"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_wrong_places_and_sizes_are_told_at_once(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["export", str(checkpoint), str(place)]) == 2
        assert f"{tmp_path / 'file'} is a file; choose a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), str(tmp_path / "out"), "--max-shard-size", "huge"])
    assert "--max-shard-size huge: give a number and KB, MB, GB or TB" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_stops_the_export(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    (checkpoint / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_knows_the_starters_parts_and_names_others_by_their_folders(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The starter trains from converted folders, which are called as their publishers call them."""
    model, _ = assemble(ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts["llama"])))
    run = variant("base-C-TL")
    folders = ModelConfig(
        vision_encoder=str(tmp_path / "EfficientNet-Lite2-260px"),
        language_model=f"{tmp_path}/SmolLM2-135M-Instruct/",
    )
    provenance = Provenance(
        run=dataclasses.replace(run, model=folders), imported_from="", results=(),
        names={"vision_encoder": "", "language_model": ""},
    )  # fmt: skip
    own = write_card("mine", "tinyllava", model, provenance, [["format"], ["tinyllava"]])
    assert "| vision encoder | EfficientNet-Lite2-260px (clip_vision_model) |" in own
    assert "| language model | SmolLM2-135M-Instruct (llama) |" in own  # by name alone it is not taken for it
    assert "| language model | not recorded |" in own
    assert str(tmp_path) not in own

    monkeypatch.setattr(model.config, "vision_width", 1280)
    monkeypatch.setattr(model.config.text_config, "hidden_size", 576)
    monkeypatch.setattr(model.config.text_config, "num_hidden_layers", 30)
    starter = write_card("mine", "tinyllava", model, provenance, [["format"], ["tinyllava"]])
    assert "| vision encoder | EfficientNet-Lite2 |" in starter
    assert "| language model | SmolLM2-135M (HuggingFaceTB/SmolLM2-135M-Instruct) |" in starter
    assert starter.count("| Apache-2.0 |") == 2


def test_the_card_has_the_licences_of_the_records_and_of_the_start(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    """The starter writes them beside its records; a model that starts from another inherits them."""
    records = make_records(tmp_path / "first", num_records=4, text_only_every=99)
    (tmp_path / "first/licences.json").write_text('{"easy_vqa": "MIT", "drawn by hand": "CC-BY-4.0"}')
    run = toy_run(parts, records, tmp_path / "runs/one")
    first = train(dataclasses.replace(run, stages={"finetune": run.stages["finetune"]}))
    other = make_records(tmp_path / "second", num_records=4, text_only_every=99).rename(
        tmp_path / "second/more.json"
    )
    run = toy_run(parts, other, tmp_path / "runs/two", start_from=str(first))
    second = train(dataclasses.replace(run, stages={"finetune": run.stages["finetune"]}))
    for model, name in ((first, "one"), (second, "two")):
        export_checkpoint(model, tmp_path / name)
    of_first, of_second = ((tmp_path / name / "README.md").read_text() for name in ("one", "two"))
    inherited = ("| data: easy_vqa | MIT |", "| data: drawn by hand | CC-BY-4.0 |")
    assert all(row in of_first and row in of_second for row in inherited)
    assert "data: records.json" not in of_first
    assert "| data: more.json | not recorded |" in of_second
    assert "the source checkpoint" not in of_first + of_second
    assert {name: licence_of(name) for name in ("easy_vqa", "cifar10", "tux_paint")} == {
        "easy_vqa": "MIT", "cifar10": "MIT", "tux_paint": "GPL-2.0",
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["tinyllava", "llava", "vllm", "onnx", "gguf"])
def test_weights_that_are_not_numbers_are_named_before_anything_is_written(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "siglip")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.multi_modal_projector.linear_1.bias"][0] = torch.nan
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--format", layout]) == 2
    told = (
        "own: 1 of 32 values of model.multi_modal_projector.linear_1.bias are not finite. Copy the checkpoint"
    )
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    records = make_records(tmp_path / "records", num_records=4)
    run = toy_run(parts, records, tmp_path / "run", start_from=str(checkpoint))
    with pytest.raises(CheckpointError, match=r"own: 1 of 32 values of .* are not finite"):
        train(run)
