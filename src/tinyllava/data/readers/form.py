"""The common result of all readers, turns and images, and the single place where they are checked.

Paper: section 3.2; a record is Y = (Y_q^1, Y_a^1, ..., Y_q^T, Y_a^T) with its image X.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any

from tinyllava.conversation import Conversation, ImageRef, Message, Role, name_place
from tinyllava.data.defects import Defect
from tinyllava.data.readers.image_values import find_image
from tinyllava.files import is_text

IMAGE_MARK = "<image>"
IMAGE_KEYS = ("image", "images", "image_path", "image_paths", "file_name")
"""Where records of any form name their images; one of them a record."""
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
TRAINED_KEYS = ("loss", "weight", "train")
"""Names under which a turn says whether it adds to the loss."""
_UNSUPPORTED = ("video", "videos", "audio", "audios", "tools", "functions")
_PREFERENCES = ("chosen", "rejected")
_SYSTEM = ("system", "system_prompt")
_SHOWN = 8
"""Turns whose roles an error names."""
_IMAGE_IN_TEXT = re.compile(r"<image>|<img>([^<>]+)</img>")
_FOREIGN_MARK = re.compile(r"<\|image(?:_pad|_\d+)?\|>|<image[ _]?\d+>|<(?:image_placeholder|ImageHere|img)>")
"""How other models' data mark the place of an image."""
_BOXES = ("<bbox>", "<ref-object>")
_OF_TURNS = ("from", "value", "role", "content", "tool_calls", "function_call")
_KNOWN_OF_TURNS = {*_OF_TURNS, *TRAINED_KEYS}
EVALUATION_KEYS = ("kind", "category", "metric", "answers", "choices", "tolerance")
"""What records say to ``tinyllava evaluate``; training does not need it."""
_KNOWN = {
    "id",
    "model",
    "conversations",
    "conversation",
    *_SYSTEM,
    *IMAGE_KEYS,
    *EVALUATION_KEYS,
    *_UNSUPPORTED,
}


@dataclass(kw_only=True)
class Reading:
    """One pass over a file: the image folder, skipped defects, and findings."""

    path: Path
    images: Path
    """Folder that image paths start from."""
    skip: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    """Of a table: ``image``, ``question`` or ``answer`` -> the name of that column."""
    allow_urls: bool = False
    """Whether images at http(s) addresses are downloaded."""
    keep_places: bool = False
    """Whether images stay where the text has them in every form."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Records left out (or, for leading_answer, turns dropped), by the name of the defect."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Fields that mean nothing here, with the number of records that have them."""

    def place(self, at: str, raw: Any) -> str:
        """Return how errors name a record that is no conversation yet."""
        id_ = raw.get("id") if isinstance(raw, dict) else None
        id_ = "" if id_ is None else str(id_)[:80]
        return name_place(str(self.path), at, id_)


@dataclass(slots=True)
class ImageValue:
    """An image in a turn, in the form of its file; without a value, the record's next image."""

    value: Any = None


@dataclass(slots=True)
class Turn:
    """One turn as a reader found it."""

    role: Role
    parts: list[str | ImageValue]
    """Text and images in the order of the file."""
    is_trained: bool = True
    """Whether it adds to the loss, if it is an answer."""
    keeps_places: bool = False
    """Whether images stay where the text has them; otherwise they come before it, as in LLaVA's loader."""

    @property
    def num_images(self) -> int:
        """Images of this turn."""
        return len(self.images)

    @property
    def images(self) -> list[ImageValue]:
        """Images of this turn, in the order of the file."""
        if len(self.parts) == 1 and isinstance(self.parts[0], str):  # as most turns, which is quicker
            return []
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def text(self) -> str:
        """Its text without its images."""
        if len(self.parts) == 1 and isinstance(self.parts[0], str):
            return self.parts[0]
        return "".join(part for part in self.parts if isinstance(part, str))


def split_marks(text: str) -> list[str | ImageValue]:
    """Return a text with an image in place of each ``<image>``, and of each ``<img>its path</img>``."""
    parts: list[str | ImageValue] = []
    if "<im" not in text:
        return [text]
    end = 0
    for mark in _IMAGE_IN_TEXT.finditer(text):
        parts += [text[end : mark.start()], ImageValue(mark[1])]
        end = mark.end()
    return [*parts, text[end:]]


def as_text(value: Any, name: str, where: str) -> str:
    """Return a value as text. None and NaN become an empty text.

    Args:
        name: how errors name it, such as ``'answer'``.

    Raises:
        Defect: a date, a list or another value that is no text.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if isinstance(value, date | time):
        raise Defect("malformed", where, f"{name} is a date ({value}); write it as text")
    if not isinstance(value, str):
        kind = f"a list of {len(value)}" if isinstance(value, list) else str(value)[:80]
        raise Defect("malformed", where, f"{name} must be text or a number, found {kind}; write one text")
    if not is_text(value):
        raise Defect("malformed", where, f"{name} contains an unpaired surrogate: {value[:80]!a}")
    return value


def decode_list(raw: Mapping[str, Any], key: str, where: str) -> Any:
    """Return a field that is a list, or a cell of a table that spells one as JSON.

    Raises:
        Defect: the cell has a list in another spelling.
    """
    value = raw.get(key)
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        detail = f"is a Python list, not JSON; write it with json.dumps: {value[:80]}"
        if "'" not in value[:3]:
            detail = f"is not JSON ({error}): {value[:80]}"
        raise Defect("malformed", where, f"{key!r} {detail}") from error


def make_conversation(
    raw: Mapping[str, Any], turns: list[Turn], at: str, reading: Reading, *, listed: list[Any] | None = None
) -> Conversation:
    """Check a record and return it as a conversation.

    Args:
        raw: the record; its id and the fields that are not of its form are looked at here.
        turns: in the order of the file.
        listed: images for the marks in order, where they are not in a field of ``IMAGE_KEYS``.

    Raises:
        Defect: the first thing that is wrong with it.
    """
    where = reading.place(at, raw)
    _refuse_unsupported(raw, turns, where)
    for turn in turns if reading.keep_places else ():
        turn.keeps_places = True
    _add_system(raw, turns, where)
    first = 1 if turns and turns[0].role == "system" else 0
    if "leading_answer" in reading.skip and turns[first:] and turns[first].role == "assistant":
        reading.skipped["leading_answer"] += 1
        del turns[first]
    _check_order([turn.role for turn in turns], where)
    values = listed_images(raw, where) if listed is None else listed
    refs = [find_image(value, reading.images, where, reading.allow_urls) for value in values]
    return Conversation(
        messages=_messages(turns, refs, where, reading), id=_id(raw, where), source=str(reading.path), at=at
    )


def read_trained(turn: Mapping[str, Any], role: Role, number: int, where: str) -> bool:
    """Return whether a turn adds to the loss: ``loss``, ``weight`` or ``train``, as other tools write it.

    Raises:
        Defect: a value other than 0 and 1, or the loss of a turn that is no answer.
    """
    if turn.keys().isdisjoint(TRAINED_KEYS):
        return role == "assistant"
    given = {key: turn[key] for key in TRAINED_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise Defect("unsupported", where, f"turn {number} has {key} {value!r}; allowed: 0 and 1")
        if value and role != "assistant":
            raise Defect(
                "unsupported", where, f"turn {number} ({role}) has {key} 1; only answers can be trained"
            )
    if len(set(map(bool, given.values()))) > 1:
        raise Defect("malformed", where, f"turn {number} has {given}, which contradict each other")
    return role == "assistant" and all(given.values())


def note_unknown(
    raw: Mapping[str, Any], known: Iterable[str], reading: Reading, turns: Iterable[Mapping[str, Any]] = ()
) -> None:
    """Count the fields of a record, and of its turns, that nothing here uses."""
    for key in set().union(*turns) - _KNOWN_OF_TURNS:
        reading.ignored[f"{key} of turns"] += 1
    for key in raw.keys() - _KNOWN - set(known):
        reading.ignored[str(key)] += 1


def listed_images(raw: Mapping[str, Any], where: str) -> list[Any]:
    """Return the images that a record names in a field of its own.

    Raises:
        Defect: the field has another type, or two fields name different images.
    """
    given = [key for key in IMAGE_KEYS if not _is_empty(raw.get(key))]
    if not given:
        return []
    if any(raw[key] != raw[given[0]] for key in given[1:]):
        raise Defect("malformed", where, f"{' and '.join(map(repr, given))} name different images; keep one")
    values = raw[given[0]]
    values = values if isinstance(values, list) else [values]
    if any(_is_empty(value) or not isinstance(value, str | bytes | dict) for value in values):
        found = str(raw[given[0]])[:80]
        raise Defect("malformed", where, f"{given[0]!r} must be a path or a list of paths, found {found}")
    return values


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | dict) and not value)


def refuse_preferences(raw: Mapping[str, Any], where: str) -> None:
    """Raise Defect for a better and a worse answer, of which neither is the answer of a record."""
    key = next((key for key in _PREFERENCES if raw.get(key)), "")
    if key:
        detail = f"{key!r}: preference pairs are not supported; keep only the better answer"
        raise Defect("unsupported", where, detail)


def _refuse_unsupported(raw: Mapping[str, Any], turns: list[Turn], where: str) -> None:
    refuse_preferences(raw, where)
    for key in _UNSUPPORTED:
        if key in raw and not _is_empty(raw[key]):
            detail = f"{key!r} = {str(raw[key])[:80]}: only images and text are supported"
            raise Defect("unsupported", where, detail)
    if raw.get("objects") and (mark := next((m for t in turns for m in _BOXES if m in t.text), "")):
        detail = f"{mark} refers to a box in 'objects'; write the coordinates into the text"
        raise Defect("unsupported", where, detail)
    if raw.get("weight") not in (None, 1):
        detail = f"'weight' = {str(raw['weight'])[:80]}: records have no weight; repeat them instead"
        raise Defect("unsupported", where, detail)
    question = next((turn.text.strip() for turn in turns if turn.role == "user"), "")
    for mark in ("<video>", "<audio>"):
        if question.startswith(f"{mark}\n") or question.endswith(f"\n{mark}") or question == mark:
            raise Defect("unsupported", where, f"{mark} in a question: only images and text are supported")


def _add_system(raw: Mapping[str, Any], turns: list[Turn], where: str) -> None:
    """Add the system turn of a field ``system``, which some forms have next to the turns."""
    key = next((key for key in _SYSTEM if not _is_empty(raw.get(key))), "")
    if not key:
        return
    text = raw[key]
    if not isinstance(text, str) or not is_text(text):
        raise Defect("malformed", where, f"{key!r} must be text, found {str(text)[:80]!a}")
    if turns and turns[0].role == "system":
        raise Defect("malformed", where, f"a system turn and a field {key!r}; keep one")
    turns.insert(0, Turn("system", [text]))


def _check_order(roles: list[Role], where: str) -> None:
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if roles[:1] == ["assistant"]:
        raise Defect("leading_answer", where, "the conversation starts with an answer")
    if roles and roles[-1] == "user":
        raise Defect("unanswered", where, "the conversation ends with a question")
    if not roles or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        shown = ", ".join(roles[:_SHOWN]) + ", ..." * (len(roles) > _SHOWN)
        raise Defect("roles", where, f"turns do not alternate: {shown or 'none'}")


def _id(raw: Mapping[str, Any], where: str) -> str:
    id_ = raw.get("id")
    if not (id_ is None or isinstance(id_, str | int | float)) or not is_text(str(id_)):
        raise Defect("malformed", where, f"'id' must be text or a number, found {str(id_)[:80]!a}")
    return "" if id_ is None else str(id_)


def _messages(turns: list[Turn], refs: list[ImageRef], where: str, reading: Reading) -> tuple[Message, ...]:
    """Move each turn's images in front of its text, as LLaVA's loader does.

    What is left of such a turn loses its outer blanks, there as here; other turns keep them for the template.
    """
    shown = [turn.images for turn in turns]
    num_marks = sum(one.value is None for some in shown for one in some)
    if num_marks != len(refs):
        raise Defect("image_count", where, _describe_counts(num_marks, refs, turns))
    messages, rest = [], iter(refs)
    for turn, values in zip(turns, shown, strict=True):
        text, count = turn.text, len(values)
        text = text.strip() if count else text
        if turn.role != "user" and count:
            raise Defect("image_count", where, f"{IMAGE_MARK} is in a turn of the {turn.role}")
        if turn.role == "assistant" and not text.strip():
            raise Defect("empty_answer", where, "an answer has no text")
        if turn.role == "user" and not text.strip() and not count:
            raise Defect("empty_question", where, "a question has neither text nor image")
        images = tuple(
            [
                next(rest)
                if one.value is None
                else find_image(one.value, reading.images, where, reading.allow_urls)
                for one in values
            ]
        )
        is_trained = turn.is_trained or turn.role != "assistant"
        text, places = _place(turn) if turn.keeps_places and count else (text, ())
        messages.append(
            Message(role=turn.role, text=text, images=images, places=places, is_trained=is_trained)
        )
    if not any(message.is_trained for message in messages if message.role == "assistant"):
        raise Defect("untrained", where, "no answer adds to the loss")
    return tuple(messages)


def _describe_counts(num_marks: int, refs: list[ImageRef], turns: list[Turn]) -> str:
    marks = f"{num_marks or 'no'} {IMAGE_MARK} mark{'s' * (num_marks > 1)}"
    names = ", ".join(str(ref) for ref in refs[:3]) + ", ..." * (len(refs) > 3)
    images = f"{len(refs)} image{'s' * (len(refs) > 1)} ({names})" if refs else "no image"
    foreign = find_foreign_mark(turns)
    fix = f"{foreign!r} is not supported; write {IMAGE_MARK}" if foreign else "write one mark for each image"
    return f"{marks} for {images}; {fix}"


def find_foreign_mark(turns: Iterable[Turn]) -> str:
    """Return the first image mark of another format in the questions; empty if there is none."""
    found = (_FOREIGN_MARK.search(turn.text) for turn in turns if turn.role == "user")
    return next((mark[0] for mark in found if mark), "")


def _place(turn: Turn) -> tuple[str, tuple[int, ...]]:
    """Return a turn's text without outer blanks, and the place of each image in it (none: all come first)."""
    text = ""
    places: list[int] = []
    for part in turn.parts:
        if isinstance(part, str):
            text += part if text else part.lstrip()
        else:
            places.append(len(text))
    if not any(places):
        return text.strip(), ()
    return text.rstrip(), tuple(min(place, len(text.rstrip())) for place in places)
