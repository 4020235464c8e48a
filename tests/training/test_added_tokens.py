"""Added tokens start as the mean of their pieces; every recipe trains them, models answer with them."""

import dataclasses
import json
from base64 import b64encode
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

import toys
from conftest import make_records
from served import serve
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.config import FULL, Hardware, Run, from_layer, lora
from tinyllava.conversation import ask
from tinyllava.data.dataset import Examples
from tinyllava.data.records import read_records
from tinyllava.errors import CheckpointError, ConfigError
from tinyllava.inference.chat import Chat, encode_prompt
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.model.rebuild import open_start, whole_model
from tinyllava.training.run import train
from training_toys import toy_run

TOKENS = ("<loc_0>", "<loc_1>")


@pytest.fixture(scope="module")
def located(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records whose every answer is a place, and some questions name one."""
    path = make_records(tmp_path_factory.mktemp("located"), 8, text_only_every=9)
    records = json.loads(path.read_text())
    for number, record in enumerate(records):
        turns = [
            {"from": "human", "value": "<image>\nWhere? Not <loc_1>."},
            {"from": "gpt", "value": "<loc_0> <loc_1>" if number % 2 else "<loc_0>."},
        ]
        record["conversations"] = turns
    path.write_text(json.dumps(records))
    return path


def run_with(parts, records, output, tune=FULL, llm="llama", **changes):
    hardware = Hardware(num_workers=0, device_batch_size=2, precision="fp32", keep_checkpoints=1)
    run = toy_run(parts, records, output, llm=llm, hardware=hardware)
    stage = dataclasses.replace(run.stages["finetune"], language_model=tune, learning_rate=1e-2, **changes)
    model = dataclasses.replace(run.model, add_tokens=TOKENS)
    return dataclasses.replace(run, model=model, stages={"finetune": stage})


@pytest.mark.parametrize("llm", ["llama", "phi", "chatml"])
def test_new_rows_are_the_mean_of_their_pieces_and_nothing_else_changes(parts, located, tmp_path, llm):
    run = run_with(parts, located, tmp_path / "run", llm=llm)
    before, processor = assemble(dataclasses.replace(run.model, add_tokens=()))
    pieces = [processor.tokenizer(token, add_special_tokens=False)["input_ids"] for token in TOKENS]
    assert all(len(one) > 2 for one in pieces)
    model, processor = open_start(run)
    ids = processor.tokenizer.convert_tokens_to_ids(list(TOKENS))
    assert model.config.added_token_ids == ids
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(one, name)() for one in (before, model))
        for id_, parts_of in zip(ids, pieces, strict=True):
            assert torch.allclose(new.weight[id_], old.weight[parts_of].mean(0))
            if getattr(old, "bias", None) is not None:
                assert torch.allclose(new.bias[id_], old.bias[parts_of].mean())
        kept = [n for n in range(len(old.weight)) if n not in ids]
        assert torch.equal(new.weight[kept], old.weight[kept])
    text = processor.tokenizer.decode(processor.tokenizer("a <loc_0>")["input_ids"], skip_special_tokens=True)
    assert "<loc_0>" in text


@pytest.mark.parametrize(
    ("tune", "llm"),
    [(FULL, "llama"), (lora(4), "llama"), (lora(4), "phi"), (lora(4), "chatml"), (from_layer(1), "llama")],
)
def test_every_recipe_trains_the_new_rows_and_of_the_frozen_ones_no_other(
    parts, located, tmp_path, tune, llm
):
    run = run_with(parts, located, tmp_path / "run", tune, llm, num_epochs=2)
    start, _ = open_start(run)
    folder = train(run)
    model, processor = open_checkpoint(folder)
    ids = model.config.added_token_ids
    assert processor.tokenizer.convert_tokens_to_ids(list(TOKENS)) == ids
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(one, name)().weight.detach() for one in (start, model))
        assert not torch.allclose(before[ids], after[ids])
        others = [n for n in range(len(before)) if n not in ids]
        assert torch.equal(before[others], after[others]) == (tune is not FULL)
    [checkpoint] = (tmp_path / "run/finetune").glob("checkpoint-*")
    whole = whole_model(checkpoint)
    assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_checkpoint_that_has_them_is_trained_on_without_making_them_anew(parts, located, tmp_path):
    folder = train(run_with(parts, located, tmp_path / "run", lora(4)))
    more = run_with(parts, located, tmp_path / "more", lora(4))
    more = dataclasses.replace(more, start_from=str(folder))
    before, after = open_checkpoint(folder)[0], open_start(more)[0]
    assert before.config.added_token_ids == after.config.added_token_ids
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name])
    trained, _ = open_checkpoint(train(more))
    ids = trained.config.added_token_ids
    rows = [model.get_input_embeddings().weight[ids] for model in (before, trained)]
    assert not torch.equal(*rows)


def test_the_loss_is_that_of_a_softmax_over_the_tokens_without_the_image(parts, located, tmp_path):
    model, processor = open_start(run_with(parts, located, tmp_path / "run"))
    assert model.config.leaves_out_image  # its row was made for it, and new tokens are behind
    conversations = read_records(located, located.parent / "images").conversations
    example = Examples(conversations=conversations, processor=processor)[1]
    inputs = {"input_ids": example.input_ids[None], "pixel_values": example.pixel_values}
    logits = model(**inputs).logits[0, :-1]
    allowed = [n for n in range(len(processor.tokenizer)) if n != processor.image_token_id]
    places = {token: place for place, token in enumerate(allowed)}
    wanted = [(i, places[int(t)]) for i, t in enumerate(example.labels[1:]) if t != -100]
    assert model.config.added_token_ids[0] in example.labels.tolist()
    positions, targets = map(list, zip(*wanted, strict=True))
    expected = torch.nn.functional.cross_entropy(logits[positions][:, allowed], torch.tensor(targets))
    assert model(**inputs, labels=example.labels[None]).loss.item() == pytest.approx(
        expected.item(), rel=1e-5
    )


ASKED = "Where? Not <loc_1>."


@pytest.fixture(scope="module")
def answering(parts, located, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run with adapters, and its model, which has learned to answer with the new tokens."""
    run = run_with(parts, located, tmp_path_factory.mktemp("answering") / "run", lora(8), num_epochs=40)
    return run, train(run)


def test_a_trained_model_answers_with_them_and_so_does_its_adapter(answering, located):
    run, folder = answering
    chat = Chat.open(folder)
    image = next((located.parent / "images").glob("*.png"))
    assert "<loc_0>" in chat.ask(ASKED, image, max_new_tokens=4)
    start, _ = open_start(run)
    adapted = PeftModel.from_pretrained(start, str(Path(run.output) / "finetune/adapters/language_model"))
    inputs = chat._collate(*_prompt(chat, image))
    with torch.no_grad():
        difference = adapted(**inputs).logits - chat.model(**inputs).logits
    assert difference.abs().max() < 1e-4


def _answer_stock(exported: Path, image: Path) -> str:
    model = LlavaForConditionalGeneration.from_pretrained(exported)
    processor = AutoProcessor.from_pretrained(exported)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=prompt, images=Image.open(image).convert("RGB"), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(ids, skip_special_tokens=True))


def _answer_llama_cpp(exported: Path, image: Path) -> str:
    url = "data:image/png;base64," + b64encode(image.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": ASKED}]
    with serve(exported, "--engine", "llama.cpp", "--name", "toy") as served:
        answer = served.post(messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0)
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("layout", "options", "answer"),
    [("llava", {}, _answer_stock), ("gguf", {"quantized": "f32"}, _answer_llama_cpp)],
)
def test_exports_keep_them_and_answer_the_same(answering, located, tmp_path, layout, options, answer):
    _, folder = answering
    image = next((located.parent / "images").glob("*.png"))
    expected = Chat.open(folder).ask(ASKED, image, max_new_tokens=4)
    assert "<loc_0>" in expected
    assert export_checkpoint(folder, tmp_path / "exported", layout=layout, **options) is not None
    assert answer(tmp_path / "exported", image).strip() == expected
    if layout == "llava":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
        ids = open_checkpoint(folder)[0].config.added_token_ids
        assert tokenizer.convert_tokens_to_ids(list(TOKENS)) == ids


def _prompt(chat: Chat, image: Path):
    conversation = ask("Where?", image)
    return [conversation], [encode_prompt(chat.processor, conversation)]


def test_tokens_without_a_row_are_refused_by_name_and_get_rows_when_they_are_named(parts, located, tmp_path):
    folder = toys.make_language_model(tmp_path / "llama", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(TOKENS))
    tokenizer.save_pretrained(folder)
    mine = {**parts, "llama": folder}
    run = run_with(mine, located, tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"2 of its tokens have none \(<loc_0> <loc_1>\).*--add-tokens <loc_0>"
    ):
        assemble(dataclasses.replace(run.model, add_tokens=()))
    model, processor = open_start(run)
    assert not model.config.leaves_out_image  # it is the last row here
    assert model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids("<loc_1>")].any()


def test_a_special_token_becomes_text_when_asked_for_and_the_templates_own_do_not(parts, located, tmp_path):
    folder = toys.make_language_model(tmp_path / "chatml", "chatml")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|box|>"]})
    tokenizer.save_pretrained(folder)
    run = run_with({**parts, "chatml": folder}, located, tmp_path / "run", llm="chatml")
    _, processor = open_start(dataclasses.replace(run, model=dataclasses.replace(run.model, add_tokens=())))
    id_ = processor.tokenizer.convert_tokens_to_ids("<|box|>")
    model = dataclasses.replace(run.model, add_tokens=("<|box|>",))
    _, asked = open_start(dataclasses.replace(run, model=model))
    asked.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert asked.tokenizer.convert_tokens_to_ids("<|box|>") == id_
    assert processor.tokenizer.decode([id_], skip_special_tokens=True) == ""
    assert saved.decode([id_], skip_special_tokens=True) == "<|box|>"
    for own in ("<|im_end|>", "<image>", " "):
        with pytest.raises(ConfigError, match="add_tokens = "):
            open_start(dataclasses.replace(run, model=dataclasses.replace(model, add_tokens=(own,))))
