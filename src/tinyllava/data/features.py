"""Features of a frozen encoder, computed once per image and cached on disk.

Paper: section 4.1.2. In the base recipe, V_phi is frozen in both stages, so the features V(X) of an image
never change. An image is identified by its content, and an encoder by its weights and preprocessing. Runs
share the cache.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from array import array
from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.distinct_images import DistinctImages
from tinyllava.data.hashes import ImageDigests, ImageHashes
from tinyllava.data.images import naming_record, open_image, read_image_bytes
from tinyllava.data.reporting import say
from tinyllava.data.store import image_counts
from tinyllava.errors import DataError, ImageError
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor

_Missing = tuple[DistinctImages, int]
"""An image by its number."""
_HEAD_BYTES = 8
_DIGEST_BYTES = 32
_PATH_BYTES = 16
_ROWS_AT_ONCE = 4096


class Numbers:
    """Finds the numbers of keys: 4 bytes each beside the keys, where a dictionary takes more than 200.

    Args:
        keys: [N, K], digests of at least 8 bytes. Of equal ones the first is found.
    """

    def __init__(self, keys: NDArray[np.uint8]) -> None:
        heads = _heads(keys)
        order = np.argsort(heads, kind="stable").astype(np.int32)
        self.heads, self.order = heads[order], order
        self.tails = keys[order, _HEAD_BYTES:]

    def find(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return [M], the number of each key [M, K]; -1 where there is none."""
        heads, tails = _heads(keys), keys[:, _HEAD_BYTES:]
        found = np.full(len(keys), -1, dtype=np.int64)
        places = np.searchsorted(self.heads, heads)
        asked = np.arange(len(keys))
        while len(asked):  # again only where different keys begin alike
            asked = asked[places[asked] < len(self.heads)]
            asked = asked[self.heads[places[asked]] == heads[asked]]
            is_same = (self.tails[places[asked]] == tails[asked]).all(axis=1)
            found[asked[is_same]] = self.order[places[asked[is_same]]]
            asked = asked[~is_same]
            places[asked] += 1
        return found


def _heads(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(keys[:, :_HEAD_BYTES]).view(np.uint64).ravel()


def _as_keys(joined: bytes, width: int) -> NDArray[np.uint8]:
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, width)


def _path_key(path: Path) -> bytes:
    return hashlib.blake2b(os.fsencode(path), digest_size=_PATH_BYTES).digest()


_FORMS = {torch.float32: ("", "f32"), torch.bfloat16: ("-bf16", "bf16"), torch.float16: ("-fp16", "f16")}
"""What ends the names of folder and file of features in a precision."""
_LINE = re.compile(r"[0-9a-f]{64} [0-9a-f]{8}\n")


class FeatureCache:
    """Rows [M, X] of patch features in one file that only grows.

    A row counts when its line is in the index, which is written after the row: a killed run leaves at
    most bytes that the next one writes over. A line is the image's digest and the checksum of its row, which
    is compared whenever the row is read.

    Args:
        folder: where features of any encoder may be kept.
        half: what matrix products of the training compute in, None for fp32. Rows are kept so where the
            connector makes the same of them, see ``seen_dtype``.
    """

    def __init__(
        self,
        folder: Path,
        model: TinyLlavaForConditionalGeneration,
        processor: TinyLlavaProcessor,
        half: torch.dtype | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.shape = (model.config.num_patches, model.config.vision_width)
        self.dtype = seen_dtype(model, half)
        name, ending = _FORMS[self.dtype]
        self.folder = folder / (encoder_key(model, processor) + name)
        self.path = self.folder / f"features.{ending}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_rows = 0
        """Images whose features are kept."""
        self.checksums = np.zeros(0, dtype=np.uint32)
        self._rows = Numbers(_as_keys(b"", _DIGEST_BYTES))
        self._known: list[tuple[Numbers, NDArray[np.uint8]]] = []
        """Images that are files, by their paths, and the digest [32] of each."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model and the processor: a process that only reads rows needs neither."""
        return {name: value for name, value in vars(self).items() if name not in ("model", "processor")}

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's features."""
        return self.dtype.itemsize * self.shape[0] * self.shape[1]

    def fill(
        self,
        *parts: Sequence[Conversation],
        batch_size: int = 8,
        progress: Callable[[int], None] = lambda n: None,
        hashes: Sequence[ImageDigests] = (),
    ) -> None:
        """Compute the missing features. Of several processes, one computes and the others wait.

        How much they will take is said before.

        Args:
            parts: conversations that show the images.
            hashes: of the images of each part, where known; otherwise images are read to find their features.

        Raises:
            ImageError: an image is broken; its record is named.
            DataError: they need more than is free on the disk, or it is full; what was finished stays.
        """
        hashes = hashes or [ImageHashes(Path(":memory:")).find(DistinctImages(part)) for part in parts]
        for known in hashes:
            self._note_paths(known)
        try:
            with FileLock(self.folder / "lock"):
                self._read_index()
                todo = self._find_missing(hashes)
                self._require_space(len(todo))
                progress(sum(int(image_counts(part).sum()) for part in parts) - len(todo))
                for start in range(0, len(todo), batch_size):
                    batch = todo[start : start + batch_size]
                    self._append(batch)
                    progress(len(batch))
                if todo:
                    self._read_index()
        except OSError as error:
            raise DataError(
                f"{self.folder}: features cannot be written ({error.strerror}). Free some disk space."
            ) from error

    def _require_space(self, num_missing: int) -> None:
        """Report the size of the missing rows, and fail if the disk does not have the space."""
        used = self.row_bytes * self.num_rows
        left_over = max(0, self.path.stat().st_size - used) if self.path.exists() else 0  # is written over
        needed = num_missing * self.row_bytes
        free = shutil.disk_usage(self.folder).free + left_over
        if needed > free:
            raise DataError(
                f"{self.folder}: features of {num_missing:,} images need {needed / 1e9:,.1f} GB, "
                f"{free / 1e9:,.1f} GB are free. Free some disk space, choose another folder with --output, "
                "or train without cached features: --hardware.cache-features False."
            )
        if needed:
            say(
                f"caching features of {num_missing:,} images: {needed / 1e9:,.2f} GB in {self.folder}, "
                f"{free / 1e9:,.1f} GB free"
            )

    def _read_index(self) -> None:
        """Read which rows exist. Rows that a kill or a full disk truncated are removed from the index."""
        index, path = self.folder / "index.txt", self.path
        num_rows = path.stat().st_size // self.row_bytes if path.exists() else 0
        digests, sums, num_whole = bytearray(), array("I"), 0
        if index.exists():
            with index.open(encoding="ascii", errors="replace", newline="\n") as lines:
                for line in islice(takewhile(_LINE.fullmatch, lines), num_rows):
                    digest, sum_ = line.split()
                    digests += bytes.fromhex(digest)
                    sums.append(int(sum_, 16))
                    num_whole += len(line)
            if num_whole < index.stat().st_size:
                os.truncate(index, num_whole)
        self._rows = Numbers(_as_keys(bytes(digests), _DIGEST_BYTES))
        self.checksums = np.array(sums, dtype=np.uint32)
        self.num_rows = len(sums)

    def _note_paths(self, hashes: ImageDigests) -> None:
        """Remember the digests of images that are files by their paths."""
        keys, numbers = bytearray(), array("I")
        for part in hashes.images.parts(_ROWS_AT_ONCE):
            first = hashes.images.place(part).start
            for number, ref in enumerate(
                hashes.images.sources[part.source].refs(part.start, part.end), first
            ):
                if ref.data is None and ref.path is not None:
                    keys += _path_key(ref.path)
                    numbers.append(number)
        found = hashes.found[np.array(numbers, dtype=np.int64)]
        self._known.append((Numbers(_as_keys(bytes(keys), _PATH_BYTES)), found))

    def _find_missing(self, hashes: Sequence[ImageDigests]) -> list[_Missing]:
        """Return the images without features, each content once, in the order of the parts."""
        found = np.concatenate([_as_keys(b"", _DIGEST_BYTES), *(known.found for known in hashes)])
        places = np.flatnonzero(self._rows.find(found) < 0)
        _, first = np.unique(found[places], axis=0, return_index=True)
        ends = np.cumsum([0, *(len(known) for known in hashes)])
        missing = []
        for place in np.sort(places[first]).tolist():
            part = int(np.searchsorted(ends, place, side="right")) - 1
            missing.append((hashes[part].images, place - int(ends[part])))
        return missing

    def read(self, ref: ImageRef) -> Tensor:
        """Return the features [M, X] of an image that ``fill`` has seen.

        Raises:
            DataError: the row is not the one that was written, or the image has changed.
        """
        [row] = self._rows.find(_as_keys(self._digest(ref), _DIGEST_BYTES)).tolist()
        if row < 0:
            raise DataError(f"{ref}: changed since it was hashed. Run the same command again.")
        stored = np.fromfile(self.path, dtype=np.uint8, count=self.row_bytes, offset=self.row_bytes * row)
        if zlib.crc32(stored.tobytes()) != int(self.checksums[row]):
            raise DataError(f"{self.path}: row {row} is damaged. Delete {self.folder} to recompute it.")
        return torch.from_numpy(stored).view(self.dtype).view(self.shape)

    def _append(self, batch: list[_Missing]) -> None:
        images, digests = [], []
        for shown, number in batch:
            ref = shown.ref(number)
            try:
                data = read_image_bytes(ref)
                images.append(open_image(ImageRef(data=data, name=str(ref)), self.processor.background))
            except ImageError as error:
                place, _ = next(shown.showing({number}))
                with naming_record(shown.conversations[place]):
                    raise error
            digests.append(hashlib.sha256(data).hexdigest())
        pixels = self.processor.to_pixels(images)
        device = next(self.model.vision_encoder.parameters()).device
        with torch.inference_mode():
            features = self.model.model.encode_images(pixels.to(device)).float().to(self.dtype).cpu()
        assert features.shape[1:] == self.shape, (features.shape, self.shape)
        rows = features.contiguous().flatten(1).view(torch.uint8).numpy()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(self.row_bytes * self.num_rows)
            file.write(rows.tobytes())
        sums = [zlib.crc32(row.tobytes()) for row in rows]
        with (self.folder / "index.txt").open("a", encoding="ascii") as index:
            index.writelines(f"{digest} {sum_:08x}\n" for digest, sum_ in zip(digests, sums, strict=True))
        self.num_rows += len(sums)

    def _digest(self, ref: ImageRef) -> bytes:
        """Content of an image; remembered by path, since one image serves many records."""
        if ref.data is None and ref.path is not None:
            key = _as_keys(_path_key(ref.path), _PATH_BYTES)
            for numbers, digests in self._known:
                [number] = numbers.find(key).tolist()
                if number >= 0:
                    found: bytes = digests[number].tobytes()
                    return found
        return hashlib.sha256(read_image_bytes(ref)).digest()


@torch.no_grad()
def seen_dtype(model: TinyLlavaForConditionalGeneration, half: torch.dtype | None) -> torch.dtype:
    """Return the precision of features for the connector: half if rounding does not change its result.

    Autocast rounds the input of a linear layer anyway. A connector that begins with a norm or a mean sees
    fp32. It is tried, so that a connector of the user's is known as well.
    """
    if half is None:
        return torch.float32
    generator = torch.Generator().manual_seed(0)
    shape = (2, model.config.num_patches, model.config.vision_width)
    features = 10 * torch.randn(shape, generator=generator)
    weight, was_training = next(model.connector.parameters()), model.connector.training
    model.connector.eval()
    with torch.autocast(weight.device.type, half):
        tokens, of_rounded = (
            model.connector(values.to(weight)) for values in (features, features.to(half).float())
        )
    model.connector.train(was_training)
    return half if torch.equal(tokens, of_rounded) else torch.float32


def encoder_key(model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor) -> str:
    """Return a key of everything that determines the features: encoder weights and preprocessing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.vision_encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    settings = {
        "image_processor": processor.image_processor.to_dict(),
        "aspect": processor.image_aspect,
        "background": processor.background,
        "form": "rows with checksums",
        "prefix": model.config.num_prefix_tokens,
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
