"""Answers in mixed, padded batches and word by word are those of each conversation asked alone."""

from pathlib import Path

import pytest
from PIL import Image

from chats import TEMPLATES, make_chat
from tinyllava.conversation import Conversation, Message, ask
from tinyllava.errors import ConfigError, DataError, ImageError
from tinyllava.inference import Chat


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path, size in zip(paths, ((40, 28), (28, 28), (30, 60)), strict=True):
        Image.new("RGB", size, path.stem).save(path)
    return paths


def mixed(pictures: list[Path]) -> list[Conversation]:
    turns = (
        Message(role="user", text="What is in the picture?", images=ask("", pictures[0]).images),
        Message(role="assistant", text="A red circle"),
        Message(role="user", text="Is there a dog?"),
    )
    return [
        ask("Is there a dog?", pictures[0]),
        ask("Is there a dog?"),
        ask("What is in the picture? Answer the question using a single word or phrase.", pictures[1]),
        Conversation(messages=turns),
        ask("A red circle and 12 blue squares.", pictures[2], pictures[0]),
    ]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_batches_give_the_answers_of_each_alone(tmp_path, pictures, kind):
    chat = make_chat(tmp_path, kind, "siglip" if kind == "phi" else "clip")
    alone = [chat.answer([conversation], 12)[0] for conversation in mixed(pictures)]
    assert chat.answer(mixed(pictures), 12) == alone
    assert len(set(alone)) >= 4, "the answers do not depend on what is asked"
    chat.batch_tokens = 80  # several batches
    assert chat.answer(mixed(pictures), 12) == alone
    assert chat.answer([], 12) == []


def test_stream_joins_to_the_answer(tmp_path, pictures):
    chat = make_chat(tmp_path, "llama")
    for conversation in mixed(pictures):
        pieces = list(chat.stream(conversation, 12))
        assert "".join(pieces) == chat.answer([conversation], 12)[0]
    stream = chat.stream(mixed(pictures)[0], 400)
    next(stream)
    stream.close()  # must not wait for 400 tokens nor leave a thread that does


@pytest.mark.parametrize("name", ["cpux", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=rf"device '{name}': .*; this machine's best is"):
        Chat.open("never looked at", device=name)


def test_wrong_requests_are_named(tmp_path, pictures):
    chat = make_chat(tmp_path, "llama")
    with pytest.raises(ImageError, match="no such picture"):
        chat.answer([ask("Is there a dog?", tmp_path / "none.png")])
    chat.processor.tokenizer.model_max_length = 20
    with pytest.raises(DataError, match=r"'What <image> is it\?' has <image> in its text; leave it out"):
        chat.answer([ask("What <image> is it?", pictures[0])])
    with pytest.raises(DataError, match="context is 20"):
        list(chat.stream(ask("Is there a dog? " * 20, id="q7")))
