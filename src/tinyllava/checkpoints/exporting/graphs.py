"""The three graphs of an exported model, as modules that torch traces: images, tokens and decoder; and int8.

The image graph takes the pixels (0-255) of an image of any size and repeats the image processor's steps:
padding, Pillow's resize, centre crop, rescaling and normalisation. The encoder therefore gets the same values
in every runtime, whatever image library the runtime uses.
Sums are whole numbers that single precision holds exactly. Their weights need more: doubles, or 64-bit
integers for browsers, whose runtime has no doubles. (OpenVINO truncates 64-bit integers to 32 bits.)
Source: the fixed-point arithmetic of Pillow's ``ImagingResample`` for 8-bit images.
"""

from collections.abc import Callable
from pathlib import Path
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

_BITS = 11
_FRACTION = 1 << (2 * _BITS)
"""Pillow rounds the weights of a resize to whole multiples of its reciprocal."""
_PIECE = 64
"""Weights are split into digits of this base: a thousand of them times 255 add up exactly in float32."""
_NUM_PIECES = 4


def _bilinear(n: Tensor, d: Tensor) -> Tensor:
    return (d - n).clamp(min=0)


def _bicubic(n: Tensor, d: Tensor) -> Tensor:
    near = (3 * n - 5 * d) * n * n + 2 * d * d * d
    far = ((5 * d - n) * n - 8 * d * d) * n + 4 * d * d * d
    return torch.where(n < d, near, torch.where(n < 2 * d, far, torch.zeros_like(n)))


# By Pillow's number of the filter: its value at a distance n / d from the middle, up to a factor.
_FILTERS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {2: _bilinear, 3: _bicubic}


def _over(a: Tensor, b: Tensor | int) -> Tensor:
    """Divide whole numbers that are not negative, and round down."""
    return a // b


class Pixels(nn.Module):
    """[I, 3, H, W] of any H and W, 0-255 -> [I, 3, S, S] as ``TinyLlavaProcessor.to_pixels`` makes them.

    Images longer than ``MAX_PADDED_PX`` have to be scaled to that side before.

    Args:
        has_doubles: whether the runtime has numbers of double precision; browsers have whole ones of 64 bits.

    Raises:
        CheckpointError: an image processor that resizes with another filter.
    """

    def __init__(self, processor: TinyLlavaProcessor, *, has_doubles: bool = True) -> None:
        super().__init__()
        own = processor.image_processor
        self.has_doubles = has_doubles
        if int(own.resample) not in _FILTERS:
            raise CheckpointError(
                f"not exported: the image processor resizes with Pillow's filter {int(own.resample)}; the "
                "graph has 2 (bilinear) and 3 (bicubic). Set `resample` of its config to one of them."
            )
        self.filter = _FILTERS[int(own.resample)]
        self.side = processor.image_size_px
        self.is_padded = processor.image_aspect == "pad"
        self.has_tall_rule = _resizes_tall_images_downwards_first()
        self.resized, self.keeps_shape = _resize_rule(own, self.side)
        self.colour: Tensor
        self.levels: Tensor
        self.mean: Tensor
        self.deviation: Tensor
        scale = float(own.rescale_factor) if own.do_rescale else 1.0
        mean, deviation = (own.image_mean, own.image_std) if own.do_normalize else ([0.0] * 3, [1.0] * 3)
        self.register_buffer("colour", torch.tensor(processor.mean_colour).view(3, 1, 1), persistent=False)
        levels = (torch.arange(256, dtype=torch.float64) * scale).float()
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Pad or crop, resize, and normalise."""
        # Lengths as numbers in the graph, so that one graph serves every size.
        height = torch.ones_like(images[0, 0, :, 0], dtype=torch.int64).sum()
        width = torch.ones_like(images[0, 0, 0, :], dtype=torch.int64).sum()
        sides, offsets = [height, width], [torch.zeros_like(height)] * 2
        short, long = torch.minimum(height, width), torch.maximum(height, width)
        if self.is_padded:
            sides, offsets = [long, long], [_over(long - side, 2) for side in sides]
        elif self.keeps_shape:  # the ends of very long images are cut off first, as the processor does
            cuts = [_over((side - MAX_CROPPED_RATIO * short).clamp(min=0), 2) for side in sides]
            sides = [side - 2 * cut for side, cut in zip(sides, cuts, strict=True)]
            offsets = [-cut for cut in cuts]
        every = torch.arange(images.shape[2] + images.shape[3])
        axes = [
            self._weights(every, images.shape[2 + axis], sides[axis], offsets[axis], torch.minimum(*sides))
            for axis in (0, 1)
        ]
        down, across = axes
        square = self._down(self._across(images, across).float(), down)
        if self.has_tall_rule and not self.is_padded:  # a square never comes under the rule
            gone = [side - self._resized(side, torch.minimum(*sides)) for side in sides]
            is_tall = (gone[0] > 0) & (gone[0] > 2 * gone[1])
            square = torch.where(is_tall, self._across(self._down(images, down).float(), across), square)
        return (self.levels[square] - self.mean) / self.deviation

    def _across(self, images: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        return self._join([images @ piece.T for piece in weights[0]], self.colour * weights[1])

    def _down(self, images: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        return self._join([piece @ images for piece in weights[0]], self.colour * weights[1][:, None])

    def _resized(self, side: Tensor, short: Tensor) -> Tensor:
        """Return the length that a side is resized to, before the crop."""
        return _over(self.resized * side, short) if self.keeps_shape else side * 0 + self.resized

    def _weights(
        self, every: Tensor, length: int, side: Tensor, offset: Tensor, short: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return weights of one axis: [4, S, length] of the image's pixels in digits, [S] of the padding.

        Args:
            every: 0, 1, ... beyond the padded or cropped side.
            length: of the image.
            side: of the padded or cropped image.
            offset: position of the image's first pixel in it.
            short: the shorter of both sides.
        """
        resized = self._resized(side, short)
        centre = (2 * (torch.arange(self.side) + _over(resized - self.side, 2)) + 1) * side
        per_pixel = 2 * torch.maximum(side, resized)

        def weigh(at: Tensor) -> Tensor:
            away = (2 * at + 1) * resized - centre[:, None]
            distance, unit = torch.where(away < 0, -away, away), per_pixel
            weights = self.filter(*(v.double() if self.has_doubles else v for v in (distance, unit)))
            return torch.where((at >= 0) & (at < side), weights, torch.zeros_like(weights))

        def fix(weights: Tensor) -> Tensor:
            """Round to fractions, halves away from zero; in two steps, for 63 bits hold no more."""
            size = torch.where(weights < 0, -weights, weights)
            if self.has_doubles:
                return (weights.sign() * (size / total * _FRACTION + 0.5).floor()).to(torch.int64)
            size = size * (1 << _BITS)
            upper = _over(size, total)
            whole = (upper * (1 << _BITS)) + _over((size - upper * total) * (2 << _BITS) + total, 2 * total)
            return torch.where(weights < 0, -whole, whole)

        whole = weigh(every)
        total = whole.sum(dim=1, keepdim=True)
        own = fix(weigh(every[:length] + offset))
        return self._split(own), fix(whole).sum(dim=1) - own.sum(dim=1)

    @staticmethod
    def _split(weights: Tensor) -> Tensor:
        """Return the digits of whole numbers, the lowest first, each with the number's sign."""
        left = torch.where(weights < 0, -weights, weights)
        digits = []
        for _ in range(_NUM_PIECES):
            higher = _over(left, _PIECE)
            digits.append(left - higher * _PIECE)
            left = higher
        pieces = torch.stack(digits)
        return torch.where(weights < 0, -pieces, pieces).float()

    @staticmethod
    def _join(sums: list[Tensor], padding: Tensor) -> Tensor:
        """Put the sums of each digit together, add the padding's, and round to a level, 0-255."""
        total = padding + _FRACTION // 2
        for place, piece in enumerate(sums):
            total = total + piece.to(torch.int64) * _PIECE**place
        return _over(total.clamp(min=0), _FRACTION).clamp(max=255)


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

    def __init__(
        self, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, *, has_doubles: bool
    ) -> None:
        super().__init__()
        self.pixels = Pixels(processor, has_doubles=has_doubles)
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
    """Embeddings [B, N, D] after P cached positions to logits [B, N, vocabulary] and the longer cache."""

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


BLOCK = 32
"""Weights of a matrix that share a scale in int8, and inputs that are rounded together."""
LEVEL = 4
"""Of the runtime's accuracy: it multiplies integers, so inputs are rounded by the block too. 0 rounds weights
only, as the runtime of browsers does at every level: its answers are compared with those of the same sums."""


def quantise(source: Path, target: Path, level: int) -> None:
    """Round the matrices of a graph to 8 bits by the block, and tables that are looked up.

    One scale for all inputs of a product would do for no language model with a few very large activations.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization import matmul_nbits_quantizer as matrices

    tables, kind = source.with_name("tables.onnx"), quantization.QuantType.QInt8
    quantization.quantize_dynamic(
        source, tables, op_types_to_quantize=["Gather"], weight_type=kind, use_external_data_format=True
    )
    settings = matrices.DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=True, accuracy_level=level, bits=8)
    quantizer = matrices.MatMulNBitsQuantizer(onnx.load(tables), algo_config=settings)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)
