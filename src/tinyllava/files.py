"""Reading JSON so that every fault of it, however odd, is one error with its line and column."""

import json
import re
import sys
from typing import Any

_TOKENS = re.compile(r'"(?:\\.|[^"\\])*"|[\[\]{}]', re.DOTALL)
_LONG_NUMBER = re.compile(rf"\d{{{sys.int_info.default_max_str_digits + 1},}}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, *, whole_characters: bool = False) -> Any:
    """Parse JSON as ``json.loads`` does, with its error for what makes that one fail in other ways.

    Args:
        whole_characters: also refuse unpaired surrogates (``"\\ud83d"`` alone), which cannot be written.

    Raises:
        json.JSONDecodeError: not JSON, an integer of thousands of digits, nested too deeply.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, _deepest(text)) from None
    except ValueError:  # Python's limit on the digits of an integer
        found = _LONG_NUMBER.search(text)
        digits = f"an integer of {len(found[0]):,} digits" if found else "an integer of too many digits"
        raise json.JSONDecodeError(digits, text, found.start() if found else 0) from None
    if whole_characters and (escaped := _ESCAPED_SURROGATE.search(text)) and not is_text(_write(value)):
        raise json.JSONDecodeError("an unpaired surrogate", text, escaped.start())
    return value


def is_text(value: str) -> bool:
    """Whether a string is Unicode text: JSON and file names can also hold one half of a surrogate pair."""
    return not _SURROGATE.search(value)


def _write(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _deepest(text: str) -> int:
    """Return where the brackets of a text are nested most deeply."""
    depth = most = place = 0
    for token in _TOKENS.finditer(text):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth > most:
            most, place = depth, token.start()
    return place
