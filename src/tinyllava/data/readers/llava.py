"""LLaVA's records: ``conversations`` with ``from`` and ``value``, ``<image>`` for each of their images.

Paper: section 4.1.2 (the four data sets of Table 2 come in this form).
"""

from typing import Any

from tinyllava.conversation import Conversation
from tinyllava.data.defects import Defect
from tinyllava.data.readers.form import (
    ROLES,
    Reading,
    Turn,
    make_conversation,
    note_unknown,
    read_trained,
    split_marks,
)
from tinyllava.files import is_text


def read_record(raw: Any, at: str, reading: Reading) -> Conversation:
    """Return the conversation of one record.

    Raises:
        Defect: the first thing that is wrong with it.
    """
    where = reading.place(at, raw)
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("conversations"), list)
        or not raw["conversations"]
    ):
        raise Defect("malformed", where, "expected an object with a non-empty list 'conversations'")
    turns = [_turn(turn, number, where) for number, turn in enumerate(raw["conversations"])]
    note_unknown(raw, (), reading, raw["conversations"])
    return make_conversation(raw, turns, at, reading)


def _turn(turn: Any, number: int, where: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise Defect("malformed", where, f"turn {number} has no text 'value': {str(turn)[:80]}")
    if not isinstance(turn.get("from"), str) or turn["from"] not in ROLES:
        raise Defect(
            "malformed", where, f"turn {number} is from {turn.get('from')!r}; allowed: human, gpt, system"
        )
    if not is_text(turn["value"]):
        raise Defect(
            "malformed", where, f"turn {number} contains an unpaired surrogate: {turn['value'][:80]!a}"
        )
    role = ROLES[turn["from"]]
    return Turn(role, split_marks(turn["value"]), read_trained(turn, role, number, where))
