"""``tinyllava chat --file``: a real toy checkpoint answers a file as it answers each line alone."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image

from chats import make_chat
from processes import start
from tinyllava.cli import main
from tinyllava.conversation import ask
from tinyllava.errors import DataError, OutputError
from tinyllava.inference import file as chat_file
from tinyllava.inference.chat import Chat


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    chat = make_chat(folder, "llama")
    chat.model.save_pretrained(folder / "model")
    chat.processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "in" / f"{colour}.png")
    lines = [
        {"image": "red.png", "question": "What is this?", "id": 7},
        {"image": "blue.png", "question": "Is there a dog?"},
        {"question": "Is there a dog?"},
    ]
    path = tmp_path / "in" / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def run(questions: Path, output: Path, checkpoint: Path, *options: str) -> int:
    return main(
        [
            "chat",
            "--file",
            str(questions),
            "--output",
            str(output),
            "--model",
            str(checkpoint),
            "--max-tokens",
            "8",
            "--device",
            "cpu",
            *options,
        ]
    )


def test_each_line_comes_out_with_its_own_answer(checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    assert run(questions, output, checkpoint) == 0
    asked = [json.loads(line) for line in questions.read_text().splitlines() if line]
    chat = Chat.open(checkpoint, device="cpu")
    expected = []
    for fields in asked:
        images = [questions.parent / fields["image"]] if "image" in fields else []
        [answer] = chat.answer([ask(fields["question"], *images)], 8)
        expected.append(fields | {"answer": answer} | ({"is_cut": True} if answer.is_cut else {}))
    assert [json.loads(line) for line in output.read_text().splitlines()] == expected
    assert len({fields["answer"] for fields in expected}) == 3


def test_a_second_run_asks_only_what_is_not_answered(
    checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    assert run(questions, output, checkpoint) == 0
    whole = output.read_text()
    first, rest = whole.split("\n", 1)
    output.write_text(f"{first}\n{rest[:9]}")  # stopped within the second line
    asked: list[str] = []
    answer = Chat.answer

    def counting(self, conversations, *arguments, **options):
        asked.extend(conversation.messages[-1].text for conversation in conversations)
        return answer(self, conversations, *arguments, **options)

    monkeypatch.setattr(Chat, "answer", counting)
    monkeypatch.setattr(chat_file, "_AT_ONCE", 1)
    assert run(questions, output, checkpoint) == 0
    assert output.read_text() == whole
    assert asked == ["Is there a dog?", "Is there a dog?"]


def test_what_is_written_outlives_a_stop_within_a_character_and_is_not_written_anew(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"question": "Où?"}\n{"question": "Was?"}\n', encoding="utf-8")
    lines, output = chat_file.read_questions(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert list(chat_file.answer_file(lambda asked: ["là", "größer"][: len(asked)], lines, output, {})) == [
        0,
        2,
    ]
    whole, written = output.read_bytes(), output.stat()
    assert list(chat_file.answer_file(lambda asked: pytest.fail("asked again"), lines, output, {})) == [2]
    assert output.stat().st_mtime_ns == written.st_mtime_ns
    output.write_bytes(whole[: whole.index("ö".encode()) + 1])
    assert list(chat_file.answer_file(lambda asked: ["größer"], lines, output, {})) == [1, 2]
    assert output.read_bytes() == whole
    assert output.stat().st_ino == written.st_ino


def test_a_place_that_cannot_be_written_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"question": "Q?"}\n')
    lines = chat_file.read_questions(tmp_path / "in.jsonl")
    with pytest.raises(OutputError, match=r"nowhere.answers\.jsonl: cannot be written \(no folder"):
        list(
            chat_file.answer_file(
                lambda asked: pytest.fail("asked"), lines, tmp_path / "nowhere/answers.jsonl", {}
            )
        )
    binary = tmp_path / "image.png"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"image\.png: cannot be used"):
        list(chat_file.answer_file(lambda asked: pytest.fail("asked"), lines, binary, {}))
    assert binary.read_bytes() == b"\xff\xfe\x00"


def test_answers_to_other_questions_are_left_alone(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert run(questions, output, checkpoint) == 0
    first = output.read_text()
    for text in ('{"question": "Another?", "answer": "yes"}\n', "no JSON\n", "3\n", "my notes", f"{first}x"):
        output.write_text(text)
        assert run(questions, output, checkpoint) == 2
        assert "Choose another file" in capsys.readouterr().err
        assert output.read_text() == text


def test_answers_of_another_run_are_not_continued(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert run(questions, output, checkpoint) == 0
    first = output.read_text().splitlines(keepends=True)[0] + '{"ima'
    output.write_text(first)
    other = tmp_path / "other"
    chat = Chat.open(checkpoint, device="cpu")
    with torch.no_grad():
        chat.model.lm_head.weight.mul_(1.5)
    chat.model.save_pretrained(other)
    chat.processor.save_pretrained(other)
    refused = [
        ((questions, output, other), f"model = '{checkpoint}', but this run has '{other}'"),
        ((questions, output, checkpoint, "--temperature", "0.5"), "temperature = 0.0, but this run has 0.5"),
        ((questions, output, checkpoint, "--max-tokens", "9"), "max_tokens = 8, but this run has 9"),
    ]
    for arguments, message in refused:
        capsys.readouterr()
        assert run(*arguments) == 2
        told = capsys.readouterr().err
        assert f"{output}: has answers of a run with {message}. Choose another --output, or delete" in told
        assert output.read_text() == first
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    copied = shutil.copytree(questions.parent, tmp_path / "elsewhere") / questions.name
    assert run(copied, output, moved) == 0  # the same weights and images
    chat_file.run_file(output).unlink()
    assert run(questions, output, checkpoint) == 2
    assert "does not name their model" in capsys.readouterr().err
    output.unlink()
    assert run(questions, output, other) == 0


def test_special_tokens_in_a_question_are_text_and_bad_weights_an_error(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions.write_text('{"image": "red.png", "question": "What </s> is <image> it?"}\n')
    assert run(questions, tmp_path / "answers.jsonl", checkpoint) == 0
    chat = Chat.open(checkpoint, device="cpu")
    with torch.no_grad():
        chat.model.connector.linear_1.weight[0, 0] = torch.nan
    chat.model.save_pretrained(tmp_path / "bad")
    chat.processor.save_pretrained(tmp_path / "bad")
    capsys.readouterr()
    assert run(questions, tmp_path / "none.jsonl", tmp_path / "bad") == 2
    told = capsys.readouterr().err
    assert f"error: {tmp_path / 'bad'}: the logits are NaN or infinite" in told
    assert "1 of 1,024 values of model.multi_modal_projector" in told
    assert main(["chat", str(questions.parent / "red.png"), "Q", "--model", str(tmp_path / "bad")]) == 2
    assert "the logits are NaN or infinite" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["image", "images"])
def test_several_images_are_seen_in_their_order(checkpoint, questions, tmp_path, field):
    both = ["red.png", "blue.png"]
    lines = [
        {field: both, "question": "What is this?", "image_id": 7},  # no path: kept, as other fields are
        {field: both[::-1], "question": "What is this?"},
        {field: [], "question": "What is this?"},
    ]
    questions.write_text("\n".join(map(json.dumps, lines)))
    assert run(questions, tmp_path / "answers.jsonl", checkpoint) == 0
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    chat = Chat.open(checkpoint, device="cpu")
    for fields, line in zip(lines, written, strict=True):
        paths = [questions.parent / name for name in fields[field]]
        assert line["answer"] == chat.answer([ask(fields["question"], *paths)], 8)[0]
        assert fields.items() <= line.items()
    assert len({line["answer"] for line in written}) == 3


def test_what_cannot_be_answered_is_told_by_line_and_the_rest_is_answered(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (questions.parent / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    good = questions.read_text().strip().splitlines()
    bad = [
        {"image": "broken.png", "question": "What is this?"},
        {"image": "missing.png", "question": "What is this?"},
        {"question": "Is there a dog? " * 300},
    ]
    questions.write_text("\n".join([*good, *map(json.dumps, bad), good[0]]))
    output = tmp_path / "answers.jsonl"
    for _ in range(2):  # a second run asks the three again and says the same
        assert run(questions, output, checkpoint) == 1
        told = capsys.readouterr().err
        assert f"not answered: {questions.parent / 'broken.png'}: " in told
        assert f"not answered: {questions.parent / 'missing.png'}: no such image" in told
        assert f"not answered: conversation '{questions}:6' has" in told
        assert f"3 questions have no answer: see 'error' in {output}" in told
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["answer"] is None for line in written] == [False] * 3 + [True] * 3 + [False]
    assert written[6] == written[0]
    whole = output.read_bytes()
    for length in (len(whole) - 40, whole.index(b"null") + 2, whole.index(b'"error"')):
        output.write_bytes(whole[:length])
        assert run(questions, output, checkpoint) == 1
        assert output.read_bytes() == whole
    for colour, name in (("red", "broken"), ("blue", "missing")):  # mended, they are answered in their places
        shutil.copy(questions.parent / f"{colour}.png", questions.parent / f"{name}.png")
    assert run(questions, output, checkpoint) == 1
    mended = [json.loads(line) for line in output.read_text().splitlines()]
    chat = Chat.open(checkpoint, device="cpu")
    for place, colour in ((3, "red"), (4, "blue")):
        expected = chat.answer([ask("What is this?", questions.parent / f"{colour}.png")], 8)[0]
        assert mended[place]["answer"] == expected
        assert "error" not in mended[place]
        written[place] = mended[place]
    assert mended == written


def test_answers_that_are_no_json_are_not_taken_for_answers(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert run(questions, output, checkpoint) == 0
    first, rest = output.read_text().split("\n", 1)
    output.write_text(f'{first[: first.index("answer") + 9]}""x\n{rest}')
    assert run(questions, output, checkpoint) == 2
    assert "contains something other than these answers" in capsys.readouterr().err


def test_an_answer_that_is_cut_off_is_marked(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert run(questions, output, checkpoint, "--max-tokens", "2") == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(line.get("is_cut") is True for line in written)
    assert (
        "3 answers were cut off at 2 tokens or at the end of the context: see 'is_cut'"
        in capsys.readouterr().err
    )
    image = str(questions.parent / "red.png")
    asked = ["chat", image, "What?", "--model", str(checkpoint), "--max-tokens", "2"]
    assert main(asked) == 0
    assert "[cut off at 2 tokens or at the end of the context" in capsys.readouterr().err


def test_several_images_in_the_terminal(
    checkpoint: Path, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    red, blue = (questions.parent / f"{colour}.png" for colour in ("red", "blue"))
    options = ("--model", str(checkpoint), "--max-tokens", "8", "--device", "cpu")
    chat = Chat.open(checkpoint, device="cpu")
    expected = chat.answer([ask("What is this?", red, blue)], 8)[0]
    assert main(["chat", str(red), str(blue), "What is this?", *options]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert main(["chat", str(red), *options, str(blue), "What is this?"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\n"))
    assert main(["chat", str(red), str(blue), *options]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert main(["chat", str(red), str(blue.with_name("b.png")), "What is this?", *options]) == 2
    assert "b.png: no such image" in capsys.readouterr().err


def test_a_conversation_longer_than_the_context_goes_on(
    checkpoint: Path, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its oldest questions are dropped with a word, and a question that is too long is told by itself."""
    asked = [f"Is there a red circle and 12 blue squares {n}? " * 3 for n in range(8)]
    asked[5] = "Is there a dog? " * 300
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked) + "\n"))
    options = ("--model", str(checkpoint), "--max-tokens", "40", "--device", "cpu")
    assert main(["chat", str(questions.parent / "red.png"), *options]) == 1
    told = capsys.readouterr()
    assert "[the context of 512 tokens is full: the oldest 1 questions were dropped]" in told.err
    assert told.err.count("error: conversation") == 1
    assert "the context of the model is 512" in told.err


def test_an_image_that_changed_since_it_was_answered_is_told(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert run(questions, output, checkpoint) == 0
    first = output.read_text().splitlines(keepends=True)[0]
    output.write_text(first)
    Image.new("RGB", (40, 30), "green").save(questions.parent / "blue.png")  # not answered yet
    assert run(questions, output, checkpoint) == 0
    Image.new("RGB", (40, 30), "green").save(questions.parent / "red.png")
    capsys.readouterr()
    assert run(questions, output, checkpoint) == 2
    assert (
        f"the image of {questions}:1 changed since it was answered. Choose another" in capsys.readouterr().err
    )


def test_two_processes_never_write_one_file(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    with FileLock(tmp_path / ".answers.jsonl.lock"):
        assert run(questions, output, checkpoint) == 2
    assert f"error: {output}: another process is writing there" in capsys.readouterr().err
    assert not output.exists()


def test_of_two_real_processes_one_writes_every_answer_once(
    checkpoint: Path, questions: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in questions.read_text().split("\n") if line]
    questions.write_text("".join(json.dumps(line | {"id": n}) + "\n" for n, line in enumerate(lines * 30)))
    output = tmp_path / "answers.jsonl"
    command = ["chat", "--file", str(questions), "--output", str(output), "--model", str(checkpoint)]
    command += ["--max-tokens", "4", "--device", "cpu"]
    said = [tmp_path / f"said-{n}" for n in range(2)]
    both = [start(lambda: main(command), path) for path in said]
    for process in both:
        process.join()
    ends = sorted(process.exitcode for process in both)
    texts = [path.read_text() for path in said]
    assert ends in ([0, 0], [0, 2]), texts  # the second may have come when the first was done
    assert ends == [0, 0] or any("another process is writing there" in text for text in texts)
    ids = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert ids == list(range(90))


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/full", "."])
def test_what_is_no_file_is_refused_in_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"question": "Q?"}\n')
    lines = chat_file.read_questions(tmp_path / "in.jsonl")
    with pytest.raises(DataError, match=rf"^{place}: not a regular file.*Give another path\.$"):
        list(chat_file.answer_file(lambda asked: pytest.fail("asked"), lines, Path(place), {}))


WRONG = {
    "swapped": (
        '{"image": "What is it?", "question": "red.png"}',
        "questions.jsonl:1: question = 'red.png': is the name of an image. Give it as 'image'",
    ),
    "json": ("{", r"questions.jsonl:1: not JSON"),
    "array": ('["a"]', "questions.jsonl:1: no text in 'question'. Write an object such as"),
    "question": ('{"image": "red.png"}', "questions.jsonl:1: no text in 'question'"),
    "image": (
        '{"image": 3, "question": "Q"}',
        "questions.jsonl:1: image = 3: must be a path or a list of paths",
    ),
    "missing": (
        '{"image": "no.png", "question": "Q"}',
        "no.png': no such file; 1 of 1 images are missing. Check the paths",
    ),
    "nul": ('{"image": "a\\u0000", "question": "Q"}', "a\\x00': no such file"),
    "both": ('{"image": "a.png", "images": ["b.png"], "question": "Q"}', "both image and images"),
    "empty path": ('{"images": [""], "question": "Q"}', "questions.jsonl:1: images = ['']: must be a path"),
    "no path": ('{"images": [{"path": "a"}], "question": "Q"}', "must be a path or a list of paths"),
    **{
        name: (
            json.dumps({name: "red.png", "question": "Q"}),
            f"questions.jsonl:1: field {name!r} looks like",
        )
        for name in ("img", "image_path", "Image", "picture", "image_file", "imagePath", "pic", "image_url")
    },
    "second": ('{"image": "red.png", "image2": "blue.png", "question": "Q"}', "field 'image2' looks like an"),
    "half": (
        '{"question": "Q\\ud800"}',
        "questions.jsonl:1: not JSON (an unpaired surrogate: line 1 column 16",
    ),
    "unused half": ('{"question": "Q", "x": "\\udead"}', "not JSON (an unpaired surrogate: line 1 col"),
    "digits": (
        f'{{"question": "Q", "x": {"9" * 5000}}}',
        "not JSON (an integer with 5,000 digits: line 1 col",
    ),
    "nested": ('{"question": ' + "[" * 100_000, "questions.jsonl:1: not JSON (nested too deeply: line 1"),
    "empty": ("\n", "questions.jsonl: empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_line_is_named(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    text, message = WRONG[case]
    questions.write_text(text)
    assert run(questions, tmp_path / "answers.jsonl", checkpoint) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


def test_file_and_output_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--file", "q.jsonl"], ["a.png", "Q", "--output", "o"], ["a.png", "--file", "q"], []):
        with pytest.raises(SystemExit):
            main(["chat", *arguments])
        assert "give an image, or --file QUESTIONS with --output ANSWERS" in capsys.readouterr().err
