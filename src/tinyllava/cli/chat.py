"""``tinyllava chat IMAGE ... [QUESTION]``: ask a model about images in the terminal."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.cli.parser import CommandParser, add_bits, find_model
from tinyllava.conversation import IMAGE_SUFFIXES, names_image
from tinyllava.errors import DataError, Stopped
from tinyllava.inference.file import answer_file, describe_unanswered, read_questions
from tinyllava.parts.folders import fingerprint

if TYPE_CHECKING:
    from tinyllava.inference.dialogue import Dialogue

_HELP = """
Ask about one image or several. Without a question, the chat has several turns,
and each answer takes the earlier turns into account.

  tinyllava chat cat.jpg "What is on the chair?"
  tinyllava chat before.jpg after.jpg "What has changed?"
  tinyllava chat cat.jpg              several turns, ended by an empty line
  tinyllava chat cat.jpg --model runs/share-Sig-Phi/model
  tinyllava chat cat.jpg < questions.txt
  tinyllava chat --file questions.jsonl --output answers.jsonl
      Reads lines such as {"image": "cat.jpg", "question": "What is this?"}
      ("image" may be a list) and writes them with "answer" added. A line that
      cannot be answered gets "error", a truncated answer gets "is_cut". Run the
      same command again to resume (answers.jsonl.run.json records the model);
      lines with an error are asked again.

Ctrl-C interrupts an answer, or exits at the prompt. The exit status is 1 if a
question has no answer.
"""
_MOST_SHOWN = 10  # errors of a file of questions; the output has all


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser("chat", _HELP)
    parser.add_argument(
        "words", nargs="*", metavar="IMAGE", help="image files (- for none), then the question"
    )
    parser.add_argument("--file", default="", help="JSONL file of questions, instead of IMAGE")
    parser.add_argument("--output", default="", help="JSONL file of answers to write (with --file)")
    parser.add_argument("--model", default="", help="checkpoint folder (default: the starter's)")
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="max length of an answer in tokens (default: 512)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature (default: 0, greedy decoding)"
    )
    parser.add_argument("--device", default="", help="torch device (default: a GPU if available)")
    add_bits(parser)
    known = parser.parse_intermixed_args(arguments)
    if known.max_tokens < 1 or not 0 <= known.temperature < math.inf:
        parser.error("--max-tokens must be at least 1, and --temperature at least 0")
    if bool(known.words) == bool(known.file) or bool(known.file) != bool(known.output):
        parser.error("give an image, or --file QUESTIONS with --output ANSWERS")
    *names, last = known.words or [""]
    if not names or _is_image(last):
        names, last = known.words, ""
    elif _is_misspelt_image(last, names):
        parser.error(
            f"{last!r}: no such image. Check the path; if it is a question, end it with a question mark or "
            "a period"
        )
    for number, name in enumerate(names):
        if "://" in name:
            parser.error(f"{name}: URLs are not supported; download the image and give its path")
        if number and not _is_image(name):
            parser.error(f"{name!r} is not an image file; write the question last, in quotes")
    known.images, known.question = [Path(name) for name in names if name != "-"], last
    return known


def _is_image(word: str) -> bool:
    """Whether an argument is meant as an image: a file, or a name of one that may be misspelt."""
    try:
        return Path(word).is_file() or names_image(word)
    except (OSError, ValueError):  # a question longer than a path may be
        return False


def _is_misspelt_image(text: str, images: Sequence[str]) -> bool:
    """Whether what stands in the place of the question is a misspelt image: ``b c.jpg`` or ``b.jgp``.

    A question may end with the name of an image that is given or exists, and with any name if a punctuation
    mark follows.
    """
    *before, last = text.split() or [""]
    if last.lower().endswith(IMAGE_SUFFIXES):
        return Path(last).name not in {Path(image).name for image in images} and not Path(last).is_file()
    suffix = Path(last).suffix.lower()
    is_word = not before and suffix.isascii() and suffix[1:].isalnum()
    return is_word and bool(get_close_matches(suffix, IMAGE_SUFFIXES, n=1, cutoff=0.75))


def main(arguments: list[str]) -> int:
    """Answer one question or a file of them, or converse; the status is 1 if one was not answered."""
    known = _parse(arguments)
    model = find_model(known.model, "--model DIR")
    lines = read_questions(Path(known.file)) if known.file else []
    if known.images:
        from tinyllava.conversation import ImageRef
        from tinyllava.data.images import open_image

        for image in known.images:
            open_image(ImageRef(path=image))  # report a wrong path before the model is loaded
    from tinyllava.inference.chat import Chat

    if sys.stderr.isatty():
        print(f"loading {model} ...", file=sys.stderr)
    chat = Chat.open(model, device=known.device, bits=known.bits)
    sampling = {"do_sample": True, "temperature": known.temperature} if known.temperature else {}

    if known.file:
        run = {
            "model": str(model),
            "weights": fingerprint(model),
            "dtype": chat.dtype,
            "max_tokens": known.max_tokens,
            "temperature": known.temperature,
        }
        for done in answer_file(
            lambda asked: chat.answer_each(asked, known.max_tokens, **sampling),
            lines,
            Path(known.output),
            run,
        ):
            print(f"{done} of {len(lines)} answered", file=sys.stderr)
        print(known.output)
        return _report(Path(known.output), known.max_tokens)

    dialogue = chat.start(*known.images)

    def answer(question: str) -> Iterator[str]:
        return _stream(dialogue, question, known.max_tokens, chat.context_tokens, sampling)

    return converse(answer, [known.question] if known.question else _read_questions())


def _report(output: Path, max_tokens: int) -> int:
    """Report the lines without an answer and the number of truncated answers."""
    errors, num_cut = describe_unanswered(output)
    for error in errors[:_MOST_SHOWN]:
        print(f"not answered: {error}", file=sys.stderr)
    if errors:
        what = "question has" if len(errors) == 1 else "questions have"
        print(f"{len(errors):,} {what} no answer: see 'error' in {output}", file=sys.stderr)
    if num_cut:
        what = "answer was" if num_cut == 1 else "answers were"
        print(
            f"{num_cut:,} {what} cut off at {max_tokens} tokens or at the end of the context: see "
            "'is_cut' (raise the limit with --max-tokens N)",
            file=sys.stderr,
        )
    return int(bool(errors))


def _stream(
    dialogue: "Dialogue", question: str, max_tokens: int, context_tokens: int, sampling: Mapping[str, object]
) -> Iterator[str]:
    """Stream the next answer; say so if the oldest questions are dropped for it, and if it is cut off."""
    num_dropped = dialogue.num_dropped
    pieces = dialogue.stream(question, max_new_tokens=max_tokens, **sampling)
    if dialogue.num_dropped > num_dropped:
        print(
            f"[the context of {context_tokens:,} tokens is full: the oldest {dialogue.num_dropped} "
            "questions were dropped]",
            file=sys.stderr,
        )
    yield from pieces
    if dialogue.is_cut:
        sys.stdout.flush()
        print(
            f" [cut off at {max_tokens} tokens or at the end of the context; see --max-tokens]",
            end="",
            file=sys.stderr,
            flush=True,
        )


def converse(stream: Callable[[str], Iterator[str]], questions: Iterable[str]) -> int:
    """Print the answer to each question as it comes.

    A question that is too long does not end the chat if others may follow.

    Args:
        stream: gives the answer to a question in pieces and remembers both; see ``Dialogue.stream``.
        questions: a list, or an iterator of questions that are still to be typed.

    Returns:
        The exit status: 1 if a question was not answered.

    Raises:
        DataError: the only question cannot be asked.
    """
    status = 0
    for question in questions:
        try:
            for piece in stream(question):
                print(piece, end="", flush=True)
        except DataError as error:
            if isinstance(questions, list):
                raise
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        except KeyboardInterrupt as stop:
            if isinstance(stop, Stopped) or not sys.stdin.isatty():  # SIGTERM ends all, Ctrl-C one answer
                raise
            print(" [interrupted]", end="")
        print()
    return status


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
