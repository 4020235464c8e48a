"""Find the image of a record from a path, a URL, bytes, or text that encodes bytes.

Paper: none.

URLs are downloaded once, into a cache, and only if the user allows it.
"""

import base64
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from tinyllava.conversation import ImageRef, to_ref
from tinyllava.data.defects import Defect
from tinyllava.errors import ImageError, first_line
from tinyllava.files import cache_folder, is_text, whole_file

MAX_DOWNLOAD_BYTES = 64_000_000
TIMEOUT_SECONDS = 30
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
"""How JPEG, PNG, GIF, WebP, BMP and TIFF begin in base64."""
_MIN_BASE64 = 64  # characters: shorter than any image, longer than a file name that begins like one
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://")


def find_image(value: Any, images: Path, where: str, allow_urls: bool = False) -> ImageRef:
    """Return where an image is.

    Args:
        value: path (relative to ``images``), ``file://``, data URL, address, bytes, base64, or an object with
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
    if (data := _from_base64(value)) is not None:
        return ImageRef(data=data, name=f"<{len(data):,} bytes>")
    if _ADDRESS.match(value):
        raise Defect("missing_image", where, f"{value[:200]} cannot be downloaded: only http and https can")
    return _find_file(value, images, where, value)


def _from_base64(value: str) -> bytes | None:
    """Return the bytes of an image that are written as base64, as tables of benchmarks have them."""
    if len(value) < _MIN_BASE64 or not value.startswith(_BASE64_STARTS):
        return None
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except ValueError:
        return None


def _spellings(path: str) -> Iterator[str]:
    """Yield a path as it is, then as other systems and programs write the same one."""
    yield path
    slashed = path.strip().replace("\\", "/")
    for text in (path.strip(), slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))):
        if text and text != path:
            yield text


def _find_file(path: str, images: Path, where: str, name: str) -> ImageRef:
    usual = os.path.join(images, path)  # noqa: PTH118 (a Path costs more than the look)
    if is_text(path) and os.path.isfile(usual):  # noqa: PTH113 (as above)
        return ImageRef(path=Path(usual), name=name)
    place = images / path
    try:
        found = next(
            (images / one for one in _spellings(path) if is_text(one) and (images / one).is_file()), None
        )
    except OSError as error:  # a name that is too long: a caption in the wrong field
        detail = f"'image' is not a valid path ({error.strerror}): {name[:80]}"
        raise Defect("malformed", where, detail) from error
    except ValueError as error:  # a NUL character
        raise Defect("malformed", where, f"'image' is not a valid path ({error}): {name[:80]!a}") from error
    if not is_text(path):
        raise Defect("malformed", where, f"'image' contains an unpaired surrogate: {name[:80]!a}")
    if found is None:
        what = "a folder, not an image:" if place.is_dir() else "image not found:"
        shown = path if _WINDOWS.match(path) else place
        defect = Defect("missing_image", where, f"{what} {shown}{_similar(path, images)}")
        defect.path = str(place)
        raise defect
    return ImageRef(path=found, name=name)


def _similar(path: str, images: Path) -> str:
    """Say where a file of nearly that name is: in its folder, or where paths start from."""
    folder, _, name = path.strip().replace("\\", "/").rpartition("/")
    for place in (images / folder, images):
        known = ""
        with suppress(OSError):  # no folder, or none any more
            known = _names_in(place, place.stat().st_mtime_ns).get(_plain(name), "")
        if known and place != images / folder:
            return f"; {images.absolute()} has {known}: write paths relative to it"
        if known:
            return f"; did you mean {known}?"
    steps = [step for step in folder.split("/") if step]
    for start in range(len(steps)):  # a path of another machine, whose end is here too
        end = "/".join([*steps[start:], name])
        if (images / end).is_file():
            return f"; {images.absolute()} has {end}: write paths relative to it"
    return ""


@lru_cache(maxsize=16)  # a mixture has as many folders
def _names_in(folder: Path, changed: int) -> dict[str, str]:
    """Return the files of a folder by their plain names; read again when it has changed."""
    return {_plain(entry.name): entry.name for entry in os.scandir(folder) if entry.is_file()}


def _plain(name: str) -> str:
    """Return a file name without its usual variations: case and extension."""
    return unicodedata.normalize("NFC", name).rpartition(".")[0].casefold() or name.casefold()


def _download(url: str, where: str, allow_urls: bool) -> ImageRef:
    path = cache_folder() / "images" / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return ImageRef(path=path, name=url)
    if not allow_urls:
        raise Defect("missing_image", where, f"{url[:200]} is a URL; allow downloads with --allow-urls")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # processes that convert a file may meet the same address
        if not path.is_file():
            _write_download(url, path, where)
    return ImageRef(path=path, name=url)


def _write_download(url: str, path: Path, where: str) -> None:
    import httpx2

    try:
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
