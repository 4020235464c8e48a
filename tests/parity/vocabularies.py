"""Real vocabularies in the forms that transformers 4's tokenizers in Python write them.

SentencePiece: the 32,000 pieces of the Llama kind in mistral-common, with a Llama's or a Gemma's settings.
Byte-level BPE: the 20,000 most frequent tokens of mistral-common's tekken, as vocab.json and merges.txt.
"""

import base64
import json
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

_DATA = files("mistral_common") / "data"
_NUM_TOKENS = 20_000
_BLANKS = range(2, 32)  # lengths of the runs of blanks that Phi-2's tokenizer has as tokens of their own


def write_llama(folder: Path, legacy: bool | None) -> Path:
    """tokenizer.model with a Llama's settings; ``legacy`` None leaves the setting out, as old folders do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes((_DATA / "tokenizer.model.v1").read_bytes())
    settings: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "added_tokens_decoder": {
            str(i): _added(token, special=True) for i, token in enumerate(("<unk>", "<s>", "</s>"))
        },
    }
    return _write(folder, settings if legacy is None else settings | {"legacy": legacy})


def write_gemma(folder: Path) -> Path:
    """tokenizer.model as Gemma's: no blank in front of a text, pad, eos, bos and unk first."""
    folder.mkdir(parents=True, exist_ok=True)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((_DATA / "tokenizer.model.v1").read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    names = ("<pad>", "<eos>", "<bos>", "<unk>")
    control, unknown = 3, 2
    del model.pieces[:3]
    for name in reversed(names):
        piece = sentencepiece_model_pb2.ModelProto.SentencePiece(
            piece=name, score=0, type=unknown if name == "<unk>" else control
        )
        model.pieces.insert(0, piece)
    spec = model.trainer_spec
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = range(4)
    spec.pad_piece, spec.eos_piece, spec.bos_piece, spec.unk_piece = names
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "tokenizer_class": "GemmaTokenizer",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "added_tokens_decoder": {str(i): _added(token, special=True) for i, token in enumerate(names)},
    }
    return _write(folder, settings)


def write_bpe(folder: Path, kind: str) -> Path:
    """vocab.json and merges.txt of ``phi`` (CodeGen), ``stablelm`` (GPT-2) or ``qwen2``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = _byte_level()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    eos, added = "<|endoftext|>", {str(len(tokens)): _added("<|endoftext|>", special=True)}
    if kind == "phi":
        added |= {str(len(tokens) + 32 - n): _added(" " * n, special=False) for n in _BLANKS}
    settings = {
        "phi": {"tokenizer_class": "CodeGenTokenizer", "bos_token": eos, "unk_token": eos},
        "stablelm": {"tokenizer_class": "GPT2Tokenizer", "bos_token": eos, "unk_token": eos},
        "qwen2": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "unk_token": None},
    }[kind]
    settings |= {
        "eos_token": eos,
        "pad_token": eos,
        "added_tokens_decoder": added,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "errors": "replace",
    }
    return _write(folder, settings)


def _added(token: str, *, special: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder; Phi-2's runs of blanks are normalised, special tokens are not."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": token, "special": special, "normalized": not special, **flags}


def _write(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@cache
def _byte_level() -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens of tekken by rank in GPT-2's spelling of bytes, and the merge that makes each."""
    tekken = json.loads((_DATA / "tekken_240718.json").read_text(encoding="utf-8"))
    ranked = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"][:_NUM_TOKENS]]
    ranks = {token: rank for rank, token in enumerate(ranked)}
    letters = _letters_of_bytes()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranked}
    merges = []
    for token in ranked[256:]:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # the last merge joins what all earlier ones leave
            joined = [ranks.get(a + b, _NUM_TOKENS) for a, b in pairwise(parts)]
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((spell[parts[0]], spell[parts[1]]))
    return [spell[token] for token in ranked], merges


def _letters_of_bytes() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it is printable, one beyond 255 otherwise."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
