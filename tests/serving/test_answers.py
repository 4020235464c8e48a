"""What is answered over HTTP is what ``Chat`` answers, whole or streamed, through the openai client."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from served import Served, data_url
from tinyllava.conversation import Conversation, Message, ask, to_ref
from tinyllava.inference.chat import Chat, encode_prompt
from tinyllava.serving.queue import UntilStop, Words
from toys import byte_level_tokenizer, chatml_tokenizer, llama_tokenizer

RED, BLUE = data_url(220, 20, 20), data_url(20, 40, 230, kind="JPEG")


def image(url: str, **fields: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture(scope="session")
def chat(toy: Path) -> Chat:
    return Chat.open(toy)


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as client:
        yield client


CASES: dict[str, tuple[list[dict[str, Any]], Conversation]] = {
    "text": ([{"role": "user", "content": "What is in the picture?"}], ask("What is in the picture?")),
    "image": (
        [{"role": "user", "content": [image(RED, detail="low"), text("What is it?")]}],
        ask("What is it?", RED),
    ),
    "images behind and between texts": (
        [{"role": "user", "content": [text("A"), image(BLUE), text("or B?"), image(RED, detail="high")]}],
        ask("A\nor B?", BLUE, RED),
    ),
    "several turns": (
        [
            {"role": "developer", "content": "Answer in one word."},
            {"role": "user", "content": [image(RED)]},
            {"role": "assistant", "content": [text("A red circle.")]},
            {"role": "user", "content": "yes or no?"},
        ],
        Conversation(
            messages=(
                Message(role="system", text="Answer in one word."),
                Message(role="user", text="", images=(to_ref(RED),)),
                Message(role="assistant", text="A red circle."),
                Message(role="user", text="yes or no?"),
            )
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_that_of_chat_whole_and_streamed(client: Any, chat: Chat, name: str) -> None:
    messages, conversation = CASES[name]
    (expected,) = chat.answer([conversation], 24)
    asked = {"model": "toy", "messages": messages, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert whole.choices[0].message.content == expected
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason
    assert whole.choices[0].finish_reason == ("length" if expected.is_cut else "stop")
    assert whole.usage == chunks[-1].usage
    assert whole.usage.prompt_tokens == len(encode_prompt(chat.processor, conversation))
    assert whole.usage.completion_tokens == 24 or not expected.is_cut
    assert chunks[0].choices[0].delta.role == "assistant"


def test_many_clients_at_once_get_the_answers_of_chat(client: Any, served: Served, chat: Chat) -> None:
    expected = {name: chat.answer([conversation], 60)[0] for name, (_, conversation) in CASES.items()}
    reused = served.metric("tinyllava_reused_tokens")

    def one(name: str) -> tuple[str, str]:
        asked = {"model": "toy", "messages": CASES[name][0], "max_completion_tokens": 60}
        return name, client.chat.completions.create(**asked).choices[0].message.content

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(one, [*CASES] * 6))
    assert answers == [(name, expected[name]) for name in [*CASES] * 6]
    assert served.metric("tinyllava_reused_tokens") > reused
    served.wait_for("tinyllava_running", 0)


def test_images_and_turns_decide_the_answer(chat: Chat) -> None:
    """Otherwise the tests above would not notice a dropped image."""
    answers = {name: str(chat.answer([conversation], 24)[0]) for name, (_, conversation) in CASES.items()}
    assert len(set(answers.values())) == len(CASES)


def test_a_stop_text_ends_the_answer_before_it(client: Any, chat: Chat) -> None:
    whole = str(chat.ask("Is there a dog?", max_new_tokens=40))
    stop = whole[7:10]
    for is_streamed in (False, True):
        asked = client.chat.completions.create(
            model="toy",
            messages=[{"role": "user", "content": "Is there a dog?"}],
            max_tokens=40,
            stop=["never said", stop],
            stream=is_streamed,
        )
        chunks = list(asked) if is_streamed else [asked]
        parts = [(c.choices[0].delta if is_streamed else c.choices[0].message).content for c in chunks]
        assert "".join(part or "" for part in parts) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stop_text_is_found_however_the_text_is_cut_into_pieces(size: int) -> None:
    said = "one two  two three ENDING END four"
    for stops in (("END",), ("two three", "END"), ("ENDING END five", "four"), ("nothing",)):
        until = UntilStop(stops)
        pieces = []
        for start in range(0, len(said), size):
            pieces.append(until.feed(said[start : start + size]))
            if until.is_found:
                break
        pieces.append("" if until.is_found else until.rest())
        ends = [said.index(stop) for stop in stops if stop in said]
        assert "".join(pieces) == said[: min(ends, default=len(said))]


@pytest.mark.parametrize("make", [llama_tokenizer, chatml_tokenizer, partial(byte_level_tokenizer, "<end>")])
def test_pieces_of_text_make_the_whole_whatever_the_tokens_are(make: Any) -> None:
    tokenizer = make()
    words = tokenizer("Façade, 日本語 and 🙂🙂 with  blanks \n\n end .").input_ids
    for seed in range(100):
        generator = random.Random(seed)
        ids = [generator.randrange(len(tokenizer)) for _ in range(20)] if seed else words
        pieces = Words(tokenizer, ())
        given = [pieces.feed(token, i == len(ids) - 1) for i, token in enumerate(ids)]
        assert "".join(given) == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert sum(map(bool, given)) > 5, "it comes in one piece"


def test_sampling_follows_its_seed(client: Any) -> None:
    def sample(**options: Any) -> str:
        messages = [{"role": "user", "content": "What?"}]
        done = client.chat.completions.create(model="toy", messages=messages, max_tokens=16, **options)
        return str(done.choices[0].message.content)

    assert sample(seed=3, temperature=1.5) == sample(seed=3, temperature=1.5)
    assert len({sample(seed=seed, temperature=1.5) for seed in range(4)}) > 1
    assert len({sample(temperature=1.5) for _ in range(4)}) > 1, "a seed of before is still in force"
    assert sample() == sample(temperature=0) == sample(temperature=1.0, top_p=1e-6)
    assert len({sample(top_p=0.99, seed=seed) for seed in range(6)}) > 1


def test_the_model_is_listed(client: Any, served: Served, chat: Chat) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").model_dump()["context_tokens"] == chat.context_tokens
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; this server has 'toy'"):
        client.models.retrieve("gpt")
    assert httpx.get(f"{served.address}/health", timeout=600).json() == {"status": "ok"}


def test_an_earlier_answer_of_the_client_can_be_sent_back_as_it_is(client: Any) -> None:
    first = {"role": "user", "content": "Is there a dog?"}
    answer = client.chat.completions.create(model="toy", messages=[first], max_tokens=4).choices[0].message
    again = [first, answer, {"role": "user", "content": "What?"}]
    assert client.chat.completions.create(model="toy", messages=again, max_tokens=4).choices


def test_metrics_count_requests_and_tokens(served: Served) -> None:
    names = ('tinyllava_tokens_total{kind="answer"}', 'tinyllava_requests_total{path="/v1/chat/completions"')
    before = [served.metric(name) for name in names]
    usage = served.post(max_tokens=5).json()["usage"]
    after = [served.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [usage["completion_tokens"], 1]
    httpx.get(f"{served.address}/made/up/by/a/client", timeout=600)
    assert "made" not in httpx.get(f"{served.address}/metrics", timeout=600).text


def test_while_nobody_asks_the_start_of_the_next_turn_is_computed(served: Served) -> None:
    before = served.metric("tinyllava_ahead_tokens")
    served.post(messages=[{"role": "user", "content": "Which is red? yes or no?"}], max_tokens=1)
    until = time.monotonic() + 60
    while served.metric("tinyllava_ahead_tokens") == before:
        assert time.monotonic() < until, "nothing was computed ahead"
        time.sleep(0.05)
