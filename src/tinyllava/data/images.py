"""Open an image as RGB, or report exactly what is wrong with it. Image bytes are decoded only here.

Differs: the published code decodes truncated files to grey, clips 16-bit images and ignores the EXIF
orientation. Here a truncated file is an error, 16-bit images are scaled, and the orientation is applied.
"""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.errors import ImageError
from tinyllava.files import data_url

MAX_PIXELS = 89_478_485  # above it Pillow warns of a decompression bomb: a quarter of a GiB as RGB
MAX_SIDE_PX = 16_384
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may open, by its names. It knows more, and for some it starts a program (EPS: Ghostscript)."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by the value of EXIF's Orientation."""

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_OTHER_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (b"%PDF", "a PDF file"),
    (b"8BPS", "a Photoshop file"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull` in its folder)"),
)
"""What is often found in place of an image, by its first bytes."""


def read_image_bytes(ref: ImageRef) -> bytes:
    """Return the encoded bytes of an image.

    Raises:
        ImageError: the file is missing, a folder or a pipe, or cannot be read.
    """
    if ref.data is not None:
        return ref.data
    path = ref.path or Path(ref.name)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ImageError(f"{path}: a pipe or device, not an image file. Give the path of a file.")
        return path.read_bytes()
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image. Check the path.") from error
    except ValueError as error:  # a NUL character, an unpaired surrogate
        raise ImageError(f"{_shorten(path)!a}: not a valid path ({error}).") from error
    except OSError as error:
        raise ImageError(f"{_shorten(path)}: cannot be read ({error.strerror}).") from error


def _shorten(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text):,} characters)"


@contextmanager
def naming_record(conversation: Conversation) -> Iterator[None]:
    """Put the record's place in front of errors about its images."""
    try:
        yield
    except ImageError as error:
        raise ImageError(
            f"{conversation.place}: {error} Or skip such records with --skip broken_image."
        ) from error


def open_image(ref: ImageRef, background: tuple[int, ...] | None = None) -> Image.Image:
    """Return an image as RGB.

    Greyscale, palette and CMYK are converted; 16-bit is scaled to 8; of an animation the first frame is
    taken; a rotation mark (EXIF) is applied, and one that cannot be read is ignored.

    Args:
        background: colour that transparent parts show; None drops transparency, as the published code does,
            and shows the colours that are stored below it.

    Raises:
        ImageError: missing, empty, not an image, truncated, too large, or without a meaning as RGB.
    """
    data = read_image_bytes(ref)
    with _naming_damage(ref, data):
        return _decode(data, ref, background)


def read_size(ref: ImageRef) -> tuple[int, int]:
    """Return width and height that an image's header claims, in pixels; its pixels are not decoded.

    Raises:
        ImageError: missing, empty, not an image, or too large.
    """
    data = read_image_bytes(ref)
    with _naming_damage(ref, data):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombError, MemoryError):
            raise
        except Exception:  # noqa: BLE001 (an odd tag of a good JPEG, see _decode)
            image = Image.open(io.BytesIO(_without_metadata(data)), formats=FORMATS)
        with image:
            _refuse_huge(image, ref)
            return image.size


THUMBNAIL_PX = 240
"""Longest side of the images of HTML pages."""


def thumbnail_url(ref: ImageRef) -> str:
    """Return a small JPEG of an image as a data URL; empty if it cannot be opened, which pages say."""
    try:
        image = open_image(ref)
    except ImageError:
        return ""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return data_url(buffer.getvalue(), "image/jpeg")


class _Remarks:
    """Pillow's warnings, silenced while any thread opens an image: their filters belong to the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._filters = warnings.catch_warnings()

    @contextmanager
    def silenced(self) -> Iterator[None]:
        with self._lock:
            if not self._num_inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if not self._num_inside:
                    self._filters.__exit__(None, None, None)


_REMARKS = _Remarks()


@contextmanager
def _naming_damage(ref: ImageRef, data: bytes) -> Iterator[None]:
    """Raise an error with one line about the damage of an image that Pillow cannot open."""
    try:
        with _REMARKS.silenced():  # those on tags; what is an error is raised below
            yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{ref}: {_name_kind(data)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{ref}: more than {MAX_PIXELS:,} pixels, which is too large. Scale it down."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow documents none: its decoders raise whatever the bytes lead to
        raise ImageError(f"{ref}: damaged ({str(error) or type(error).__name__}). Replace it.") from error


def _decode(data: bytes, ref: ImageRef, background: tuple[int, ...] | None) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_huge(image, ref)
            image.load()
            return _turn_upright(_to_rgb(image, image.format, ref, background), image)
    except (ImageError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        bare = _without_metadata(data)
        if bare == data:
            raise
        return _decode(bare, ref, background)


def _without_metadata(jpeg: bytes) -> bytes:
    """Return a JPEG without its segments APP1 and APP2 (EXIF, XMP, MPF, ICC); what is no JPEG, as it is.

    Pillow reads them when it opens a file, and a tag of the wrong type there can hide good pixels.
    """
    if not jpeg.startswith(b"\xff\xd8"):
        return jpeg
    kept, at = [jpeg[:2]], 2
    while jpeg[at : at + 1] == b"\xff" and at + 4 <= len(jpeg):
        marker, size = jpeg[at + 1], 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker == 0xDA:  # start of scan: pixels from here on
            break
        if marker not in (0xE1, 0xE2):
            kept.append(jpeg[at : at + size])
        at += size
    return b"".join([*kept, jpeg[at:]])


def _turn_upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Apply the rotation mark of the file that ``rgb`` came from; only read it: writing EXIF can fail."""
    try:
        mark = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 (as undocumented as the decoders'; what cannot be read is no mark)
        return rgb
    method = _UPRIGHT.get(mark) if isinstance(mark, int) else None
    return rgb if method is None else rgb.transpose(method)


def _name_kind(data: bytes) -> str:
    """Describe bytes that are not an image of a known format, with the fix."""
    head = data[:512]
    if not head:
        return "an empty file. Replace it."
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIC_BRANDS:
            return (
                "a HEIC image from a phone; convert it to JPEG, for example with `heif-convert IN OUT.jpg`."
            )
        return "a video; extract a frame as JPEG or PNG, for example with `ffmpeg -i IN -frames:v 1 OUT.jpg`."
    if head.lstrip().lower().startswith(b"<"):
        return (
            "an SVG drawing; convert it to PNG."
            if b"<svg" in head.lower()
            else ("a web page, possibly an error message of the server; download it again.")
        )
    kind = next((kind for start, kind in _OTHER_KINDS if head.startswith(start)), "")
    kind = kind or f"not a known image format (starts with {head[:8]!r})"
    return f"{kind}; replace it with one of: {', '.join(FORMATS)}."


def _refuse_huge(image: Image.Image, ref: ImageRef) -> None:
    """Look at the size that the header claims, before anything is decoded."""
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE_PX:
        raise ImageError(
            f"{ref}: {image.width:,} x {image.height:,} pixels; at most {MAX_PIXELS:,} in all and "
            f"{MAX_SIDE_PX:,} on a side. Scale it down."
        )


def _to_rgb(
    image: Image.Image, file_format: str | None, ref: ImageRef, background: tuple[int, ...] | None
) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and file_format != "PPM"):  # Pillow scales PGM to 16 bits
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ImageError(f"{ref}: {kind} pixels have no fixed range. Save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow's own conversion would clip everything above 255 to white.
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if background is not None and image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
