"""``tinyllava train`` on toy parts: the user's records, fine-tuning of a checkpoint, options, errors."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinyllava.cli import main
from tinyllava.config import Run, run_from_json, to_json
from training_toys import toy_run


@pytest.fixture
def recipe(parts, records, tmp_path) -> str:
    """A user's file with a run in it, as the command takes it."""
    run = toy_run(parts, records, tmp_path / "never")
    (tmp_path / "toy.json").write_text(to_json(run))
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom tinyllava.config import run_from_json\n"
        f"TOY = run_from_json(Path({str(tmp_path / 'toy.json')!r}).read_text())\nOTHER = 5\n"
    )
    return f"{tmp_path / 'mine.py'}:TOY"


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def trained(output: Path) -> Run:
    return run_from_json((output / "run.json").read_text())


def my_records(folder: Path, last: dict[str, object] | None = None) -> Path:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A red circle."}]
    records = [
        {"id": f"m{n}", "conversations": [{**turns[0], "value": f"What {n}?"}, turns[1]]} for n in range(4)
    ]
    path = folder / "my.json"
    path.write_text(json.dumps([*records, last] if last else records))
    return path


UNANSWERED = {"id": "bad", "conversations": [{"from": "human", "value": "Q"}]}


def test_a_run_then_its_checkpoint_tuned_on_records_of_ones_own(recipe, records, tmp_path, capsys):
    assert (
        train(
            recipe,
            "--output",
            tmp_path / "first",
            "--finetune.learning-rate",
            "5e-4",
            "--pretrain.max-steps",
            1,
        )
        == 0
    )
    first = trained(tmp_path / "first")
    assert list(first.stages) == ["pretrain", "finetune"]
    assert first.stages["finetune"].learning_rate == 5e-4
    assert first.stages["pretrain"].learning_rate == 1e-2
    assert first.stages["pretrain"].max_steps == 1
    assert f"model: {tmp_path / 'first/model'}\n" in capsys.readouterr().out

    mine = my_records(tmp_path, UNANSWERED)
    arguments = (
        recipe,
        "--from",
        tmp_path / "first/model",
        "--data",
        mine,
        "--skip",
        "unanswered",
        "--output",
        tmp_path / "second",
        "--finetune.learning-rate",
        "1e-6",
        "--hardware.device-batch-size",
        1,
    )
    assert train(*arguments) == 0
    second = trained(tmp_path / "second")
    assert list(second.stages) == ["finetune"]
    assert second.start_from == str(tmp_path / "first/model")
    assert second.stages["finetune"].data.records == (str(mine),)
    assert second.hardware.device_batch_size == 1
    papers = json.loads((tmp_path / "second/finetune/stage.json").read_text())
    assert papers["data"]["num_samples"] == 4
    assert papers["data"]["skipped"] == {"unanswered": 1}
    assert "skipped: 1 unanswered" in capsys.readouterr().out
    before, after = (load_file(tmp_path / f"{n}/model/model.safetensors") for n in ("first", "second"))
    assert max((before[name] - after[name]).abs().max().item() for name in before) < 1e-4  # it began there


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def test_the_saved_file_of_a_finished_run_trains_the_same_weights_again(recipe, tmp_path, capsys):
    # In folders apart: finished stages beside a run are reused, and nothing would be trained.
    first, again, other, tuned, retuned = (tmp_path / str(n) / "run" for n in range(5))
    short = ("--pretrain.max-steps", 2, "--finetune.max-steps", 2)
    assert train(recipe, "--output", first, "--finetune.learning-rate", "5e-4", *short) == 0
    assert train(first / "run.json", "--output", again) == 0
    assert "already trained" not in capsys.readouterr().out
    assert dataclasses.replace(trained(again), output="") == dataclasses.replace(trained(first), output="")
    assert len((again / "finetune" / "metrics.jsonl").read_text().splitlines()) == 2
    torch.testing.assert_close(weights(again), weights(first), rtol=0, atol=0)

    # Any setting can be changed on the way.
    assert train(first / "run.json", "--output", other, "--seed", 43, "--only", "pretrain") == 0
    assert trained(other).seed == 43
    assert any(not torch.equal(value, weights(first)[name]) for name, value in weights(other).items())

    mine = my_records(tmp_path)
    assert train(recipe, "--from", first / "model", "--data", mine, "--output", tuned) == 0
    assert train(tuned / "run.json", "--output", retuned) == 0  # it knows which checkpoint it began with
    torch.testing.assert_close(weights(retuned), weights(tuned), rtol=0, atol=0)
    assert any(not torch.equal(value, weights(first)[name]) for name, value in weights(tuned).items())


def test_one_stage_alone(recipe, tmp_path, capsys):
    assert train(recipe, "--only", "pretrain", "--output", tmp_path / "run", "--pretrain.max-steps", 1) == 0
    assert not (tmp_path / "run/finetune").exists()
    assert (tmp_path / "run/model/model.safetensors").is_file()
    asked = (recipe, "--only", "finetune", "--finetune.max-steps", 1, "--output")
    assert train(*asked, tmp_path / "tuned", "--from", tmp_path / "run/model") == 0
    assert "starts without" not in capsys.readouterr().out
    assert train(*asked, tmp_path / "bare") == 0
    assert "finetune: starts without pretrain, so the connector is untrained." in capsys.readouterr().out


ERRORS = {
    "variant": (("base-C-TinyLama",), "'TinyLama'; in a variant name, write 'TL' for TinyLlama."),
    "encoder": (("base-siglip-TL",), "'siglip'; in a variant name, write 'Sig' for SigLIP."),
    "recipe alone": (("base",), "A recipe alone needs --from CHECKPOINT."),
    "records of two stages": (
        ("base-C-TL", "--data", "records.json"),
        "your own file with --pretrain.data.records FILE, or --from CHECKPOINT to fine-tune only.",
    ),
    "stage": (
        ("RECIPE", "--only", "midtune"),
        "--only midtune: no such stage; this run has pretrain, finetune.",
    ),
    "data": (
        ("RECIPE", "--data", "none"),
        "--data none: not a folder and not a record file (.json, .jsonl, .ndjson, .csv, .tsv",
    ),
    "two folders": (
        ("RECIPE", "--data", "FOLDER", "--data", "FOLDER"),
        "give only one folder, with all mixtures in it.",
    ),
    "output is a file": (("RECIPE", "--output", "FILE"), "cannot be created (File exists). Choose another"),
    "output below a file": (("RECIPE", "--output", "FILE/x"), "cannot be created (Not a directory)"),
    "images alone": (("RECIPE", "--images", "x"), "--images x: needs --data FILE.json"),
    "file": (("none.py:TOY",), "none.py: no such file."),
    "no run": (("OTHER",), "unknown run or recipe in"),
    "code": (("RECIPE", "--code", "lava"), "Did you mean 'llava'"),
    "skip": (("RECIPE", "--skip", "unanswerd"), "skip 'unanswerd': unknown; known: malformed,"),
    "checkpoint": (("RECIPE", "--from", "none"), "none: no such folder; give a checkpoint folder"),
    "mixture": (("base-C-TL",), "needs data_root"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_said_in_one_block_before_anything_is_written(
    recipe, tmp_path, capsys, monkeypatch, case
):
    arguments, message = ERRORS[case]
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "toy.json"
    names = {
        "RECIPE": recipe,
        "OTHER": recipe.replace("TOY", "OTHER"),
        "FOLDER": tmp_path,
        "FILE": file,
        "FILE/x": file / "x",
    }
    assert train(*(names.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_a_broken_config_file_lists_what_is_wrong(recipe, tmp_path, capsys):
    config = json.loads((tmp_path / "toy.json").read_text())
    config["stages"]["finetune"]["learning_rat"] = 1
    (tmp_path / "toy.json").write_text(json.dumps(config))
    assert train(recipe) == 2
    assert (
        "config.stages.finetune: unknown field 'learning_rat'; known: data, template,"
        in capsys.readouterr().err
    )
    del config["stages"]["finetune"]["learning_rat"]
    config["stages"]["finetune"]["learning_rate"] = "fast"
    config["model"]["image_aspect"] = "round"
    (tmp_path / "toy.json").write_text(json.dumps(config))
    assert train(recipe) == 2
    error = capsys.readouterr().err
    assert "stages.finetune.learning_rate = 'fast': Input should be a valid number" in error
    assert "model.image_aspect = 'round': Input should be 'pad' or 'square'" in error
    (tmp_path / "toy.json").write_text("{")
    assert train(recipe) == 2
    assert "config: not JSON" in capsys.readouterr().err


def test_a_bad_record_ends_the_program_with_its_name_and_no_traceback(recipe, tmp_path):
    mine = my_records(tmp_path, UNANSWERED)
    command = [
        sys.executable,
        "-m",
        "tinyllava",
        "train",
        recipe,
        "--data",
        str(mine),
        "--output",
        str(tmp_path / "run"),
    ]
    result = subprocess.run([*command, "--only", "finetune"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    line = result.stderr[result.stderr.index("error: ") :]
    assert line == (
        f"error: {mine}: record 4 (id bad): the conversation ends with a question [unanswered]. "
        "Fix the record, or skip such records with --skip unanswered.\n"
    )
    assert "Traceback" not in result.stderr


def test_a_checkpoint_brings_its_own_model_whatever_the_recipe_names(recipe, records, tmp_path, capsys):
    pool = ("--model.connector", "pool", "--model.connector-options", "side", 1)
    assert (
        train(recipe, *pool, "--only", "pretrain", "--pretrain.max-steps", 1, "--output", tmp_path / "first")
        == 0
    )
    checkpoint = tmp_path / "first/model"
    settings = (
        "--data",
        records,
        "--images",
        records.parent / "images",
        "--finetune.max-steps",
        1,
        "--report-to",
        "--finetune.max-length-tokens",
        256,
        "--finetune.global-batch-size",
        2,
        "--hardware.num-workers",
        0,
        "--hardware.precision",
        "fp32",
    )
    for name in ("base", "base-Sig-Phi"):  # SigLIP's 729 tokens would not fit 256
        assert train(name, "--from", checkpoint, *settings, "--output", tmp_path / name) == 0
        run = trained(tmp_path / name)
        assert run == trained(tmp_path / name / "model")
        assert (run.model.connector, run.model.connector_options) == ("pool", {"side": 1})
        assert run.model.vision_encoder == trained(tmp_path / "first").model.vision_encoder
        assert (run.name, run.recipe, list(run.stages)) == ("toy-tuned-base", "base", ["finetune"])
    capsys.readouterr()

    wrong = (
        (("--finetune.max-length-tokens", 9000), "finetune.max_length_tokens = 9000: the language model of"),
        (
            ("--model.connector", "mlp"),
            "the checkpoint has connector 'pool', not 'mlp'; leave out --model.conn",
        ),
    )
    for options, message in wrong:
        assert train("base", "--from", checkpoint, *settings, *options, "--output", tmp_path / "no") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    assert train("base", "--from", tmp_path / "first", *settings) == 2
    assert f"{tmp_path / 'first'}: a run folder; its checkpoint is {checkpoint}." in capsys.readouterr().err


def test_a_checkpoint_without_papers_says_what_its_config_does(recipe, tmp_path):
    assert train(recipe, "--only", "pretrain", "--pretrain.max-steps", 1, "--output", tmp_path / "first") == 0
    run = trained(tmp_path / "first")
    (tmp_path / "first/model/run.json").unlink()
    assert (
        train(
            recipe,
            "--from",
            tmp_path / "first/model",
            "--finetune.max-steps",
            1,
            "--output",
            tmp_path / "second",
        )
        == 0
    )
    assert trained(tmp_path / "second").model == run.model
