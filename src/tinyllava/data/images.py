"""Open a picture as RGB, or say exactly what is wrong with it. Image bytes are decoded here and nowhere else.

Differs: the published code decodes truncated files to grey, clips 16-bit pictures and ignores a camera's rotation
mark; here the first is an error, the second is scaled, the third is applied.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tinyllava.conversation import ImageRef
from tinyllava.errors import ImageError

MAX_PIXELS = 178_956_970  # Pillow's own bound for a picture that may be a decompression bomb


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
        raise ImageError(f"{path}: no such picture; check the images folder, or skip 'missing_image'.") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}).") from error


def open_image(ref: ImageRef) -> Image.Image:
    """Return a picture as RGB.

    Greyscale, palette and CMYK are converted; 16-bit is scaled to 8; of an animation the first frame is taken;
    transparency is dropped, as the published code does; a rotation mark (EXIF) is applied.

    Raises:
        ImageError: missing, empty, not a picture, truncated, too large, or of a kind without a meaning as RGB.
    """
    data = read_image_bytes(ref)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), ref)
    except UnidentifiedImageError as error:
        what = "an empty file" if not data else f"not a picture that can be read (begins with {data[:8]!r})"
        raise ImageError(f"{ref}: {what}; replace it, or skip 'broken_image'.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{ref}: more than {MAX_PIXELS:,} pixels; scale it down, or skip 'broken_image'.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{ref}: damaged ({error}); fetch it again, or skip 'broken_image'.") from error


def _to_rgb(image: Image.Image, ref: ImageRef) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.int64)
        # 16-bit greyscale: Pillow's own conversion would clip everything above 255 to white.
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{ref}: floating-point pixels have no fixed range; save it as PNG or JPEG.")
    return image.convert("RGB")
