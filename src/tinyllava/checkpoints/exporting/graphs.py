"""The three graphs of an exported model, as modules that torch traces: images, tokens, decoder.

The image graph takes the pixels of an image of any size, 0-255, and does what the image processor does:
padding, Pillow's resize, centre crop, rescaling and normalisation. So every runtime feeds the encoder the
same values, however its own image library resizes.
Source: the fixed-point arithmetic is that of Pillow's ``ImagingResample`` for 8-bit images.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache

from tinyllava.errors import CheckpointError
from tinyllava.model.compat import CACHE_NAME
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import MAX_CROPPED_RATIO, TinyLlavaProcessor

_FRACTION = 2.0**22
"""Pillow rounds the weights of a resize to whole multiples of its reciprocal."""


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    x, a = x.abs(), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


# By Pillow's number of the filter: the function and its radius in output pixels.
_FILTERS: dict[int, tuple[Callable[[Tensor], Tensor], float]] = {2: (_bilinear, 1.0), 3: (_bicubic, 2.0)}


class Pixels(nn.Module):
    """[I, 3, H, W] of any H and W, 0-255 -> [I, 3, S, S] as ``TinyLlavaProcessor.to_pixels`` makes them.

    Images longer than ``MAX_PADDED_PX`` have to be scaled to that side before.

    Raises:
        CheckpointError: an image processor that resizes with another filter.
    """

    def __init__(self, processor: TinyLlavaProcessor) -> None:
        super().__init__()
        own = processor.image_processor
        if int(own.resample) not in _FILTERS:
            raise CheckpointError(
                f"not exported: the image processor resizes with Pillow's filter {int(own.resample)}; the "
                "graph has 2 (bilinear) and 3 (bicubic). Set `resample` of its config to one of them."
            )
        self.filter, self.radius = _FILTERS[int(own.resample)]
        self.side = processor.image_size_px
        self.is_padded = processor.image_aspect == "pad"
        self.has_tall_rule = _resizes_tall_images_downwards_first()
        self.resized, self.keeps_shape = _resize_rule(own, self.side)
        self.colour: Tensor
        self.mean: Tensor
        self.deviation: Tensor
        scale = float(own.rescale_factor) if own.do_rescale else 1.0
        mean, deviation = (own.image_mean, own.image_std) if own.do_normalize else ([0.0] * 3, [1.0] * 3)
        self.scale = scale
        colour = torch.tensor(processor.mean_colour, dtype=torch.float64).view(3, 1, 1)
        self.register_buffer("colour", colour, persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Pad or crop, resize, and normalise."""
        images = images.double()
        # Lengths as numbers in the graph, so that one graph serves every size.
        height = torch.ones_like(images[0, 0, :, 0]).sum()
        width = torch.ones_like(images[0, 0, 0, :]).sum()
        sides, offsets = [height, width], [torch.zeros_like(height)] * 2
        short, long = torch.minimum(height, width), torch.maximum(height, width)
        if self.is_padded:
            sides, offsets = [long, long], [((long - side) / 2).floor() for side in sides]
        elif self.keeps_shape:  # the ends of very long images are cut off first, as the processor does
            cuts = [((side - MAX_CROPPED_RATIO * short).clamp(min=0) / 2).floor() for side in sides]
            sides = [side - 2 * cut for side, cut in zip(sides, cuts, strict=True)]
            offsets = [-cut for cut in cuts]
        every = torch.arange(images.shape[2] + images.shape[3], dtype=torch.float64)
        axes = [
            self._weights(every, images.shape[2 + axis], sides[axis], offsets[axis], torch.minimum(*sides))
            for axis in (0, 1)
        ]
        down, across = axes
        square = self._down(self._across(images, across), down)
        if self.has_tall_rule and not self.is_padded:  # a square never comes under the rule
            gone = [side - self._resized(side, torch.minimum(*sides)) for side in sides]
            is_tall = (gone[0] > 0) & (gone[0] > 2 * gone[1])
            square = torch.where(is_tall, self._across(self._down(images, down), across), square)
        return ((square * self.scale).float() - self.mean) / self.deviation

    def _across(self, images: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        return self._round(images @ weights[0].T + self.colour * weights[1])

    def _down(self, images: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        return self._round(weights[0] @ images + self.colour * weights[1][:, None])

    def _resized(self, side: Tensor, short: Tensor) -> Tensor:
        """Return the length that a side is resized to, before the crop."""
        return (self.resized * side / short).floor() if self.keeps_shape else side * 0 + self.resized

    def _weights(
        self, every: Tensor, length: int, side: Tensor, offset: Tensor, short: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return whole-number weights of one axis: [S, length] of the image's pixels, [S] of the padding.

        Args:
            every: 0, 1, ... beyond the padded or cropped side.
            length: of the image.
            side: of the padded or cropped image.
            offset: position of the image's first pixel in it.
            short: the shorter of both sides.
        """
        resized = self._resized(side, short)
        first = ((resized - self.side) / 2).floor()
        scale = side / resized
        stretch = scale.clamp(min=1)
        centre = ((torch.arange(self.side, dtype=torch.float64) + first + 0.5) * scale)[:, None]
        low = (centre - self.radius * stretch + 0.5).floor().clamp(min=0)
        high = torch.minimum((centre + self.radius * stretch + 0.5).floor(), side)

        def weigh(at: Tensor) -> Tensor:
            weights = self.filter((at - centre + 0.5) / stretch)
            return torch.where((at >= low) & (at < high), weights, torch.zeros_like(weights))

        def fix(weights: Tensor) -> Tensor:
            """Round halves away from zero."""
            return weights.sign() * (weights.abs() / total * _FRACTION + 0.5).floor()

        whole = weigh(every)
        total = whole.sum(dim=1, keepdim=True)
        own = fix(weigh(every[:length] + offset))
        return own, fix(whole).sum(dim=1) - own.sum(dim=1)

    @staticmethod
    def _round(sums: Tensor) -> Tensor:
        return (sums / _FRACTION + 0.5).floor().clamp(0, 255)


def _resizes_tall_images_downwards_first() -> bool:
    """Whether the installed Pillow shrinks the height first where that loses over twice the width's pixels.

    Pillow 13 does; older ones always begin with the width. Both round in between, so pixels can differ.
    """
    noise = np.random.default_rng(0).integers(0, 256, (200, 20), dtype=np.uint8)
    image = Image.fromarray(noise)
    plain = image.resize((10, 200), Image.Resampling.BICUBIC).resize((10, 10), Image.Resampling.BICUBIC)
    return plain.tobytes() != image.resize((10, 10), Image.Resampling.BICUBIC).tobytes()


def _resize_rule(image_processor: Any, side: int) -> tuple[int, bool]:
    """Return the length an image is resized to, and whether that is its shorter side (then cropped)."""
    size = image_processor.size or {}
    shortest = size.get("shortest_edge") if hasattr(size, "get") else size["shortest_edge"]
    if not shortest:
        return side, False
    crop_pct = getattr(image_processor, "crop_pct", None)  # ConvNeXt's, see processing.py
    if crop_pct:
        return (int(shortest / crop_pct), True) if shortest < 384 else (side, False)
    return int(shortest), True


class ImageGraph(nn.Module):
    """Pixels [I, 3, H, W], 0-255, to image tokens [I, T, D]: preprocessing, encoder, connector."""

    def __init__(self, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor) -> None:
        super().__init__()
        self.pixels = Pixels(processor)
        self.model = model.model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return image tokens in single precision."""
        return self.model.get_image_features(self.pixels(pixel_values)).float()


class TokenGraph(nn.Module):
    """Token ids [B, N] to embeddings [B, N, D]."""

    def __init__(self, model: TinyLlavaForConditionalGeneration) -> None:
        super().__init__()
        self.embedding = model.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return embeddings in single precision."""
        return self.embedding(input_ids).float()  # type: ignore[no-any-return]


class DecoderGraph(nn.Module):
    """Embeddings [B, N, D] behind P cached positions to logits [B, N, vocabulary] and the longer cache."""

    def __init__(self, model: TinyLlavaForConditionalGeneration) -> None:
        super().__init__()
        self.language_model: Any = model.language_model
        self.lm_head = model.lm_head

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run N positions.

        Args:
            attention_mask: [B, P + N], 1 where there is a token.
            past: keys and values [B, heads, P, width] of each layer in turn.
        """
        dtype = self.lm_head.weight.dtype
        num_new = inputs_embeds.shape[1]
        keys = torch.arange(attention_mask.shape[1])
        seen = (keys[None, :] <= keys[-num_new:, None]) & (attention_mask[:, None, None, :] > 0)
        # The lowest number in place of minus infinity: a row of padding sees nothing, and would become NaN.
        mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer].to(dtype), past[2 * layer + 1].to(dtype), layer)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds.to(dtype),
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        present = [
            tensor.float() for layer in outputs[CACHE_NAME].layers for tensor in (layer.keys, layer.values)
        ]
        return self.lm_head(outputs.last_hidden_state).float(), *present
