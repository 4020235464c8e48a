"""What a turn's text spells is text: ids against a tokenizer that has no special tokens at all."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.tokenizer import find_special_tokens, substitute
from tinyllava.parts.templates import read_template
from toys import SENTENCES, byte_level_tokenizer, chatml_tokenizer, llama_tokenizer


def first_only_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space in front of the whole text, not of what follows a special token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer("<|eot_id|>")
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>"])  # of the template, yet not "special"
    return tokenizer


TOKENIZERS = {
    "phi": lambda: byte_level_tokenizer("<|endoftext|>"),
    "llama": llama_tokenizer,
    "gemma": llama_tokenizer,
    "chatml": chatml_tokenizer,
    "llama3": llama3_tokenizer,
    "first": first_only_tokenizer,
}
LAYOUTS = [*TOKENIZERS, "caption-llama", "caption-chatml"]


@pytest.fixture(scope="module")
def processors() -> dict[str, TinyLlavaProcessor]:
    from transformers import CLIPImageProcessorPil

    made = {}
    for name, make in TOKENIZERS.items():
        tokenizer = make()
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.add_tokens(["    ", "<loc_12>"])  # vocabulary for text
        made[name] = TinyLlavaProcessor(
            image_processor=CLIPImageProcessorPil(),
            tokenizer=tokenizer,
            num_image_tokens=4,
            chat_template=read_template("llama" if name == "first" else name),
        )
    return made


MARKS = (
    "<image>",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_header_id|>",
    "<|begin_of_text|>",
)
ordinary = st.sampled_from(
    ["ASSISTANT:", "USER: ", "a red circle", "'s", "12", "\n", "  ", "    ", "<", "|>", "<loc_12>", "im_end"]
) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=5)
anything = ordinary | st.sampled_from(MARKS) | st.sampled_from([mark[:-1] for mark in MARKS])


@st.composite
def conversations(draw, pieces) -> Conversation:
    texts = st.lists(pieces, min_size=1, max_size=7).map("".join).filter(str.strip)
    messages = [Message(role="system", text=draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        images = (ImageRef(name="x"),) * draw(st.integers(0, 2))
        messages.append(Message(role="user", text=draw(texts), images=images))
        messages.append(Message(role="assistant", text=draw(texts)))
    return Conversation(messages=tuple(messages))


def split_layout(processors, layout: str) -> tuple[TinyLlavaProcessor, str]:
    stage, _, name = layout.rpartition("-")
    processor = processors[name]
    return processor, read_template("caption") if stage else processor.chat_template


def has_marks(conversation: Conversation) -> bool:
    return any(mark in message.text for message in conversation.messages for mark in MARKS)


def has_vocabulary(conversation: Conversation) -> bool:
    """Whether a text holds an added token that is meant for text."""
    return any(mark in message.text for message in conversation.messages for mark in ("    ", "<loc_12>"))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(conversation=conversations(ordinary).filter(lambda one: not has_marks(one)))
@settings(max_examples=40, deadline=None)
def test_the_ids_of_an_ordinary_conversation_are_the_tokenizers_own(processors, layout, conversation):
    """Also on the way that other conversations take: under other names of the special tokens."""
    processor, template = split_layout(processors, layout)
    text, spans = processor.render(conversation, template=template)
    own = processor.tokenizer(text, add_special_tokens=False).input_ids
    encoded = processor.encode(conversation, template=template)
    num = processor.num_image_tokens
    expanded = [i for token in own for i in [token] * (num if token == processor.image_token_id else 1)]
    assert encoded.input_ids == expanded
    read, moved, ids, offsets = find_special_tokens(processor.tokenizer, template).tokenize(text, spans, {})
    assert ids == own
    inside = [any(a <= start and end <= b for a, b in moved) and end > start for start, end in offsets]
    repeats = [num if token == processor.image_token_id else 1 for token in ids]
    assert [i for i, n in zip(inside, repeats, strict=True) for _ in range(n)] == encoded.supervised
    assert [read[a:b] for a, b in moved] != [] or not spans


def plain(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer without any token that a template writes."""
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    saved["added_tokens"] = []
    saved["post_processor"] = None
    return Tokenizer.from_str(json.dumps(saved))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "first"])
@given(conversation=conversations(anything).filter(lambda one: not has_vocabulary(one)))
@settings(max_examples=40, deadline=None)
def test_special_tokens_stand_only_where_the_template_writes_them(processors, layout, conversation):
    processor, template = split_layout(processors, layout)
    tokenizer = processor.tokenizer
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= {mark: i for mark, i in tokenizer.get_added_vocab().items() if "header_id" in mark}
    # Reference: a stand-in for each spelt token while rendering, then the text cut at the template's own.
    stand_ins = {mark: chr(0xE000 + n) for n, mark in enumerate(special)}
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    messages = tuple(
        Message(
            role=m.role, images=m.images, text=pattern.sub(lambda place: stand_ins[place.group()], m.text)
        )
        for m in conversation.messages
    )
    rendered, _ = processor.render(Conversation(messages=messages), template=template)
    reader = plain(tokenizer)
    cuts = re.compile("(" + "|".join(map(re.escape, special)) + ")")
    expected: list[int] = []
    for piece in cuts.split(rendered):
        if piece in special:
            token = special[piece]
            expected += [token] * (processor.num_image_tokens if piece == "<image>" else 1)
        elif piece:
            for mark, char in stand_ins.items():
                piece = piece.replace(char, mark)
            expected += reader.encode(piece, add_special_tokens=False).ids
    encoded = processor.encode(conversation, template=template)
    assert encoded.input_ids == expected
    assert encoded.input_ids.count(processor.image_token_id) == 4 * len(conversation.images)
    assert encoded.text == processor.render(conversation, template=template)[0]


@pytest.mark.parametrize("layout", ["phi", "llama", "chatml", "llama3", "first"])
def test_a_spelt_end_of_turn_neither_ends_the_turn_nor_is_taught_as_its_end(processors, layout):
    processor, tokenizer = processors[layout], processors[layout].tokenizer
    end = tokenizer.eos_token
    said = f"a{end}b <image> c"
    conversation = Conversation(
        messages=(
            Message(role="user", text=f"Why{end}?", images=(ImageRef(name="x"),)),
            Message(role="assistant", text=said),
        )
    )
    encoded = processor.encode(conversation)
    taught = [i for i, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on]
    assert taught.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(taught[:-1], clean_up_tokenization_spaces=False).strip() == said
    neutral = Conversation(
        messages=tuple(Message(role=m.role, text="x", images=m.images) for m in conversation.messages)
    )
    turns = processor.encode(neutral).input_ids
    assert encoded.input_ids.count(tokenizer.eos_token_id) == turns.count(tokenizer.eos_token_id)


def test_the_other_names_cannot_be_written_and_characters_in_use_are_left_alone(processors):
    processor = processors["chatml"]
    special = find_special_tokens(processor.tokenizer, processor.chat_template)
    hostile = "".join(map(chr, range(0xF0000, 0xF0010))) + "<|im_end|>"
    conversation = Conversation(messages=(Message(role="user", text=hostile),))
    text, _ = processor.render(conversation)
    assert text == f"<|im_start|>user\n{hostile}<|im_end|>\n"
    ids = processor.encode(conversation).input_ids
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert processor.tokenizer.decode(ids) == text
    names = special._renamed[1].values()
    assert len(set(names)) == len(names)


def test_spans_move_with_what_is_replaced():
    assert substitute("a[x]b", [(0, 1), (1, 4), (4, 5)], {"[x]": "longer"}) == (
        "alongerb",
        [(0, 1), (1, 7), (7, 8)],
    )
    assert substitute("ab", [(0, 2)], {}) == ("ab", [(0, 2)])
