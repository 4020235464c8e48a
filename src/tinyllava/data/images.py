"""Open a picture as RGB, or say exactly what is wrong with it. Image bytes are decoded here and nowhere else.

Differs: the published code decodes truncated files to grey, clips 16-bit pictures and ignores a camera's
rotation
mark; here the first is an error, the second is scaled, the third is applied.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.errors import ImageError

MAX_PIXELS = 89_478_485  # above it Pillow warns of a decompression bomb: a quarter of a GiB as RGB
MAX_SIDE_PX = 16_384  # a strip of one pixel's height would become this square when it is padded


def read_image_bytes(ref: ImageRef) -> bytes:
    """Return the encoded bytes of a picture.

    Raises:
        ImageError: the file is missing, a folder, or cannot be read.
    """
    if ref.data is not None:
        return ref.data
    path = ref.path or Path(ref.name)
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such picture; check the path.") from error
    except ValueError as error:  # a NUL character
        raise ImageError(f"{str(path)!r}: no path of a file ({error}).") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}).") from error


@contextmanager
def naming_record(conversation: Conversation) -> Iterator[None]:
    """Put the record and its file in front of what is said about its pictures."""
    try:
        yield
    except ImageError as error:
        record = f"record {conversation.id}" if conversation.id else "a record without id"
        raise ImageError(
            f"{conversation.source or 'conversation'}: {record}: {error} Or leave such records out with skip "
            "'broken_image'."
        ) from error


def open_image(ref: ImageRef) -> Image.Image:
    """Return a picture as RGB.

    Greyscale, palette and CMYK are converted; 16-bit is scaled to 8; of an animation the first frame is
    taken; transparency is dropped, as the published code does; a rotation mark (EXIF) is applied.

    Raises:
        ImageError: missing, empty, not a picture, truncated, too large, or without a meaning as RGB.
    """
    data = read_image_bytes(ref)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on tags; what is an error is raised below
            with Image.open(io.BytesIO(data)) as image:
                _refuse_huge(image, ref)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), image.format, ref)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        what = "an empty file" if not data else f"not a picture that can be read (begins with {data[:8]!r})"
        raise ImageError(f"{ref}: {what}; replace it.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{ref}: more than {MAX_PIXELS:,} pixels; scale it down.") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error) as error:
        raise ImageError(f"{ref}: damaged ({error}); fetch it again.") from error


def _refuse_huge(image: Image.Image, ref: ImageRef) -> None:
    """Look at the size that the header claims, before anything is decoded."""
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE_PX:
        raise ImageError(
            f"{ref}: {image.width:,} x {image.height:,} pixels; at most {MAX_PIXELS:,} in all and "
            f"{MAX_SIDE_PX:,} on a side. Scale it down."
        )


def _to_rgb(image: Image.Image, file_format: str | None, ref: ImageRef) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and file_format != "PPM"):  # Pillow scales PGM to 16 bits
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ImageError(f"{ref}: {kind} pixels have no fixed range; save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow's own conversion would clip everything above 255 to white.
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
