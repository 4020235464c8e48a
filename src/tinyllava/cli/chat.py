"""``tinyllava chat IMAGE [QUESTION]``: ask a model about an image in the terminal."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.cli.parser import CommandParser
from tinyllava.errors import CheckpointError
from tinyllava.inference.file import answer_file, read_questions
from tinyllava.parts.folders import check_checkpoint, fingerprint

if TYPE_CHECKING:
    from tinyllava.conversation import Conversation

_HELP = """
Ask about an image. Without a question, ask as many as you like; each is
answered knowing those before it.

  tinyllava chat cat.jpg "What is on the chair?"
  tinyllava chat cat.jpg              several turns; an empty line ends
  tinyllava chat cat.jpg --model runs/share-Sig-Phi/model
  tinyllava chat cat.jpg < questions.txt
  tinyllava chat --file questions.jsonl --output answers.jsonl
      lines such as {"image": "cat.jpg", "question": "What is this?"}; the same
      lines with "answer" come out; run again, it goes on where it was
      (answers.jsonl.run.json keeps answers of two models or settings apart)

Ctrl-C breaks off an answer; at the prompt it ends.
"""


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser("chat", _HELP)
    parser.add_argument("image", nargs="?", default="", help="image file, or - for none")
    parser.add_argument("question", nargs="?", default="", help="what to ask (default: ask in turns)")
    parser.add_argument("--file", default="", help="JSONL of questions, instead of IMAGE")
    parser.add_argument("--output", default="", help="JSONL of answers to write (with --file)")
    parser.add_argument("--model", default="", help="checkpoint folder (default: the starter's)")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0: the likeliest answer")
    parser.add_argument("--device", default="", help="device of torch (default: a GPU if there is one)")
    known = parser.parse_args(arguments)
    if known.max_tokens < 1 or not 0 <= known.temperature < math.inf:
        parser.error("--max-tokens must be at least 1, --temperature at least 0")
    if bool(known.image) == bool(known.file) or bool(known.file) != bool(known.output):
        parser.error("give an image, or --file QUESTIONS with --output ANSWERS")
    if "://" in known.image:
        parser.error(f"{known.image}: an address; give an image file of this machine")
    return known


def main(arguments: list[str]) -> int:
    """Answer one question or a file of them, or converse."""
    known = _parse(arguments)
    model = find_model(known.model)
    lines = read_questions(Path(known.file)) if known.file else []
    image = None if known.image in ("", "-") else Path(known.image)
    if image is not None:
        from tinyllava.conversation import ImageRef
        from tinyllava.data.images import open_image

        open_image(ImageRef(path=image))  # a wrong path is told before a model is opened
    from tinyllava.inference.chat import Chat

    if sys.stderr.isatty():
        print(f"opening {model} ...", file=sys.stderr)
    chat = Chat.open(model, device=known.device)
    sampling = {"do_sample": True, "temperature": known.temperature} if known.temperature else {}

    if known.file:
        run = {
            "model": str(model.resolve()),
            "weights": fingerprint(model),
            "dtype": chat.dtype,
            "max_tokens": known.max_tokens,
            "temperature": known.temperature,
            "images": str(Path(known.file).resolve().parent),
        }
        for done in answer_file(
            lambda asked: chat.answer(asked, known.max_tokens, **sampling), lines, Path(known.output), run
        ):
            print(f"{done} of {len(lines)} answered", file=sys.stderr)
        print(known.output)
        return 0

    def stream(conversation: "Conversation") -> Iterator[str]:
        return chat.stream(conversation, known.max_tokens, **sampling)

    converse(stream, image, [known.question] if known.question else _read_questions())
    return 0


def find_model(name: str) -> Path:
    """Return the checkpoint folder: the given one, or the starter's.

    Raises:
        CheckpointError: the folder is no checkpoint, or there is no model yet.
    """
    from tinyllava.starter.packages import cache_folder

    if name:
        check_checkpoint(Path(name))
        return Path(name)
    starter = cache_folder() / "starter" / "model"
    if not (starter / "config.json").is_file():
        raise CheckpointError(
            "there is no model yet. Make a small real one with `tinyllava starter` (minutes on a laptop), "
            "or name a checkpoint folder with --model."
        )
    return starter


def converse(
    stream: Callable[["Conversation"], Iterator[str]],
    image: Path | None,
    questions: "Iterator[str] | list[str]",
) -> None:
    """Print the answer to each question as it comes; every turn sees those before it."""
    from tinyllava.conversation import Conversation, Message, ask

    messages: tuple[Message, ...] = ()
    for question in questions:
        turn = ask(question, *([image] if image and not messages else [])).messages
        messages += turn
        pieces = []
        try:
            for piece in stream(Conversation(messages=messages)):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(" [broken off]", end="")
        print()
        messages += (Message(role="assistant", text="".join(pieces)),)


def _read_questions() -> Iterator[str]:
    """Yield lines of the terminal, or of a pipe, until an empty one."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()
            return
        if not question:
            return
        yield question
