"""llama.cpp behind the same API: a GGUF export of a toy answers as the toy does in ``Chat``."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
import xllamacpp
from PIL import Image

from chats import make_chat
from served import Served, data_url, serve
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.conversation import Conversation, Message, ask, to_ref
from tinyllava.errors import CheckpointError
from tinyllava.inference.chat import Chat
from tinyllava.serving import llama_cpp
from tinyllava.serving.llama_cpp import PreparedImages

RED, WIDE = data_url(220, 20, 20), data_url(20, 40, 230, size=(90, 20))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return make_chat(tmp_path_factory.mktemp("chat"), "phi", "siglip")


@pytest.fixture(scope="module")
def folder(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    chat.model.save_pretrained(folder / "model")
    chat.processor.save_pretrained(folder / "model")
    export_checkpoint(folder / "model", folder / "out", layout="gguf", quantized="f32")
    return folder / "out"


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serve(folder, "--engine", "llama.cpp", "--name", "toy", "--cache-tokens", "1024") as served:
        yield served


def test_images_are_prepared_as_in_training(chat: Chat, folder: Path) -> None:
    prepared = PreparedImages(folder)
    for colour, size in (((250, 10, 90), (90, 20)), ((10, 200, 90), (31, 77)), ((1, 2, 3), (28, 28))):
        ref = to_ref(data_url(*colour, size=size))
        image = Image.new("RGB", size, colour)
        expected = chat.processor.to_pixels([image])
        found = chat.processor.image_processor([prepared.prepare(ref)], return_tensors="pt")["pixel_values"]
        assert found.equal(expected)


def test_answers_are_those_of_chat(served: Served, chat: Chat) -> None:
    turns = (
        Message(role="user", text="What is it?", images=(to_ref(WIDE), to_ref(RED))),
        Message(role="assistant", text="A red circle."),
        Message(role="user", text="Is there a dog?"),
    )
    conversations = [
        ask("Is there a dog?"),
        ask("What is in the picture?", WIDE),
        Conversation(messages=turns),
    ]
    for conversation in conversations:
        messages = [
            {
                "role": message.role,
                "content": [
                    *(
                        {"type": "image_url", "image_url": {"url": url}}
                        for url in ((WIDE, RED)[: len(message.images)])
                    ),
                    {"type": "text", "text": message.text},
                ]
                if message.role == "user"
                else message.text,
            }
            for message in conversation.messages
        ]
        (expected,) = chat.answer([conversation], 6)
        answered = served.post(messages=messages, max_tokens=6).json()
        assert answered["choices"][0]["message"]["content"] == expected
        assert answered["choices"][0]["finish_reason"] == ("length" if expected.is_cut else "stop")
        prompt = len(chat.processor.encode(conversation, open_answer=True).input_ids)
        assert abs(answered["usage"]["prompt_tokens"] - prompt) <= len(conversation.images)


def test_limits_stops_and_seeds_are_followed(served: Served) -> None:
    whole = served.post(max_tokens=30).json()["choices"][0]["message"]["content"]
    stopped = served.post(max_tokens=30, stop=[whole[5:8]]).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (whole[:5].rstrip(), "stop")
    sampled = [served.post(seed=seed, temperature=1.5).json()["choices"][0] for seed in (-1, -1, 2, 3)]
    assert sampled[0] == sampled[1]  # llama.cpp itself would choose a seed for 2**32 - 1
    assert len({one["message"]["content"] for one in sampled}) > 1
    long = served.post(messages=[{"role": "user", "content": "word " * 900}])
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert served.post(n=2).status_code == 400


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_written_special_token_is_refused_and_other_text_is_not(
    served: Served, chat: Chat, role: str
) -> None:
    token = chat.processor.tokenizer.eos_token
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    turns = [{**turn, "content": f"a{token}b"} if turn["role"] == role else turn for turn in turns]
    refused = served.post(messages=[*turns, {"role": "user", "content": "Why?"}])
    assert refused.status_code == 400
    assert (
        f"contains {token!r}, which llama.cpp reads as a special token" in refused.json()["error"]["message"]
    )
    assert served.post(messages=[{"role": "user", "content": "a <b> [INST] </b>"}]).status_code == 200


def test_a_client_that_goes_away_frees_its_place(served: Served) -> None:
    body = {
        "model": "toy",
        "messages": [{"role": "user", "content": "What?"}],
        "max_tokens": 450,
        "stream": True,
    }
    with httpx.stream("POST", f"{served.address}/v1/chat/completions", json=body, timeout=600) as got:
        next(got.iter_lines())
    served.wait_for("tinyllava_places", 0)
    served.wait_for("tinyllava_running", 0)
    assert served.post(max_tokens=3).status_code == 200
    assert "/page.js" in httpx.get(served.address, timeout=600).text


def test_a_folder_that_is_no_export_is_refused(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tinyllava",
        "serve",
        str(tmp_path),
        "--engine",
        "llama.cpp",
        "--port",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "mmproj.gguf: missing." in done.stderr) == (2, True)
    shutil.copy(folder / "model.gguf", tmp_path / "mmproj.gguf")
    with pytest.raises(CheckpointError, match="does not record how images are prepared"):
        PreparedImages(tmp_path)


@pytest.mark.parametrize("has_32_bits", [True, False])
def test_threads_are_torchs_and_keys_have_the_bits_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_32_bits: bool
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(xllamacpp, "Server", started.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    llama_cpp._start(tmp_path, 1, 128, has_32_bits=has_32_bits)
    assert started[0].cpuparams.n_threads == started[0].cpuparams_batch.n_threads == 3
    kinds = xllamacpp.ggml_type
    expected = kinds.GGML_TYPE_F32 if has_32_bits else kinds.GGML_TYPE_F16
    assert started[0].cache_type_k == started[0].cache_type_v == expected


def test_rounded_weights_have_keys_in_16_bits(
    folder: Path, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(llama_cpp, "_start", lambda *given, has_32_bits: asked.append(has_32_bits))
    chat.model.save_pretrained(tmp_path / "model")
    chat.processor.save_pretrained(tmp_path / "model")
    export_checkpoint(tmp_path / "model", tmp_path / "rounded", layout="gguf", quantized="q8_0")
    for opened in (folder, tmp_path / "rounded"):
        engine = llama_cpp.LlamaCppEngine(opened)
        assert engine.context_tokens == chat.context_tokens
        engine.close()
    assert asked == [True, False]
