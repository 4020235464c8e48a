"""The model: an image passes encoder and connector into the language model's sequence; the loss.

Paper: section 3.1 (V, P, F), equations 1-3.
Differs: unlike transformers' LLaVA, it takes any connector and keeps the language model's own head bias. The
head is applied only to supervised positions, and training skips the last position, whose next token is
unknown. The loss is the same for less work.
"""

from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, GenerationMixin, GradientCheckpointingLayer
from transformers.utils import ModelOutput

from tinyllava.config import LOSS_POSITIONS
from tinyllava.model.compat import CACHE_NAME, ComposedModel, attention_of, last_layer_output, packed_mask
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.connectors import build_connector
from tinyllava.model.linear import dtype_of

IGNORED = -100  # label of a position that is not supervised, as everywhere in transformers


@dataclass
class TinyLlavaOutput(ModelOutput):
    """Result of a forward pass. Values that were not computed are None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    """[B, K, vocabulary] at the positions that were asked for."""
    last_hidden_state: Tensor | None = None
    """[B, N, D], from the model without its head."""
    if CACHE_NAME == "cache":  # ``generate`` looks for the cache under this name
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_tokens: Tensor | None = None
    """h [I, T, D]."""


class Segments(TypedDict):
    """Samples one after another in one row [1, N], none of which sees another.

    The last token of each has no next one and is not run, so P = N - S positions are.
    """

    lengths: list[int]
    """Positions that are run of each sample; numbers, so that the host knows them."""
    kept: Tensor
    """[P], their places in the row"""
    positions: Tensor
    """[1, P], counted from 0 in each sample"""
    branches: NotRequired[Tensor]
    """[1, P], see ``branch_attention``"""


class TinyLlavaModel(ComposedModel):
    """Encoder, connector and language model without its head."""

    config_class = TinyLlavaConfig
    config: TinyLlavaConfig
    is_sharded = False
    """Whether ranks gather weights from each other in each forward pass, also where none trains."""

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = build_connector(
            config.connector,
            vision_width=config.vision_width,
            language_width=config.text_config.hidden_size,
            num_patches=config.num_patches,
            options=config.connector_options or {},
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the language model's table of token embeddings."""
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the language model's table of token embeddings."""
        self.language_model.set_input_embeddings(value)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return patch features V [I, M, X] of images; without gradient if the encoder is frozen."""
        assert pixel_values.is_floating_point(), "packed images: see ImagePacking.unpack"
        trained = any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            pixel_values = pixel_values.to(dtype_of(self.vision_tower))
            if self.config.encoder_kind == "cnn":
                grid: Tensor = self.vision_tower(pixel_values).last_hidden_state
                return grid.flatten(2).transpose(1, 2) if grid.ndim == 4 else grid
            return last_layer_output(self.vision_tower, pixel_values)[:, self.config.num_prefix_tokens :]

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return image tokens h = P(V(X)) [I, T, D] of images [I, 3, H, W]."""
        return self._connect(self.encode_images(pixel_values))

    def _connect(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.multi_modal_projector(features)
        return tokens if self.config.image_scale == 1 else tokens * self.config.image_scale

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_positions: Tensor | None = None,
        branches: Tensor | None = None,
        segments: Segments | None = None,
        without_last: bool = False,
        **kwargs: Any,
    ) -> TinyLlavaOutput:
        """Run the sequence [B, N] with images [I, 3, H, W], or with their patch features [I, M, X].

        Args:
            image_positions: places of the image tokens in the flattened ``input_ids`` [I * T]; without them
                they are looked for, for which the host has to wait for the device.
            branches: branch of each token [B, N], see ``branch_attention``; takes the place of a mask.
            segments: of a row [1, N] of several samples; takes the place of a mask and of ``without_last``.
                The language model has to be within ``causal_without_looking``.
            without_last: run the first N - 1 positions only, as the loss needs them.

        Raises:
            ValueError: the image tokens in ``input_ids`` are not exactly T for each image.
        """
        image_tokens = self._image_tokens(pixel_values, image_features)
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if image_tokens is not None:
                if image_positions is None:
                    image_positions = (input_ids == self.config.image_token_id).flatten().nonzero().flatten()
                inputs_embeds = _splice(inputs_embeds, image_tokens, image_positions)
        if segments is not None:
            inputs_embeds = inputs_embeds.index_select(1, segments["kept"])
            branches = segments.get("branches")
            if branches is None:
                attention_mask, kwargs["position_ids"] = (
                    packed_mask(segments["lengths"]),
                    segments["positions"],
                )
        elif without_last:
            inputs_embeds = inputs_embeds[:, :-1]
            attention_mask = None if attention_mask is None else attention_mask[:, :-1]
            branches = None if branches is None else branches[:, :-1]
        if branches is not None:
            attention_mask, kwargs["position_ids"] = branch_attention(branches, segments)
            if attention_of(self.language_model) == "eager":  # which adds its mask
                lowest = torch.finfo(inputs_embeds.dtype).min
                attention_mask = torch.where(attention_mask, 0.0, lowest).to(inputs_embeds.dtype)
        outputs = self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return TinyLlavaOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_tokens=image_tokens,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _image_tokens(self, pixel_values: Tensor | None, features: Tensor | None) -> Tensor | None:
        if features is None and pixel_values is not None:
            features = self.encode_images(pixel_values)
        joins = self.training or self.is_sharded
        if features is None and joins and any(p.requires_grad for p in self.vision_parameters()):
            features = self._no_features()
        if features is None:
            return None
        return self._connect(features.to(dtype_of(self.multi_modal_projector)))

    def vision_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of encoder and connector."""
        return [*self.vision_tower.parameters(), *self.multi_modal_projector.parameters()]

    def blank_image(self) -> Tensor:
        """Pixels [1, 3, H, W] of one black image, of a side that the encoder takes."""
        side = getattr(self.config.vision_config, "image_size", None) or 224  # ResNet's config names none
        return next(self.multi_modal_projector.parameters()).new_zeros(1, 3, side, side)

    def _no_features(self) -> Tensor:
        """Features [0, M, X] of no image, so that a text-only batch reaches every trained parameter.

        Without them ranks that drew text only would have no gradient to reduce, and the others would wait
        forever (DDP, FSDP and ZeRO alike). A trained encoder is run on one blank image for the same reason.
        """
        weight = next(self.multi_modal_projector.parameters())
        if any(p.requires_grad for p in self.vision_tower.parameters()):
            return self.encode_images(self.blank_image())[:0]
        return weight.new_zeros(0, self.config.num_patches, self.config.vision_width)


def _splice(embeds: Tensor, image_tokens: Tensor, positions: Tensor) -> Tensor:
    """Put image tokens [I, T, D] at their places in the flattened embeddings [B, N, D]."""
    num_expected, num_found = image_tokens.shape[0] * image_tokens.shape[1], len(positions)
    if num_expected != num_found:
        raise ValueError(
            f"{image_tokens.shape[0]} images of {image_tokens.shape[1]} tokens need {num_expected} image "
            f"tokens in input_ids, found {num_found}; let the processor expand <image>, and do not truncate."
        )
    rows = image_tokens.flatten(0, 1).to(embeds.dtype)
    return embeds.flatten(0, 1).index_copy(0, positions, rows).view_as(embeds)


class TinyLlavaForConditionalGeneration(
    ComposedModel, GenerationMixin, tied={"lm_head.weight": "model.language_model.embed_tokens.weight"}
):
    """A small LMM with its head; trains with ``labels`` and answers with ``generate``."""

    config_class = TinyLlavaConfig
    config: TinyLlavaConfig

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        self.model = TinyLlavaModel(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=config.lm_head_bias
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the language model's table of token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the language model's table of token embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    @property
    def vision_encoder(self) -> nn.Module:
        """V of Figure 2."""
        return self.model.vision_tower  # type: ignore[no-any-return]

    @property
    def connector(self) -> nn.Module:
        """P of Figure 2."""
        return self.model.multi_modal_projector

    @property
    def language_model(self) -> nn.Module:
        """F of Figure 2, without its head."""
        return self.model.language_model  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "TinyLlavaForConditionalGeneration":
        """Switch the trained components to training mode; frozen ones stay in inference mode (no dropout).

        Batch norms of an encoder keep their statistics also where it is trained: batches are small, and
        statistics are no parameters, so a stage that is reused would lack them.
        """
        super().train(mode)
        for component in (self.vision_encoder, self.connector, self.language_model):
            if not any(p.requires_grad for p in component.parameters()):
                component.eval()
        for module in self.vision_encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        if mode:
            # transformers checkpoints a layer only where the layer itself is in training mode. A frozen
            # language model passes gradients on to the connector; its inner modules stay without dropout.
            for module in self.language_model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        supervised_positions: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> TinyLlavaOutput:
        """Return the loss over supervised positions if there are ``labels``, otherwise logits [B, N, K].

        Args:
            image_features: patch features [I, M, X] in place of ``pixel_values``, computed beforehand.
            labels: token ids [B, N] where supervised, -100 elsewhere; not shifted. With them hidden states
                are those of the first N - 1 positions.
            supervised_positions: places [S] in the flattened first N - 1 positions whose next token is
                supervised. Without them they are looked for, for which the host has to wait for the device.
            num_items_in_batch: supervised tokens of the whole optimizer step; the loss is the sum divided by
                it. Without it the mean over this batch.
            segments: of a row [1, N] of several samples; ``supervised_positions`` are then among those that
                are run.
        """
        if labels is not None:
            kwargs.setdefault("use_cache", False)  # a loss needs no keys and values of the past
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_features=image_features,
            attention_mask=attention_mask,
            segments=segments,
            without_last=labels is not None,
            **kwargs,
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            if segments is not None:
                targets = targets.index_select(0, segments["kept"])
            if supervised_positions is None:
                supervised_positions = (targets != IGNORED).nonzero().flatten()
            loss = self._loss(hidden.flatten(0, 1), targets, supervised_positions, num_items_in_batch)
            if outputs.image_tokens is not None and len(outputs.image_tokens) == 0:
                loss = loss + 0.0 * outputs.image_tokens.sum()  # see TinyLlavaModel._no_features
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return TinyLlavaOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_tokens=outputs.image_tokens,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _loss(
        self, hidden: Tensor, targets: Tensor, positions: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        """Equation 3: cross-entropy at the positions whose next token is supervised.

        The logits of more than ``LOSS_POSITIONS`` are computed again in the backward pass, part by part.
        """
        hidden, targets = hidden.index_select(0, positions), targets.index_select(0, positions)
        parts = list(zip(hidden.split(LOSS_POSITIONS), targets.split(LOSS_POSITIONS), strict=True))
        if len(parts) == 1:
            total = self._sum_losses(*parts[0])
        else:
            sums = [
                checkpoint(self._sum_losses, *part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
            total = torch.stack(sums).sum()
        return total / (len(positions) if num_items is None else num_items)

    def _sum_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(hidden)[:, : self.config.num_language_rows or None].float()
        if self.config.leaves_out_image:
            logits[:, self.config.image_token_id] = -torch.inf
        return cross_entropy(logits, targets, reduction="sum")

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass images to the first step only, because later steps find them in the cache, if there is one."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            given = {"pixel_values": pixel_values, "image_features": image_features}
            inputs |= {name: value for name, value in given.items() if value is not None}
        return inputs


def branch_attention(branches: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    """Return mask [B, 1, N, N] and positions [B, N] of rows with branches that do not see each other.

    A token sees the shared beginning (branch 0) and what precedes it in its own branch. Its position is the
    number of tokens before it that it sees, so each branch runs as if it alone followed the prefix.

    Args:
        branches: branch of each token [B, N].
        segments: of a row that holds several samples, each with a beginning of its own.
    """
    own = branches.unsqueeze(2) == branches.unsqueeze(1)
    visible = (own | (branches == 0).unsqueeze(1)).tril()
    if segments is not None:
        first = torch.arange(branches.shape[1], device=branches.device) - segments["positions"]
        visible &= first.unsqueeze(2) == first.unsqueeze(1)
    return visible.unsqueeze(1), visible.sum(-1) - 1
