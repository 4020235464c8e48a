"""``tinyllava chat``: turns, and what Ctrl-C breaks off; the model is played by a function."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyllava.cli import main
from tinyllava.cli.chat import _parse, converse
from tinyllava.conversation import Conversation
from tinyllava.errors import DataError
from tinyllava.inference.dialogue import Dialogue


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Played:
    """A stream of ``Chat`` out of a function; what cannot be asked is told when it is asked."""

    is_cut = False

    def __init__(self, pieces: Iterator[str]) -> None:
        self.first, self.pieces = next(pieces), pieces

    def __iter__(self) -> Iterator[str]:
        yield self.first
        yield from self.pieces

    def close(self) -> None:
        """Nothing is computed."""


def play(answer: Callable[[Conversation], Iterator[str]]) -> Callable[[str], Iterator[str]]:
    """Return the stream of a dialogue with a model that a function plays."""

    class Chat:
        def stream(self, conversation: Conversation, max_new_tokens: int) -> Played:
            return Played(answer(conversation))

        def shorten(self, conversation: Conversation, num_answer_tokens: int) -> tuple[Conversation, int]:
            return conversation, 0

    chat: Any = Chat()
    return Dialogue(chat).stream


def broken_off(conversation: Conversation) -> Iterator[str]:
    """Say what was heard; a question of 'long' is broken off on the way."""
    yield f"{len(conversation.messages)}:"
    if conversation.messages[-1].text == "long":
        raise KeyboardInterrupt
    yield conversation.messages[-1].text


def test_ctrl_c_in_a_terminal_breaks_off_one_answer_and_the_next_turn_knows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal())
    converse(play(broken_off), ["first", "long", "last"])
    assert capsys.readouterr().out == "1:first\n3: [interrupted]\n5:last\n"


def test_ctrl_c_ends_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        converse(play(broken_off), ["long", "last"])


def too_long(conversation: Conversation) -> Iterator[str]:
    if conversation.messages[-1].text == "long":
        raise DataError("too long")
    yield f"{len(conversation.messages)}"


def test_a_question_that_cannot_be_asked_does_not_end_the_conversation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert converse(play(too_long), iter(["first", "long", "last"])) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("1\n3\n", "error: too long\n")
    with pytest.raises(DataError):  # nothing else was asked
        converse(play(too_long), ["long"])


REFUSED = {
    "two questions": (("a.jpg", "What?", "Why?"), "'What?' is not an image file; write the question last"),
    "no number": (("a.jpg", "Q", "--temperature", "nan"), "--temperature at least 0"),
    "no bound": (("a.jpg", "Q", "--temperature", "inf"), "--temperature at least 0"),
    "no token": (("a.jpg", "Q", "--max-tokens", "0"), "--max-tokens must be at least 1"),
    "address": (
        ("https://example.org/a.jpg", "Q"),
        "https://example.org/a.jpg: URLs are not supported; download the image",
    ),
    "misspelt": (("a.jpg", "b c.jpg"), "'b c.jpg': no such image. Check the path; if it is a question, end"),
    "misspelt last of three": (("a.jpg", "b.jpg", "c D.PNG"), "'c D.PNG': no such image. Check the path"),
    "misspelt suffix": (("a.jpg", "in/b.jgp"), "'in/b.jgp': no such image. Check the path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_refused(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(SystemExit):
        main(["chat", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "question",
    [
        *(
            "What is in a.jpg?",
            "what is in a.jpg",
            "describe in/a.jpg",
            "Compare it with b c.jpg.",
            "Why?",
            "a.jpg?",
        ),
        *(
            "Is it 3.5?",
            "PNG",
            "what.is.it",
            "Explain main.py",
            "What is on\nb.jpg?",
            "a.jpg里有什么",
            ".",
            " ",
        ),
    ],
)
def test_a_question_that_names_an_image_is_a_question(question: str) -> None:
    known = _parse(["in/a.jpg", question])
    assert (known.images, known.question) == ([Path("in/a.jpg")], question)


def test_a_word_that_names_an_image_is_no_turn_of_a_conversation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "my photo.jpg"
    photo.touch()
    asked = [str(photo), "b.jpg", "b c.jpg?"]
    assert converse(play(broken_off), iter(asked)) == 1
    told = capsys.readouterr()
    assert told.out == "1:b c.jpg?\n"
    assert f"error: question {str(photo)!r}: is the name of an image. Give the question first" in told.err
    assert "error: question 'b.jpg': is the name of an image." in told.err
