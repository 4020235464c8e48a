"""Records of ``messages`` with ``role`` and ``content``: OpenAI, TRL, LLaMA-Factory, ms-swift, the Cauldron.

Content is text in which ``<image>`` marks the next image of the record, or a list of texts and images.
"""

from collections.abc import Mapping
from typing import Any

from tinyllava.conversation import Conversation
from tinyllava.data.defects import Defect
from tinyllava.data.readers.form import (
    ROLES,
    ImageValue,
    Reading,
    Turn,
    as_text,
    decode_list,
    find_foreign_mark,
    listed_images,
    make_conversation,
    note_unknown,
    read_trained,
    split_marks,
)

_ROLES = {**ROLES, "developer": ROLES["system"], "model": ROLES["assistant"]}
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")


def read_record(raw: Any, at: str, reading: Reading) -> Conversation:
    """Return the conversation of one record.

    Raises:
        Defect: the first thing that is wrong with it.
    """
    where = reading.place(at, raw)
    if not isinstance(raw, dict):
        raise Defect("malformed", where, "expected an object with a non-empty list 'messages'")
    if isinstance(raw.get("texts"), list):
        return _read_texts(raw, at, where, reading)
    found: list[Any] = []
    for key in ("messages", "conversations", "conversation", "prompt", "completion"):
        turns_of_key = decode_list(raw, key, where)
        if isinstance(turns_of_key, list):
            found += turns_of_key
    if not found:
        raise Defect("malformed", where, "expected an object with a non-empty list 'messages'")
    listed = listed_images(raw, where)
    if isinstance(found[0], dict) and "input" in found[0]:  # XTuner
        found = [one for pair in found for one in _split_pair(pair)]
    turns = [_turn(turn, number, listed, where) for number, turn in enumerate(found)]
    note_unknown(raw, ("messages", "prompt", "completion"), reading, found)
    unmarked = len(listed) if all(not turn.num_images for turn in turns) else 0
    if unmarked and not find_foreign_mark(turns):  # TRL: images beside the messages and no mark of them
        first = next((turn for turn in turns if turn.role == "user"), None)
        if first is not None:
            first.parts[:0] = [ImageValue() for _ in range(unmarked)]
    return make_conversation(raw, turns, at, reading, listed=_for_marks(turns, listed))


def _split_pair(pair: Any) -> list[Any]:
    """Return the turns of an object with ``input`` and ``output``, as XTuner has them."""
    if not isinstance(pair, Mapping):
        return [pair]
    system = [{"role": "system", "content": pair["system"]}] if pair.get("system") else []
    spoken = [
        {"role": "user", "content": pair.get("input")},
        {"role": "assistant", "content": pair.get("output")},
    ]
    return [*system, *spoken]


def _for_marks(turns: list[Turn], listed: list[Any]) -> list[Any]:
    """Return the images of the marks: none if every image is in its turn by its index."""
    indexed = any(isinstance(part, ImageValue) and part.value is not None for t in turns for part in t.parts)
    marked = any(isinstance(part, ImageValue) and part.value is None for t in turns for part in t.parts)
    return [] if indexed and not marked else listed


def _turn(turn: Any, number: int, listed: list[Any], where: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise Defect("malformed", where, f"turn {number} has no 'role': {str(turn)[:80]}")
    if turn["role"] in ("tool", "function", "observation", "function_call", "tool_call"):
        raise Defect(
            "unsupported", where, f"turn {number} is from {turn['role']!r}: tool calls are not supported"
        )
    if turn["role"].lower() not in _ROLES:
        allowed = "user, assistant, system"
        raise Defect("malformed", where, f"turn {number} is from {turn['role']!r}; allowed: {allowed}")
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise Defect("unsupported", where, f"turn {number} has {key!r}: tool calls are not supported")
    content = turn.get("content")
    items = content if isinstance(content, list) else [content]
    parts: list[str | ImageValue] = []
    for item in items:
        parts += (
            split_marks(_text(item, number, where))
            if isinstance(item, str | int | float)
            else (_part(item, number, listed, where))
        )
    role = _ROLES[turn["role"].lower()]
    return Turn(role, parts, read_trained(turn, role, number, where), keeps_places=True)


def _part(item: Any, number: int, listed: list[Any], where: str) -> list[str | ImageValue]:
    """Return one item of typed content; its own text is text, whatever it spells."""
    if not isinstance(item, Mapping):
        raise Defect("malformed", where, f"turn {number} has no text 'content': {str(item)[:80]}")
    kind = item.get("type") or next((k for k in ("text", "image", "image_url") if item.get(k)), None)
    if kind in _TEXT_TYPES:
        return [_text(item.get("text"), number, where)]
    if kind not in _IMAGE_TYPES:
        raise Defect("unsupported", where, f"turn {number} has content of type {kind!r}: only text and image")
    value = next(
        (item[key] for key in ("image", "image_url", "url", "path", "base64", "bytes") if item.get(key)), None
    )
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    if item.get("base64") is not None and value is item["base64"]:
        value = f"data:image/unknown;base64,{value}"
    index = item.get("index")
    if value is None and isinstance(index, int) and listed:
        if not 0 <= index < len(listed):
            raise Defect(
                "image_count",
                where,
                f"turn {number} refers to image {index}, but the record has {len(listed)}",
            )
        value = listed[index]
    return [ImageValue(value)]


def _text(value: Any, number: int, where: str) -> str:
    if not isinstance(value, str | int | float):
        raise Defect("malformed", where, f"turn {number} has no text 'content': {str(value)[:80]}")
    return as_text(value, f"turn {number}", where)


def _read_texts(raw: dict[str, Any], at: str, where: str, reading: Reading) -> Conversation:
    """Read the form of the Cauldron: pairs of ``user`` and ``assistant``, all images before the first."""
    turns: list[Turn] = []
    for number, pair in enumerate(raw["texts"]):
        if not isinstance(pair, dict):
            raise Defect("malformed", where, f"pair {number} of 'texts' is not an object: {str(pair)[:80]}")
        turns.append(Turn("user", [_text(pair.get("user"), 2 * number, where)]))
        turns.append(Turn("assistant", [_text(pair.get("assistant"), 2 * number + 1, where)]))
    if not turns:
        raise Defect("malformed", where, "'texts' is empty")
    note_unknown(raw, ("texts",), reading)
    listed = listed_images(raw, where)
    turns[0].parts[:0] = [ImageValue() for _ in listed]
    return make_conversation(raw, turns, at, reading, listed=listed)
