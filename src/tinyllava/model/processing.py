"""From a conversation to token ids and pixels: template, expansion of ``<image>``, image size.

Paper: section 3.2; ``Encoded.supervised`` is the indicator of equation 3.
Differs: the published code finds the answers by tokenising every turn again and comparing lengths. Here the
template marks them, and the tokenizer's offsets map the marks to tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from tinyllava.config import Aspect, Transparency
from tinyllava.conversation import Conversation
from tinyllava.errors import DataError
from tinyllava.model.rendering import Bools, Ints, locate_all, settings_of, whole_encodings
from tinyllava.model.tokenizer import Spans, find_special_tokens, substitute

IMAGE_TOKEN = "<image>"
IMAGE_RULES = "tinyllava.images"
"""Key of the processor's ``image_rules`` in files of other formats."""
_PLACE = chr(0x10FFFC)
"""Stands for an image in a text while it is rendered: the last but one private character of Unicode."""
MAX_PADDED_PX = 4096
"""Longest side that is padded as it is: a strip of 16,000 x 12 would become a square of 768 MB."""
MAX_CROPPED_RATIO = 64
"""Longest shape that is resized as it is before a square is cropped from its centre."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A conversation as the model sees it: N token ids, image tokens expanded, and the supervised mask."""

    text: str
    """The rendered text, with one ``<image>`` for each image."""
    token_ids: Ints
    """[N]"""
    is_supervised: Bools
    """[N], whether each token belongs to the set A of equation 3."""
    branches: list[int] = field(default_factory=list)
    """The branch of each token, 0 for the shared beginning; empty where all is one sequence."""

    @cached_property
    def input_ids(self) -> list[int]:
        """``token_ids`` as a list, made when asked for: a training step needs the array alone."""
        ids: list[int] = self.token_ids.tolist()
        return ids

    @cached_property
    def supervised(self) -> list[bool]:
        """``is_supervised`` as a list."""
        flags: list[bool] = self.is_supervised.tolist()
        return flags


class TinyLlavaProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template of one checkpoint.

    Args:
        num_image_tokens: T, the number of tokens per image.
        image_aspect: ``pad`` centres the image on a square of the image processor's mean colour first.
        transparency: ``blend`` puts transparent parts on that colour, ``drop`` ignores transparency.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 576,
        image_aspect: Aspect = "pad",
        transparency: Transparency = "drop",
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_aspect: Aspect = image_aspect
        self.transparency: Transparency = transparency
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, padding: bool = True, **kwargs: Any
    ) -> BatchFeature:
        """Prepare rendered prompts for ``generate``: expanded, tokenised, padded on the left.

        Args:
            images: PIL images in the order of the ``<image>`` in ``text``; None if there are none.
            text: one prompt or a list of prompts, as ``apply_chat_template(tokenize=False)`` gives them.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        images = [images] if isinstance(images, Image.Image) else list(images or [])
        num_expected = sum(t.count(IMAGE_TOKEN) for t in texts)
        if num_expected != len(images):
            raise DataError(
                f"{len(images)} images for {num_expected} {IMAGE_TOKEN} tokens in the prompts. Give one "
                "image for each."
            )
        kwargs = {key: value for key, value in kwargs.items() if key != "return_tensors"}
        kwargs.setdefault("add_special_tokens", False)
        kwargs.setdefault("verbose", False)  # a text that is too long is an error of ours, which says more
        inputs = self.tokenizer(
            [self.expand(t) for t in texts],
            padding=padding,
            padding_side="left",
            return_tensors="pt",
            **kwargs,
        )
        data = dict(inputs)
        if images:
            data["pixel_values"] = self.to_pixels(images)
        return BatchFeature(data=data)

    def expand(self, text: str) -> str:
        """Write T image tokens for each ``<image>``."""
        return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens)

    def to_pixels(self, images: list[Image.Image]) -> Any:
        """Return ``pixel_values`` [I, 3, H, W] of RGB images.

        Very long or large images are cropped or scaled first, so that memory is bounded; see
        ``MAX_PADDED_PX`` and ``MAX_CROPPED_RATIO``. Others keep every pixel.
        """
        return self.image_processor(self.shape_images(images), return_tensors="pt")["pixel_values"]

    def shape_images(self, images: list[Image.Image]) -> list[Image.Image]:
        """Return images as the image processor gets them: cropped, scaled or padded where necessary."""
        if self._crops():
            images = [crop_ends(image) for image in images]
        images = [scale_down(image, self.image_processor.resample) for image in images]
        if self.image_aspect == "pad":
            images = [pad_to_square(image, self.mean_colour) for image in images]
        return images

    def _crops(self) -> bool:
        return self.image_aspect == "square" and _crops_centre(self.image_processor)

    @property
    def image_rules(self) -> str:
        """How images are prepared, for ``IMAGE_RULES``: three words with blanks between.

        ``pad``, ``square`` or ``crop``; what transparent parts show; Pillow's number of the filter.
        """
        aspect = "crop" if self._crops() else self.image_aspect
        return f"{aspect} {self.transparency} {int(self.image_processor.resample)}"

    @property
    def image_size_px(self) -> int:
        """Side of the square images that ``to_pixels`` makes."""
        return int(self.to_pixels([Image.new("RGB", (64, 64))]).shape[-1])

    @property
    def mean_colour(self) -> tuple[int, ...]:
        """The image processor's mean as a colour, 0-255, truncated as LLaVA does."""
        return tuple(int(channel * 255) for channel in self.image_processor.image_mean)

    @property
    def background(self) -> tuple[int, ...] | None:
        """Colour that transparent parts of an image show; None where transparency is dropped."""
        return self.mean_colour if self.transparency == "blend" else None

    def render(
        self, conversation: Conversation, *, template: str | None = None, open_answer: bool = False
    ) -> tuple[str, Spans]:
        """Return the text of a conversation and the spans [start, end) of what the assistant says.

        Args:
            template: Jinja text; the checkpoint's own if None.
            open_answer: end where the assistant is to speak.
        """
        [(text, spans, hidden)] = self._render([conversation], template or self.chat_template, open_answer)
        return substitute(text, spans, hidden)

    def _render(
        self, conversations: Sequence[Conversation], template: str, open_answer: bool
    ) -> list[tuple[str, Spans, dict[str, str]]]:
        """Render with one character in place of each special token that the turns' own text spells.

        Returns:
            Of each: text, spans of what the assistant says, and the meaning of the characters.
        """
        special = find_special_tokens(self.tokenizer, template)
        settings = settings_of(self.tokenizer, self.chat_template, template, open_answer)
        found = []
        for conversation in conversations:
            num_placed = sum(len(message.places) for message in conversation.messages)
            said, hidden = special.hide(_place_images(conversation) if num_placed else conversation)
            rendered, spans = settings.render(said)
            if num_placed:
                if rendered.count(_PLACE) != num_placed:  # the template leaves out what the user says
                    said, hidden = special.hide(conversation)
                    rendered, spans = settings.render(said)
                rendered, spans = substitute(rendered, spans, {_PLACE: IMAGE_TOKEN})
            found.append((rendered, _trained_spans(conversation, spans), hidden))
        return found

    def encode(
        self, conversation: Conversation, *, template: str | None = None, open_answer: bool = False
    ) -> Encoded:
        """Tokenise a conversation whole and mark the supervised tokens.

        A special token is one only where the template writes it: spelt in the text of a turn, it is text.

        Raises:
            DataError: a token reaches from a prompt into an answer: there is no exact mask to train with.
        """
        return self.encode_all([conversation], template=template, open_answer=open_answer)[0]

    def encode_all(
        self, conversations: Sequence[Conversation], *, template: str | None = None, open_answer: bool = False
    ) -> list[Encoded]:
        """Tokenise conversations as ``encode`` does, which takes less time for many together."""
        template = template or self.chat_template
        rendered = self._render(conversations, template, open_answer)
        texts = [substitute(text, spans, hidden)[0] for text, spans, hidden in rendered]
        read: list[tuple[str, Spans, list[int], Spans]] = []
        for text, (raw, spans, hidden), encoding in zip(
            texts, rendered, whole_encodings(self.tokenizer, texts), strict=True
        ):
            if hidden:
                special = find_special_tokens(self.tokenizer, template)
                read.append(special.tokenize(raw, spans, hidden))
            else:
                read.append((text, spans, encoding.ids, encoding.offsets))
        masks, joining = locate_all(read)
        if joining is not None and not open_answer:  # training needs an exact mask, an open answer none
            number, token = joining
            text, _, _, offsets = read[number]
            start, end = offsets[token]
            raise DataError(
                f"{conversations[number].place}: the token {text[start:end]!r} spans the end of the prompt "
                "and the start of the answer. Put a separator between them in the template."
            )
        return [
            self._expanded(text, np.array(ids, dtype=np.int64), mask)
            for text, (_, _, ids, _), mask in zip(texts, read, masks, strict=True)
        ]

    def _expanded(self, text: str, ids: Ints, mask: Bools) -> Encoded:
        """Return an encoding in which the token of an image is there as often as an image has tokens."""
        at_image = ids == self.image_token_id
        if at_image.any():
            repeats = np.where(at_image, self.num_image_tokens, 1)
            ids, mask = ids.repeat(repeats), mask.repeat(repeats)
        return Encoded(text=text, token_ids=ids, is_supervised=mask)


def _place_images(conversation: Conversation) -> Conversation:
    """Return a conversation with a character in the text for each image in it."""
    messages = tuple(
        replace(m, text=m.marked(_PLACE), images=(), places=()) if m.places else m
        for m in conversation.messages
    )
    return replace(conversation, messages=messages)


def _trained_spans(conversation: Conversation, spans: Spans) -> Spans:
    """Return the spans of the answers that add to the loss.

    Raises:
        DataError: some do not, and the template's marks are not one for each answer.
    """
    answers = [message for message in conversation.messages if message.role == "assistant"]
    if all(answer.is_trained for answer in answers):
        return spans
    if len(spans) != len(answers):
        raise DataError(
            f"{conversation.place}: {len(answers)} answers, of which only some add to the loss, but the "
            f"template marks {len(spans)}. Give each answer its own generation marks in the template."
        )
    return [span for span, answer in zip(spans, answers, strict=True) if answer.is_trained]


def try_image_processor(image_processor: Any, aspect: Aspect, side: int) -> str:
    """Return in words why an image processor does not fit an encoder of square images; empty if it does."""
    for name in ("image_mean", "image_std"):
        values = getattr(image_processor, name, None)
        if not isinstance(values, list | tuple) or len(values) != 3:
            given = list(values) if isinstance(values, list | tuple) else values
            return f"its image processor's {name} is {given!r}; RGB needs 3 numbers."
    image = Image.new("RGB", (64, 48))
    if aspect == "pad":
        image = pad_to_square(image, tuple(int(channel * 255) for channel in image_processor.image_mean))
    try:
        pixels = image_processor([image], return_tensors="pt")["pixel_values"]
    except Exception as error:  # noqa: BLE001 (a stranger's settings in a library: anything may come)
        return f"its image processor fails on an image ({type(error).__name__}: {error})."
    shape = tuple(pixels.shape)
    if shape == (1, 3, side, side):
        return ""
    hint = " With image_aspect 'square' it must crop the centre." if shape[-1] != shape[-2] else ""
    made = " x ".join(map(str, shape[2:][::-1] if shape[:2] == (1, 3) else shape))
    return f"its image processor produces images of {made}, but the encoder takes {side} x {side} px.{hint}"


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centre an image on a square of one colour; the odd pixel goes below and to the right."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def scale_down(image: Image.Image, resample: int) -> Image.Image:
    """Scale an image to a longest side of at most ``MAX_PADDED_PX``."""
    longest = max(image.size)
    if longest <= MAX_PADDED_PX:
        return image
    width, height = (max(1, round(side * MAX_PADDED_PX / longest)) for side in image.size)
    return image.resize((width, height), resample)


def crop_ends(image: Image.Image) -> Image.Image:
    """Cut the ends off an image that is longer than ``MAX_CROPPED_RATIO`` times its shorter side.

    What is cut off is outside the centre that will be cropped; resized with it, it would fill the memory.
    """
    longest = MAX_CROPPED_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def _crops_centre(image_processor: Any) -> bool:
    """Whether an image processor resizes the shorter side and crops a square from the centre."""
    size = image_processor.size or {}
    if "shortest_edge" not in size:
        return False
    crop_pct = getattr(image_processor, "crop_pct", None)  # ConvNeXt's crops below 384 pixels
    is_cropped = size["shortest_edge"] < 384 if crop_pct else image_processor.do_center_crop
    return bool(is_cropped)
