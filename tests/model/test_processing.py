"""Mask, layouts and pixels: properties over generated conversations, literal strings, references."""

import copy
import dataclasses
import resource
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
)

from processes import start
from tinyllava.config import ModelConfig
from tinyllava.conversation import Conversation, ImageRef, Message, to_chat
from tinyllava.data.images import open_image
from tinyllava.errors import DataError
from tinyllava.model.assemble import assemble, open_processor
from tinyllava.model.compat import render_template
from tinyllava.model.packing import ImagePacking
from tinyllava.model.processing import (
    IMAGE_TOKEN,
    MAX_CROPPED_RATIO,
    MAX_PADDED_PX,
    TinyLlavaProcessor,
    pad_to_square,
)
from tinyllava.model.rendering import Settings, leading_bos, locate_tokens
from tinyllava.parts.templates import (
    GAP,
    NO_GAP,
    as_published,
    gap_of,
    is_packaged,
    read_template,
    template_names,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# Template, the toy tokenizer it is meant for, what an answer ends with.
LAYOUTS = {
    "phi": ("phi", "<|endoftext|>"),
    "llama": ("llama", "</s>"),
    "gemma": ("llama", "</s>"),
    "chatml": ("chatml", "<|im_end|>"),
    "qwen": ("chatml", "<|im_end|>"),
    "llama3": ("llama3", "<|eot_id|>"),
    "caption": ("llama", "\n"),
    "caption-phi": ("phi", "\n"),
    "caption-chatml": ("chatml", "\n"),
}


def make_processors(parts: dict[str, Path]) -> dict[str, TinyLlavaProcessor]:
    """A processor for each layout, with the toy tokenizer of its kind."""
    made = {}
    for layout, (kind, _) in LAYOUTS.items():
        language_model = parts["phi" if kind == "llama3" else kind]
        processor = assemble(
            ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(language_model))
        )[1]
        if kind == "llama3":
            headers = ["<|start_header_id|>", "<|end_header_id|>"]
            marks = {
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|eot_id|>",
                "additional_special_tokens": headers,
            }
            processor.tokenizer.add_special_tokens(marks)
        if not layout.startswith("caption"):
            processor.chat_template = read_template(layout)
        made[layout] = processor
    return made


@pytest.fixture(scope="module")
def processors(parts) -> dict[str, TinyLlavaProcessor]:
    return make_processors(parts)


def stage_template(layout: str) -> str | None:
    """The template that a stage brings; None for the checkpoint's own."""
    return read_template("caption") if layout.startswith("caption") else None


SPECIALS = ("<image>", "<s>", "</s>", "<unk>", "<|")
words = st.sampled_from(
    ["ASSISTANT:", "USER: ", "assistant", "a red circle", "'s", "...", "12", "\n", "\n\n", "  ", "?!", "<"]
)
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=6)
joined = st.lists(words | anything, max_size=8).map("".join)
texts = joined.filter(lambda text: not any(special in text for special in SPECIALS))
spoken = texts.map(str.strip).filter(bool)
image = ImageRef(name="x")


@st.composite
def conversations(draw) -> Conversation:
    messages = [Message(role="system", text=draw(spoken))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        num_images = draw(st.integers(0, 2))
        question = draw(texts if num_images else spoken)
        messages.append(Message(role="user", text=question, images=(image,) * num_images))
        messages.append(Message(role="assistant", text=draw(spoken)))
    return Conversation(messages=tuple(messages))


def supervised_runs(processor, encoded) -> list[str]:
    """The decoded text of each unbroken run of supervised tokens."""
    pairs = zip(encoded.supervised, encoded.input_ids, strict=True)
    groups = [(inside, list(group)) for inside, group in groupby(pairs, key=lambda pair: pair[0])]
    runs = [[token for _, token in group] for inside, group in groups if inside]
    return [processor.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(conversation=conversations())
@settings(max_examples=100, deadline=None)
def test_what_is_supervised_decodes_to_the_answers_and_their_ends(processors, layout, conversation):
    processor, end = processors[layout], LAYOUTS[layout][1]
    encoded = processor.encode(conversation, template=stage_template(layout))
    answers = [m.text + end for m in conversation.messages if m.role == "assistant"]
    runs = supervised_runs(processor, encoded)
    if layout.startswith("caption"):  # nothing stands between two captions but an image
        assert "".join(runs) == "".join(answers)
    elif layout == "phi":
        assert runs == [" " + answer for answer in answers]
    else:
        assert runs == answers
    assert len(encoded.supervised) == len(encoded.input_ids)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(conversation=conversations())
@settings(max_examples=60, deadline=None)
def test_every_prompt_is_the_beginning_of_the_conversation_it_is_trained_in(processors, layout, conversation):
    processor = processors[layout]
    template = stage_template(layout)
    whole = processor.encode(conversation, template=template).input_ids
    for number, message in enumerate(conversation.messages):
        if message.role == "assistant" and not (layout.startswith("caption") and number > 2):
            asked = dataclasses.replace(conversation, messages=conversation.messages[:number])
            prompt = processor.encode(asked, template=template, open_answer=True)
            assert prompt.input_ids == whole[: len(prompt.input_ids)]
            assert not any(prompt.supervised[-1:])


@pytest.mark.parametrize("layout", LAYOUTS)
@given(conversation=conversations())
@settings(max_examples=30, deadline=None)
def test_image_tokens_are_counted_exactly_and_never_supervised(processors, layout, conversation):
    processor = processors[layout]
    encoded = processor.encode(conversation, template=stage_template(layout))
    at_image = [token == processor.image_token_id for token in encoded.input_ids]
    assert sum(at_image) == 4 * len(conversation.images)
    assert encoded.text.count(IMAGE_TOKEN) == len(conversation.images)
    assert not any(inside for inside, image in zip(encoded.supervised, at_image, strict=True) if image)


@pytest.mark.parametrize("layout", ["phi", "llama", "chatml", "llama3"])
@given(conversation=conversations())
@settings(max_examples=20, deadline=None)
def test_generate_gets_the_ids_that_training_has(processors, layout, conversation):
    processor = processors[layout]
    asked = dataclasses.replace(conversation, messages=conversation.messages[:-1])
    images = [Image.new("RGB", (9, 7))] * len(asked.images)
    inputs = processor(images=images, text=processor.render(asked, open_answer=True)[0])
    assert inputs["input_ids"][0].tolist() == processor.encode(asked, open_answer=True).input_ids
    assert len(inputs.get("pixel_values", [])) == len(images)


LENGTHS = (
    "{% for m in messages %}{% generation %}{{ m.content[-1].text | length }}{% endgeneration %}{% endfor %}"
)


@pytest.mark.parametrize("name", [*template_names(), "of a user"])
@given(talk=conversations(), blanks=st.text(" \t\n\v\u3000", max_size=3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_template_that_is_rendered_once_for_a_shape_gives_what_it_gives_each_time(name, talk, blanks, data):
    """Also where turns have outer blanks or nothing else, and for templates that look at the text."""
    template = LENGTHS if name == "of a user" else read_template(name)
    variants = [template, as_published(template), template.replace(NO_GAP, GAP)]
    assert [is_packaged(one) for one in variants] == [name != "of a user"] * 3
    turns = [
        dataclasses.replace(m, text=blanks + m.text * data.draw(st.booleans()) + blanks)
        for m in talk.messages[: data.draw(st.integers(1, len(talk.messages)))]
    ]
    talk = dataclasses.replace(talk, messages=tuple(turns))
    for one in variants:
        filled = Settings(
            one, data.draw(st.booleans()), "<s>", "</s>", "<s>", data.draw(st.sampled_from(["", " "]))
        )
        assert filled.render(talk) == filled.render_alone(talk)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(some=st.lists(conversations(), max_size=4))
@example(some=[])
@settings(max_examples=10, deadline=None)
def test_many_together_are_tokenised_as_each_alone_by_the_tokenizer_itself(processors, layout, some):
    """And as with typed content throughout, whatever the last call asked the tokenizer to cut off or add."""
    processor, template = processors[layout], stage_template(layout)
    text = template or processor.chat_template
    names = {"bos_token": processor.tokenizer.bos_token or "", "eos_token": processor.tokenizer.eos_token}
    names |= {"gap": gap_of(processor.chat_template)}
    names |= {"leading_bos": leading_bos(processor.tokenizer, processor.chat_template)}
    processor.tokenizer("a b c", truncation=True, max_length=2)
    processor.tokenizer("a", padding="max_length", max_length=4)
    together = processor.encode_all(some, template=template)
    for conversation, encoded in zip(some, together, strict=True):
        typed, spans = render_template(to_chat(conversation), text, **names)
        own = processor.tokenizer(typed, add_special_tokens=False, return_offsets_mapping=True)
        starts = [
            any(start <= s and e <= end and s < e for start, end in spans) for s, e in own["offset_mapping"]
        ]
        repeats = [4 if id_ == processor.image_token_id else 1 for id_ in own["input_ids"]]
        assert encoded.text == typed
        assert encoded.token_ids.tolist() == np.repeat(own["input_ids"], repeats).tolist()
        assert encoded.is_supervised.tolist() == np.repeat(starts, repeats).tolist()
        assert processor.encode(conversation, template=template).input_ids == encoded.input_ids


TWO_TURNS = Conversation(
    messages=(
        Message(role="user", text="What is it?", images=(image,)),
        Message(role="assistant", text="A dog."),
        Message(role="user", text="Sure?"),
        Message(role="assistant", text="Yes."),
    )
)

# Worked out by hand from the published layouts.
WRITTEN = {
    "phi": f"{SYSTEM}USER: <image>\nWhat is it? ASSISTANT: A dog.<|endoftext|>"
    "USER: Sure? ASSISTANT: Yes.<|endoftext|>",
    "llama": f"<s>{SYSTEM}USER: <image>\nWhat is it? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT: Yes.</s>",
    "gemma": f"<s>{SYSTEM}USER: <image>\nWhat is it? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT: Yes.</s>",
    "chatml": "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
    "caption": "<s><image>A dog.\nYes.\n",
    "caption-phi": "<image>A dog.\nYes.\n",
    "caption-chatml": "<|im_start|><image>A dog.\nYes.\n",  # BOS, as that model's conversations begin
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_the_published_one(processors, layout):
    text, spans = processors[layout].render(TWO_TURNS, template=stage_template(layout))
    assert text == WRITTEN[layout]
    end = LAYOUTS[layout][1]
    space = " " if "ASSISTANT:" in text else ""  # the space before the answer is learnt with it
    assert [text[a:b] for a, b in spans] == [f"{space}A dog.{end}", f"{space}Yes.{end}"]


@pytest.mark.parametrize(
    ("layout", "end"),
    [
        ("phi", "Sure? ASSISTANT:"),
        ("llama", "Sure? ASSISTANT:"),
        ("gemma", "Sure? ASSISTANT:"),
        ("chatml", "Sure?<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3", "Sure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ],
)
def test_an_open_answer_ends_where_the_assistant_is_to_speak(processors, layout, end):
    asked = dataclasses.replace(TWO_TURNS, messages=TWO_TURNS.messages[:3])
    text, spans = processors[layout].render(asked, open_answer=True)
    assert text.endswith(end)
    assert len(spans) == 1


@pytest.mark.parametrize(
    ("layout", "start"),
    [
        ("phi", "Be short. USER: <image>\n"),
        ("llama", "<s>Be short. USER: <image>\n"),
        ("chatml", "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<image>\n"),
        ("caption", "<s><image>A dog."),
    ],
)
def test_a_system_line_of_the_record_takes_the_place_of_the_templates(processors, layout, start):
    system = Message(role="system", text="Be short.")
    conversation = dataclasses.replace(TWO_TURNS, messages=(system, *TWO_TURNS.messages))
    text, _ = processors[layout].render(conversation, template=stage_template(layout))
    assert text.startswith(start)


def test_a_stage_may_bring_its_own_template(processors):
    text, _ = processors["llama"].render(TWO_TURNS, template=read_template("caption"))
    assert text == WRITTEN["caption"]


def test_a_token_over_the_edge_of_an_answer_is_refused_with_the_record(processors):
    template = "{% for m in messages %}{{ 'r' }}{% generation %}{{ 'ed' }}{% endgeneration %}{% endfor %}"
    one = Conversation(messages=(Message(role="assistant", text="x"),), id="r7", source="a.json")
    with pytest.raises(DataError, match=r"a\.json: record r7: the token 're' spans the end of the prompt"):
        processors["phi"].encode(one, template=template)


def test_images_and_marks_in_the_prompts_must_agree(processors):
    with pytest.raises(DataError, match="1 images for 2 <image> tokens in the prompts"):
        processors["phi"](images=[Image.new("RGB", (4, 4))], text=["<image>", "<image>"])


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def padded(image: Image.Image, colour: tuple[int, ...]) -> np.ndarray:
    """A square of one colour with the image in the middle, in numpy."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    square = np.empty((max(height, width), max(height, width), 3), dtype=np.uint8)
    square[:] = colour
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


@given(width=st.integers(1, 40), height=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_pad_to_square_against_numpy(width, height):
    image = noise(width, height)
    assert np.array_equal(np.asarray(pad_to_square(image, (122, 116, 104))), padded(image, (122, 116, 104)))


SIZES = [(50, 40), (31, 64), (28, 28), (7, 100), (100, 3), (3, 50), (1, 1), (40, 1), (640, 11)]


def processor_of(parts: dict[str, Path], encoder: str, aspect: str) -> TinyLlavaProcessor:
    config = ModelConfig(
        vision_encoder=str(parts[encoder]), language_model=str(parts["llama"]), image_aspect=aspect
    )
    return assemble(config)[1]


def through(reference, pixels: np.ndarray) -> torch.Tensor:
    """One image through a processor of transformers, told where the channels are."""
    return reference(pixels, return_tensors="pt", input_data_format="channels_last")["pixel_values"]


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_square_is_what_the_image_processor_does_alone(parts, encoder):
    processor = processor_of(parts, encoder, "square")
    reference = AutoImageProcessor.from_pretrained(parts[encoder], backend="pil")
    for size in SIZES:
        found = processor.to_pixels([noise(*size)])
        torch.testing.assert_close(
            found, through(reference, np.asarray(noise(*size))), rtol=0, atol=0, msg=str(size)
        )


@pytest.mark.parametrize(("encoder", "colour"), [("clip", (122, 116, 104)), ("siglip", (127, 127, 127))])
def test_pad_is_the_image_processor_after_a_square_of_the_mean_colour(parts, encoder, colour):
    processor = processor_of(parts, encoder, "pad")
    reference = AutoImageProcessor.from_pretrained(parts[encoder], backend="pil")
    assert processor.mean_colour == colour
    pixels = processor.to_pixels([noise(*size) for size in SIZES])
    for size, found in zip(SIZES, pixels, strict=True):
        expected = through(reference, padded(noise(*size), colour))[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=str(size))


def test_pad_agrees_with_the_stock_llavan_image_processor(parts):
    from transformers import LlavaImageProcessorPil

    reference = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = processor_of(parts, "clip", "pad")
    for size in [(50, 40), (31, 64), (28, 28)]:
        found, expected = processor.to_pixels([noise(*size)]), through(reference, np.asarray(noise(*size)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def grown_mb(processor: TinyLlavaProcessor, paths: list[Path]) -> float:
    """Return the memory that images take at most, in MB above what an ordinary one takes."""
    processor.to_pixels([Image.new("RGB", (640, 480))])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths:
        processor.to_pixels([open_image(ImageRef(path=path), processor.background)])
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


KINDS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "siglip": SiglipImageProcessorPil(size={"height": 28, "width": 28}),
    "crops more": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
    "uneven": CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, rescale_factor=1 / 127, resample=2
    ),
}

PACKINGS: dict[tuple[str, str], ImagePacking] = {}


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("kind", KINDS)
@given(sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_packed_images_are_bytes_and_unpack_to_the_image_processors_pixels(processors, kind, aspect, sizes):
    processor = copy.copy(processors["chatml"])
    processor.image_processor, processor.image_aspect = KINDS[kind], aspect
    if (kind, aspect) not in PACKINGS:
        PACKINGS[kind, aspect] = ImagePacking(processor)
    packing = PACKINGS[kind, aspect]
    noise = np.random.default_rng(len(sizes))
    images = [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    packed = packing.pack(images)
    assert packed.dtype == torch.uint8
    assert packed.nbytes == packing.image_bytes * len(images) == 3 * 28 * 28 * len(images)
    assert torch.equal(packing.unpack(packed), processor.to_pixels(images))


class _Stretching(CLIPImageProcessorPil):
    """Makes an image's darkest value 0: no table of bytes gives that."""

    def __call__(self, images, **kwargs):
        found = super().__call__(images, **kwargs)
        found["pixel_values"] = found["pixel_values"] - found["pixel_values"].min()
        return found


def test_an_image_processor_that_looks_at_the_whole_image_is_asked_itself(processors):
    processor = copy.copy(processors["chatml"])
    size = {"height": 28, "width": 28}
    processor.image_processor = _Stretching(size={"shortest_edge": 28}, crop_size=size)
    packing = ImagePacking(processor)
    images = [Image.new("RGB", (40, 30), "red")]
    assert not packing.is_packed
    assert torch.equal(packing.unpack(packing.pack(images)), processor.to_pixels(images))


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_a_strip_takes_no_gigabytes(parts, tmp_path, encoder, aspect):
    """16,000 x 12 pixels are 677 bytes of PNG; padded as they are they took a worker to 3.8 GB."""
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts["llama"])
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    TinyLlavaProcessor(
        AutoImageProcessor.from_pretrained(parts[encoder], backend="pil"),
        tokenizer,
        chat_template=read_template("llama"),
        transparency="blend",
    ).save_pretrained(tmp_path / "processor")
    sizes = [(16_000, 12), (1, 16_384), (16_384, 1)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    processor = open_processor(tmp_path / "processor")
    processor.image_aspect = aspect
    # The peak is that of a process of its own, which begins with what this one holds.
    measured = start(lambda: print(grown_mb(processor, paths), flush=True), tmp_path / "said")
    measured.join()
    assert measured.exitcode == 0
    assert float((tmp_path / "said").read_text()) < 400


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("size", [(50, 40), (MAX_PADDED_PX, 300), (30, 30 * MAX_CROPPED_RATIO), (1, 1)])
def test_images_of_ordinary_shape_keep_every_pixel(parts, processors, encoder, aspect, size):
    """What the encoder's own image processor makes of the image, padded or not, and nothing else."""
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stock = AutoImageProcessor.from_pretrained(parts[encoder], backend="pil")
    processor = copy.copy(processors["llama"])
    processor.image_processor, processor.image_aspect = stock, aspect
    image = Image.fromarray(noise)
    colour = tuple(int(255 * channel) for channel in stock.image_mean)
    given = Image.fromarray(padded(image, colour)) if aspect == "pad" else image
    expected = stock([given], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.to_pixels([image]), expected)


def test_of_a_strip_the_same_centre_is_cropped(parts, processors):
    """Where the centre is cropped, cutting the ends off first changes nothing that can be seen."""
    stock = AutoImageProcessor.from_pretrained(parts["clip"], backend="pil")
    processor = copy.copy(processors["llama"])
    processor.image_processor, processor.image_aspect = stock, "square"
    noise = np.random.default_rng(2).integers(0, 256, (8, 400, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = stock([image], return_tensors="pt")["pixel_values"]
    assert torch.allclose(processor.to_pixels([image]), expected, atol=0.02)


def test_tokens_are_located_in_spans_as_by_looking_at_each():
    """Every token against every span, written as the definition reads."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        length = int(rng.integers(1, 30))
        cuts = sorted(rng.integers(0, length + 1, size=2 * int(rng.integers(0, 4))).tolist())
        spans = list(zip(cuts[::2], cuts[1::2], strict=True))
        tokens = rng.integers(0, length + 1, size=(int(rng.integers(0, 12)), 2))
        offsets = np.sort(tokens, axis=1)
        inside = [any(a <= s and e <= b for a, b in spans) and e > s for s, e in offsets.tolist()]
        joins = [
            not within and any(s < edge < e for span in spans for edge in span)
            for within, (s, e) in zip(inside, offsets.tolist(), strict=True)
        ]
        found, joining = locate_tokens(offsets, spans)
        assert found.tolist() == inside
        assert joining == (joins.index(True) if any(joins) else None)


PLACED = ("chatml", "llama", "phi", "llama3")


@pytest.mark.parametrize("layout", PLACED)
def test_an_image_stands_where_the_text_has_it(processors, layout):
    processor = processors[layout]
    refs = (ImageRef(name="a.png"), ImageRef(name="b.png"))
    question = Message(role="user", text="Is </s>  like ?", images=refs, places=(8, 14))
    conversation = Conversation(messages=(question, Message(role="assistant", text="Yes.")))
    encoded = processor.encode(conversation)
    assert "Is </s> <image> like <image>?" in encoded.text
    ids, num_image = encoded.input_ids, processor.num_image_tokens
    assert ids.count(processor.image_token_id) == 2 * num_image
    start = ids.index(processor.image_token_id)
    assert ids[start : start + num_image] == [processor.image_token_id] * num_image
    assert ids[start + num_image] != processor.image_token_id  # the text between the two
    caption = processor.encode(conversation, template=read_template("caption"))
    assert caption.text.count("<image>") == 2


@pytest.mark.parametrize("layout", PLACED)
def test_an_answer_without_loss_is_read_and_not_learned(processors, layout):
    processor = processors[layout]
    turns = [Message(role=role, text=f"{role}{n}") for n in range(3) for role in ("user", "assistant")]
    whole = processor.encode(Conversation(messages=tuple(turns)))
    turns[3] = dataclasses.replace(turns[3], is_trained=False)
    encoded = processor.encode(Conversation(messages=tuple(turns)))
    assert encoded.input_ids == whole.input_ids
    runs = supervised_runs(processor, whole)
    assert len(runs) == 3
    assert supervised_runs(processor, encoded) == [runs[0], runs[2]]
