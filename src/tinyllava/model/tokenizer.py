"""Open a language model's tokenizer with its files' own tokens; special tokens in a turn's text stay text.

A folder holds a tokenizer as tokenizer.json, as a SentencePiece model (tokenizer.model), or as vocab.json
with merges.txt. Each becomes a pipeline of the tokenizers library, saved as tokenizer.json.
Differs: transformers 5 rebuilds some pipelines by the name of a class (a Llama's loses its normalizer, and so
the blank in front of a text); here the file counts. The published code reads the older forms first, with
transformers 4's classes in Python; the forms of one folder can disagree.

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
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from shutil import copyfile
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from tinyllava.conversation import Conversation
from tinyllava.errors import CheckpointError
from tinyllava.parts.folders import download, read_config
from tinyllava.parts.templates import GAP, NO_GAP

PIECES = "tokenizer.model"
"""SentencePiece's file."""
_PIPELINE = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MERGES = ("vocab.json", "merges.txt")
_FILES = (_PIPELINE, PIECES, *_MERGES, *_SETTINGS)
_BLANK = "▁"  # SentencePiece's sign for a blank
# Kinds of a SentencePiece model's pieces, as its protocol numbers them.
_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in one of the forms that ``open_tokenizer`` reads."""
    return any((folder / name).is_file() for name in (_PIPELINE, PIECES, _MERGES[0]))


def open_tokenizer(source: str | Path, *, older_first: bool = False) -> Any:
    """Return a tokenizer that splits text as the folder's own files say.

    Args:
        source: a folder, or a name on the hub.
        older_first: prefer the older forms, as the published code does.

    Raises:
        CheckpointError: no tokenizer, no network, or a form that cannot be converted exactly.
        OSError, ValueError: a file is damaged.
    """
    folder = Path(source) if Path(source).is_dir() else download(str(source), only=_FILES)
    has_pipeline, has_pieces = ((folder / name).is_file() for name in (_PIPELINE, PIECES))
    has_merges = all((folder / name).is_file() for name in _MERGES)
    if has_pipeline and not (older_first and (has_pieces or has_merges)):
        return _open_pipeline(folder, folder)
    if not has_pieces and not has_merges:
        if ranks := sorted(folder.glob("*.tiktoken")):
            raise CheckpointError(
                f"{ranks[0]}: a tiktoken vocabulary does not define how text is split or which tokens are "
                f"special. The publisher's code does, but it is never run. Copy {_PIPELINE}, or "
                f"{' with '.join(_MERGES)}, of the same language model into the folder."
            )
        raise CheckpointError(
            f"{source}: no tokenizer; expected {_PIPELINE}, {PIECES}, or {' with '.join(_MERGES)}."
        )
    with tempfile.TemporaryDirectory() as scratch:
        for name in _SETTINGS:
            if (folder / name).is_file():
                copyfile(folder / name, Path(scratch) / name)
        if has_pieces:
            _convert_pieces(folder, Path(scratch))
        else:
            by_class = AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig())
            by_class.backend_tokenizer.save(str(Path(scratch) / _PIPELINE))
        tokenizer = _open_pipeline(Path(scratch), folder)
    tokenizer.name_or_path = str(source)
    return tokenizer


def fit_template(template: str, tokenizer: Any) -> str:
    """Return a template that gives the tokenizer the blank it puts in front of a text.

    Such a tokenizer marks the beginning of a text with a blank. The published code encodes the text after
    BOS and the text after an image separately. A pipeline that marks every piece after a special
    token by itself, or nothing at all, needs no help.
    """
    bos = tokenizer.bos_token
    if not bos or NO_GAP not in template:
        return template
    alone, after, spaced = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("A", f"{bos}A", f"{bos} A")
    )
    return template.replace(NO_GAP, GAP) if after[1:] != alone == spaced[1:] else template


def _open_pipeline(folder: Path, where: Path) -> Any:
    """Open a tokenizer.json with the class that takes it as it is.

    Raises:
        CheckpointError: a token would get another id than tokenizer_config.json gives it.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.init_kwargs.pop("legacy", None)  # said by the pipeline; a class would rebuild it by this
    settings = read_config(folder, _SETTINGS[0]) if (folder / _SETTINGS[0]).is_file() else {}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        found = tokenizer.convert_tokens_to_ids(token["content"])
        if str(found) != number:
            raise CheckpointError(
                f"{where / _SETTINGS[0]}: {token['content']!r} is token {number} in this file, but {found} "
                "in the vocabulary; copy the language model's tokenizer files again."
            )
    return tokenizer


def _convert_pieces(folder: Path, target: Path) -> None:
    """Write a SentencePiece model as tokenizer.json, and the special tokens that its file names.

    Raises:
        CheckpointError: sentencepiece is not installed, or the model does what the pipeline cannot.
    """
    model = _read_pieces(folder)
    settings = read_config(folder, _SETTINGS[0]) if (folder / _SETTINGS[0]).is_file() else {}
    rules, trained = model.normalizer_spec, model.trainer_spec
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    symbols = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    obstacles = {
        f"model type {trained.model_type}, not BPE": trained.model_type != _BPE,
        "a table of normalised characters": bool(rules.precompiled_charsmap),
        "extra spaces are removed": rules.remove_extra_whitespaces,
        "spaces as suffixes": trained.treat_whitespace_as_suffix,
        "user-defined pieces next to a leading space": bool(symbols) and rules.add_dummy_prefix,
    }
    if reasons := [reason for reason, holds in obstacles.items() if holds]:
        raise CheckpointError(
            f"{folder / PIECES}: cannot be converted exactly ({', '.join(reasons)}). Give a folder of the "
            f"same language model with a {_PIPELINE}: --language-model DIR."
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            list(_merges(model.pieces, vocabulary)),
            unk_token=trained.unk_piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    )
    # In transformers 4 `legacy`, the default, gives the leading blank to every piece behind a special token.
    is_legacy = settings.get("legacy") is not False
    if rules.add_dummy_prefix and not is_legacy:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, prepend_scheme="first", split=False)
    else:
        prefix = [normalizers.Prepend(_BLANK)] if rules.add_dummy_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _BLANK)])
    decoding: list[Any] = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*decoding, decoders.Strip(" ", left=1)] if rules.add_dummy_prefix else decoding
    )
    tokenizer.add_tokens(symbols)
    tokenizer.save(str(target / _PIPELINE))
    named = {"bos_token": trained.bos_piece, "eos_token": trained.eos_piece, "unk_token": trained.unk_piece}
    text = json.dumps({name: piece for name, piece in named.items() if piece in vocabulary} | settings)
    (target / _SETTINGS[0]).write_text(text, encoding="utf-8")


def _read_pieces(folder: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise CheckpointError(
            f"{folder / PIECES}: reading a SentencePiece model needs sentencepiece: "
            "pip install 'tinyllava[sentencepiece]'. Or give a folder of the same language model with a "
            f"{_PIPELINE}: --language-model DIR."
        ) from error
    from google.protobuf.message import DecodeError

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString((folder / PIECES).read_bytes())
    except DecodeError as error:
        raise CheckpointError(
            f"{folder / PIECES}: not a SentencePiece model; download the file again."
        ) from error
    return model


def _merges(pieces: Any, vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the pairs that make each piece, the best piece first: what SentencePiece's search does."""
    normal = [piece for piece in pieces if piece.type == _NORMAL]
    parts = {piece.piece for piece in normal}
    for piece in sorted(normal, key=lambda piece: (-piece.score, vocabulary[piece.piece])):
        text = piece.piece
        for cut in range(1, len(text)):
            if text[:cut] in parts and text[cut:] in parts:
                yield text[:cut], text[cut:]


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
    """The tokens that only a template may write.

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
        if not self._pattern.search("\0".join(texts)):
            return conversation, {}
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
