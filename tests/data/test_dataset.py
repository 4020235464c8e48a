"""Examples and batches: what is measured, left out, padded, and said when an image is broken."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinyllava.config import DataConfig, ModelConfig
from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.conversion import read_stored
from tinyllava.data.dataset import Collator, Example, Examples, measure
from tinyllava.data.defects import Defect
from tinyllava.data.records import read_configured, read_records
from tinyllava.data.store import image_counts, question_counts
from tinyllava.errors import ImageError
from tinyllava.model.assemble import assemble
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.parts.templates import read_template


@pytest.fixture(scope="module")
def processor(parts) -> TinyLlavaProcessor:
    config = ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["chatml"]))
    return assemble(config)[1]


@pytest.fixture(scope="module")
def examples(processor, records) -> Examples:
    conversations = read_records(records, records.parent / "images").conversations
    return Examples(conversations=conversations, processor=processor)


def talk(question: str, answer: str, id: str = "r1") -> Conversation:
    messages = (Message(role="user", text=question), Message(role="assistant", text=answer))
    return Conversation(messages=messages, id=id, source="data.json")


def test_labels_are_the_ids_where_supervised_and_ignored_elsewhere(examples, processor):
    for index in (0, 3):
        example, encoded = examples[index], processor.encode(examples.conversations[index])
        expected = [t if on else -100 for t, on in zip(encoded.input_ids, encoded.supervised, strict=True)]
        assert example.labels.tolist() == expected
        assert example.input_ids.tolist() == encoded.input_ids
    assert examples[0].pixel_values.shape == (1, 3, 28, 28)
    assert examples[3].pixel_values is None
    assert examples[3].place.endswith("records.json: record 3 (id r3)")


def test_measured_lengths_are_those_of_the_examples(examples):
    measured, skipped = measure(examples, 512, ())
    assert list(measured.lengths) == [
        len(example.input_ids) for example in map(examples.__getitem__, range(12))
    ]
    assert list(measured.supervised_lengths) == [int((examples[i].labels != -100).sum()) for i in range(12)]
    assert not skipped


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_record_that_is_too_long_ends_behind_the_last_answer_that_fits(processor, tmp_path, is_stored):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    records = []
    for number in range(12):
        turns = []
        for n in range(1 + number % 4):
            mark = "<image>" if n in (0, 2) else ""
            turns += [
                {"from": "human", "value": f"{mark}Why {n}? " + "tell me " * number},
                {"from": "gpt", "value": "because " * (n + 1), "loss": n != 0 or number % 4 == 0},
            ]
        images = ["a.png"] * sum(turn["value"].count("<image>") for turn in turns)
        records.append({"id": number, "image": images, "conversations": turns})
    (tmp_path / "my.json").write_text(json.dumps(records))
    data = DataConfig(records=(str(tmp_path / "my.json"),))
    whole = read_configured(data).conversations
    found = read_stored(data, "", tmp_path / "store").conversations if is_stored else whole
    given = Examples(conversations=found, processor=processor)
    limit = 110
    cut, skipped = measure(given, limit, ("too_long",), truncate=True)
    expected = []
    for one in whole:  # every way to cut, the longest first
        ends = [i + 1 for i, m in enumerate(one.messages) if m.role == "assistant"]
        tried = [dataclasses.replace(one, messages=one.messages[:end]) for end in reversed(ends)]
        tried = [t for t in tried if any(m.is_trained for m in t.messages if m.role == "assistant")]
        fits = [t for t in tried if len(processor.encode(t).input_ids) <= limit]
        expected += fits[:1]
    assert list(cut.conversations) == expected
    assert cut.num_truncated == sum(one not in expected for one in whole) - skipped["too_long"] > 1
    assert skipped["too_long"] == len(whole) - len(expected) > 0
    assert [len(processor.encode(one).input_ids) for one in expected] == list(cut.lengths)
    assert image_counts(cut.conversations).tolist() == [len(one.images) for one in expected]
    assert question_counts(cut.conversations).tolist() == question_counts(expected).tolist()
    assert [one.place for one in cut.select(np.array([1, 0])).conversations] == [
        one.place for one in (expected[1], expected[0])
    ]
    again, _ = measure(given, limit, ("too_long",))
    assert len(again) < len(cut)  # nothing is cut where it was not asked for


def test_only_the_chosen_answers_add_to_the_loss(processor):
    turns = []
    for number, is_trained in enumerate((False, True, False)):
        turns.append(Message(role="user", text=f"Question {number}?"))
        turns.append(Message(role="assistant", text=f"Answer {number}.", is_trained=is_trained))
    chosen = Conversation(messages=tuple(turns), id="r1")
    whole = dataclasses.replace(
        chosen, messages=tuple(dataclasses.replace(turn, is_trained=True) for turn in turns)
    )
    one, other = (processor.encode(conversation) for conversation in (chosen, whole))
    assert one.input_ids == other.input_ids
    learnt = [token for token, on in zip(one.input_ids, one.supervised, strict=True) if on]
    assert processor.tokenizer.decode(learnt).strip() == "Answer 1.<|im_end|>"
    alone = Examples(conversations=[chosen], processor=processor, separate_questions=True)
    asked = (Conversation(messages=tuple(turns[2:4])), processor)
    assert alone.encode(chosen).input_ids == asked[1].encode(asked[0]).input_ids


def test_too_long_is_an_error_or_counted(processor):
    conversations = [talk("Q", "A", "short"), talk("Q", "word " * 100, "long"), talk("Q", "A", "end")]
    examples = Examples(conversations=conversations, processor=processor)
    length = len(processor.encode(conversations[1]).input_ids)
    message = rf"record long: {length} tokens exceed max_length_tokens = {length - 1} \[too_long\]"
    with pytest.raises(Defect, match=message):
        measure(examples, length - 1, ())
    kept, skipped = measure(examples, length - 1, ("too_long",))
    assert [c.id for c in kept.conversations] == ["short", "end"]
    assert skipped == {"too_long": 1}
    assert measure(examples, length, ())[0].conversations == conversations


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<image>"])
@pytest.mark.parametrize("where", ["question", "answer"])
def test_special_tokens_in_a_text_are_trained_as_text(processor, mark, where):
    texts = {"question": "Q", "answer": "A"} | {where: f"it ends with {mark}, see?"}
    examples, skipped = measure(Examples(conversations=[talk(**texts)], processor=processor), 512, ())
    assert not skipped
    ids, neutral = examples[0].input_ids, processor.encode(talk("Q", "A")).input_ids
    mark_id = processor.tokenizer.convert_tokens_to_ids(mark)
    assert int((ids == mark_id).sum()) == neutral.count(mark_id)
    assert mark in processor.tokenizer.decode(ids[ids != mark_id])


def test_a_batch_is_padded_on_the_right_and_holds_all_images(examples, processor):
    chosen = [examples[0], examples[3], examples[2]]
    collate = Collator(pad_token_id=7, image_token_id=processor.image_token_id)
    batch = collate(chosen)
    longest = max(len(example.input_ids) for example in chosen)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, longest)
    for row, example in enumerate(chosen):
        size = len(example.input_ids)
        assert batch["input_ids"][row].tolist() == example.input_ids.tolist() + [7] * (longest - size)
        assert batch["labels"][row].tolist() == example.labels.tolist() + [-100] * (longest - size)
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (longest - size)
    assert torch.equal(batch["pixel_values"], torch.cat([chosen[0].pixel_values, chosen[2].pixel_values]))
    assert "pixel_values" not in collate([examples[3], examples[7]])
    assert batch["num_tokens"] == int(batch["attention_mask"].sum())
    flat = batch["input_ids"].flatten()
    found = [place for place, token in enumerate(flat.tolist()) if token == processor.image_token_id]
    assert batch["image_positions"].tolist() == found
    rows = batch["labels"].tolist()
    supervised = [
        (row, place) for row in range(3) for place in range(longest - 1) if rows[row][place + 1] != -100
    ]
    assert batch["supervised_positions"].tolist() == [
        row * (longest - 1) + place for row, place in supervised
    ]


def test_padding_with_a_token_of_the_text_leaves_labels_and_mask_alone():
    """Phi-2 pads with its EOS: what is padding is told by the attention mask."""
    rows = [torch.tensor([5, 9, 9]), torch.tensor([9])]
    batch = Collator(pad_token_id=9, image_token_id=3)([Example(input_ids=row, labels=row) for row in rows])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 9, 9], [9, -100, -100]]


def broken_records(folder: Path) -> Path:
    (folder / "gone.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    path = folder / "data.json"
    path.write_text(json.dumps([{"id": "r9", "image": "gone.png", "conversations": turns}]))
    return path


def test_an_image_that_breaks_while_training_is_named_with_its_record(tmp_path, processor):
    conversations = read_records(broken_records(tmp_path), tmp_path).conversations
    examples = Examples(conversations=conversations, processor=processor)
    with pytest.raises(ImageError, match=r"data\.json: record 0 \(id r9\): gone\.png: .*--skip broken_image"):
        examples[0]
    (tmp_path / "gone.png").unlink()
    with pytest.raises(ImageError, match=r"data\.json: record 0 \(id r9\): .*gone\.png: no such image"):
        examples[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_run_stops_with_that_line_also_out_of_a_worker_process(parts, tmp_path, num_workers):
    import dataclasses

    from tinyllava.config import DataConfig, Hardware
    from tinyllava.training.run import train
    from training_toys import toy_run

    hardware = Hardware(num_workers=num_workers, device_batch_size=2, check_images=False)
    run = toy_run(parts, broken_records(tmp_path), tmp_path / "run", hardware=hardware)
    data = DataConfig(records=(str(tmp_path / "data.json"),))
    stage = dataclasses.replace(run.stages["finetune"], data=data)
    with pytest.raises(ImageError) as caught:
        train(dataclasses.replace(run, stages={"finetune": stage}))
    assert str(caught.value).startswith(f"{tmp_path / 'data.json'}: record 0 (id r9): gone.png: ")
    assert "\n" not in str(caught.value)


def test_captions_are_one_answer_under_an_image(processor):
    """Dialogues would supervise every answer under one image, and text alone would train nothing."""
    image = (ImageRef(name="x.png"),)

    def conversation(*, images=image, num_questions=1):
        turns = [
            Message(role=role, text=role, images=images if number == 0 and role == "user" else ())
            for number in range(num_questions)
            for role in ("user", "assistant")
        ]
        return Conversation(messages=tuple(turns), id="r1", source="data.json", at="record 0")

    caption = read_template("caption")
    for wrong, name in ((conversation(num_questions=2), "dialogue"), (conversation(images=()), "text_only")):
        examples = Examples(conversations=[wrong, conversation()], processor=processor, template=caption)
        with pytest.raises(Defect, match=rf"data.json: record 0 \(id r1\): .* \[{name}\]"):
            measure(examples, 512, ())
        kept, skipped = measure(examples, 512, (name,))
        assert (len(kept), dict(skipped)) == (1, {name: 1})
        assert len(measure(dataclasses.replace(examples, template=None), 512, ())[0]) == 2
