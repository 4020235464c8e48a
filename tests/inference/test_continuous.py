"""Decoding together changes no answer: against ``Chat``, one conversation at a time."""

import random
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from chats import TEMPLATES, make_chat
from tinyllava.conversation import Conversation, Message, ask
from tinyllava.errors import CheckpointError, ConfigError, DataError
from tinyllava.inference import continuous
from tinyllava.inference.chat import Chat, decode
from tinyllava.inference.continuous import ContinuousDecoder, Sequence
from tinyllava.inference.ragged import KeysValues, RaggedModel
from tinyllava.model import linear

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama, biases": LlamaConfig(attention_bias=True, mlp_bias=True, **SIZES),
    "mistral, window": MistralConfig(sliding_window=5, **SIZES),
    "qwen2, window in one layer": Qwen2Config(
        use_sliding_window=True, sliding_window=5, max_window_layers=1, **SIZES
    ),
    "qwen3": Qwen3Config(head_dim=8, **SIZES),
    "phi3": Phi3Config(**SIZES),
    "gemma2, capped": Gemma2Config(head_dim=8, sliding_window=5, attn_logit_softcapping=1.0, **SIZES),
    "gemma3": Gemma3TextConfig(head_dim=8, sliding_window=5, **SIZES),
}


LEAN = ("llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_of_several_sequences_in_one_pass_are_the_sequences_alone(
    name: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_is_packed_faster", lambda weight: is_packed)
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(FAMILIES[name], attn_implementation="eager").train(False)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ids = [torch.randint(1, 40, (n,)) for n in (13, 3, 9)]
    with torch.inference_mode():
        alone = [model(input_ids=one[None]).last_hidden_state[0, -1] for one in ids]
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        linear.pack_linear_layers(model)
        wrapped: Any = SimpleNamespace(
            language_model=model,
            get_input_embeddings=model.get_input_embeddings,
            config=SimpleNamespace(text_config=model.config),
        )
        ragged = RaggedModel(wrapped)
        assert ragged.is_lean == name.startswith(LEAN)
        pasts, hidden = [KeysValues() for _ in ids], {}
        for start in range(0, 13, 4):
            new = [(i, one[start : start + 4]) for i, one in enumerate(ids) if len(one) > start]
            got = ragged.forward([(pasts[i], model.get_input_embeddings()(piece)) for i, piece in new])
            hidden |= {i: row for (i, _), row in zip(new, got, strict=True)}
        ragged.close()
        again = model(input_ids=ids[0][None]).last_hidden_state[0, -1]
    for i, expected in enumerate(alone):
        torch.testing.assert_close(hidden[i], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, alone[0], rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[place], weight) for place, weight in before.items())


def test_a_model_that_keeps_other_things_than_keys_is_refused() -> None:
    model: Any = AutoModel.from_config(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2))
    model.set_attn_implementation = lambda name: None
    wrapped: Any = SimpleNamespace(
        language_model=model,
        get_input_embeddings=model.get_input_embeddings,
        config=SimpleNamespace(text_config=model.config),
    )
    with pytest.raises(ConfigError, match="'mamba': only 0 of 2 layers use plain"):
        RaggedModel(wrapped)


@pytest.fixture(scope="module", params=TEMPLATES)
def chat(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Chat:
    return make_chat(tmp_path_factory.mktemp("chat"), request.param)


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return make_chat(tmp_path_factory.mktemp("phi"), "phi")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return sorted(folder.iterdir())


def finish(decoder: ContinuousDecoder) -> None:
    for _ in range(10_000):
        if not (decoder.running or decoder.waiting):
            return
        decoder.step()
    raise AssertionError("it does not end")


def text(chat: Chat, sequence: Sequence) -> str:
    assert sequence.is_done
    return decode(chat.processor, [sequence.answer])[0]


def test_answers_are_those_of_chat_whenever_questions_come_and_go(chat: Chat, images: list[Path]) -> None:
    asked = [
        ask("Is there a dog?", images[0]),
        ask("What is in the picture?", images[0]),
        ask("Is there a dog?"),
        ask("Which is red?", images[1], images[0]),
        ask("Which is red?", images[1], images[2]),
        ask("Is there a dog?", images[0]),
        ask("Is there a dog or a cat?", images[0]),
    ]
    limits = [25, 3, 12, 1, 20, 25, 9]
    expected = [chat.answer([one], limit)[0] for one, limit in zip(asked, limits, strict=True)]
    for seed in range(3):
        decoder, order = ContinuousDecoder(chat, prefill_tokens=5, max_running=4), random.Random(seed)
        sequences = [decoder.prepare(one, limit) for one, limit in zip(asked, limits, strict=True)]
        for sequence in order.sample(sequences, len(sequences)):
            decoder.add(sequence)
            for _ in range(order.randrange(12)):
                decoder.step()
        finish(decoder)
        assert [text(chat, sequence) for sequence in sequences] == expected
        assert [not sequence.is_ended for sequence in sequences] == [one.is_cut for one in expected]
        decoder.close()


def test_a_seeded_answer_is_that_of_chat_whoever_else_asks(phi: Chat) -> None:
    options = {"temperature": 1.3, "top_p": 0.9}
    expected = []
    for seed in range(4):
        torch.manual_seed(seed)
        expected.append(phi.ask("What?", max_new_tokens=12, do_sample=True, top_k=0, **options))
    decoder = ContinuousDecoder(phi)
    sequences = [decoder.prepare(ask("What?"), 12, options=options, seed=seed) for seed in range(4)]
    for sequence in (*sequences, decoder.prepare(ask("Is there a dog?"), 30, options=options)):
        decoder.add(sequence)
    finish(decoder)
    decoder.close()
    assert [text(phi, sequence) for sequence in sequences] == expected
    assert len(set(expected)) == 4


def test_images_and_beginnings_are_computed_once(
    phi: Chat, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = phi.model.model.get_image_features
    monkeypatch.setattr(
        phi.model.model, "get_image_features", lambda pixels: encoded.append(len(pixels)) or encode(pixels)
    )
    decoder = ContinuousDecoder(phi)
    sequences = [
        decoder.prepare(ask(f"Is there a {word}?", images[0]), 4) for word in ("dog", "cat", "red dog")
    ]
    for sequence in sequences:
        decoder.add(sequence)
    finish(decoder)
    assert sum(encoded) == 1
    shared = [one.prompt.index(phi.processor.image_token_id) for one in sequences]
    assert decoder.num_reused >= 2 * (shared[0] + phi.processor.num_image_tokens)
    other = decoder.prepare(ask("Is there a dog?", images[1], images[0]), 4)
    assert [pixels is None for pixels in other.images] == [False, True]
    decoder.add(other)
    finish(decoder)
    decoder.close()
    assert sum(encoded) == 2, "an image that was seen before was encoded again"
    assert text(phi, other) == phi.ask("Is there a dog?", images[1], images[0], max_new_tokens=4)


def turn(first: Conversation, answer: str, question: str) -> Conversation:
    more = (Message(role="assistant", text=answer), Message(role="user", text=question))
    return Conversation(messages=(*first.messages, *more))


def test_earlier_turns_are_remembered_within_the_budget(phi: Chat, images: list[Path]) -> None:
    first = ask("Is there a dog?", images[0])
    following = turn(first, phi.answer([first], 6)[0], "What?")
    expected = [phi.answer([one], 6)[0] for one in (first, following, following)]
    decoder = ContinuousDecoder(phi, cache_tokens=phi.context_tokens)
    answers, reused = [], []
    for one in (first, following, following):  # asked, a second turn, and that tried again
        two = decoder.prepare(one, 6)
        decoder.add(two)
        finish(decoder)
        answers.append(text(phi, two))
        reused.append(decoder.num_reused)
    num_first, num_second = (len(decoder.prepare(one, 6).prompt) for one in (first, following))
    assert answers == expected
    assert reused[0] == 0
    assert reused[1] >= num_first
    assert reused[2] - reused[1] == num_second - 1
    assert decoder.num_kept_tokens == num_first + num_second + 2 * 5, "what is known already is held again"
    large = [decoder.prepare(ask("dog " * n), 300) for n in (31, 37, 41)]
    for sequence in large:
        decoder.add(sequence)
    most = 0
    while decoder.running or decoder.waiting:
        decoder.step()
        reserved = sum(sequence.num_reserved for sequence in decoder.running)
        most = max(most, len(decoder.running))
        assert reserved + decoder.num_kept_tokens <= decoder.cache_tokens
    decoder.close()
    assert most == 1, "the budget holds one such conversation at a time"
    assert decoder.num_forgotten > 0
    expected = [phi.answer([ask("dog " * n)], 300)[0] for n in (31, 37, 41)]
    assert [text(phi, sequence) for sequence in large] == expected
    with pytest.raises(ConfigError, match="a cache of 100 tokens cannot hold one conversation"):
        ContinuousDecoder(phi, cache_tokens=100)


def test_a_conversation_that_goes_on_takes_over_what_is_remembered(phi: Chat) -> None:
    decoder = ContinuousDecoder(phi)
    one = decoder.prepare(ask("Is there a dog?"), 6)
    decoder.add(one)
    finish(decoder)
    longer = [*one.prompt, *one.answer, 5, 6]
    for _ in range(2):
        two = Sequence(prompt=longer, key=[*longer], images=[], limit=4, options={})
        decoder.add(two)
        finish(decoder)
        assert decoder.num_kept_tokens == len(longer) + 3
    assert decoder.num_reused == len(one.prompt) + 5 + len(longer) - 1
    decoder.close()
    output = phi.model.generate(torch.tensor([longer]), max_new_tokens=4)
    assert output[0, len(longer) :].tolist() == two.answer


def test_the_start_of_the_next_turn_is_computed_ahead(chat: Chat, images: list[Path]) -> None:
    """After one token, whose text alone decides; the random tokens of a long answer are other ones again."""
    first, num_reused = ask("Is there a dog?", images[0]), []
    for num_tokens, is_ahead in ((1, False), (1, True), (40, True)):
        decoder = ContinuousDecoder(chat)
        one = decoder.prepare(first, num_tokens)
        decoder.add(one)
        finish(decoder)
        assert decoder.can_look_ahead
        if is_ahead:
            decoder.look_ahead()
            assert not decoder.can_look_ahead
        following = [turn(first, text(chat, one), words) for words in ("What?", "7 of them?")]
        sequences = [decoder.prepare(two, 6) for two in following]
        decoder.add(sequences[0])
        decoder.step()
        num_reused.append(decoder.num_reused)
        decoder.add(sequences[1])
        finish(decoder)
        decoder.close()
        assert [text(chat, two) for two in sequences] == chat.answer(following, 6)
        if num_tokens == 1:
            pairs = zip(*(two.prompt for two in sequences), strict=False)
            common = next(i for i, (a, b) in enumerate(pairs) if a != b)
    assert num_reused[:2] == [len(one.prompt), common]


def test_who_leaves_disturbs_nobody(phi: Chat, images: list[Path]) -> None:
    decoder = ContinuousDecoder(phi, prefill_tokens=4, max_running=2)
    asked = [ask("Is there a dog?", images[0]), ask("What is in the picture?", images[0]), ask("What?")]
    sequences = [decoder.prepare(one, 15) for one in asked]
    for sequence in sequences:
        decoder.add(sequence)
    decoder.step()
    decoder.remove(sequences[0])  # in the middle of its prompt, which the second one waits for
    finish(decoder)
    again = decoder.prepare(asked[0], 15)
    decoder.add(again)
    finish(decoder)
    decoder.close()
    expected = [phi.answer([one], 15)[0] for one in (*asked[1:], asked[0])]
    assert [text(phi, sequence) for sequence in (*sequences[1:], again)] == expected
    assert not sequences[0].is_done


def test_what_cannot_be_asked_is_refused_before_it_joins(phi: Chat, tmp_path: Path) -> None:
    decoder = ContinuousDecoder(phi)
    with pytest.raises(DataError, match="the context of the model is"):
        decoder.prepare(ask("word " * 900), 5)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        decoder.prepare(ask("What?", tmp_path / "broken.png"), 5)
    whole = decoder.prepare(ask("What?"), 10_000)
    assert whole.num_reserved == phi.context_tokens
    decoder.close()


def test_images_of_somebody_who_left_are_not_opened(
    phi: Chat, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    real = continuous.open_image
    monkeypatch.setattr(continuous, "open_image", lambda ref, *b: (opened.append(ref), real(ref, *b))[1])
    decoder = ContinuousDecoder(phi)
    with pytest.raises(CancelledError):
        decoder.prepare(ask("Which?", *images[:3]), 4, is_wanted=lambda: not opened)
    assert len(opened) == 1
    decoder.close()


def test_memory_that_runs_out_before_a_sequence_begins_ends_it_and_frees_what_is_remembered(
    phi: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = ContinuousDecoder(phi)
    asked = [decoder.prepare(ask(question), 4) for question in ("Is there a dog?", "Is there a cat?", "Why?")]
    decoder.add(asked[0])
    finish(decoder)
    assert decoder.num_kept_tokens

    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(KeysValues, "copy", run_out)  # of the beginning that the two questions share
    for sequence in asked[1:]:
        decoder.add(sequence)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.step()
    assert decoder.drop_running() == [asked[1]]
    assert decoder.num_kept_tokens == 0
    finish(decoder)
    decoder.close()
    assert asked[2].is_done


def test_logits_that_are_not_numbers_are_an_error(tmp_path: Path) -> None:
    chat = make_chat(tmp_path, "llama")
    decoder = ContinuousDecoder(chat)
    with torch.no_grad():
        chat.model.lm_head.weight[3] = torch.nan
    decoder.add(decoder.prepare(ask("What?"), 5))
    with pytest.raises(CheckpointError, match="lm_head"):
        decoder.step()
    assert decoder.drop_running()
    assert decoder.step() == []
    with pytest.raises(RuntimeError, match="close the ContinuousDecoder"):
        chat.ask("What?")
    decoder.close()
