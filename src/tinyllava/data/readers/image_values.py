"""An image as a record names it: a path, ``file://``, a data URL, bytes, or an http(s) address.

Addresses are downloaded once, into a cache, and only where the user allows it.
"""

import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tinyllava.conversation import ImageRef, to_ref
from tinyllava.data.defects import Defect
from tinyllava.errors import ImageError, first_line
from tinyllava.files import is_text, whole_file

MAX_DOWNLOAD_BYTES = 64_000_000
TIMEOUT_SECONDS = 30


def find_image(value: Any, images: Path, where: str, allow_urls: bool = False) -> ImageRef:
    """Return where an image is.

    Args:
        value: path (relative to ``images``), ``file://``, data URL, address, bytes, or an object with
            ``bytes``, ``path`` or ``url`` as the hub's data sets have it.
        images: folder that paths start from.
        where: place of the record, for errors.
        allow_urls: whether an address is downloaded.

    Raises:
        Defect: missing, or of another form.
    """
    if isinstance(value, ImageRef):
        return value if value.data is not None else find_image(str(value.path or value.name), images, where)
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(value, bytes) and value:
        return ImageRef(data=value, name=f"<{len(value):,} bytes>")
    if not isinstance(value, str) or not value:
        raise Defect("malformed", where, f"an image must be a path or bytes, found {str(value)[:80]}")
    if value.startswith("data:"):
        try:
            return to_ref(value)
        except ImageError as error:
            raise Defect("malformed", where, str(error)) from error
    if value.startswith(("http://", "https://")):
        return _download(value, where, allow_urls)
    if value.startswith("file://"):
        return _find_file(unquote(urlsplit(value).path), images, where, value)
    return _find_file(value, images, where, value)


def _find_file(path: str, images: Path, where: str, name: str) -> ImageRef:
    place = images / path
    try:
        there = is_text(path) and place.is_file()
    except OSError as error:  # a name that is too long: a caption in the wrong field
        detail = f"'image' is not a valid path ({error.strerror}): {name[:80]}"
        raise Defect("malformed", where, detail) from error
    except ValueError as error:  # a NUL character
        raise Defect("malformed", where, f"'image' is not a valid path ({error}): {name[:80]!a}") from error
    if not is_text(path):
        raise Defect("malformed", where, f"'image' contains an unpaired surrogate: {name[:80]!a}")
    if not there:
        what = "a folder, not an image:" if place.is_dir() else "no image"
        defect = Defect("missing_image", where, f"{what} {place}")
        defect.path = str(place)
        raise defect
    return ImageRef(path=place, name=name)


def cache_folder() -> Path:
    """Return the folder of downloaded images."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tinyllava" / "images"


def _download(url: str, where: str, allow_urls: bool) -> ImageRef:
    path = cache_folder() / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return ImageRef(path=path, name=url)
    if not allow_urls:
        raise Defect("missing_image", where, f"{url[:200]} is not downloaded; allow it with --allow-urls")
    import httpx2

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            httpx2.stream("GET", url, follow_redirects=True, timeout=TIMEOUT_SECONDS) as answer,
            whole_file(path) as partial,
            partial.open("wb") as file,
        ):
            answer.raise_for_status()
            size = 0
            for part in answer.iter_bytes():
                size += len(part)
                if size > MAX_DOWNLOAD_BYTES:
                    detail = f"{url[:200]} is larger than {MAX_DOWNLOAD_BYTES:,} bytes"
                    raise Defect("missing_image", where, detail)
                file.write(part)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        detail = f"{url[:200]} cannot be downloaded ({first_line(error) or type(error).__name__})"
        raise Defect("missing_image", where, detail) from error
    return ImageRef(path=path, name=url)
