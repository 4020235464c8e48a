"""``tinyllava show``: the tables, a variant's plan, and that neither takes long nor imports torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import MixtralConfig

from tinyllava.cli import main
from tinyllava.cli.show import TABLES
from tinyllava.config import run_from_json
from tinyllava.data.mixtures import MIXTURES
from tinyllava.parts.connectors import CONNECTORS
from tinyllava.parts.language import LANGUAGE_MODELS
from tinyllava.parts.templates import template_names
from tinyllava.parts.vision import VISION_ENCODERS
from tinyllava.planning.speed import GPUS
from tinyllava.recipes.variants import RECIPES, VARIANTS, variant

NAMES = {
    "encoders": VISION_ENCODERS,
    "language-models": LANGUAGE_MODELS,
    "connectors": CONNECTORS,
    "templates": template_names(),
    "recipes": RECIPES,
    "variants": VARIANTS,
    "data": MIXTURES,
    "gpus": GPUS,
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_a_row_for_every_name(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", table]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("  ")[0] for row in rows] == list(NAMES[table])


def test_a_variant_is_shown_with_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "share-Sig-Phi"]) == 0
    text = capsys.readouterr().out
    for said in (
        "SigLIP + mlp + Phi-2",
        "729 of 729 patches",
        "1319 left for text",
        "from layer 12 at 2e-05",
        "4,868",
        "3,186,939,424",
        "12.7 GB",
        "  yes\n",  # recomputed where two samples do not fit
        "sharding all",
        "2048 tokens",
    ):
        assert said in text
    stages = {line.split()[0]: line.split()[-1] for line in text.split("\n\n")[2].splitlines()[2:]}
    assert stages == {"pretrain": "caption", "share_pretrain": "caption", "finetune": "phi"}  # templates
    (total,) = [line.split() for line in text.splitlines() if line.startswith("all ") and " M " in line]
    assert total[1:5] == ["2,469,128", "12,245", "2,211", "M"]
    assert "refused" not in text
    assert "DOES NOT FIT" not in text


def test_the_forms_beside_the_recipes_own_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for name, own, others in (
        ("base-C-TL", "full", ["LoRA, rank 128", "QLoRA, rank 128"]),
        ("lora-C-TL", "LoRA, rank 128", ["full", "QLoRA, rank 128"]),
        ("qlora-C-TL", "QLoRA, rank 128", ["full", "LoRA, rank 128"]),
    ):
        assert main(["show", name]) == 0
        table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
        rows = [re.split(" {2,}", line) for line in table if line.startswith("finetune")]
        assert [row[1] for row in rows] == ["as the recipe", *others, "sharding gradients", "sharding all"]
        main(["show", "base-C-TL"])
        base = [re.split(" {2,}", line) for line in capsys.readouterr().out.split("\n\n")[-1].splitlines()]
        (same,) = [row[2:] for row in base if row[0] == "finetune" and row[1] == own] or [
            next(row[2:] for row in base if row[0] == "finetune")
        ]
        assert rows[0][2:] == same  # the form is the one that the recipe of that name trains


def test_each_component_is_shown_with_its_own_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "lora-Sig-Phi"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("finetune  LLaVA")]
    assert re.split(" {2,}", row)[2:5] == ["frozen", "full at 2e-05", "lora 128 at 0.0002"]


def test_two_encoders_are_shown_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "base-Dino+Sig-Phi"]) == 0
    text = capsys.readouterr().out
    assert "DINOv2+SigLIP + mlp + Phi-2" in text
    assert "729 of 729 patches" in text
    (row,) = [line for line in text.splitlines() if line.startswith("vision_encoder")]
    sizes = [main(["show", f"base-{short}-Phi"]) for short in ("Sig", "Dino")]
    assert sizes == [0, 0]
    alone = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vision_encoder")]
    total, *single = (int(line.split()[1].replace(",", "")) for line in (row, *alone))
    assert total == sum(single) - 2 * (1152 + 1024)  # without the norms behind the features
    assert main(["show", "share-Dino+Sig-Phi"]) == 0
    assert "this component has no numbered layers" in capsys.readouterr().out


def test_another_machine_changes_batch_and_hours(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "base-C-TL", "--gpu", "H100-80G", "--gpus", "1"])
    text = capsys.readouterr().out
    assert "on 1 x H100-80G" in text
    assert "sharding" not in text
    assert "does not fit" not in text
    main(["show", "base-Sig-Phi", "--gpu", "RTX-4090", "--gpus", "1"])
    assert "finetune does not fit as it is. It fits with the recipe lora." in capsys.readouterr().out
    main(["show", "base-Sig-Phi", "--gpu", "RTX-4090", "--gpus", "8"])
    text = capsys.readouterr().out
    assert "finetune does not fit as it is. It fits with --hardware.sharding gradients. Its time" in text
    assert re.search(r"finetune  +as the recipe +[\d.]+ GB, too much", text)


def test_a_gpu_without_bf16_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "base-C-TL", "--gpu", "V100-32G"])
    text = capsys.readouterr().out
    assert "auto: fp32" in text
    assert "'auto' trains in fp32; --hardware.precision fp16 has 8 times the peak" in text
    main(["show", "base-C-TL"])
    text = capsys.readouterr().out
    assert "auto: bf16" in text
    assert "has no bf16" not in text


def test_an_architecture_without_a_record_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "The architecture 'mixtral' is unknown. Its activations are estimated"
    assert main(["show", "base-Sig-Phi"]) == 0
    assert "is unknown. Its" not in capsys.readouterr().out
    MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    ).save_pretrained(tmp_path / "language")  # fmt: skip
    (tmp_path / "language/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom tinyllava.recipes.variants import variant\nSIG = variant('base-Sig-Phi')\n"
        f"MODEL = dataclasses.replace(SIG.model, language_model={str(tmp_path / 'language')!r})\n"
        "MINE = dataclasses.replace(SIG, model=MODEL)\n"
    )
    assert main(["show", f"{tmp_path / 'mine.py'}:MINE"]) == 0
    assert said in capsys.readouterr().out


def test_a_number_of_gpus_that_cannot_keep_the_global_batch_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["show", "base-C-TL", "--gpus", "3"])
    assert "stages.pretrain.global_batch_size = 256: not divisible by 3 ranks" in capsys.readouterr().out
    main(["show", "base-C-TL", "--gpus", "4"])
    assert "refused" not in capsys.readouterr().out


def test_published_settings_that_cannot_work_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "base-Sig-Phi", "--code", "bench"]) == 0
    text = capsys.readouterr().out
    assert "`tinyllava train` would reject this run" in text
    assert text.count("Phi-2 has 2048 positions") == 2


def test_the_resolved_config_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "share-Sig-Phi", "--json"])
    text = capsys.readouterr().out
    assert json.loads(text)["recipe"] == "share"
    assert run_from_json(text) == variant("share-Sig-Phi")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["base-Sig-Ph"], "Did you mean 'Phi'"),
        (["encodrs"], "Tables to show: encoders"),
        (["base-C-TL", "--gpu", "A100"], "Did you mean 'A100-"),
        (["base-C-TL", "--code", "lava"], "Did you mean 'llava'"),
    ],
)
def test_a_wrong_name_is_answered(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("what", ["share-Sig-Phi", "base-Sig+Dino-Phi", "encoders", "data", "wrong-name"])
def test_it_loads_nothing_that_takes_time(what: str) -> None:
    code = (
        "import sys\nfrom tinyllava.cli import main\n"
        f"main(['show', {what!r}])\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'tyro', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stage_that_ends_by_steps_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from tinyllava.recipes.variants import variant\n"
        "RUN = variant('base-C-TL')\n"
        "STAGES = {n: replace(s, max_steps=1200 * (n == 'finetune')) for n, s in RUN.stages.items()}\n"
        "MINE = replace(RUN, stages=STAGES)\n"
    )
    assert main(["show", f"{tmp_path / 'mine.py'}:MINE"]) == 0
    text = capsys.readouterr().out
    stages = [line for line in text.splitlines() if line.startswith(("pretrain", "finetune"))][:2]
    assert "1 epoch " in stages[0]
    assert "1,200 steps" in stages[1]
    assert "epoch" not in stages[1]
