"""The text part of a GGUF file: tokens, the rules that split text into them, and the chat template."""

import json
from typing import Any

import gguf

from tinyllava.conversation import Conversation, Message
from tinyllava.errors import CheckpointError
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.parts.templates import gap_of

# Splitting rules of byte-level BPE that llama.cpp knows, by the pattern or the steps of the pipeline.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
}
_BYTE_LEVEL = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}

# llama.cpp hands a message over as one text, with <__media_...__> where an image was. Ours are in front of
# the text, one a line.
_SAID = """{%- macro said_there(content) -%}
{%- set pieces = content.split('<__media_') -%}
{%- set words = namespace(text=pieces[0]) -%}
{%- for piece in pieces[1:] -%}
{%- set words.text = words.text + piece.split('>')[1:] | join('>') -%}
{%- endfor -%}
{%- set line = '\\n' if TRIMMED or words.text else '' -%}
{%- for piece in pieces[1:] -%}{{ '<__media_' + piece.split('>')[0] + '>' + GAP + line }}{%- endfor -%}
{{- words.text | trim if TRIMMED else words.text -}}
{%- endmacro -%}
"""
_STRING = "{%- if content is string -%}"


def add_tokenizer(writer: gguf.GGUFWriter, processor: TinyLlavaProcessor, num_rows: int) -> None:
    """Add tokens, merges, special tokens and the chat template.

    Args:
        num_rows: of the embedding; rows without a token are marked as unused.

    Raises:
        CheckpointError: a kind of tokenizer, or a splitting rule, that llama.cpp does not have.
    """
    tokenizer = processor.tokenizer
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    if pipeline["model"]["type"] != "BPE":
        raise CheckpointError(
            f"tokenizer of type {pipeline['model']['type']!r}: the GGUF export supports only BPE."
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in pipeline["model"]["merges"]]
    tokens, types = _tokens(tokenizer, pipeline, num_rows, processor.image_token_id)
    if pipeline["model"].get("byte_fallback"):
        _add_pieces(writer, processor, tokens, merges)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_split(pipeline))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)  # the template writes it
    writer.add_add_eos_token(False)
    writer.add_chat_template(template_there(processor))
    writer.add_string(gguf.Keys.Tokenizer.HF_JSON, json.dumps(pipeline, ensure_ascii=False))


def _tokens(
    tokenizer: Any, pipeline: dict[str, Any], num_rows: int, image_token: int
) -> tuple[list[str], list[int]]:
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(known) >= num_rows:
        raise CheckpointError(
            f"the tokenizer has token {max(known)}, but the embedding has only {num_rows} rows."
        )
    added = {token["id"]: token["special"] for token in pipeline["added_tokens"]}
    has_bytes = bool(pipeline["model"].get("byte_fallback"))
    tokens, types = [], []
    for number in range(num_rows):
        token = known.get(number, f"<unused row {number}>")
        kind = gguf.TokenType.NORMAL
        if number not in known or number == image_token:
            kind = gguf.TokenType.UNUSED  # an image needs no token there, and one typed by a user is text
        elif token == tokenizer.unk_token and has_bytes:
            kind = gguf.TokenType.UNKNOWN
        elif number in added:
            kind = gguf.TokenType.CONTROL if added[number] else gguf.TokenType.USER_DEFINED
        elif has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _add_pieces(
    writer: gguf.GGUFWriter, processor: TinyLlavaProcessor, tokens: list[str], merges: list[str]
) -> None:
    """Add a SentencePiece-like BPE: the earlier a merge, the higher the score of what it makes."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    first = processor.tokenizer.convert_ids_to_tokens(
        processor.tokenizer("A", add_special_tokens=False)["input_ids"]
    )[0]
    # Where the template writes the blank behind BOS and images itself, no second one is added.
    writer.add_add_space_prefix(first.startswith("▁") and not gap_of(processor.chat_template))


def _name_split(pipeline: dict[str, Any]) -> str:
    steps = pipeline["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = tuple(step.get("type", "") for step in steps)
    if kinds in _BYTE_LEVEL and pipeline["normalizer"] is None:
        return _BYTE_LEVEL[kinds]
    pattern = steps[0].get("pattern", {}).get("Regex", "")
    if kinds == ("Split", "ByteLevel") and pattern in _SPLITS:
        return _SPLITS[pattern]
    raise CheckpointError(
        f"the tokenizer splits texts by {pattern or kinds!r}: the GGUF export does not support this "
        f"rule (supported: {', '.join([*_BYTE_LEVEL.values(), *_SPLITS.values()])})."
    )


def template_there(processor: TinyLlavaProcessor) -> str:
    """Return the chat template for llama.cpp, which puts image and text of a message into one string.

    Raises:
        CheckpointError: a template of somebody's own, which does not read a message's text that way.
    """
    template: str = processor.chat_template
    trimmed = "{%- set trimmed = false -%}" not in template
    said = _SAID.replace("GAP", repr(gap_of(template))).replace("TRIMMED", str(trimmed).lower())
    head, found, tail = template.partition(_STRING)
    if not found:
        raise CheckpointError(
            "the chat template does not accept plain text (content is string), which is all that llama.cpp "
            "passes. Give the model one of the templates that `tinyllava show templates` lists."
        )
    calls = "{%- if content is string and '<__media_' in content -%}{{- said_there(content) -}}"
    return said + head + calls + "{%- elif content is string -%}" + tail


def write_modelfile(processor: TinyLlavaProcessor, model: str, mmproj: str) -> str:
    """Return an Ollama Modelfile: both files, the template in Ollama's language, greedy answers.

    The pieces of the template are cut out of conversations that our own template renders.
    """
    question, answer, system = "{{ .Content }}", "\x01", "{{ .System }}"

    def render(*turns: tuple[Any, str]) -> str:
        messages = tuple(Message(role=role, text=text) for role, text in turns)
        return processor.render(Conversation(messages=messages), open_answer=True)[0]

    whole = render(("user", question), ("assistant", answer), ("user", question))
    before, lead, after = whole.split(question)
    lead, behind = lead.split(answer)
    # `before` and `behind` end alike, with what stands in front of every question.
    length = next(
        n
        for n in range(min(len(before), len(behind)), -1, -1)
        if before[len(before) - n :] == behind[len(behind) - n :]
    )
    head, end, user = (
        before[: len(before) - length],
        behind[: len(behind) - length],
        behind[len(behind) - length :],
    )
    with_system = render(("system", system), ("user", question)).split(question)[0]
    with_system = with_system.removesuffix(user)
    template = (
        f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{head}{{{{ end }}}}{{{{ range .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{user}{{{{ .Content }}}}{after}'
        f'{{{{ else if eq .Role "assistant" }}}}{lead.removeprefix(after)}{{{{ .Content }}}}{end}'
        "{{ end }}{{ end }}"
    )
    stop = processor.tokenizer.eos_token
    return (
        f'FROM ./{model}\nFROM ./{mmproj}\nTEMPLATE """{template}"""\n'
        f"PARAMETER stop {json.dumps(stop)}\nPARAMETER temperature 0\n"
    )
