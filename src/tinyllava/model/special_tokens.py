"""Special tokens are the template's: what a turn's own text spells, such as ``</s>`` or ``<image>``, is text.

Paper: section 3.2; the turns of a conversation are what its template marks, and nothing that is said in them.

A text that spells no special token is tokenised as ever. For one that does, each such place is held by a
single unused character while the template is rendered. Then the tokenizer reads the whole text in one pass,
under other spellings of the special tokens that nobody can write: a copy of it knows them by a random name.
Splits, blanks and merges around the template's own marks stay exactly those of the tokenizer.
"""

import dataclasses
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import Tokenizer

from tinyllava.conversation import Conversation

Spans = list[tuple[int, int]]
"""Parts [start, end) of a text, in order."""

_FIRST_UNUSED = 0xF0000  # the private planes of Unicode: no text has a use for their characters
_LAST_UNUSED = 0x10FFFD


@lru_cache(maxsize=16)
def _find(tokenizer: Any, num_tokens: int, template: str) -> "SpecialTokens":
    return SpecialTokens(tokenizer, template)


def find_special_tokens(tokenizer: Any, template: str) -> "SpecialTokens":
    """Return the special tokens of a tokenizer under a chat template."""
    return _find(tokenizer, len(tokenizer), template)


class SpecialTokens:
    """What only a template may write.

    These are the tokenizer's special tokens and whichever of its other added tokens the template names.
    Added tokens that are neither (runs of blanks in Phi-2, places such as ``<loc_12>``) are vocabulary for
    text, and stay it.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._ids = {
            token.content: id_
            for id_, token in added.items()
            if token.content.strip() and (token.special or token.content in template)
        }
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def hide(self, conversation: Conversation) -> tuple[Conversation, dict[str, str]]:
        """Return the conversation with a character for each special token in its text, and their meaning."""
        texts = [message.text for message in conversation.messages]
        found = {token for text in texts for token in self._pattern.findall(text)}
        if not found:
            return conversation, {}
        used = set().union(*texts)
        characters = dict(zip(sorted(found), _unused(used), strict=False))
        messages = tuple(
            dataclasses.replace(
                message, text=self._pattern.sub(lambda place: characters[place.group()], message.text)
            )
            for message in conversation.messages
        )
        meaning = {char: token for token, char in characters.items()}
        return dataclasses.replace(conversation, messages=messages), meaning

    def tokenize(
        self, rendered: str, spans: Spans, hidden: Mapping[str, str]
    ) -> tuple[str, Spans, list[int], Spans]:
        """Tokenise a rendered text in which characters hold the place of spelt special tokens.

        Returns:
            The text that was read (with the other names of special tokens), the spans in it, token ids and
            their offsets.
        """
        renamed, names, ids = self._renamed
        text, spans = substitute(rendered, spans, {**hidden, **names})
        encoding = renamed.encode(text, add_special_tokens=False)
        return text, spans, [ids.get(id_, id_) for id_ in encoding.ids], list(encoding.offsets)

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """A copy of the tokenizer in which special tokens have names that no text contains.

        Returns:
            The copy, its name of each special token, and the tokenizer's id for each id of an added token in
            the copy.
        """
        settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
        secret = secrets.token_hex(16)
        names = {
            token: f"{chr(_FIRST_UNUSED)}{secret}{id_}{chr(_LAST_UNUSED)}" for token, id_ in self._ids.items()
        }
        originals: dict[str, int] = {}
        for added in settings["added_tokens"]:
            added["content"] = names.get(added["content"], added["content"])
            originals[added["content"]] = added["id"]
        settings |= {"truncation": None, "padding": None}
        renamed = Tokenizer.from_str(json.dumps(settings))
        ids = {renamed.token_to_id(content): id_ for content, id_ in originals.items()}
        return renamed, names, {new: id_ for new, id_ in ids.items() if new is not None}


def substitute(text: str, spans: Spans, replacements: Mapping[str, str]) -> tuple[str, Spans]:
    """Replace strings in a text, the longest first, and return it with spans at the same places."""
    if not replacements:
        return text, spans
    pattern = re.compile("|".join(map(re.escape, sorted(replacements, key=len, reverse=True))))
    pieces, ends, grown = [], [(0, 0)], 0  # ends: (end of a replaced string, by how much the text has grown)
    position = 0
    for place in pattern.finditer(text):
        new = replacements[place.group()]
        pieces += [text[position : place.start()], new]
        position = place.end()
        grown += len(new) - len(place.group())
        ends.append((position, grown))
    pieces.append(text[position:])

    def moved(edge: int) -> int:
        return edge + next(growth for end, growth in reversed(ends) if end <= edge)

    return "".join(pieces), [(moved(start), moved(end)) for start, end in spans]


def _unused(used: set[str]) -> Iterator[str]:
    return (chr(code) for code in range(_FIRST_UNUSED, _LAST_UNUSED) if chr(code) not in used)
