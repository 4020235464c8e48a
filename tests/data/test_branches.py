"""Questions as branches of one row: same loss and gradient as rows of their own, and what cannot branch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tinyllava.config import ModelConfig
from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.dataset import Collator, Examples, encode_branches, measure, split_questions
from tinyllava.errors import DataError
from tinyllava.model.assemble import assemble
from tinyllava.parts.templates import read_template

TURNS = (
    ("Is there a dog?", "no"),
    ("What is in the picture?", "A red circle."),
    ("Is there a circle?", "yes"),
)


def talk(image: Path, *turns: tuple[str, str], system: str = "") -> Conversation:
    messages = [Message(role="system", text=system)] if system else []
    for number, (question, answer) in enumerate(turns):
        images = (ImageRef(path=image),) if number == 0 else ()
        messages.append(Message(role="user", text=question, images=images))
        messages.append(Message(role="assistant", text=answer))
    return Conversation(messages=tuple(messages), id="r", source="data.json")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (30, 20), path.stem).save(path)
    return paths


def gradients(model, processor, conversations, *, separate: bool):
    """Return the summed loss, the number of supervised tokens and all gradients."""
    examples = Examples(conversations=conversations, processor=processor, separate_questions=separate)
    batch = Collator(0, processor.image_token_id)([examples[i] for i in range(len(examples))])
    del batch["sample_ids"], batch["num_tokens"]
    if "branches" in batch:
        batch.pop("attention_mask")
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), int((batch["labels"] != -100).sum()), grads


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("llm", ["llama", "phi", "stablelm", "chatml"])
def test_branches_are_rows_of_their_own(parts, images, llm, attention):
    torch.manual_seed(0)
    model, processor = assemble(
        ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts[llm]))
    )
    model.set_attn_implementation(attention)
    red = talk(images[0], *TURNS)
    blue = talk(images[1], *TURNS[:2])
    alone = talk(images[1], TURNS[2])  # a row without branches in the same batch
    rows = [part for conversation in (red, blue, alone) for part in split_questions(conversation)]
    loss, count, grads = gradients(model, processor, [red, blue, alone], separate=True)
    expected, expected_count, expected_grads = gradients(model, processor, rows, separate=False)
    assert count == expected_count
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-5, msg=name)
    in_turn, _, _ = gradients(model, processor, [red, blue, alone], separate=False)
    assert abs(in_turn - expected) > 1e-4  # where questions see each other the loss is another


@pytest.fixture(scope="module")
def processor(parts):
    return assemble(ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["chatml"])))[1]


def test_a_row_holds_the_image_once_and_every_question_whole(processor, images):
    conversation = talk(images[0], *TURNS, system="You are brief.")
    row = encode_branches(processor, conversation)
    parts = [processor.encode(part) for part in split_questions(conversation)]
    assert row.input_ids.count(processor.image_token_id) == processor.num_image_tokens
    shared = [t for t, branch in zip(row.input_ids, row.branches, strict=True) if branch == 0]
    for number, part in enumerate(parts, start=1):
        own = [t for t, branch in zip(row.input_ids, row.branches, strict=True) if branch == number]
        on = [s for s, branch in zip(row.supervised, row.branches, strict=True) if branch == number]
        whole = part.input_ids[: len(shared) + len(own)]
        assert shared + own == whole
        assert [False] * len(shared) + on == part.supervised[: len(whole)]
        assert not any(part.supervised[len(whole) :])  # only what no loss depends on is left out
        assert not on[0]
    examples = Examples(conversations=[conversation], processor=processor, separate_questions=True)
    measured, _ = measure(examples, 512, ())
    assert list(measured.lengths) == [len(examples[0].input_ids)] == [len(row.input_ids)]
    assert measured.separate_questions


def test_what_cannot_be_separated_is_an_error_with_the_record(processor, images):
    red = talk(images[0], *TURNS)
    later = replace(red.messages[2], images=red.messages[0].images)
    two = replace(red, messages=(*red.messages[:2], later, *red.messages[3:]))
    with pytest.raises(DataError, match=r"data\.json: record r: a later question has its own images"):
        split_questions(two)
    with pytest.raises(DataError, match="record r: the template puts the answer directly after the image"):
        encode_branches(processor, red, read_template("caption"))
