"""Features of a frozen encoder, computed once per picture and kept on disk.

Paper: section 4.1.2; in the base recipe V_phi is frozen in both stages, so V(X) of a picture never changes.
A picture is known by its content, an encoder by its weights and preprocessing; runs share the rows.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyllava.conversation import ImageRef
from tinyllava.data.images import open_image, read_image_bytes
from tinyllava.errors import DataError
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor


class FeatureCache:
    """Rows [M, X] of patch features in one file that only grows.

    A row counts when its line stands in the index, which is written after the row: a killed run leaves at most
    bytes that the next one writes over.

    Args:
        folder: where features of any encoder may be kept.
    """

    def __init__(self, folder: Path, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor) -> None:
        self.model, self.processor = model, processor
        self.shape = (model.config.num_patches, model.config.vision_width)
        self.folder = folder / encoder_key(model, processor)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, int] = {}
        self._digests: dict[str, str] = {}
        index = self.folder / "index.txt"
        if index.exists():
            lines = index.read_text(encoding="ascii").split("\n")[:-1]  # what follows the last newline is unfinished
            self.rows = {digest: row for row, digest in enumerate(lines)}

    def fill(self, refs: Iterable[ImageRef], *, batch_size: int = 16, progress: Callable[[int], None] = lambda n: None) -> None:
        """Compute what is not there yet.

        Raises:
            ImageError: a picture is broken.
            DataError: the disk is full; what was finished stays.
        """
        missing: dict[str, ImageRef] = {}
        for ref in refs:
            digest = self._digest(ref)
            if digest not in self.rows and digest not in missing:
                missing[digest] = ref
            else:
                progress(1)
        todo = list(missing.items())
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            try:
                self._append(batch)
            except OSError as error:
                raise DataError(f"{self.folder}: features cannot be written ({error.strerror}); free some space.") from error
            progress(len(batch))

    def read(self, ref: ImageRef) -> Tensor:
        """Return the features [M, X] of a picture that ``fill`` has seen."""
        row = self.rows[self._digest(ref)]
        size = self.shape[0] * self.shape[1]
        values = np.fromfile(self.folder / "features.f32", dtype=np.float32, count=size, offset=4 * size * row)
        return torch.from_numpy(values.reshape(self.shape))

    def _append(self, batch: list[tuple[str, ImageRef]]) -> None:
        pixels = self.processor.to_pixels([open_image(ref) for _, ref in batch])
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            features = self.model.model.encode_images(pixels.to(device)).float().cpu().numpy()
        assert features.shape[1:] == self.shape, (features.shape, self.shape)
        path = self.folder / "features.f32"
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.seek(features[0].nbytes * len(self.rows))
            file.write(features.tobytes())
        with open(self.folder / "index.txt", "a", encoding="ascii") as index:
            index.writelines(f"{digest}\n" for digest, _ in batch)
        for digest, _ in batch:
            self.rows[digest] = len(self.rows)

    def _digest(self, ref: ImageRef) -> str:
        """Content of a picture; remembered by path, since one picture serves many records."""
        key = str(ref.path) if ref.data is None else ""
        if not key:
            return hashlib.sha256(ref.data or b"").hexdigest()
        if key not in self._digests:
            self._digests[key] = hashlib.sha256(read_image_bytes(ref)).hexdigest()
        return self._digests[key]


def encoder_key(model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor) -> str:
    """Return a name for what decides the features: the encoder's weights, its config and the preprocessing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.vision_encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    settings = {
        "image_processor": processor.image_processor.to_dict(),
        "aspect": processor.image_aspect,
        "prefix": model.config.num_prefix_tokens,
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
