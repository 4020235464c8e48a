"""LLaVA's records: ``conversations`` with ``from`` and ``value``, and one ``<image>`` for each image.

Paper: section 4.1.2 (the four data sets of Table 2 have this form).
"""

from typing import Any

from tinyllava.conversation import Conversation
from tinyllava.data.defects import Defect
from tinyllava.data.readers.form import (
    ROLES,
    Reading,
    Turn,
    as_text,
    decode_list,
    make_conversation,
    note_unknown,
    read_trained,
    refuse_preferences,
    split_marks,
)


def read_record(raw: Any, at: str, reading: Reading) -> Conversation:
    """Return the conversation of one record.

    Raises:
        Defect: the first thing that is wrong with it.
    """
    where = reading.place(at, raw)
    found = turns_of(raw, where) if isinstance(raw, dict) else None
    if not isinstance(found, list) or not found:
        refuse_preferences(raw if isinstance(raw, dict) else {}, where)
        detail = f"expected an object with a non-empty list 'conversations', found {_describe(raw)}"
        raise Defect("malformed", where, detail)
    turns = [_turn(turn, number, where) for number, turn in enumerate(found)]
    note_unknown(raw, (), reading, found)
    return make_conversation(raw, turns, at, reading)


def turns_of(raw: dict[str, Any], where: str) -> Any:
    """Return the turns of a record, whatever they are: a list, or another value in its place.

    Raises:
        Defect: a cell of a table spells them in a way that cannot be read.
    """
    return decode_list(raw, "conversations" if "conversations" in raw else "conversation", where)


def _describe(raw: Any) -> str:
    if isinstance(raw, dict):
        return f"the fields {', '.join(map(str, raw))[:80] or 'none'}"
    return {list: "a list", type(None): "null"}.get(type(raw), str(raw)[:80])


def _turn(turn: Any, number: int, where: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str | int | float):
        shown = turn.get("value", turn) if isinstance(turn, dict) else turn
        raise Defect("malformed", where, f"turn {number} has no text 'value': {str(shown)[:80]}")
    role = ROLES.get(str(turn.get("from")).lower())
    if role is None:
        raise Defect(
            "malformed", where, f"turn {number} is from {turn.get('from')!r}; allowed: human, gpt, system"
        )
    text = as_text(turn["value"], f"turn {number}", where)
    return Turn(role, split_marks(text), read_trained(turn, role, number, where))
