"""LLaVA's JSON and JSONL: records to conversations, with a name for everything that can be wrong.

Paper: section 4.1.2 (the four data sets of Table 2 come in this form).
Nothing behind this file repairs text: what a record says is settled here.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyllava.conversation import Conversation, ImageRef, Message, Role
from tinyllava.errors import ConfigError, DataError, ImageError
from tinyllava.files import is_text, parse_json

IMAGE_MARK = "<image>"
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

DEFECTS: dict[str, str] = {
    "malformed": "a record that is not an object, has no conversations, or has a value of a wrong type",
    "leading_answer": "a conversation that starts with an answer (a skip drops only that turn)",
    "roles": "turns that do not alternate between user and assistant",
    "unanswered": "a conversation that ends with a question",
    "empty_answer": "an answer without text",
    "empty_question": "a question without text and without an image",
    "image_count": "the numbers of <image> and images differ, or an answer contains <image>",
    "missing_image": "an image file that does not exist",
    "broken_image": "an image that cannot be decoded (a skip decodes every image before training)",
    "dialogue": "several questions in a stage whose template drops them (caption)",
    "text_only": "no image in a stage whose template drops the question (caption)",
    "too_long": "more tokens than max_length_tokens, including image tokens",
    "duplicate_id": "two records of one file with the same id and the same image and turns",
}
"""Names of what may be skipped, and what each means."""


class Defect(DataError):  # noqa: N818 (the word that users meet in skips and docs)
    """A defect of one record, by its name in ``DEFECTS``."""

    def __init__(self, name: str, where: str, detail: str) -> None:
        assert name in DEFECTS
        self.name = name
        super().__init__(
            f"{where}: {detail} [{name}]. Fix the record, or skip such records with --skip {name}."
        )


@dataclass(frozen=True, kw_only=True)
class Records:
    """The conversations of one or more files, and what was left out by name."""

    conversations: tuple[Conversation, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of records left out (or, for leading_answer, turns dropped), by the name of the defect."""


def read_records(path: Path, images: Path, skip: tuple[str, ...] = ()) -> Records:
    """Read a LLaVA-format file.

    Args:
        path: ``.json`` (one array) or ``.jsonl`` (one object a line).
        images: folder that image paths start from.
        skip: names out of ``DEFECTS`` whose records are left out and counted.

    Raises:
        ConfigError: an unknown name in ``skip``.
        DataError: the file is missing or not JSON; or ``Defect`` for the first record with a defect not
        skipped.
    """
    check_skip(skip)
    skipped: Counter[str] = Counter()
    conversations: list[Conversation] = []
    seen: set[int] = set()
    for at, raw in read_raw(path):
        where = _place(path, at, raw)
        try:
            conversation = _to_conversation(raw, where, images, skip, skipped)
            conversation = replace(conversation, source=str(path), at=at)
            key = hash((conversation.id, conversation.messages))
            if conversation.id and key in seen:
                raise Defect("duplicate_id", where, f"the record {conversation.id!r} is in the file twice")
            seen.add(key)
            conversations.append(conversation)
        except Defect as defect:
            if defect.name not in skip:
                raise
            skipped[defect.name] += 1
    if not conversations:
        raise DataError(f"{path}: no record left" + (f" after skips {dict(skipped)}." if skipped else "."))
    return Records(conversations=tuple(conversations), skipped=dict(skipped))


def check_skip(skip: tuple[str, ...]) -> None:
    """Raise ConfigError for a name that is no defect."""
    for name in skip:
        if name not in DEFECTS:
            raise ConfigError(f"skip {name!r}: unknown; known: {', '.join(DEFECTS)}.")


def read_raw(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place in the file, value) for each record."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such record file. Check the path.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a record file ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut inside strings
            if line.strip():
                raw = _parse(line, str(path), number)
                if isinstance(raw, list):
                    raise DataError(
                        f"{path}:{number}: a JSON array. Rename a file with one array of records to .json."
                    )
                yield f"line {number}", raw
        return
    records = _parse(text, str(path))
    if not isinstance(records, list):
        raise DataError(
            f"{path}: expected a JSON array, found {type(records).__name__}. Or rename it to .jsonl."
        )
    for index, raw in enumerate(records):
        yield f"record {index}", raw


def _place(path: Path, at: str, raw: Any) -> str:
    """Return how errors name a record that is no conversation yet."""
    id_ = raw.get("id") if isinstance(raw, dict) else None
    return Conversation(messages=(), id="" if id_ is None else str(id_)[:80], source=str(path), at=at).place


def _parse(text: str, where: str, first_line: int = 1) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = " If it has one record per line, rename it to .jsonl." if error.msg == "Extra data" else ""
        fix = " This is not a record file." if error.msg == "nested too deeply" else " Fix the file."
        raise DataError(
            f"{where}: not JSON: {error.msg} at line {line} column {error.colno}.{hint or fix}"
        ) from error


def _to_conversation(
    raw: Any, where: str, images: Path, skip: tuple[str, ...], skipped: Counter[str]
) -> Conversation:
    turns = _turns(raw, where)
    first = 1 if turns[0][0] == "system" else 0
    if "leading_answer" in skip and turns[first:] and turns[first][0] == "assistant":
        skipped["leading_answer"] += 1
        del turns[first]
    _check_order(turns, where)
    refs = [_image_ref(name, images, where) for name in _image_names(raw, where)]
    return Conversation(messages=_messages(turns, refs, where), id=_id(raw, where))


def _turns(raw: Any, where: str) -> list[tuple[Role, str]]:
    """Return (role, text) of each turn."""
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("conversations"), list)
        or not raw["conversations"]
    ):
        raise Defect("malformed", where, "expected an object with a non-empty list 'conversations'")
    turns: list[tuple[Role, str]] = []
    for number, turn in enumerate(raw["conversations"]):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise Defect("malformed", where, f"turn {number} has no text 'value': {str(turn)[:80]}")
        if not isinstance(turn.get("from"), str) or turn["from"] not in _ROLES:
            raise Defect(
                "malformed", where, f"turn {number} is from {turn.get('from')!r}; allowed: human, gpt, system"
            )
        if not is_text(turn["value"]):
            raise Defect(
                "malformed", where, f"turn {number} contains an unpaired surrogate: {turn['value'][:80]!a}"
            )
        turns.append((_ROLES[turn["from"]], turn["value"]))
    return turns


def _id(raw: dict[str, Any], where: str) -> str:
    id_ = raw.get("id")
    if not (id_ is None or isinstance(id_, str | int | float)) or not is_text(str(id_)):
        raise Defect("malformed", where, f"'id' must be text or a number, found {str(id_)[:80]!a}")
    return "" if id_ is None else str(id_)


def _check_order(turns: list[tuple[Role, str]], where: str) -> None:
    roles = [role for role, _ in turns]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if roles[:1] == ["assistant"]:
        raise Defect("leading_answer", where, "the conversation starts with an answer")
    if roles and roles[-1] == "user":
        raise Defect("unanswered", where, "the conversation ends with a question")
    if not roles or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise Defect("roles", where, f"turns do not alternate: {', '.join(roles) or 'none'}")


def _image_names(raw: dict[str, Any], where: str) -> list[str]:
    names = raw.get("image")
    if names in (None, "", []):
        return []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise Defect(
            "malformed", where, f"'image' must be a path or a list of paths, found {str(names)[:80]}"
        )
    return names


def _image_ref(name: str, images: Path, where: str) -> ImageRef:
    path = images / name
    try:
        there = is_text(name) and path.is_file()
    except OSError as error:  # a name that is too long: a caption in the wrong field
        raise Defect(
            "malformed", where, f"'image' is not a valid path ({error.strerror}): {name[:80]}"
        ) from error
    if not is_text(name):
        raise Defect("malformed", where, f"'image' contains an unpaired surrogate: {name[:80]!a}")
    if not there:
        what = "a folder, not an image:" if path.is_dir() else "no image"
        raise Defect("missing_image", where, f"{what} {path}")
    return ImageRef(path=path, name=name)


def _messages(turns: list[tuple[Role, str]], refs: list[ImageRef], where: str) -> tuple[Message, ...]:
    """Move each turn's ``<image>`` in front of its text, as LLaVA's loader does, and hand it its images.

    What is left of such a turn loses its outer blanks, there as here; other turns keep them for the template.
    """
    counts = [text.count(IMAGE_MARK) for _, text in turns]
    if sum(counts) != len(refs):
        raise Defect("image_count", where, f"{sum(counts)} {IMAGE_MARK} marks for {len(refs)} images")
    messages, rest = [], iter(refs)
    for (role, text), count in zip(turns, counts, strict=True):
        text = text.replace(IMAGE_MARK, "").strip() if count else text
        if role != "user" and count:
            raise Defect("image_count", where, f"{IMAGE_MARK} is in a turn of the {role}")
        if role == "assistant" and not text.strip():
            raise Defect("empty_answer", where, "an answer has no text")
        if role == "user" and not text.strip() and not count:
            raise Defect("empty_question", where, "a question has neither text nor image")
        messages.append(Message(role=role, text=text, images=tuple(next(rest) for _ in range(count))))
    return tuple(messages)


def drop_broken_images(records: Records, progress: Callable[[int], None] = lambda n: None) -> Records:
    """Decode every image once and leave out the records whose image is broken, counted."""
    from tinyllava.data.images import open_image

    good, num_broken = [], 0
    for conversation in records.conversations:
        try:
            for ref in conversation.images:
                open_image(ref)
            good.append(conversation)
        except ImageError:
            num_broken += 1
        progress(1)
    return Records(conversations=tuple(good), skipped={**records.skipped, "broken_image": num_broken})
