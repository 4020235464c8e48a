"""Kept features: the encoder's own, computed once, shared, whole after a kill, apart for each encoder."""

import dataclasses
import os
import pickle
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinyllava.config import ModelConfig
from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.distinct_images import DistinctImages
from tinyllava.data.features import FeatureCache, Numbers, encoder_key
from tinyllava.data.hashes import ImageHashes
from tinyllava.data.images import open_image
from tinyllava.data.reporting import reporting
from tinyllava.errors import DataError, ImageError
from tinyllava.model.assemble import assemble


@pytest.fixture(scope="module")
def model_and_processor(parts):
    return assemble(ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["llama"])))


def shown(ref: ImageRef, id: str = "r") -> Conversation:
    return Conversation(messages=(Message(role="user", text="", images=(ref,)),), id=id, source="data.json")


@pytest.fixture
def conversations(tmp_path) -> list[Conversation]:
    """Five records over four files with three different contents."""
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    return [
        shown(ImageRef(path=tmp_path / f"{name}.png", name=name)) for name in ("a", "b", "copy", "c", "a")
    ]


@pytest.fixture
def counted(model_and_processor, monkeypatch) -> list[int]:
    """Number of images of each pass through the encoder."""
    passes: list[int] = []
    inner = model_and_processor[0].model
    original = inner.encode_images
    monkeypatch.setattr(
        inner, "encode_images", lambda pixels: (passes.append(len(pixels)), original(pixels))[1]
    )
    return passes


def test_rows_are_the_encoders_features(model_and_processor, tmp_path, conversations):
    model, processor = model_and_processor
    cache = FeatureCache(tmp_path / "kept", model, processor)
    progressed = []
    cache.fill(conversations, progress=progressed.append)
    assert sum(progressed) == 5
    for conversation in conversations:
        [ref] = conversation.images
        with torch.inference_mode():
            expected = model.model.encode_images(processor.to_pixels([open_image(ref)]))[0]
        torch.testing.assert_close(cache.read(ref), expected, rtol=0, atol=1e-5)


def test_images_whose_hashes_are_known_are_not_read_again(model_and_processor, tmp_path, conversations):
    hashes = ImageHashes(tmp_path / "hashes.sqlite").find(DistinctImages(conversations))
    FeatureCache(tmp_path / "kept", *model_and_processor).fill(conversations)
    for ref in hashes:
        ref.path.unlink()
    again = FeatureCache(tmp_path / "kept", *model_and_processor)
    again.fill(conversations, hashes=[hashes])
    rows = [again.read(conversation.images[0]) for conversation in conversations]
    assert torch.equal(rows[0], rows[2])  # a copy of it
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("connector", "half", "kept"),
    [
        ("mlp", torch.bfloat16, torch.bfloat16),
        ("mlp", torch.float16, torch.float16),
        ("mlp", None, torch.float32),
        ("slots", torch.bfloat16, torch.float32),  # begins with a mean, which autocast does not round
    ],
)
def test_features_take_half_the_disk_where_the_connector_makes_the_same_of_them(
    parts, tmp_path, conversations, connector, half, kept
):
    config = ModelConfig(
        vision_encoder=str(parts["siglip"]), language_model=str(parts["phi"]), connector=connector
    )
    model, processor = assemble(config)
    caches = [FeatureCache(tmp_path / "kept", model, processor, dtype) for dtype in (None, half)]
    for cache in caches:
        cache.fill(conversations)
    [exact, rounded] = [cache.read(conversations[1].images[0]) for cache in caches]
    assert (exact.dtype, rounded.dtype) == (torch.float32, kept)
    assert caches[1].path.stat().st_size == 3 * 4 * 32 * kept.itemsize
    assert torch.equal(rounded, exact.to(kept))
    with torch.autocast("cpu", half, enabled=half is not None):
        results = [model(**one).image_tokens for one in map(step_inputs(model), (exact, rounded))]
    assert torch.equal(*results)


def step_inputs(model):
    ids = torch.tensor([[*[model.config.image_token_id] * 4, 5, 6]])
    return lambda features: {"input_ids": ids, "image_features": features[None]}


def test_each_content_is_computed_once_and_found_again(model_and_processor, tmp_path, conversations, counted):
    FeatureCache(tmp_path / "kept", *model_and_processor).fill(conversations, batch_size=2)
    assert counted == [2, 1]
    again = FeatureCache(tmp_path / "kept", *model_and_processor)
    again.fill(conversations)
    assert counted == [2, 1]
    assert again.read(conversations[0].images[0]).shape == (4, 32)
    data = (tmp_path / "a.png").read_bytes()
    again.fill([shown(ImageRef(data=data, name="cell"))])
    assert counted == [2, 1]  # the same image, as bytes


def test_what_a_kill_left_unfinished_is_written_over(model_and_processor, tmp_path, conversations, counted):
    cache = FeatureCache(tmp_path / "kept", *model_and_processor)
    cache.fill(conversations[:2])
    expected = cache.read(conversations[1].images[0])
    with (cache.folder / "index.txt").open("a") as index:
        index.write("0123")  # a line without its end
    with (cache.folder / "features.f32").open("ab") as rows:
        rows.write(b"xyz")
    again = FeatureCache(tmp_path / "kept", *model_and_processor)
    again.fill(conversations)
    third = FeatureCache(tmp_path / "kept", *model_and_processor)
    third.fill(conversations)
    assert counted == [2, 1]  # the third image once; nothing was lost
    assert torch.equal(third.read(conversations[1].images[0]), expected)
    assert len((cache.folder / "index.txt").read_text().splitlines()) == 3


def test_two_caches_open_at_once_share_their_rows(model_and_processor, tmp_path, conversations, counted):
    """As two ranks do: the second finds what the first wrote after both were opened."""
    caches = [FeatureCache(tmp_path / "kept", *model_and_processor) for _ in range(2)]
    for cache in caches:
        cache.fill(conversations)
    assert sum(counted) == 3
    refs = [conversation.images[0] for conversation in conversations]
    assert all(torch.equal(caches[0].read(ref), caches[1].read(ref)) for ref in refs)


def test_another_encoder_or_another_preprocessing_has_rows_of_its_own(parts, model_and_processor):
    model, processor = model_and_processor
    config = ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["phi"]))
    keys = [
        encoder_key(model, processor),
        encoder_key(*assemble(dataclasses.replace(config, image_aspect="square"))),
    ]
    changed, _ = assemble(config)
    keys.append(encoder_key(changed, processor))
    with torch.no_grad():
        next(changed.vision_encoder.parameters()).add_(1e-3)
    keys.append(encoder_key(changed, processor))
    assert keys[0] == keys[2]  # the language model does not matter
    assert len(set(keys)) == 3


def test_a_broken_image_is_named_with_its_record(model_and_processor, tmp_path, conversations):
    (tmp_path / "bad.png").write_text("no image")
    bad = shown(ImageRef(path=tmp_path / "bad.png", name="bad.png"), id="r7")
    with pytest.raises(ImageError, match=r"data\.json: record r7: bad\.png: not a known image format"):
        FeatureCache(tmp_path / "kept", *model_and_processor).fill([*conversations, bad])


def test_a_full_disk_is_said_and_what_was_finished_stays(
    model_and_processor, tmp_path, conversations, monkeypatch
):
    cache = FeatureCache(tmp_path / "kept", *model_and_processor)
    cache.fill(conversations[:1])

    def full(self, batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureCache, "_append", full)
    with pytest.raises(
        DataError, match=r"features cannot be written \(No space left on device\)\. Free some disk space"
    ):
        cache.fill(conversations)
    monkeypatch.undo()
    assert cache.read(conversations[0].images[0]).shape == (4, 32)


def test_the_size_is_said_before_and_what_the_disk_cannot_hold_is_not_begun(
    model_and_processor, tmp_path, conversations, counted, monkeypatch, capsys
):
    cache = FeatureCache(tmp_path / "kept", *model_and_processor)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 3 * 512 - 1))
    with pytest.raises(DataError, match=r"features of 3 images need 0\.0 GB, 0\.0 GB are free\. Free some"):
        cache.fill(conversations)
    assert counted == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 3 * 512))
    with reporting(is_shown=True):
        cache.fill(conversations)
        assert f"caching features of 3 images: 0.00 GB in {cache.folder}" in capsys.readouterr().out
        cache.fill(conversations)
        assert capsys.readouterr().out == ""


def test_a_worker_reads_rows_without_the_model(model_and_processor, tmp_path, conversations):
    cache = FeatureCache(tmp_path / "kept", *model_and_processor)
    cache.fill(conversations)
    sent = pickle.dumps(cache)
    assert len(sent) < 5000
    [ref] = conversations[1].images
    assert torch.equal(pickle.loads(sent).read(ref), cache.read(ref))


def swap_rows(folder: Path, size: int) -> None:
    path = folder / "features.f32"
    rows = path.read_bytes()
    path.write_bytes(rows[size : 2 * size] + rows[:size] + rows[2 * size :])


def swap_lines(folder: Path, size: int) -> None:
    path = folder / "index.txt"
    first, second, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([second, first, *rest]))


def flip_a_bit(folder: Path, size: int) -> None:
    path = folder / "features.f32"
    rows = bytearray(path.read_bytes())
    rows[size // 2] ^= 1
    path.write_bytes(rows)


@pytest.mark.parametrize("damage", [swap_rows, swap_lines, flip_a_bit])
def test_rows_that_are_not_the_written_ones_are_never_read(
    model_and_processor, tmp_path, conversations, damage
):
    cache = FeatureCache(tmp_path / "kept", *model_and_processor)
    cache.fill(conversations)
    damage(cache.folder, 4 * 4 * 32)
    again = FeatureCache(tmp_path / "kept", *model_and_processor)
    again.fill(conversations)
    with pytest.raises(DataError, match=r"features\.f32: row \d is damaged\. Delete .* to recompute it"):
        [again.read(conversation.images[0]) for conversation in conversations]


@pytest.mark.parametrize("left", [0, 700, 1024])
def test_rows_that_were_cut_off_are_computed_again(
    model_and_processor, tmp_path, conversations, counted, left
):
    cache = FeatureCache(tmp_path / "kept", *model_and_processor)
    cache.fill(conversations)
    expected = [cache.read(conversation.images[0]) for conversation in conversations]
    os.truncate(cache.folder / "features.f32", left)
    again = FeatureCache(tmp_path / "kept", *model_and_processor)
    again.fill(conversations)
    assert counted == [3, 3 - left // 512]
    found = [again.read(conversation.images[0]) for conversation in conversations]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))


def test_an_image_that_changes_while_features_are_computed_is_named(
    model_and_processor, tmp_path, conversations
):
    hashes = ImageHashes(tmp_path / "hashes.sqlite").find(DistinctImages(conversations))
    (tmp_path / "b.png").write_bytes((tmp_path / "c.png").read_bytes())
    cache = FeatureCache(tmp_path / "kept", *model_and_processor)
    cache.fill(conversations, hashes=[hashes])
    with pytest.raises(DataError, match=r"^b: changed since it was hashed\. Run the same command again"):
        cache.read(conversations[1].images[0])
    assert cache.num_rows == 3  # one of them once more: a file that was b's shows c
    again = FeatureCache(tmp_path / "kept", *model_and_processor)
    again.fill(conversations)
    assert torch.equal(again.read(conversations[1].images[0]), again.read(conversations[3].images[0]))


def test_numbers_are_those_of_a_dictionary_also_where_keys_begin_alike():
    random = np.random.default_rng(0)
    keys = random.integers(0, 256, (2_000, 16), dtype=np.uint8)
    keys[:600, :8] = keys[0, :8]  # alike in what is searched
    keys[1_000:1_100] = keys[:100]  # equal
    expected: dict[bytes, int] = {}
    for number, key in enumerate(keys):
        expected.setdefault(key.tobytes(), number)
    numbers, unknown = Numbers(keys), random.integers(0, 256, (500, 16), dtype=np.uint8)
    unknown[:100, :8] = keys[0, :8]
    assert numbers.find(keys).tolist() == [expected[key.tobytes()] for key in keys]
    assert numbers.find(unknown).tolist() == [-1] * 500
    assert Numbers(keys[:0]).find(keys).tolist() == [-1] * 2_000
    held = sum(values.nbytes for values in (numbers.heads, numbers.order, numbers.tails))
    assert held == 2_000 * (16 + 4)
