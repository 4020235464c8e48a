"""``tinyllava record``: the text with its supervised spans, and the counts."""

import json
import re

import pytest

from tinyllava.cli import main
from tinyllava.config import DataConfig, ModelConfig
from tinyllava.data.dataset import Examples, measure
from tinyllava.data.defects import Defect
from tinyllava.data.records import read_configured
from tinyllava.model.assemble import assemble
from tinyllava.model.processing import TinyLlavaProcessor

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["llama"]))
    model, processor = assemble(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def shown(capsys, *arguments: object, status: int = 0) -> str:
    assert main(["record", *map(str, arguments)]) == status
    return capsys.readouterr().out


def test_the_text_and_what_is_supervised_of_it(checkpoint, records, capsys, monkeypatch):
    monkeypatch.setattr("tinyllava.data.store.open_image", None)  # the images are not decoded
    options = ("--images", records.parent / "images", "--skip", "broken_image")
    out = shown(capsys, records, *options, "--model", checkpoint, "--index", 1)
    assert "record 1 (id r1)" in out
    text = (
        f"<s>{SYSTEM}USER: <image>\nWhat colour is number 1? ASSISTANT:>> green</s><<"
        "USER: Is it really green? ASSISTANT:>> yes</s><<"
    )
    assert text in out
    tokenizer = TinyLlavaProcessor.from_pretrained(checkpoint).tokenizer
    plain = text.replace(">>", "").replace("<<", "")
    num_tokens = len(tokenizer(plain, add_special_tokens=False).input_ids) + 3  # one <image> is four tokens
    num_supervised = sum(
        len(tokenizer(t, add_special_tokens=False).input_ids) for t in ("green</s>", "yes</s>")
    )
    assert f"{num_tokens} tokens, 4 of them for 1 image(s), {num_supervised} supervised" in out


def test_another_template_another_number_of_image_tokens_and_several_records(checkpoint, records, capsys):
    out = shown(
        capsys,
        records,
        "--images",
        records.parent / "images",
        "--model",
        checkpoint,
        "--template",
        "caption",
        "--image-tokens",
        100,
        "--index",
        2,
        "--count",
        2,
        status=1,
    )
    assert "training rejects this record" in out  # a dialogue, and text alone, are no captions
    assert "[dialogue]" in out
    assert "<s><image>>>blue\n<<>>yes\n<<" in out
    assert "100 of them for 1 image(s)" in out
    assert "0 of them for 0 image(s)" in out
    assert re.findall(r"─ record \d+ \(id (r\d+)\) ─", out) == ["r2", "r3"]


def test_a_language_model_alone_is_enough(parts, records, capsys):
    arguments = (
        records,
        "--images",
        records.parent / "images",
        "--language-model",
        parts["chatml"],
        "--index",
        3,
    )
    assert "<|im_start|>assistant\n>>red<|im_end|><<\n" in shown(capsys, *arguments)


def test_what_training_would_refuse_is_said(checkpoint, records, tmp_path, capsys):
    folder = ("--images", records.parent / "images", "--model", checkpoint)
    raw = json.loads(records.read_text())
    raw[1]["conversations"][3]["value"] = "yes </s>" * 100
    marked = tmp_path / "marked.json"
    marked.write_text(json.dumps(raw))
    shown_of = ("record", marked, *folder, "--count", 2, "--max-length", 200)
    data = DataConfig(records=(str(marked),), images=str(records.parent / "images"))
    with pytest.raises(Defect) as refusal:
        measure(
            Examples(
                conversations=read_configured(data).conversations,
                processor=TinyLlavaProcessor.from_pretrained(checkpoint),
            ),
            200,
            (),
        )
    assert main([*map(str, shown_of)]) == 1
    out = capsys.readouterr().out
    assert f">> {'yes </s>' * 100}</s><<" in out
    assert out.count("training rejects this record") == 1
    assert f"training rejects this record: {refusal.value}" in out  # the same words
    assert "[too_long]" in out
    assert main([*map(str, shown_of), "--skip", "too_long"]) == 0
    assert "training skips this record: too_long" in capsys.readouterr().out
    assert main(["record", *map(str, (records, *folder, "--max-length", 20))]) == 1
    assert "tokens exceed max_length_tokens = 20 [too_long]" in capsys.readouterr().out


def test_errors_are_said_in_a_line(checkpoint, records, tmp_path, capsys):
    images = ("--images", records.parent / "images", "--model", checkpoint)
    assert main(["record", *map(str, (records, *images, "--index", 12))]) == 2
    assert capsys.readouterr().err == f"error: --index 12: {records} has records 0 to 11.\n"
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    bad = tmp_path / "bad.json"
    bad.write_text(
        json.dumps([{"id": "[/a]", "conversations": turns}, {"id": "b", "conversations": turns[:1]}])
    )
    assert main(["record", str(bad), "--model", str(checkpoint)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {bad}: record 1 (id b): the conversation ends with a question [unanswered]"
    )
    assert "record 0 (id [/a])" in shown(capsys, bad, "--model", checkpoint, "--skip", "unanswered")
    assert main(["record", str(records), *map(str, images[:2]), "--model", str(tmp_path)]) == 2
    assert "not a tinyllava checkpoint" in capsys.readouterr().err
