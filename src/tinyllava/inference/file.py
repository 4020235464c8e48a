"""``tinyllava chat --file``: a file of questions in, the same lines with answers out, in batches."""

import json
import os
import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava.conversation import Answer, Conversation, ask, names_image
from tinyllava.errors import ConfigError, DataError
from tinyllava.files import append_lines, held, parse_json, read_object, sha256_of, whole_file, write_text

_AT_ONCE = 64  # lines answered before they are written: a batch is cut out of them by its tokens


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the file of questions."""

    fields: dict[str, Any]
    """As it was read; what the answer is added to."""
    conversation: Conversation


def read_questions(path: Path) -> list[Line]:
    """Read a JSONL file of ``{"image": PATH, "question": TEXT}``; without an image it is text alone.

    ``image`` or ``images`` may also be a list of paths. They start from the file's folder. Other fields are
    kept.

    Raises:
        DataError: the file is missing, empty or not UTF-8, a line is of another form, or half of the images
            or more are missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give a JSONL file of questions.") from error
    lines = [
        _read_line(line, f"{path}:{number}", path.parent)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise DataError(f"{path}: empty. Write one object per line, with image and question.")
    _check_images(lines)
    return lines


def _check_images(lines: Sequence[Line]) -> None:
    """Refuse a file whose paths are wrong; a few missing images are reported line by line."""
    asked = [(line, ref.path) for line in lines for ref in line.conversation.images]
    missing = [(line, image) for line, image in asked if image is None or not image.is_file()]
    if missing and 2 * len(missing) >= len(asked):
        line, image = missing[0]
        raise DataError(
            f"{line.conversation.id}: image = {str(image)!r}: no such file; {len(missing):,} of "
            f"{len(asked):,} images are missing. Check the paths, which are relative to the file's folder."
        )


def _read_line(line: str, where: str, folder: Path) -> Line:
    try:
        fields = parse_json(line, whole_characters=True)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}). Write one object per line.") from error
    question = fields.get("question") if isinstance(fields, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: no text in 'question'. Write an object such as {_EXAMPLE}.")
    if names_image(question):
        raise DataError(
            f"{where}: question = {question!r}: is the name of an image. Give it as 'image', and a question."
        )
    images = [folder / image for image in _image_names(fields, where)]
    return Line(fields=fields, conversation=ask(question, *images, id=where))


def _image_names(fields: dict[str, Any], where: str) -> list[str]:
    """Return the paths under ``image`` or ``images``; another field that may name an image is refused."""
    given = [name for name in ("image", "images") if fields.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise DataError(f"{where}: has both image and images. Put all paths into one list, images.")
    for name, value in fields.items():
        looks_like_one = _IMAGE_FIELD.search(name) is not None and name not in ("image", "images")
        if looks_like_one and (not given or _IMAGE_PATH.search(str(value))):
            raise DataError(
                f"{where}: field {name!r} looks like an image but would be ignored. Rename it to 'image' (a "
                "path or a list of paths), or choose another name if it is not an image."
            )
    value = fields[given[0]] if given else []
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{where}: {given[0]} = {value!r}: must be a path or a list of paths. Leave it out for a "
                "text-only question."
            )
    return names


_EXAMPLE = '{"image": "cat.jpg", "question": "What is on the chair?"}'
_IMAGE_FIELD = re.compile(r"(?i)image|img|picture|photo|(^|_)pics?(_|$)")
_IMAGE_PATH = re.compile(r"(?i)\.(jpe?g|png|gif|bmp|webp|tiff?|ppm|heic)\b|^data:image|^https?:")


def answer_file(
    answer: Callable[[Sequence[Conversation]], Sequence[str | DataError]],
    lines: Sequence[Line],
    output: Path,
    run: Mapping[str, object],
) -> Iterator[int]:
    """Write each line with its answer, in order; yield the number of lines done, also before the first batch.

    Lines that the output answers already are not asked again. A line that cannot be answered gets
    ``"answer": null`` and its ``error``, and is asked again the next time: its image may be there by then.
    An answer that ran into its limit of tokens gets ``"is_cut": true``.

    Args:
        answer: gives one text a conversation, or its error.
        lines: what is asked.
        output: JSONL to write; ``run_file`` beside it says whose answers these are.
        run: what the answers depend on, by name: weights, decoding. What the images show is compared too.

    Raises:
        DataError: the output holds answers to other questions, or of a run that is not known, or cannot be
            written.
        ConfigError: it holds answers of another run.
        OutputError: another process writes there.
    """
    is_device = Path("/dev") in output.absolute().parents  # also where the shell has a file in its place
    if is_device or (output.exists() and not output.is_file()):
        raise DataError(f"{output}: not a regular file, which is needed to resume later. Give another path.")
    with held(output, is_folder=False):
        yield from _answer(answer, lines, output, run)


def _answer(
    answer: Callable[[Sequence[Conversation]], Sequence[str | DataError]],
    lines: Sequence[Line],
    output: Path,
    run: Mapping[str, object],
) -> Iterator[int]:
    written, num_whole = _read_answered(output, lines)
    unanswered = [place for place, line in enumerate(written) if json.loads(line)["answer"] is None]
    _claim(output, run, lines, set(range(len(written))).difference(unanswered))
    if output.exists() and num_whole < output.stat().st_size:
        os.truncate(output, num_whole)  # cut, not written anew: what is there outlives a kill and a full disk
    yield len(written) - len(unanswered)
    for start in range(0, len(unanswered), _AT_ONCE):
        places = unanswered[start : start + _AT_ONCE]
        again = _ask(answer, [lines[place] for place in places])
        if again != [written[place] for place in places]:
            for place, line in zip(places, again, strict=True):
                written[place] = line
            with _told_by_name(output):
                write_text(output, "".join(f"{line}\n" for line in written))
        yield len(written) - len(unanswered) + start + len(places)
    for start in range(len(written), len(lines), _AT_ONCE):
        chunk = lines[start : start + _AT_ONCE]
        with _told_by_name(output):
            append_lines(output, _ask(answer, chunk))
        yield start + len(chunk)


def _ask(
    answer: Callable[[Sequence[Conversation]], Sequence[str | DataError]], lines: Sequence[Line]
) -> list[str]:
    """Return the lines to write: each question with its answer."""
    answers = answer([line.conversation for line in lines])
    return [
        json.dumps({**_asked(line.fields), **_answer_fields(text)}, ensure_ascii=False)
        for line, text in zip(lines, answers, strict=True)
    ]


def _answer_fields(answer: str | DataError) -> dict[str, Any]:
    if isinstance(answer, DataError):
        return {"answer": None, "error": str(answer)}
    is_cut = isinstance(answer, Answer) and answer.is_cut
    return {"answer": answer, **({"is_cut": True} if is_cut else {})}


@contextmanager
def _told_by_name(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}). Choose another file.") from error


def describe_unanswered(output: Path) -> tuple[list[str], int]:
    """Return the errors of the lines without an answer, and how many answers are cut off."""
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
    errors = [str(line.get("error")) for line in lines if line["answer"] is None]
    return errors, sum(line.get("is_cut") is True for line in lines)


def run_file(output: Path) -> Path:
    """Return the file that says which model gave the answers in ``output``, and how it was asked."""
    return output.with_name(f"{output.name}.run.json")


def _claim(output: Path, run: Mapping[str, object], lines: Sequence[Line], answered: Set[int]) -> None:
    """Write down whose answers these are; what was written beside an output without answers is replaced."""
    identity = run_file(output)
    fix = f"Choose another --output, or delete {output} to start over."
    if not output.exists() or not output.stat().st_size:
        identity.unlink(missing_ok=True)
    elif not identity.exists():
        raise DataError(f"{output}: has answers, but {identity} does not name their model. {fix}")
    images = _hash_images(lines)
    known = (read_object(identity) or {}).get("images")
    before = known if isinstance(known, list) else []
    for place in sorted(answered):
        if place < len(before) and before[place] != images[place]:
            where = lines[place].conversation.id
            raise DataError(f"{output}: the image of {where} changed since it was answered. {fix}")
    claim_answers(output, identity, run, fix=fix, told_by={"model": "weights"}, noted={"images": images})


def _hash_images(lines: Sequence[Line]) -> list[str]:
    """Return for each line a hash of what its images show; empty for text alone."""
    paths = {ref.path for line in lines for ref in line.conversation.images if ref.path is not None}
    hashes = {path: sha256_of(path)[:16] if path.is_file() else "missing" for path in paths}
    return [" ".join(hashes[ref.path] for ref in line.conversation.images if ref.path) for line in lines]


def _read_answered(output: Path, lines: Sequence[Line]) -> tuple[list[str], int]:
    """Return the whole lines of the output, and their bytes; a line that a stop cut may follow."""
    try:
        is_new = not output.exists()
        output.open("ab").close()  # a place that cannot be written is told before anything is asked
        data = output.read_bytes()
        if is_new:
            output.unlink()
        whole = data[: data.rfind(b"\n") + 1]
        written = whole.decode().split("\n")[:-1]
        rest = getincrementaldecoder("utf-8")().decode(data[len(whole) :])  # it may end within a character
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{output}: cannot be used ({error}). Choose another file.") from error
    begins = [_without_answer(line.fields) for line in lines]
    cut = begins[len(written)] if len(written) < len(lines) else ""
    same = len(written) <= len(lines) and all(map(str.startswith, written, begins))
    if (
        not same
        or not all(map(_is_whole, written))
        or not (rest.startswith(cut) or cut.startswith(rest))
        or (rest and not cut)
    ):
        raise DataError(f"{output}: contains something other than these answers. Choose another file.")
    return written, len(whole)


def _is_whole(line: str) -> bool:
    try:
        return "answer" in json.loads(line)
    except ValueError:
        return False


def _asked(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("answer", "error", "is_cut")}


def _without_answer(fields: dict[str, Any]) -> str:
    """Return what a written line begins with, up to the answer."""
    return json.dumps({**_asked(fields), "answer": 0}, ensure_ascii=False).removesuffix("0}")


def claim_answers(
    answers: Path,
    identity: Path,
    run: Mapping[str, Any],
    *,
    fix: str,
    told_by: Mapping[str, str] | None = None,
    noted: Mapping[str, Any] | None = None,
) -> None:
    """Record which run owns these answers, or verify that existing ones belong to it.

    Args:
        answers: file or folder that holds them, named in errors.
        identity: JSON file beside them, written whole or not at all.
        run: what the answers depend on, by name.
        fix: what to do where they are another run's.
        told_by: a name that may differ -> the one that has to be equal then, ``{"model": "weights"}`` where
            the model's folder may move.
        noted: further values, that the caller compares; what was noted before is replaced.

    Raises:
        ConfigError: they are of another run or nobody knows whose, or the file cannot be written.
    """
    noted = noted or {}
    if not identity.exists():
        _write(identity, {**run, **noted})
        return
    known = _read(identity, answers, fix)
    is_noted_anew = any(known.get(name) != value for name, value in noted.items())
    known = {name: value for name, value in known.items() if name not in noted}
    different = {name for name in {**known, **run} if known.get(name) != run.get(name)}
    moved = {name for name, other in (told_by or {}).items() if run.get(other) and other not in different}
    for name in {**known, **run}:
        if name in different - moved:
            raise ConfigError(
                f"{answers}: has answers of a run with {name} = {known.get(name)!r}, but this run has "
                f"{run.get(name)!r}. {fix}"
            )
    if is_noted_anew:
        _write(identity, {**known, **noted})


def _write(identity: Path, values: Mapping[str, Any]) -> None:
    try:
        with whole_file(identity) as partial:
            partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{identity}: cannot be written ({error.strerror}). Free some disk space, or choose another "
            "output."
        ) from error


def _read(identity: Path, answers: Path, fix: str) -> dict[str, Any]:
    known = read_object(identity)
    if known is None:
        raise ConfigError(f"{answers}: has answers, but {identity} does not name their run. {fix}")
    return known
