"""A run that is killed, resumed, shared by processes or cut short gives the answers of one that was not."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tinyllava
from chats import make_chat
from processes import FORK, in_ranks, start
from tinyllava.conversation import Answer, ImageRef, ask
from tinyllava.errors import CheckpointError, ConfigError, DataError
from tinyllava.evaluation.answers import AnswerFile, read_answers, read_predictions, read_refusals
from tinyllava.evaluation.benchmark import Benchmark, Grade
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.read import Record, unpack_image
from tinyllava.evaluation.results import ResultTable
from tinyllava.evaluation.run import Settings, evaluate, suitable_batch_tokens
from tinyllava.inference.chat import Chat, encode_prompt

SMALL = Settings(batch_tokens=200, num_workers=0)


def load(folder: Path) -> list[Question]:
    """60 questions on 20 images, a fifth of them without an image."""
    words = ["image", "dog", "red circle", "blue squares", "12"]
    return [
        Question(
            id=f"q{n}",
            conversation=ask(
                f"Is there a {words[n % 5]} {n}?",
                *([ImageRef(path=folder / f"{n % 20}.png")] if n % 5 else []),
            ),
            image=f"{n % 20}.png" if n % 5 else "",
            target="yes",
        )
        for n in range(60)
    ]


BENCHMARK = Benchmark(
    name="toy",
    title="Toy",
    protocol="toy",
    split="test",
    metric="accuracy",
    num_questions=60,
    prompt="{question}",
    load=load,
    max_new_tokens=6,
    grade=lambda question, answer: Grade(answer, float("a" in answer)),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    for n in range(20):
        pixels = np.random.default_rng(n).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    return make_chat(tmp_path_factory.mktemp("parts"), "llama")


@pytest.fixture(scope="module")
def expected(chat, data) -> dict[str, str]:
    return {q.id: chat.answer([q.conversation], 6)[0] for q in load(data)}


def run(chat: Chat, data: Path, output: Path, settings: Settings = SMALL):
    return evaluate(chat, BENCHMARK, data, output, model="toy-model", settings=settings)


def lines(folder: Path) -> list[str]:
    return [line for path in folder.glob("answers-*") for line in path.read_text().split("\n")[:-1]]


def test_answers_are_scored_and_recorded(chat, data, tmp_path, expected):
    result = run(chat, data, tmp_path)
    predictions = read_predictions(tmp_path / "toy" / "predictions.jsonl")
    assert {p.question_id: p.answer for p in predictions} == expected
    assert len(set(expected.values())) > 20
    share = sum("a" in answer for answer in expected.values()) / 60
    assert result.value == pytest.approx(100 * share)
    assert ResultTable.load(tmp_path / "results.json").results == (result,)
    again = run(chat, data, tmp_path, Settings(num_workers=2))
    assert again.metrics == result.metrics
    assert len(lines(tmp_path / "toy")) == 60


def kill_in(num_written: int, num_lines: int) -> None:
    """Have this process kill itself so many lines of the package's code behind a writing of answers."""
    package, append = str(Path(tinyllava.__file__).parent), AnswerFile.append
    writings, passed = itertools.count(), itertools.count()

    def trace(frame, event, _):
        if event == "line" and next(passed) == num_lines:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace if frame.f_code.co_filename.startswith(package) else None

    def writing(self, answers):
        if next(writings) == num_written:
            sys.settrace(trace)
        append(self, answers)

    AnswerFile.append = writing


def test_killed_at_20_moments_it_loses_nothing_and_asks_nothing_twice(chat, data, tmp_path, expected):
    """The moments are lines of code, not times: they are the same on every machine."""
    generator = random.Random(0)
    folder = tmp_path / "toy"
    num_seen = [0]

    def killed(num_written: int, num_lines: int) -> None:
        kill_in(num_written, num_lines)
        run(chat, data, tmp_path, Settings(batch_tokens=100, num_workers=0))

    num_kills = 0
    while num_kills < 20:
        process = start(partial(killed, generator.choice([0, 0, 0, 1]), generator.randrange(90)))
        process.join()
        assert len(lines(folder)) >= num_seen[-1]
        num_seen.append(len(lines(folder)))
        if process.exitcode == 0:  # it came to its end before
            assert read_answers(folder, load(data)) == expected
            shutil.rmtree(folder)
            num_seen.append(0)
        else:
            assert process.exitcode == -signal.SIGKILL
            num_kills += 1
    assert len(set(num_seen)) >= 5, "the kills have to fall on different stages of the run"
    run(chat, data, tmp_path)
    assert sorted(json.loads(line)["question_id"] for line in lines(tmp_path / "toy")) == sorted(expected)
    assert read_answers(tmp_path / "toy", load(data)) == expected


def test_a_line_cut_short_at_any_byte_is_asked_again(data, tmp_path):
    questions = load(data)[:2]
    with AnswerFile(tmp_path) as file:
        file.append([(questions[0], Answer("yes")), (questions[1], Answer("nö\n", is_cut=True))])
    whole = (tmp_path / "answers-000.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        (tmp_path / "answers-000.jsonl").write_bytes(whole[:length])
        kept = read_answers(tmp_path, questions)
        assert kept == ({} if length < first else {"q0": "yes"})
        with AnswerFile(tmp_path) as file:
            again = {"q0": Answer("yes"), "q1": Answer("nö\n", is_cut=True)}
            file.append((q, again[q.id]) for q in questions if q.id not in kept)
        assert (tmp_path / "answers-000.jsonl").read_bytes() == whole


def test_two_processes_share_the_images(chat, data, tmp_path, expected):
    run(chat, data, tmp_path / "one")

    def rank(_: int) -> None:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        run(chat, data, tmp_path / "two")

    assert in_ranks(2, rank) == [0, 0]
    parts = [path.read_text().splitlines() for path in sorted((tmp_path / "two" / "toy").glob("answers-*"))]
    assert sorted(len(part) for part in parts) > [15, 15]
    one, two = ((tmp_path / name / "toy" / "predictions.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    first, second = (ResultTable.load(tmp_path / name / "results.json").results[0] for name in ("one", "two"))
    assert (first.metrics, first.data_sha256) == (second.metrics, second.data_sha256)


def unpack(folder: Path, images: list[bytes], begin) -> None:
    begin.wait()
    for number, data in enumerate(images):
        record = Record(values={"image": {"bytes": data}}, path=folder / "0.parquet", line=number)
        unpack_image(record, "image", folder, f"{number}.jpg")


def test_processes_unpack_the_same_images_side_by_side(tmp_path):
    images, begin = [bytes([number]) * 20_000 for number in range(200)], FORK.Barrier(4)
    processes = [start(lambda: unpack(tmp_path, images, begin)) for _ in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    written = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert written == {f"{number}.jpg": data for number, data in enumerate(images)}


def test_blind_answers_do_not_hang_on_the_image(chat, data, tmp_path, expected):
    run(chat, data, tmp_path)
    result = run(chat, data, tmp_path, Settings(blind=True, num_workers=0))
    assert result.model == "toy-model (blank images)"
    assert len(ResultTable.load(tmp_path / "results.json").results) == 2
    blind = read_answers(tmp_path / "toy-blind", load(data))
    changed = {q for q, answer in blind.items() if answer != expected[q]}
    with_image = {q.id for q in load(data) if q.image}
    assert changed <= with_image
    assert len(changed) > len(with_image) / 2
    colour = tuple(int(c * 255) for c in chat.processor.image_processor.image_mean)
    for n in (1, 2):  # the same as asking with an image of the mean colour, whatever its size
        Image.new("RGB", (30 * n, 50), colour).save(tmp_path / "mean.png")
        assert chat.answer([ask(load(data)[n].prompt, tmp_path / "mean.png")], 6)[0] == blind[f"q{n}"]


def test_a_limit_can_be_raised_later(chat, data, tmp_path, expected):
    result = run(chat, data, tmp_path, Settings(limit=10, num_workers=0))
    assert (result.num_questions, result.is_partial, len(lines(tmp_path / "toy"))) == (10, True, 10)
    run(chat, data, tmp_path, Settings(limit=30, num_workers=0))
    assert len(lines(tmp_path / "toy")) == 30
    assert run(chat, data, tmp_path, Settings(limit=20, num_workers=0)).num_questions == 20


def test_special_tokens_in_a_prompt_are_text(chat, data, tmp_path):
    texts = ["What is it?\nReference OCR token: <image>, </s>, <image>", "What is </s>it?", "What is it?"]
    questions = [
        Question(id=f"q{n}", conversation=ask(text, data / "1.png"), image="1.png", target="yes")
        for n, text in enumerate(texts)
    ]
    benchmark = Benchmark(**{**BENCHMARK.__dict__, "load": lambda folder: questions})
    evaluate(chat, benchmark, data, tmp_path, model="toy-model", settings=SMALL)
    answers = read_answers(tmp_path / "toy", questions)
    assert answers == {q.id: chat.answer([q.conversation], 6)[0] for q in questions}


def test_logits_that_are_not_numbers_stop_it_before_an_answer_is_written(data, tmp_path):
    broken = make_chat(tmp_path / "parts", "llama")
    with torch.no_grad():
        broken.model.connector.linear_2.bias[5] = torch.nan
    with pytest.raises(
        CheckpointError, match=r"logits are NaN or infinite: 1 of 32 values of .*linear_2\.bias"
    ):
        run(broken, data, tmp_path / "out")
    assert not lines(tmp_path / "out" / "toy")
    assert not (tmp_path / "out" / "results.json").exists()


def test_answers_of_two_runs_are_never_mixed(chat, data, tmp_path):
    run(chat, data, tmp_path, Settings(limit=3, num_workers=0))
    with pytest.raises(ConfigError, match="model = 'toy-model', but this run has 'other'"):
        evaluate(chat, BENCHMARK, data, tmp_path, model="other")
    path = tmp_path / "toy" / "answers-000.jsonl"
    text = path.read_text()
    path.write_text(text.replace("Is there a dog 1?", "Is there a cat 1?"))
    with pytest.raises(DataError, match="the data files differ"):
        run(chat, data, tmp_path)
    path.write_text(text + text)
    with pytest.raises(DataError, match="two answers"):
        run(chat, data, tmp_path)


def test_a_model_saved_again_keeps_its_answers_and_a_changed_one_does_not(chat, data, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"
    settings = Settings(limit=3, num_workers=0)

    def ask_again() -> None:
        evaluate(chat, BENCHMARK, data, tmp_path / "out", model=str(model), settings=settings)

    weights.write_bytes(b"weights")
    ask_again()
    weights.unlink()
    weights.write_bytes(b"weights")
    os.utime(weights, (1, 1))
    ask_again()
    weights.write_bytes(b"weightz")
    os.utime(weights, (1, 1))
    with pytest.raises(ConfigError, match="belongs to other weights"):
        ask_again()


@pytest.mark.parametrize(("num_workers", "shares"), [(0, True), (1, True), (0, False)])
def test_what_cannot_be_asked_is_named_and_the_rest_is_answered(
    chat, data, tmp_path, expected, monkeypatch, num_workers, shares
):
    """A broken image and a question that is too long, one of several on its image."""
    monkeypatch.setattr("tinyllava.evaluation.run.can_share", lambda model: shares)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    bad = {
        "b": ask("Is there a dog?", tmp_path / "broken.png"),
        "l": ask("Is there a dog? " * 300, data / "1.png"),
        "m": ask("Is there a dog?", tmp_path / "missing.png"),
    }
    questions = [
        *load(data)[:40],
        *(Question(id=key, conversation=one, image="x.png", target="yes") for key, one in bad.items()),
    ]
    benchmark = Benchmark(**{**BENCHMARK.__dict__, "load": lambda folder: questions})
    settings = Settings(batch_tokens=100, num_workers=num_workers)
    result = evaluate(chat, benchmark, data, tmp_path, model="toy-model", settings=settings)
    answers = read_answers(tmp_path / "toy", questions)
    assert answers == {q.id: expected[q.id] for q in questions[:40]}
    assert (result.num_missing, result.num_questions) == (3, 43)
    share = sum("a" in answer for answer in answers.values()) / 43
    assert result.value == pytest.approx(100 * share), "a missing answer counts as wrong"
    told = sorted(read_refusals(tmp_path / "toy"))
    assert re.match(r"b: .*broken\.png: not a known image format", told[0])
    assert re.match(r"l: conversation .* has [\d,]+ tokens, but the context of the model is 512", told[1])
    assert re.match(r"m: .*missing\.png: no such image", told[2])
    # Once the image is mended, only what has no answer is asked.
    Image.new("RGB", (30, 40)).save(tmp_path / "broken.png")
    again = evaluate(chat, benchmark, data, tmp_path, model="toy-model", settings=settings)
    assert again.num_missing == 2
    assert len(read_refusals(tmp_path / "toy")) == 2


def test_an_answer_that_is_cut_off_is_marked_and_the_context_bounds_it(chat, data, tmp_path, monkeypatch):
    questions = load(data)[1:5]
    whole = {q.id: chat.answer([q.conversation], 200)[0] for q in questions}
    lengths = {q.id: len(encode_prompt(chat.processor, q.conversation)) for q in questions}
    monkeypatch.setattr(chat.processor.tokenizer, "model_max_length", max(lengths.values()) + 3)
    benchmark = Benchmark(**{**BENCHMARK.__dict__, "load": lambda folder: questions, "max_new_tokens": 200})
    result = evaluate(chat, benchmark, data, tmp_path, model="toy-model", settings=SMALL)
    alone = {q.id: chat.answer([q.conversation], 200)[0] for q in questions}
    answers = read_answers(tmp_path / "toy", questions)
    assert answers == alone
    assert {key: a.is_cut for key, a in answers.items()} == {key: a.is_cut for key, a in alone.items()}
    longest = max(lengths, key=lengths.__getitem__)
    tokens = chat.processor.tokenizer(answers[longest], add_special_tokens=False).input_ids
    assert answers[longest].is_cut
    assert len(tokens) <= 3 + 1
    assert whole[longest].startswith(answers[longest].rstrip("\ufffd"))
    marked = {p.question_id: p.is_cut for p in read_predictions(tmp_path / "toy" / "predictions.jsonl")}
    assert marked == {key: a.is_cut for key, a in alone.items()}
    assert result.num_cut == sum(marked.values()) > 0


def test_a_batch_without_room_is_answered_in_halves(chat, data, tmp_path, expected, monkeypatch):
    import tinyllava.evaluation.run as module

    original = module.answer_groups

    def answer_groups(model, groups, *limits):
        if len(groups) > 1:
            raise torch.OutOfMemoryError
        return original(model, groups, *limits)

    monkeypatch.setattr(module, "answer_groups", answer_groups)
    run(chat, data, tmp_path)
    assert read_answers(tmp_path / "toy", load(data)) == expected


def test_without_sharing_the_answers_are_the_same(chat, data, tmp_path, expected, monkeypatch):
    monkeypatch.setattr("tinyllava.evaluation.run.can_share", lambda model: False)
    run(chat, data, tmp_path)
    assert read_answers(tmp_path / "toy", load(data)) == expected
    assert suitable_batch_tokens(chat.model) == 8192
