"""Images travel to the device as bytes and become the encoder's input there.

Paper: none. Workers pass a quarter of the memory, and the cores that open images neither rescale nor
normalise. The value of each byte is looked up in a table made by the image processor itself, so the pixels
are exactly the image processor's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyllava.model.processing import TinyLlavaProcessor

_TRIED = ((64, 48), (48, 64), (33, 33), (97, 200), (620, 466))
"""Sizes of the images of noise on which a packing has to give what the image processor gives."""


class ImagePacking:
    """Packs images as bytes [I, 3, S, S] and unpacks them to ``pixel_values``.

    ``pack`` is the same as ``TinyLlavaProcessor.to_pixels`` for an image processor that does more to a byte
    than rescale and normalise it, or that gives no bytes when asked to do neither.
    """

    def __init__(self, processor: TinyLlavaProcessor) -> None:
        self._processor = processor
        self._side = processor.image_size_px
        self._tables: dict[torch.device, Tensor] = {}
        self._resize: Callable[[list[Image.Image]], Tensor] | None = None
        noise = np.random.default_rng(0)
        images = [
            Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
            for width, height in _TRIED
        ]
        expected = processor.to_pixels(images)
        for resize in (self._resize_all, self._ask_processor):
            if self._agrees(resize, images, expected):
                self._resize = resize
                return

    @property
    def is_packed(self) -> bool:
        """Whether images become bytes."""
        return self._resize is not None

    @property
    def image_bytes(self) -> int:
        """Bytes of one packed image."""
        return 3 * self._side**2 * (1 if self.is_packed else 4)

    def pack(self, images: list[Image.Image]) -> Tensor:
        """Return RGB images as bytes [I, 3, S, S], or as pixel values if they cannot be packed."""
        if self._resize is None:
            pixels: Tensor = self._processor.to_pixels(images)
            return pixels
        return self._resize(self._processor.shape_images(images))

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the ``pixel_values`` [I, 3, S, S] of packed images, on their device."""
        if packed.dtype != torch.uint8:
            return packed
        table = self._tables.get(packed.device)
        if table is None:  # copied once: a copy in each step would keep the host waiting
            table = self._tables[packed.device] = self._tables[torch.device("cpu")].to(packed.device)
        shape = packed[:, 0].shape
        channels = [
            values.index_select(0, packed[:, channel].flatten().int()).view(shape)
            for channel, values in enumerate(table)
        ]
        return torch.stack(channels, dim=1)

    def _agrees(
        self, resize: Callable[[list[Image.Image]], Tensor], images: list[Image.Image], expected: Any
    ) -> bool:
        """Whether bytes and table give the pixels that the image processor gives."""
        each_byte = np.arange(256, dtype=np.uint8).reshape(16, 16)
        image = Image.fromarray(np.stack([each_byte] * 3, axis=-1))
        try:
            values = self._call([image], do_resize=False, do_center_crop=False)
            self._tables = {torch.device("cpu"): values.reshape(3, 256)}
            packed = resize(self._processor.shape_images(images))
        except Exception:  # noqa: BLE001 (settings of a stranger in a library: what cannot be asked is not packed)
            return False
        return packed.dtype == torch.uint8 and torch.equal(self.unpack(packed), expected)

    def _call(self, images: list[Image.Image], **settings: bool) -> Tensor:
        pixels: Tensor = self._processor.image_processor(images, return_tensors="pt", **settings)[
            "pixel_values"
        ]
        return pixels

    def _resize_all(self, images: list[Image.Image]) -> Tensor:
        """Resize with Pillow alone, which spares the image processor's copies of the whole image."""
        side, resample = self._side, self._processor.image_processor.resample
        arrays = [np.asarray(image.resize((side, side), resample)) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def _ask_processor(self, images: list[Image.Image]) -> Tensor:
        return self._call(images, do_rescale=False, do_normalize=False)
