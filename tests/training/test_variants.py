"""The twelve variants of Table A1, trained on toy parts: their ledgers are what section 4.1.2 says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import toys
from tinyllava.config import Hardware, ModelConfig, Run
from tinyllava.recipes.variants import VARIANTS, variant
from tinyllava.training.run import train

PAIRS = [f"{encoder}-{language}" for language in ("TL", "SLM", "Phi") for encoder in ("C", "Sig")]
KINDS = {"C": "clip", "Sig": "siglip", "TL": "llama", "SLM": "stablelm", "Phi": "phi"}
NUM_LAYERS = 14  # of the encoders; the features are those of the 13th, so the 14th is not there

# Section 4.1.2, stage by stage: learning rate, and the parts that it names as updated.
BASE = {
    # "we only update the connector"
    "pretrain": (1e-3, {"connector"}),
    # "we keep the vision encoder frozen and update both the connector and the small-scale LLM"
    "finetune": (2e-5, {"connector", "language_model"}),
}
SHARE = {
    # "we initialize the connector from the base's pretrained counterpart"
    "pretrain": BASE["pretrain"],
    # "we keep the first 12 layers of the vision encoder frozen and update the rest of the model"
    "share_pretrain": (2e-5, {"vision_encoder", "connector", "language_model"}),
    # "the same as the base recipe"
    "finetune": BASE["finetune"],
}
LAYERS_AFTER_THE_FIRST_12 = ("encoder.layers.12.",)

# Table 2: the record files in their published places, and where the images of each start from.
FILES = {
    "blip_laion_cc_sbu_558k": "llava/llava_pretrain/images",
    "llava_v1_5_mix665k": "",
    "share-captioner_coco_lcs_sam_1246k_1107": "",
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k": "",
}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four records for each file of Table 2: two steps of two samples."""
    root = tmp_path_factory.mktemp("data")
    (root / "text_files").mkdir()
    for file, images in FILES.items():
        (root / images).mkdir(parents=True, exist_ok=True)
        records = []
        for number in range(4):
            Image.new("RGB", (30, 30), (60 * number, 90, 200)).save(root / images / f"{number}.png")
            turns = [("human", "<image>\nWhat is in the picture?"), ("gpt", f"{number} of {file}.")]
            conversations = [{"from": speaker, "value": text} for speaker, text in turns]
            records.append({"id": str(number), "image": f"{number}.png", "conversations": conversations})
        (root / "text_files" / f"{file}.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def small_parts(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoders deep enough for "the first 12 layers", beside the toy language models."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    made = {
        kind: toys.make_vision_encoder(root / kind, kind, num_layers=NUM_LAYERS, width=16)
        for kind in ("clip", "siglip")
    }
    return {**parts, **made}


def toy_variant(name: str, small_parts: dict[str, Path], data_root: Path, output: Path) -> Run:
    """The variant as it stands, with toy parts in place of its own and two samples in place of 256 or 128."""
    run = variant(name)
    _, encoder, language = name.split("-")
    stages = {
        stage: dataclasses.replace(value, global_batch_size=2, max_length_tokens=256)
        for stage, value in run.stages.items()
    }
    model = ModelConfig(
        vision_encoder=str(small_parts[KINDS[encoder]]), language_model=str(small_parts[KINDS[language]])
    )
    return dataclasses.replace(
        run,
        model=model,
        stages=stages,
        data_root=str(data_root),
        output=str(output),
        report_to=(),
        hardware=Hardware(num_workers=0, device_batch_size=2, precision="fp32"),
    )


def tensors_of(encoder: Path, language: Path) -> dict[str, tuple[str, list[int]]]:
    """Component and shape of every tensor, from transformers' own classes of the parts."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    tower = AutoModel.from_pretrained(encoder)
    for name, tensor in tower.named_parameters():
        if not name.startswith((f"encoder.layers.{NUM_LAYERS - 1}.", "head.")):  # behind the features
            tensors[f"model.vision_tower.{name}"] = ("vision_encoder", list(tensor.shape))
    llm, width = AutoModelForCausalLM.from_pretrained(language), toys.WIDTH
    for layer, inputs in ((1, tower.config.hidden_size), (2, width)):
        name = f"model.multi_modal_projector.linear_{layer}"
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
            ("connector", [width, inputs]),
            ("connector", [width]),
        )
    rows, num_tokens = llm.config.vocab_size, len(AutoTokenizer.from_pretrained(language)) + 1  # and <image>
    new_rows = rows if num_tokens <= rows else -(-num_tokens // 64) * 64
    for name, tensor in llm.named_parameters():
        name = name if name.startswith("lm_head") else f"model.language_model.{name.removeprefix('model.')}"
        shape = [new_rows, *tensor.shape[1:]] if tensor.shape[0] == rows else list(tensor.shape)
        tensors[name] = ("language_model", shape)
    return tensors


def expected_ledger(tensors: dict[str, tuple[str, list[int]]], updated: set[str]) -> dict[str, Any]:
    """What the section names as updated is trained and moves; every other tensor stays bit by bit."""
    ledger = {}
    for name, (component, shape) in tensors.items():
        trained = component in updated
        if component == "vision_encoder":
            trained = trained and any(layer in name for layer in LAYERS_AFTER_THE_FIRST_12)
        ledger[name] = {"component": component, "shape": shape, "trained": trained, "moved": trained}
    return ledger


def saved_ledger(folder: Path) -> dict[str, Any]:
    rows = json.loads((folder / "ledger.json").read_text())
    compared = ("component", "shape", "trained", "moved")
    return {row["name"]: {key: row[key] for key in compared} for row in rows}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_runs_by_both_recipes_and_moves_what_the_section_names(
    small_parts: dict[str, Path],
    data_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pair: str,
) -> None:
    encoder, language = (small_parts[KINDS[short]] for short in pair.split("-"))
    tensors = tensors_of(encoder, language)
    for recipe, says in (("base", BASE), ("share", SHARE)):
        run = toy_variant(f"{recipe}-{pair}", small_parts, data_root, tmp_path / recipe)
        assert (train(run) / "model.safetensors").is_file()
        said = capsys.readouterr().out
        assert list(run.stages) == list(says)
        assert ("pretrain: already trained" in said) == (recipe == "share")
        assert said.count("already trained") == (
            recipe == "share"
        )  # fine-tuning begins elsewhere: trained again
        provenance = json.loads((tmp_path / recipe / "model/provenance.json").read_text())["stages"]
        for stage, (rate, updated) in says.items():
            assert run.stages[stage].learning_rate == rate
            assert provenance[stage]["num_steps"] == 2
            folder = tmp_path / ("base" if stage == "pretrain" else recipe) / stage
            assert saved_ledger(folder) == expected_ledger(tensors, updated), stage
        assert (tmp_path / recipe / "pretrain/trained.safetensors").exists() == (recipe == "base")


def test_these_are_the_twelve_of_table_a1() -> None:
    assert {f"{recipe}-{pair}" for recipe in ("base", "share") for pair in PAIRS} == set(VARIANTS)
    assert len(VARIANTS) == 12
