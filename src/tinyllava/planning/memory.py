"""Peak memory of one training step on one device, in closed form, before anything is loaded.

Paper: small LMMs are for those with few and small GPUs (section 1); this says which recipe fits which.
What a layer keeps for its backward pass is counted tensor by tensor below. Weights are held in fp32. With
bf16 frozen linear layers are held in bf16 (``tinyllava.training.precision``), and products with trained ones
run on casts, of which the backward pass keeps a copy.
docs/memory.md compares the estimate with measured peaks.
"""

from dataclasses import dataclass, replace

from tinyllava.config import FROZEN, LOSS_POSITIONS, OPTIMIZERS, Component, Sharding, Stage, Tune
from tinyllava.parts.families import LANGUAGE_FAMILIES, VISION_FAMILIES, LanguageFamily, VisionFamily
from tinyllava.parts.language import LanguageModel
from tinyllava.parts.vision import VisionEncoder
from tinyllava.planning.sizes import PartSize

FLOAT_BYTES, HALF_BYTES = 4, 2
BITS_BYTES = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0, 16: 4.0}
"""Bytes of a weight below adapters. In 4 bits: a scale in 8 bits for 64 weights, one in fp32 for 256 of them.
In 8 bits one fp32 scale for each row is left out. 16 means not quantised, which is fp32 here."""


@dataclass(frozen=True, kw_only=True)
class PlannedParts:
    """The three components of a model with their sizes."""

    encoder: VisionEncoder
    language: LanguageModel
    template: str
    """Name of the model's prompt template."""
    encoder_size: PartSize
    connector_size: PartSize
    language_size: PartSize
    num_patches: int
    num_image_tokens: int

    @property
    def sizes(self) -> dict[Component, PartSize]:
        """The size of each component."""
        return {
            "vision_encoder": self.encoder_size,
            "connector": self.connector_size,
            "language_model": self.language_size,
        }

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return sum(size.total for size in self.sizes.values())


def count_trained(size: PartSize, tune: Tune) -> int:
    """Return how many parameters a stage trains of one component."""
    if size.members:
        return sum(count_trained(member, tune) for member in size.members)
    if tune.kind == "full":
        return size.total - size.behind
    if tune.kind == "from_layer":
        return sum(size.layers[tune.first_layer :])
    share = len(tune.layers) / len(size.layers) if tune.layers and size.layers else 1
    return round(tune.rank * size.adapted_widths * share) if tune.kind == "lora" else 0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of a step, by purpose."""

    weights: int
    optimizer: int
    """What the optimizer keeps of the trained parameters, such as AdamW's two moments."""
    gradients: int
    activations: int
    """What the forward pass keeps, the casts of weights and the logits included."""
    accumulates: bool
    """Whether gradients, or the buckets that they will lie in, are there during the forward pass."""

    @property
    def peak(self) -> int:
        """Gradients grow while activations are freed: the larger of the two counts, unless both stay."""
        moving = (self.gradients, self.activations)
        return self.weights + self.optimizer + (sum(moving) if self.accumulates else max(moving))


def estimate_memory(
    parts: PlannedParts,
    stage: Stage,
    *,
    batch: int,
    num_tokens: int,
    num_supervised: int,
    bf16: bool,
    checkpointing: bool = False,
    compiled: bool = False,
    sharding: Sharding = "none",
    num_ranks: int = 1,
    accumulates: bool = False,
) -> Memory:
    """Estimate the peak of one step.

    Args:
        batch: samples per forward pass, each with one image.
        num_tokens: length of a sequence, image tokens included.
        num_supervised: supervised tokens of a sequence.
        compiled: whether layers are (``hardware.compile``), which then make much again that others keep.
        sharding: what so many ranks divide among them (FSDP2).
        num_ranks: with more than one and no sharding, gradients lie in buckets all the time (DDP).
    """
    trained = sum(count_trained(size, tune) for size, tune in _tuned(parts, stage))
    weights = _all_weight_bytes(parts, stage, bf16)
    is_divided = sharding != "none" and num_ranks > 1
    num_shards = num_ranks if is_divided else 1
    in_buckets = num_ranks > 1 and not is_divided  # of DDP, which hold the gradients all the time
    whole, gathered = _undivided(parts, stage, sharding, bf16) if is_divided else (0, 0)
    activations = batch * _sample_bytes(parts, stage, num_tokens, bf16, checkpointing, compiled)
    activations += min(batch * num_supervised, LOSS_POSITIONS) * _logit_bytes(parts.language, bf16)
    if bf16 and not checkpointing:
        activations += HALF_BYTES * _cast_weights(parts, stage)
    reduced = FLOAT_BYTES * min(trained, _gathered(parts, stage)) if is_divided else 0
    return Memory(
        weights=whole + (weights - whole) // num_shards + gathered,
        optimizer=int(OPTIMIZERS[stage.optimizer][1] * trained) // num_shards,
        gradients=FLOAT_BYTES * trained // num_shards + reduced,
        activations=activations,
        accumulates=accumulates or in_buckets,
    )


def _tuned(parts: PlannedParts, stage: Stage) -> list[tuple[PartSize, Tune]]:
    return [(size, stage.tune(component)) for component, size in parts.sizes.items()]


def _all_weight_bytes(parts: PlannedParts, stage: Stage, bf16: bool) -> int:
    """Bytes of all weights; with bf16 those of frozen linear layers, but not the connector's, are halved."""
    weights = sum(_weight_bytes(size, tune) for size, tune in _tuned(parts, stage))
    if not bf16:
        return weights
    halved = _halved_weights(parts.encoder_size, stage.vision_encoder)
    halved += _halved_weights(parts.language_size, stage.language_model)
    if not parts.language.tied and stage.language_model.kind != "full":
        halved += parts.language.vocab_size * parts.language.width  # the head
    return weights - (FLOAT_BYTES - HALF_BYTES) * halved


def _halved_weights(size: PartSize, tune: Tune) -> int:
    """Weights of a component's linear layers that are held in half precision, because they are frozen."""
    if size.members:
        return sum(_halved_weights(member, tune) for member in size.members)
    if tune.kind == "full" or tune.bits < 16:
        return 0
    if tune.kind == "from_layer":
        return size.adapted_weights * sum(size.layers[: tune.first_layer]) // max(1, sum(size.layers))
    return size.adapted_weights


def _weight_bytes(size: PartSize, tune: Tune) -> int:
    """Bytes of a component's weights: fp32, or 4 or 8 bits in its linear layers below adapters."""
    if size.members:
        return sum(_weight_bytes(member, tune) for member in size.members)
    held = size.adapted_weights
    adapters = count_trained(size, tune) if tune.kind == "lora" else 0
    return int(held * BITS_BYTES[tune.bits] + (size.total - held + adapters) * FLOAT_BYTES)


def _undivided(parts: PlannedParts, stage: Stage, sharding: Sharding, bf16: bool) -> tuple[int, int]:
    """Bytes of weights that sharding leaves whole, and of those that are gathered at one time.

    See ``tinyllava.training.sharding.shard``: a frozen encoder and codes are never divided, and with
    ``gradients`` nothing frozen is; what it does divide is gathered until the backward pass.
    """
    if sharding == "gradients":
        trained = sum(count_trained(size, tune) for size, tune in _tuned(parts, stage))
        return _all_weight_bytes(parts, stage, bf16) - FLOAT_BYTES * trained, FLOAT_BYTES * trained
    held = [
        size.adapted_weights * BITS_BYTES[tune.bits] for size, tune in _tuned(parts, stage) if tune.bits < 16
    ]
    encoder = 0
    if not stage.vision_encoder.trains:
        encoder = _weight_bytes(parts.encoder_size, stage.vision_encoder)
        encoder -= (FLOAT_BYTES - HALF_BYTES) * bf16 * _halved_weights(parts.encoder_size, FROZEN)
    return int(sum(held)) + encoder, FLOAT_BYTES * _gathered(parts, stage)


def _gathered(parts: PlannedParts, stage: Stage) -> int:
    """Parameters that lie there whole at one time: what is no layer's, and two layers, one fetched ahead."""
    language, encoder = parts.language_size, parts.encoder_size
    is_held = stage.language_model.bits < 16  # the codes of a layer are whole anyway
    layers = 0 if is_held else 2 * max(language.layers, default=0)
    in_layers = sum(encoder.layers)
    unlayered = encoder.total - in_layers if stage.vision_encoder.trains else 0
    return language.total - sum(language.layers) + parts.connector_size.total + unlayered + layers


def _cast_weights(parts: PlannedParts, stage: Stage) -> int:
    """Weights whose bf16 casts the backward pass keeps: those that are trained, and a tied head."""
    encoder = count_trained(parts.encoder_size, stage.vision_encoder)
    language = count_trained(parts.language_size, stage.language_model)
    if parts.language.tied and stage.language_model.kind != "full":
        language += parts.language.vocab_size * parts.language.width
    if not parts.language.tied and stage.language_model.kind == "full":
        language -= parts.language.vocab_size * parts.language.width  # the table, which nothing multiplies
    return encoder + parts.connector_size.total + language


def _logit_bytes(language: LanguageModel, bf16: bool) -> int:
    """Log-probabilities, their gradient and that of the logits, in fp32; with bf16 a cast of the last too."""
    return language.vocab_size * (3 * FLOAT_BYTES + (HALF_BYTES if bf16 else 0))


def _sample_bytes(
    parts: PlannedParts, stage: Stage, num_tokens: int, bf16: bool, checkpointing: bool, compiled: bool
) -> int:
    """Bytes that one sample's forward pass keeps outside the head."""
    language, width = parts.language, parts.language.width
    layer = num_tokens * _decoder_layer_bytes(language, stage.language_model, bf16, compiled)
    ends = num_tokens * width * FLOAT_BYTES * 4  # embeddings before and after the splice, the last norm
    if checkpointing:
        kept = layer + num_tokens * width * FLOAT_BYTES * (language.num_layers - 1)
    else:
        kept = layer * language.num_layers
    item = HALF_BYTES if bf16 else FLOAT_BYTES
    connector = item * (parts.num_patches * parts.encoder.width + 3 * parts.num_image_tokens * width)
    return (
        kept + ends + connector + _encoder_bytes(parts, stage.vision_encoder, bf16, checkpointing, compiled)
    )


def _decoder_layer_bytes(language: LanguageModel, tune: Tune, bf16: bool, compiled: bool) -> int:
    """Bytes that a layer keeps for each token.

    A norm keeps its input and, where it is trained, what it multiplies its weight with; a linear layer its
    input where it is trained; attention its three inputs and its output; the feed-forward block what its
    activation and its product need. With bf16 each linear layer keeps a cast of its input of its own.
    """
    if compiled:
        return _compiled_layer_bytes(language, tune, bf16)
    width, mlp, family = language.width, language.mlp_width, _family(language)
    item = HALF_BYTES if bf16 else FLOAT_BYTES
    weights_trained = tune.kind in ("full", "from_layer")
    is_rms = family.norm_rows == 1
    norms = family.norms * width * FLOAT_BYTES * (2 if weights_trained and is_rms else 1)
    num_casts = _num_readers(family) if bf16 else family.norms
    # In 8 bits bitsandbytes keeps inputs too, the same tensor as adapters do without cast and dropout.
    keeps_inputs = weights_trained or (tune.bits == 8 and (bf16 or tune.dropout > 0))
    inputs = num_casts * width * item if keeps_inputs else 0
    attention = (2 * language.num_queries + 2 * language.num_keys) * item
    total = norms + inputs + attention + mlp * _feed_forward_bytes(family, keeps_inputs, bf16)
    if tune.kind == "lora":
        total += _adapter_bytes(language, tune, bf16)
    return total


def _compiled_layer_bytes(language: LanguageModel, tune: Tune, bf16: bool) -> int:
    """Bytes that a compiled layer keeps for each token: what products read and write, and its own input.

    Norms, activations and casts are made again. What attention adds is kept where a norm follows it, and the
    inputs of linear layers where their weights are trained.
    """
    family, width, mlp = _family(language), language.width, language.mlp_width
    item = HALF_BYTES if bf16 else FLOAT_BYTES
    keeps_inputs = tune.kind in ("full", "from_layer") or (tune.bits == 8 and (bf16 or tune.dropout > 0))
    total = width * FLOAT_BYTES + (family.norms - 1) * width * item
    total += (2 * language.num_queries + 2 * language.num_keys) * item
    total += (2 if family.gated else 1) * mlp * item
    if keeps_inputs:
        total += (family.norms * width + language.num_queries + mlp) * item
    return total + (_adapter_bytes(language, tune, bf16) if tune.kind == "lora" else 0)


def _family(language: LanguageModel) -> LanguageFamily:
    """Return the record of a language model; what a layer of an unknown family keeps is only an estimate.

    Its parameters are counted (``language_model_size``). Its activations are taken for those of a gated
    block of its widths; ``tinyllava show`` says so.
    """
    return LANGUAGE_FAMILIES.get(language.family, LanguageFamily())


def _num_readers(family: LanguageFamily) -> int:
    """Linear layers of a layer that read the residual stream: three of attention, one or two of the MLP."""
    return 3 + (2 if family.gated else 1)


def _adapter_bytes(language: LanguageModel, tune: Tune, bf16: bool) -> int:
    """Bytes that the adapters of a layer keep for each token: inputs, and what is between the two factors.

    With dropout each linear layer keeps its own dropped input and a mask: bytes on a GPU, fp32 on a CPU.
    """
    family = _family(language)
    num_readers = _num_readers(family)
    between = (num_readers + 2) * tune.rank * FLOAT_BYTES  # and the two that write into the stream
    if not tune.dropout:
        return between + (family.norms * language.width + language.mlp_width) * FLOAT_BYTES
    inputs = num_readers * language.width + language.num_queries + language.mlp_width
    return between + inputs * (FLOAT_BYTES + (1 if bf16 else FLOAT_BYTES))


def _feed_forward_bytes(family: LanguageFamily, keeps_inputs: bool, bf16: bool) -> int:
    """Bytes for each column of the block.

    Gate, its SiLU, up and their product; Phi's tanh GELU keeps four steps, three of them in fp32.
    """
    item = HALF_BYTES if bf16 else FLOAT_BYTES
    kept = 3 * item if family.gated else 3 * FLOAT_BYTES + item
    return kept + (item if keeps_inputs else 0)


def _cnn_values(encoder: VisionEncoder) -> float:
    """Values that training keeps for each pixel; of a ConvNeXt's block 12 times its width, in version 2 20.

    Its input, what goes into and comes out of norm, convolution and scale, and the inner layer four times as
    wide before and after its activation (and after the normalisation of version 2).
    """
    family = VISION_FAMILIES.get(encoder.family, VisionFamily())
    if not encoder.stages:
        counted = (known.values_per_pixel for known in VISION_FAMILIES.values())
        return family.values_per_pixel or max(counted)  # one that was not counted: the largest of them
    widths = family.block_values or max(known.block_values for known in VISION_FAMILIES.values())
    cells: list[float] = [1 / (4 << stage) ** 2 for stage in range(len(encoder.stages))]
    return sum(n * widths * width * cell for (n, width), cell in zip(encoder.stages, cells, strict=True))


def _encoder_bytes(
    parts: PlannedParts, tune: Tune, bf16: bool, checkpointing: bool = False, compiled: bool = False
) -> int:
    """Bytes that a trained encoder keeps for one image; a frozen one keeps nothing.

    With checkpointing a transformer keeps one layer and the inputs of the others.
    """
    encoder = parts.encoder
    if not tune.trains:
        return 0
    if encoder.members:
        return sum(
            _encoder_bytes(replace(parts, encoder=e), tune, bf16, compiled=compiled) for e in encoder.members
        )
    item = HALF_BYTES if bf16 else FLOAT_BYTES
    if encoder.kind == "cnn":
        return int(_cnn_values(encoder) * encoder.image_size_px**2 * item)
    num_layers = encoder.num_kept_layers - (tune.first_layer if tune.kind == "from_layer" else 0)
    tokens = parts.num_patches + encoder.num_prefix_tokens
    num_mlp = VISION_FAMILIES.get(encoder.family, VisionFamily()).mlp_values
    casts = 6 if bf16 else 2
    layer = tokens * (
        2 * FLOAT_BYTES * encoder.width + item * ((4 + casts) * encoder.width + num_mlp * encoder.mlp_width)
    )
    if compiled:
        layer = tokens * (FLOAT_BYTES * encoder.width + item * (7 * encoder.width + 2 * encoder.mlp_width))
    if checkpointing:
        return layer + (num_layers - 1) * tokens * encoder.width * FLOAT_BYTES
    return num_layers * layer
