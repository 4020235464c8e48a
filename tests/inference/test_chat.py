"""Answers in mixed, padded batches and word by word are those of each conversation asked alone."""

import json
import math
import re
from pathlib import Path
from threading import current_thread

import pytest
import torch
from PIL import Image

from chats import TEMPLATES, make_chat
from tinyllava.conversation import Conversation, Message, ask
from tinyllava.errors import CheckpointError, ConfigError, DataError, ImageError
from tinyllava.inference import chat as chats
from tinyllava.inference.batches import prepare_group
from tinyllava.inference.chat import Chat, decode, encode_prompt
from tinyllava.inference.logits import FiniteLogits, stop_ids
from tinyllava.inference.shared_prefix import answer_groups


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path, size in zip(paths, ((40, 28), (28, 28), (30, 60)), strict=True):
        Image.new("RGB", size, path.stem).save(path)
    return paths


def mixed(images: list[Path]) -> list[Conversation]:
    turns = (
        Message(role="user", text="What is in the picture?", images=ask("", images[0]).images),
        Message(role="assistant", text="A red circle"),
        Message(role="user", text="Is there a dog?"),
    )
    return [
        ask("Is there a dog?", images[0]),
        ask("Is there a dog?"),
        ask("What is in the picture? Answer the question using a single word or phrase.", images[1]),
        Conversation(messages=turns),
        ask("A red circle and 12 blue squares.", images[2], images[0]),
    ]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_batches_give_the_answers_of_each_alone(tmp_path, images, kind):
    chat = make_chat(tmp_path, kind, "siglip" if kind == "phi" else "clip")
    alone = [chat.answer([conversation], 12)[0] for conversation in mixed(images)]
    assert chat.answer(mixed(images), 12) == alone
    assert len(set(alone)) >= 4, "the answers do not depend on what is asked"
    chat.batch_tokens = 80  # several batches
    assert chat.answer(mixed(images), 12) == alone
    assert chat.answer([], 12) == []


def test_stream_joins_to_the_answer(tmp_path, images):
    chat = make_chat(tmp_path, "llama")
    for conversation in mixed(images):
        pieces = list(chat.stream(conversation, 12))
        assert "".join(pieces) == chat.answer([conversation], 12)[0]
    stream = chat.stream(mixed(images)[0], 400)
    next(stream)
    stream.close()  # must not wait for 400 tokens nor leave a thread that does


@pytest.mark.parametrize("name", ["cpux", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=rf"device '{name}': .*; this machine's best is"):
        Chat.open("never looked at", device=name)


def test_without_a_folder_the_starters_model_is_opened(tmp_path, images, monkeypatch):
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"no model found.*`tinyllava starter`.*Chat\.open"):
        Chat.open()
    chat = make_chat(tmp_path / "parts", "llama")
    for part in (chat.model, chat.processor):
        part.save_pretrained(tmp_path / "cache/starter/model")
    openers, opens = [], chats.open_checkpoint
    monkeypatch.setattr(
        chats, "open_checkpoint", lambda *a, **k: (openers.append(current_thread()), opens(*a, **k))[1]
    )
    assert Chat.open(device="cpu").ask("What is it?", images[0]) == chat.ask("What is it?", images[0])
    assert [thread.is_alive() for thread in openers] == [False], "its helpers would slow down the answers"


def test_wrong_requests_are_named(tmp_path, images):
    chat = make_chat(tmp_path, "llama")
    with pytest.raises(ImageError, match="no such image"):
        chat.answer([ask("Is there a dog?", tmp_path / "none.png")])
    for swapped in (chat.ask, chat.start().ask, chat.start().stream):
        with pytest.raises(
            DataError, match=r"^question 'dog\.png': is the name of an image\. Give the quest"
        ):
            swapped("dog.png", "Is there a dog?")
    chat.processor.tokenizer.model_max_length = 20
    with pytest.raises(DataError, match="the context of the model is 20"):
        list(chat.stream(ask("Is there a dog? " * 20, id="q7")))
    chat.processor.chat_template = "{% for m in messages %}{% generation %}x{% endgeneration %}{% endfor %}"
    with pytest.raises(
        DataError, match="'Q' has 1 images, but its chat template writes <image> 0 times\\. Fix"
    ):
        chat.answer([ask("Q", images[0])])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_spelt_special_token_is_answered_as_text(tmp_path, images, kind):
    chat = make_chat(tmp_path, kind)
    end = chat.processor.tokenizer.eos_token
    one = ask(f"What {end} is <image> it? ", images[0])
    prompt = encode_prompt(chat.processor, one)
    assert prompt.count(chat.processor.image_token_id) == chat.processor.num_image_tokens
    bare = encode_prompt(chat.processor, ask("What", images[0]))
    end_id = chat.processor.tokenizer.eos_token_id
    assert prompt.count(end_id) == bare.count(end_id)
    [answer] = chat.answer([one], 6)
    assert "".join(chat.stream(one, 6)) == answer


def break_connector(chat: Chat, value: float) -> str:
    name, weight = next((n, w) for n, w in chat.model.named_parameters() if "multi_modal_projector" in n)
    with torch.no_grad():
        weight.view(-1)[3] = value
    return name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_are_an_error_that_names_the_weight(tmp_path, images, value):
    chat = make_chat(tmp_path, "llama")
    name = break_connector(chat, value)
    asked = ask("Is there a dog?", images[0])
    message = rf"logits are NaN or infinite: 1 of [\d,]+ values of {re.escape(name)} are not finite\. Copy"
    with pytest.raises(CheckpointError, match=message):
        chat.answer([asked], 4)
    with pytest.raises(CheckpointError, match=message):
        list(chat.stream(asked, 4))
    group = prepare_group(chat.processor, [asked])
    with pytest.raises(CheckpointError, match=message):
        answer_groups(chat.model, [group], 4)
    assert chat.answer([ask("Is there a dog?")], 4), "what needs no image is still answered"


def test_an_overflow_of_half_precision_is_named(tmp_path):
    chat = make_chat(tmp_path, "llama")
    with torch.no_grad():
        chat.model.lm_head.weight.mul_(60_000 / chat.model.lm_head.weight.abs().max())
    chat.model.half()
    with pytest.raises(CheckpointError, match=r"float16 overflows\. Load it in bfloat16 or float32"):
        chat.answer([ask("Is there a dog?")], 4)


def test_a_single_infinite_logit_is_an_error_unless_an_option_asks_for_it(tmp_path):
    chat = make_chat(tmp_path, "phi")  # its head has a bias
    one = ask("Is there a dog?")
    assert chat.answer([one], 6, no_repeat_ngram_size=1)
    with torch.no_grad():
        chat.model.lm_head.bias[7] = -math.inf
    with pytest.raises(CheckpointError, match=r"1 of [\d,]+ values of lm_head\.bias are not"):
        chat.answer([one], 4)


def test_what_follows_a_finished_answer_may_overflow(tmp_path):
    chat = make_chat(tmp_path, "llama")
    check = FiniteLogits(chat.model, 2, can_forbid=False)
    end = chat.processor.tokenizer.eos_token_id
    ids = torch.tensor([[5, 6, end, 0], [end, 6, 7, 8]])  # an end within the prompt ends nothing
    scores = torch.zeros(2, 9)
    scores[0, 3] = math.nan
    check(ids, scores)
    scores[1, 3] = math.nan
    with pytest.raises(CheckpointError):
        check(ids, scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_return_sequences": 2},
            r"num_return_sequences = 2 is not supported \(only one answer per question",
        ),
        ({"max_length": 9}, "option max_length = 9 is not supported; supported: do_sample"),
        ({"temperature": 0.5}, "temperature = 0.5 has no effect without do_sample=True"),
        ({"stream": True}, "stream = True is not supported"),
    ],
)
def test_an_option_without_effect_is_refused_by_name(tmp_path, options, message):
    chat = make_chat(tmp_path, "llama")
    with pytest.raises(ConfigError, match=message):
        chat.answer([ask("Is there a dog?")], 4, **options)
    with pytest.raises(ConfigError, match=message):
        chat.stream(ask("Is there a dog?"), 4, **options)
    with pytest.raises(ConfigError, match="num_beams = 2 cannot be streamed"):
        chat.stream(ask("Is there a dog?"), 4, num_beams=2)


def test_options_of_generate_are_followed_streamed_or_not(tmp_path, images):
    chat = make_chat(tmp_path, "llama")
    one = ask("Is there a dog?", images[0])
    [whole] = chat.answer([one], 30)
    assert chat.answer([one, ask("dog")], 12, num_beams=2)[0] == chat.answer([one], 12, num_beams=2)[0]
    seen: list[int] = []

    def after_three(ids: torch.Tensor, scores: object) -> torch.Tensor:
        seen.append(ids.shape[1])
        return torch.full((len(ids),), len(seen) >= 3)

    [short] = chat.answer([one], 30, stopping_criteria=[after_three])
    assert len(seen) == 3
    assert whole.startswith(short)
    assert not short.is_cut, "it was asked to stop there"
    seen.clear()
    stream = chat.stream(one, 30, stopping_criteria=[after_three])
    assert "".join(stream) == short
    assert not stream.is_cut
    word = whole[6:8]
    [stopped] = chat.answer([one], 30, stop_strings=[word])
    assert whole.startswith(stopped)
    assert word in stopped
    assert len(stopped) < len(whole)
    assert "".join(chat.stream(one, 30, stop_strings=[word])) == stopped


def test_an_answer_that_is_cut_off_says_so(tmp_path, images):
    chat = make_chat(tmp_path, "llama")
    one = ask("Is there a dog?", images[0])
    stream = chat.stream(one, 3)
    assert "".join(stream) == chat.answer([one], 3)[0]
    assert stream.is_cut
    assert chat.answer([one], 3)[0].is_cut
    chat.model.generation_config.eos_token_id = list(range(len(chat.processor.tokenizer) + 64))
    stream = chat.stream(one, 3)
    list(stream)
    assert not stream.is_cut
    assert not chat.answer([one], 3)[0].is_cut


@pytest.mark.parametrize("kind", ["llama", "chatml"])
def test_prompt_and_answer_stay_within_the_context(tmp_path, images, kind):
    chat = make_chat(tmp_path, kind)
    asked = [
        ask("Is there a dog?", images[0]),
        ask("Is there a red circle and a dog?", images[1]),
        ask("dog"),
    ]
    lengths = [len(encode_prompt(chat.processor, one)) for one in asked]
    chat.processor.tokenizer.model_max_length = max(lengths) + 2
    chat.model.generation_config.eos_token_id = None  # nothing else ends an answer
    answers = chat.answer(asked, 1000)
    assert answers == [chat.answer([one], 1000)[0] for one in asked]
    assert all(answer.is_cut for answer in answers)
    groups = [prepare_group(chat.processor, [one]) for one in asked]
    rows = [row for [row] in answer_groups(chat.model, groups, 1000, chat.context_tokens)]
    assert [len(row) for row in rows] == [max(lengths) + 2 - length for length in lengths]
    assert decode(chat.processor, rows) == answers


def test_the_oldest_questions_make_room_and_images_and_system_stay(tmp_path, images):
    chat = make_chat(tmp_path, "llama")
    turns = [Message(role="system", text="Be short.")]
    for n in range(4):
        refs = ask("", images[n]).images if n < 2 else ()
        turns.append(Message(role="user", text=f"Is there a dog {n}?", images=refs))
        turns.append(Message(role="assistant", text="no"))
    turns.append(Message(role="user", text="Sure?"))
    whole = Conversation(messages=tuple(turns), id="c")
    num_tokens = len(encode_prompt(chat.processor, whole))
    chat.processor.tokenizer.model_max_length = num_tokens + 10
    assert chat.shorten(whole, 10) == (whole, 0)
    shorter, num_dropped = chat.shorten(whole, 11)
    assert num_dropped == 1
    assert shorter.images == whole.images
    assert [m.text for m in shorter.messages] == ["Be short.", *(m.text for m in turns[3:])]
    assert [len(m.images) for m in shorter.messages[:2]] == [0, 2]
    chat.processor.tokenizer.model_max_length = 30
    last, num_dropped = chat.shorten(whole, 500)
    assert num_dropped == 4
    assert [m.text for m in last.messages] == ["Be short.", "Sure?"]


def test_sampling_that_a_checkpoint_was_published_with_does_not_make_chat_sample(tmp_path, images):
    chat = make_chat(tmp_path, "llama")
    one = ask("Is there a dog?", images[0])
    expected = chat.answer([one], 20)
    chat.model.save_pretrained(tmp_path / "m")
    chat.processor.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    settings = json.loads(path.read_text())
    other = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 0,
        "repetition_penalty": 3.0,
        "num_beams": 2,
        "num_return_sequences": 2,
        "max_new_tokens": 1,
        "min_new_tokens": 30,
        "suppress_tokens": [5],
    }
    path.write_text(json.dumps(settings | other))
    opened = Chat.open(tmp_path / "m", device="cpu")
    assert opened.answer([one], 20) == expected
    assert "".join(opened.stream(one, 20)) == expected[0]
    path.write_text(json.dumps(settings | {"eos_token_id": [settings["eos_token_id"], 5]}))
    assert set(stop_ids(Chat.open(tmp_path / "m", device="cpu").model).tolist()) == {
        settings["eos_token_id"],
        5,
    }


def test_the_context_is_no_longer_than_the_models_positions(tmp_path):
    chat = make_chat(tmp_path, "llama")
    chat.processor.tokenizer.model_max_length = 10**30  # as a tokenizer without a limit says
    chat.model.save_pretrained(tmp_path / "m")
    chat.processor.save_pretrained(tmp_path / "m")
    assert Chat.open(tmp_path / "m", device="cpu").context_tokens == 512


@pytest.mark.parametrize("kind", ["llama", "chatml"])
def test_no_answer_contains_the_row_of_an_image(tmp_path, images, kind):
    """Under a head whose logits are all negative, the zero rows of ``<image>`` would win."""
    chat = make_chat(tmp_path, kind)
    config = chat.model.config
    rows = [config.image_token_id, *range(config.num_language_rows or 10**6, config.text_config.vocab_size)]
    with torch.no_grad():
        width = chat.model.lm_head.weight.shape[1]
        chat.model.lm_head = torch.nn.Linear(width, chat.model.lm_head.out_features)
        chat.model.lm_head.weight.mul_(0.01)
        chat.model.lm_head.bias.fill_(-5.0)
        chat.model.lm_head.weight[rows] = 0
        chat.model.lm_head.bias[rows] = 0
    question = ask("What is it?", images[0])
    inputs = chat._collate([question], [encode_prompt(chat.processor, question)])
    with torch.no_grad():
        assert int(chat.model(**inputs).logits[0, -1].argmax()) in rows
    said = []
    chat.answer(
        [question], 4, stopping_criteria=[lambda ids, scores: said.append(ids[0, -1].item()) or False]
    )
    assert said
    assert not set(said) & set(rows)
    groups = [prepare_group(chat.processor, [question])]
    [[answer]] = answer_groups(chat.model, groups, 4)
    assert not set(answer) & set(rows)
