"""Features of a frozen encoder, computed once per image and cached on disk.

Paper: section 4.1.2. In the base recipe, V_phi is frozen in both stages, so the features V(X) of an image
never change. An image is identified by its content, and an encoder by its weights and preprocessing. Runs
share the cache.
"""

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.images import naming_record, open_image, read_image_bytes
from tinyllava.data.reporting import say
from tinyllava.errors import DataError
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor

_Missing = tuple[str, ImageRef, Conversation]
"""Digest of an image, where it is, and a record that shows it."""


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
        self.rows: dict[str, int] = {}
        self.checksums: list[int] = []
        self._digests: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model and the processor: a process that only reads rows needs neither."""
        return {name: value for name, value in vars(self).items() if name not in ("model", "processor")}

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's features."""
        return self.dtype.itemsize * self.shape[0] * self.shape[1]

    def fill(
        self,
        conversations: Iterable[Conversation],
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] = lambda n: None,
        hashes: Iterable[Mapping[ImageRef, str]] = (),
    ) -> None:
        """Compute the missing features. Of several processes, one computes and the others wait.

        How much they will take is said before.

        Args:
            hashes: SHA-256 of images, where known; the others are read to find their features.

        Raises:
            ImageError: an image is broken; its record is named.
            DataError: they need more than is free on the disk, or it is full; what was finished stays.
        """
        for known in hashes:
            self._digests |= {str(ref.path): digest for ref, digest in known.items() if ref.data is None}
        try:
            with FileLock(self.folder / "lock"):
                self._read_index()
                todo = self._find_missing(conversations, progress)
                self._require_space(len(todo))
                for start in range(0, len(todo), batch_size):
                    batch = todo[start : start + batch_size]
                    self._append(batch)
                    progress(len(batch))
        except OSError as error:
            raise DataError(
                f"{self.folder}: features cannot be written ({error.strerror}). Free some disk space."
            ) from error

    def _require_space(self, num_missing: int) -> None:
        """Report the size of the missing rows, and fail if the disk does not have the space."""
        used = self.row_bytes * len(self.rows)
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
        text = index.read_text(encoding="ascii", errors="replace") if index.exists() else ""
        num_rows = path.stat().st_size // self.row_bytes if path.exists() else 0
        whole = takewhile(_LINE.fullmatch, text.splitlines(keepends=True))
        lines = list(islice(whole, num_rows))
        if "".join(lines) != text:
            index.write_text("".join(lines), encoding="ascii")
        self.rows = {line.split()[0]: row for row, line in enumerate(lines)}
        self.checksums = [int(line.split()[1], 16) for line in lines]

    def _find_missing(
        self, conversations: Iterable[Conversation], progress: Callable[[int], None]
    ) -> list[_Missing]:
        missing: dict[str, _Missing] = {}
        for conversation in conversations:
            for ref in conversation.images:
                with naming_record(conversation):
                    digest = self._digest(ref)
                if digest in self.rows or digest in missing:
                    progress(1)
                else:
                    missing[digest] = (digest, ref, conversation)
        return list(missing.values())

    def read(self, ref: ImageRef) -> Tensor:
        """Return the features [M, X] of an image that ``fill`` has seen.

        Raises:
            DataError: the row is not the one that was written.
        """
        row = self.rows[self._digest(ref)]
        stored = np.fromfile(self.path, dtype=np.uint8, count=self.row_bytes, offset=self.row_bytes * row)
        if zlib.crc32(stored.tobytes()) != self.checksums[row]:
            raise DataError(f"{self.path}: row {row} is damaged. Delete {self.folder} to recompute it.")
        return torch.from_numpy(stored).view(self.dtype).view(self.shape)

    def _append(self, batch: list[_Missing]) -> None:
        images = []
        for _, ref, conversation in batch:
            with naming_record(conversation):
                images.append(open_image(ref, self.processor.background))
        pixels = self.processor.to_pixels(images)
        device = next(self.model.vision_encoder.parameters()).device
        with torch.inference_mode():
            features = self.model.model.encode_images(pixels.to(device)).float().to(self.dtype).cpu()
        assert features.shape[1:] == self.shape, (features.shape, self.shape)
        rows = features.contiguous().flatten(1).view(torch.uint8).numpy()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(self.row_bytes * len(self.rows))
            file.write(rows.tobytes())
        with (self.folder / "index.txt").open("a", encoding="ascii") as index:
            sums = [zlib.crc32(row.tobytes()) for row in rows]
            index.writelines(
                f"{digest} {sum_:08x}\n" for (digest, _, _), sum_ in zip(batch, sums, strict=True)
            )
        for digest, _, _ in batch:
            self.rows[digest] = len(self.rows)
        self.checksums += sums

    def _digest(self, ref: ImageRef) -> str:
        """Content of an image; remembered by path, since one image serves many records."""
        key = str(ref.path) if ref.data is None else ""
        if not key:
            return hashlib.sha256(ref.data or b"").hexdigest()
        if key not in self._digests:
            self._digests[key] = hashlib.sha256(read_image_bytes(ref)).hexdigest()
        return self._digests[key]


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
