"""Images as they really come: every odd kind becomes the right RGB, every broken one a named error."""

import base64
import io
import json
import os
import pickle
import random
import struct
import subprocess
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyllava.conversation import ImageRef
from tinyllava.data import images
from tinyllava.data.images import MAX_PIXELS, MAX_SIDE_PX, THUMBNAIL_PX, open_image, thumbnail_url
from tinyllava.errors import ImageError

ORIENTATION = 0x0112
CORNERS = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255), (255, 0, 255)]]
"""Two rows of three colours, so that each of the eight orientations looks different."""


def rgb(scale: int = 8) -> Image.Image:
    pixels = np.array(CORNERS, dtype=np.uint8).repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(pixels)


def save(image: Image.Image, path: Path, **options) -> ImageRef:
    image.save(path, **options)
    return ImageRef(path=path, name=path.name)


def pixels(ref: ImageRef) -> np.ndarray:
    image = open_image(ref)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "gif"])
def test_lossless_formats_give_their_pixels(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    assert np.array_equal(pixels(save(rgb(), tmp_path / f"a.{suffix}", **options)), np.asarray(rgb()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_an_rgb_image_is_not_copied_and_needs_its_file_no_more(kind, monkeypatch):
    buffer = io.BytesIO()
    rgb().save(buffer, kind)
    expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
    monkeypatch.setattr(Image.Image, "copy", lambda self: pytest.fail("copied"))
    image = open_image(ImageRef(data=buffer.getvalue()))
    assert np.array_equal(np.asarray(image), expected)
    assert np.array_equal(np.asarray(image.transpose(Image.Transpose.ROTATE_180)), expected[::-1, ::-1])
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(image))), expected)
    image.thumbnail((4, 4))
    assert image.size == (4, 3)


def test_bytes_are_opened_as_a_file_is(tmp_path):
    ref = save(rgb(), tmp_path / "a.png")
    assert np.array_equal(pixels(ImageRef(data=ref.path.read_bytes(), name="cell 3")), np.asarray(rgb()))


def test_the_suffix_does_not_matter(tmp_path):
    """OCR-VQA: files that the records call .jpg are GIFs and PNGs."""
    for kind in ("GIF", "PNG"):
        assert np.array_equal(pixels(save(rgb(), tmp_path / "a.jpg", format=kind)), np.asarray(rgb()))


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue")]
    for suffix, options in (("gif", {}), ("png", {}), ("webp", {"lossless": True})):
        ref = save(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert (pixels(ref) == (255, 0, 0)).all()


def test_cmyk_is_converted(tmp_path):
    ref = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100)
    assert np.abs(pixels(ref).astype(int) - (255, 0, 0)).max() <= 2


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 257, 1000], [25_700, 32_768, 65_000, 65_535]], dtype=np.uint16)
    expected = (values // 257).astype(np.uint8)
    for suffix in ("png", "tiff"):
        found = pixels(save(Image.fromarray(values), tmp_path / f"a.{suffix}"))
        assert np.array_equal(found, np.stack([expected] * 3, axis=-1))


def test_a_pgm_with_a_maximum_of_its_own_is_scaled(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + np.array([0, 2048, 4095], dtype=">u2").tobytes())
    assert pixels(ImageRef(path=tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 127, 255]


def test_one_bit_and_grey_and_palette(tmp_path):
    grey = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    assert np.array_equal(pixels(save(grey, tmp_path / "l.png"))[..., 1], np.asarray(grey))
    bits = grey.convert("1", dither=Image.Dither.NONE)
    assert set(np.unique(pixels(save(bits, tmp_path / "1.png")))) == {0, 255}
    palette = rgb().convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(pixels(save(palette, tmp_path / "p.png")), np.asarray(rgb()))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_and_the_colour_below_kept(tmp_path, mode):
    """What `convert("RGB")` alone gives, as in the code that the published models were trained with."""
    if mode == "P":
        image, options = (
            rgb().convert("P", palette=Image.Palette.ADAPTIVE),
            {"transparency": bytes([0, 128] * 3)},
        )
        expected = np.asarray(rgb())
    else:
        image, options = rgb().convert(mode), {}
        image.putalpha(0)
        expected = np.asarray(rgb() if mode == "RGBA" else rgb().convert("L").convert("RGB"))
    found = pixels(save(image, tmp_path / "a.png", **options))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_transparent_parts_show_the_background(tmp_path, mode):
    """Half transparent, half opaque: what is opaque keeps its colour, the rest is the background's."""
    image, options = rgb(), {}
    if mode == "tRNS":
        options = {"transparency": CORNERS[0][0]}
    elif mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        options = {"transparency": image.getpixel((0, 0))}
    else:
        image = image.convert(mode)
        alpha = Image.new("L", image.size, 255)
        alpha.paste(0, (0, 0, 8, 8))
        image.putalpha(alpha)
    ref = save(image, tmp_path / "a.png", **options)
    found = np.asarray(open_image(ref, background=(9, 99, 199)))
    opaque = np.asarray(rgb() if mode != "LA" else rgb().convert("L").convert("RGB"))
    assert (found[:8, :8] == (9, 99, 199)).all()
    assert np.array_equal(found[8:], opaque[8:])
    assert np.array_equal(found[:8, 8:], opaque[:8, 8:])


def test_an_opaque_image_is_the_same_on_any_background(tmp_path):
    ref = save(rgb().convert("RGBA"), tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(ref, background=(1, 2, 3))), np.asarray(rgb()))


# Where the camera's top row and left column are, by EXIF's table: what undoes each mark, in numpy.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("mark", UPRIGHT)
def test_a_rotation_mark_is_applied(tmp_path, mark):
    exif = Image.Exif()
    exif[ORIENTATION] = mark
    ref = save(rgb(), tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(ref), UPRIGHT[mark](np.asarray(rgb())))
    ref = save(rgb(), tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    assert np.abs(pixels(ref).astype(int) - UPRIGHT[mark](np.asarray(rgb())).astype(int)).max() < 20


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def bomb(path: Path) -> None:
    Image.new("1", (12_000, 12_000)).save(path, format="PNG")


def monstrous(path: Path) -> None:
    """A header that claims 60,000 x 60,000 pixels."""
    path.write_bytes(
        b"BM"
        + bytes(8)
        + (54).to_bytes(4, "little")
        + (40).to_bytes(4, "little")
        + (60_000).to_bytes(4, "little") * 2
        + b"\x01\0\x18\0"
        + bytes(24)
    )


def strip(path: Path) -> None:
    Image.new("1", (60_000, 1)).save(path, format="PNG")


BROKEN = {
    "missing": (lambda path: None, "no such image. Check the path"),
    "folder": (lambda path: path.mkdir(), r"cannot be read \(Is a directory\)"),
    "empty": (lambda path: path.touch(), "an empty file. Replace it"),
    "text": (
        lambda path: path.write_text("not an image"),
        r"not a known image format \(starts with b'not an i'\)",
    ),
    "json": (lambda path: path.write_text(json.dumps({"a": 1})), "not a known image format"),
    "truncated": (truncated, r"damaged \(.*truncated.*\. Replace it"),
    "bomb": (bomb, "12,000 x 12,000 pixels; at most 89,478,485 in all"),
    "monstrous": (monstrous, "more than 89,478,485 pixels, which is too large. Scale it down"),
    "web page": (lambda path: path.write_text("<html>404</html>"), "a web page, .*; download it again"),
    "SVG": (lambda path: path.write_text("<svg xmlns='x'/>"), "an SVG drawing; convert it to PNG"),
    "HEIC": (
        lambda path: path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        r"a HEIC image from a phone; convert it to JPEG, for example with `heif-convert IN OUT.jpg`",
    ),
    "video": (lambda path: path.write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isom"), "a video; extract a frame"),
    "PDF": (lambda path: path.write_bytes(b"%PDF-1.7\n"), "a PDF file; replace it with one of: JPEG, PNG"),
    "pipe": (os.mkfifo, "a pipe or device, not an image file"),
    "strip": (strip, "60,000 x 1 pixels; at most .* 16,384 on a side"),
    "float": (
        lambda path: Image.new("F", (4, 4), 0.5).save(path, format="TIFF"),
        "floating-point pixels have no fixed range",
    ),
    "32-bit": (
        lambda path: Image.new("I", (4, 4), 200).save(path, format="TIFF"),
        "32-bit pixels have no fixed range",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_named_with_what_to_do(tmp_path, kind):
    make, message = BROKEN[kind]
    path = tmp_path / "image.jpg"
    make(path)
    with pytest.raises(ImageError, match=message) as caught:
        open_image(ImageRef(path=path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("image.jpg") == 1  # said once, not once more around it


def test_the_bounds_are_those_of_the_messages():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS == 89_478_485
    assert MAX_SIDE_PX == 16_384


def encoded(kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    buffer = io.BytesIO()
    rgb().save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    return buffer.getvalue()


SAMPLES = {kind: encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")}


@given(
    kind=st.sampled_from(list(SAMPLES)),
    cut=st.none() | st.integers(0, 400),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
)
@settings(max_examples=400, deadline=None)
def test_damage_anywhere_gives_an_image_or_the_named_error(kind, cut, changes):
    data = bytearray(SAMPLES[kind])
    for place, value in changes:
        data[place % len(data)] = value
    with suppress(ImageError):  # any other kind of error fails the test
        assert open_image(ImageRef(data=bytes(data[:cut]), name="x")).mode == "RGB"


def test_a_nul_in_a_path_is_no_path() -> None:
    with pytest.raises(ImageError, match=r"'a\\x00\.png': not a valid path"):
        open_image(ImageRef(path=Path("a\0.png")))


def odd_exif(rng: random.Random) -> bytes:
    """A TIFF block with tags of wrong types, counts, offsets and lengths; Orientation is often among them."""
    endian, num = rng.choice("<>"), rng.choice([0, 1, 1, 2, 3, 5, 12, 200])
    block = (b"II*\0" if endian == "<" else b"MM\0*") + struct.pack(
        f"{endian}L", rng.choice([8, 8, 8, 8, 0, 7, 100, 2**31])
    )
    block += struct.pack(f"{endian}H", rng.choice([num, num, num, 65_535, 0]))
    for _ in range(num):
        tag = rng.choice([0x112, 0x112, 0x11A, 0x8769, 0x8825, 0xA005, 0xB001, 0x100, rng.randrange(65_536)])
        kind = rng.choice([*range(14), 16, 99, rng.randrange(65_536)])
        count = rng.choice([0, 1, 1, 1, 2, 3, 4, 5, 100, 2**31, 2**32 - 1])
        value = struct.pack(f"{endian}L", rng.choice([0, 1, 6, 8, 9, 10, 30, 2**32 - 1]))
        block += struct.pack(f"{endian}HHL", tag, kind, count) + rng.choice([value, rng.randbytes(4)])
    block += rng.choice([b"", b"\0\0\0\0", rng.randbytes(40)])
    return block[: rng.choice([len(block)] * 4 + [rng.randrange(len(block) + 1)])]


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def with_chunk(png: bytes, content: bytes) -> bytes:
    """Put an eXIf chunk behind a PNG's header."""
    body = b"eXIf" + content
    return png[:33] + struct.pack(">L", len(content)) + body + struct.pack(">L", zlib.crc32(body)) + png[33:]


@pytest.mark.filterwarnings("ignore")
def test_thousands_of_odd_exif_blocks_never_hide_good_pixels():
    """Pillow raises TypeError, KeyError, AttributeError and more on such tags; the pixels are fine."""
    rng = random.Random(13)
    plain = {kind: io.BytesIO() for kind in ("JPEG", "PNG")}
    for kind, buffer in plain.items():
        rgb().save(buffer, kind)
    jpeg, png = plain["JPEG"].getvalue(), plain["PNG"].getvalue()
    allowed = {
        kind: {turn(np.asarray(Image.open(buffer))).tobytes() for turn in UPRIGHT.values()}
        for kind, buffer in plain.items()
    }
    for _ in range(1500):
        block = odd_exif(rng)
        for kind, data in (
            ("JPEG", with_segment(jpeg, 0xE1, b"Exif\0\0" + block)),
            ("JPEG", with_segment(jpeg, 0xE2, b"MPF\0" + block)),
            ("PNG", with_chunk(png, block)),
        ):
            assert np.asarray(open_image(ImageRef(data=data, name="x"))).tobytes() in allowed[kind]


def test_postscript_called_jpg_starts_no_program(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a program was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    path = tmp_path / "cat.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n{} loop\n")
    with pytest.raises(ImageError, match="a PostScript file; replace it"):
        open_image(ImageRef(path=path))


def test_threads_that_open_images_leave_the_warnings_of_the_process_alone() -> None:
    """Each thread used to put back what the other had set, and all warnings stayed silent."""
    before = list(warnings.filters)
    first, second = images._REMARKS.silenced(), images._REMARKS.silenced()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert warnings.filters[0][0] == "ignore"
    second.__exit__(None, None, None)
    assert warnings.filters == before


def test_images_of_pages_are_small_and_none_is_made_of_one_that_cannot_be_opened(tmp_path):
    large = save(rgb(200), tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    kind, _, content = thumbnail_url(large).partition(";base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (kind, shown.format, shown.size) == ("data:image/jpeg", "JPEG", (THUMBNAIL_PX, 160))
    assert thumbnail_url(ImageRef(path=tmp_path / "broken.png")) == ""
