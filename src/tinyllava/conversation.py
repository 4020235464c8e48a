"""A conversation about images: the input of the model in training, chat, evaluation and serving.

Paper: section 3.2, Y = (Y_q^1, Y_a^1, ..., Y_q^T, Y_a^T) together with the image X.
"""

from base64 import b64decode
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Union

from tinyllava.errors import DataError, ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

Role = Literal["system", "user", "assistant"]
_ORIENTATION = 0x0112  # the tag of EXIF
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"),
    *(".jp2", ".avif", ".heic", ".heif"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """An image by its file, or by its encoded bytes (a Parquet cell, an upload)."""

    path: Path | None = None
    data: bytes | None = None
    name: str = ""

    def __str__(self) -> str:
        return self.name or (str(self.path) if self.path else f"<{len(self.data or b'')} bytes>")


ImageLike = Union[ImageRef, "PathLike[str]", str, bytes, "Image"]
"""An image as users have it: a path, bytes of a file, a data URL, or an image of Pillow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn. Images come before the text, like LLaVA's ``<image>\\n``, or at places in it."""

    role: Role
    text: str
    images: tuple[ImageRef, ...] = ()
    places: tuple[int, ...] = ()
    """Place of each image in the text, in characters; empty if all come before the text."""
    is_trained: bool = True
    """Whether training learns this answer; otherwise it is only read, like a question."""

    def marked(self, mark: str) -> str:
        """Return the text with a mark for each image, at its place or else before the text."""
        edges = [*(self.places or (0,) * len(self.images)), len(self.text)]
        pieces = [self.text[start:end] for start, end in pairwise(edges)]
        return self.text[: edges[0]] + "".join(mark + piece for piece in pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns in order, with the id of the record they came from (shown in every error about it)."""

    messages: tuple[Message, ...]
    id: str = ""
    source: str = ""
    at: str = ""
    """Place in ``source``, such as ``record 12`` or ``line 3``."""

    @property
    def place(self) -> str:
        """File, place in the file and id, as far as known. Every error names the record this way."""
        return name_place(self.source, self.at, self.id)

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images, in the order in which the model sees them."""
        return tuple(image for message in self.messages for image in message.images)


def name_place(source: str, at: str, id_: str) -> str:
    """Return how errors name a record, see ``Conversation.place``."""
    named = f"record {id_}" if id_ else "a record without id"
    where = f"{at} (id {id_})" if at and id_ else at or named
    return f"{source or 'conversation'}: {where}"


class Answer(str):
    """The text of an answer; ``is_cut`` is true if it reached its limit of tokens before its end."""

    __slots__ = ("is_cut",)
    is_cut: bool

    def __new__(cls, text: str, *, is_cut: bool = False) -> "Answer":
        """Return a text with the mark."""
        answer = super().__new__(cls, text)
        answer.is_cut = is_cut
        return answer


def ask(text: str, *images: ImageLike, id: str = "") -> Conversation:
    """Return the conversation of a single question, images first.

    Args:
        images: paths, encoded bytes, data URLs (``data:image/png;base64,...``) or Pillow images.

    Raises:
        ImageError: a data URL that cannot be read.
    """
    refs = tuple(map(to_ref, images))
    return Conversation(messages=(Message(role="user", text=text, images=refs),), id=id)


def names_image(text: str) -> bool:
    """Return whether a text, as a whole, is the name of an image: one word with its suffix, or a file.

    "What is in a.jpg?" and "describe a.jpg" are questions.
    """
    if not text.lower().endswith(IMAGE_SUFFIXES):
        return False
    try:
        return not any(map(str.isspace, text)) or Path(text).is_file()
    except (OSError, ValueError):  # longer than a path may be
        return False


def check_question(text: str) -> None:
    """Refuse the name of an image in the place of a question, where a user gives both.

    Raises:
        DataError: see ``names_image``.
    """
    if names_image(text):
        raise DataError(
            f"question {text!r}: is the name of an image. Give the question first, then the images; a "
            "question about a file name needs a question mark or a period at its end."
        )


def to_ref(image: ImageLike) -> ImageRef:
    """Return a reference to an image that is given in any supported form.

    Raises:
        ImageError: a data URL that cannot be read.
    """
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, bytes):
        return ImageRef(data=image)
    if isinstance(image, str) and image.startswith("data:"):
        head, comma, body = image.partition(",")
        try:
            if not comma or not head.endswith(";base64"):
                raise ValueError("not base64")
            return ImageRef(data=b64decode(body, validate=True))
        except ValueError as error:
            raise ImageError(
                f"data URL {image[:40]!r}...: cannot be read ({error}); it must start like "
                "data:image/png;base64,iVBORw0..."
            ) from error
    if isinstance(image, str | PathLike):
        return ImageRef(path=Path(image))
    return ImageRef(data=_encode(image))


def _encode(image: "Image") -> bytes:
    """Return an image of Pillow as PNG, with its EXIF rotation: what opens it applies that."""
    from PIL.Image import Exif

    rotation, exif = image.getexif().get(_ORIENTATION), Exif()
    if rotation:
        exif[_ORIENTATION] = rotation
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    buffer = BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def to_chat(conversation: Conversation, *, plain: bool = False) -> list[dict[str, object]]:
    """Return the turns in the form that chat templates read: typed content, images before text.

    Args:
        plain: give a turn without images as a string (see ``tinyllava.parts.templates.takes_plain_text``).
    """
    return [
        {
            "role": message.role,
            "content": message.text
            if plain and not message.images
            else [*({"type": "image"} for _ in message.images), {"type": "text", "text": message.text}],
        }
        for message in conversation.messages
    ]
