"""The connectors P_phi: from M patch features of width X to T image tokens of width D.

Paper: section 3.1 (h_j = P_phi(v_j)), section 4.1.1 and Figure 6.
This table alone defines the number of image tokens. It imports no torch, so that a plan can be made before
anything is loaded. The modules are imported when a connector is built.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from math import isqrt

from tinyllava.errors import ConfigError, look_up
from tinyllava.parts.user_code import is_reference, recall_value, short_reference

Options = Mapping[str, int]
Linears = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Connector:
    """The properties of a connector before it is built."""

    name: str
    module: str | type
    """A class, or ``file:Class`` of ``tinyllava.model.connectors``.

    It takes (vision_width, language_width, num_patches, **options)."""
    summary: str
    num_tokens: Callable[[int, Options], int]
    """T from M and the options."""
    num_parameters: Callable[[int, int, Options], int] | None = None
    """Parameters from X, D and the options; None: it is built on the meta device and counted."""
    linears: Callable[[int, int, Options], Linears] | None = None
    """(Inputs, outputs) of each linear layer from X, D and the options: what adapters are put on."""
    options: Options = field(default_factory=dict)
    """Every option with its default."""


def _one_per_patch(num_patches: int, options: Options) -> int:
    return num_patches


def _one_per_query(num_patches: int, options: Options) -> int:
    return options["num_queries"]


def _one_per_block(num_patches: int, options: Options) -> int:
    side, block = isqrt(num_patches), options["block"]
    if side * side != num_patches or side % block:
        raise ConfigError(
            f"a grid of {num_patches} patches ({side} x {side}) cannot be divided into blocks of {block} x "
            f"{block}; choose one of {_divisors(side)}."
        )
    return (side // block) ** 2


def _one_per_cell(num_patches: int, options: Options) -> int:
    grid, side = isqrt(num_patches), options["side"]
    if grid**2 != num_patches or side > grid:
        raise ConfigError(
            f"{num_patches} patches form a grid of {grid} x {grid}, which is too small for {side} x {side} "
            f"cells; choose a side of at most {grid}."
        )
    return side**2


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _weights(linears: Linears, *, biased: bool = True) -> int:
    return sum(inputs * outputs + biased * outputs for inputs, outputs in linears)


def _linear_linears(vision_width: int, language_width: int, options: Options) -> Linears:
    return [(vision_width, language_width)]


def _linear(vision_width: int, language_width: int, options: Options) -> int:
    return _weights(_linear_linears(vision_width, language_width, options))


def _mlp_linears(vision_width: int, language_width: int, options: Options) -> Linears:
    inputs = vision_width * options.get("block", 1) ** 2
    return [(inputs, language_width), (language_width, language_width)]


def _mlp(vision_width: int, language_width: int, options: Options) -> int:
    return _weights(_mlp_linears(vision_width, language_width, options))


def _resampler_linears(vision_width: int, language_width: int, options: Options) -> Linears:
    width, attention = options["width"], options["num_heads"] * options["head_width"]
    layer = [(width, attention), (width, 2 * attention), (attention, width)]
    layer += [(width, 4 * width), (4 * width, width)]
    return [(vision_width, width), *layer * options["num_layers"], (width, language_width)]


def _resampler(vision_width: int, language_width: int, options: Options) -> int:
    first, *layers, last = _resampler_linears(vision_width, language_width, options)
    others = 6 * options["num_layers"] + 2 + options["num_queries"]  # norms and queries, in widths
    return _weights([first, last]) + _weights(layers, biased=False) + others * options["width"]


def _bench_resampler_linears(vision_width: int, language_width: int, options: Options) -> Linears:
    width = options["width"]
    layer = [(width, width)] * 2 + [(vision_width, width)] * 2 + [(width, 4 * width), (4 * width, width)]
    return [*layer * options["num_layers"], (width, language_width)]


def _bench_resampler(vision_width: int, language_width: int, options: Options) -> int:
    width, linears = options["width"], _bench_resampler_linears(vision_width, language_width, options)
    norms = options["num_layers"] * (2 * vision_width + 4 * width) + 2 * width
    return _weights(linears, biased=False) + norms + options["num_queries"] * width


def _qformer_linears(vision_width: int, language_width: int, options: Options) -> Linears:
    width, num_layers = options["width"], options["num_layers"]
    layer = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    across = [(width, width)] * 2 + [(vision_width, width)] * 2
    num_across = -(-num_layers // options["cross_every"])
    return [*layer * num_layers, *across * num_across, (width, language_width)]


def _qformer(vision_width: int, language_width: int, options: Options) -> int:
    width, num_layers = options["width"], options["num_layers"]
    num_norms = 1 + 2 * num_layers + -(-num_layers // options["cross_every"])
    linears = _qformer_linears(vision_width, language_width, options)
    return _weights(linears) + 2 * width * num_norms + options["num_queries"] * width


def _slots_linears(vision_width: int, language_width: int, options: Options) -> Linears:
    return [(vision_width, language_width), (language_width, options["num_slots"] * language_width)]


def _slots(vision_width: int, language_width: int, options: Options) -> int:
    return _weights(_slots_linears(vision_width, language_width, options))


CONNECTORS: dict[str, Connector] = {
    connector.name: connector
    for connector in (
        Connector(
            name="linear",
            module="per_patch:Linear",
            summary="one linear layer, one token per patch",
            num_tokens=_one_per_patch,
            num_parameters=_linear,
            linears=_linear_linears,
        ),
        Connector(
            name="mlp",
            module="per_patch:MLP",
            summary="two linear layers with GELU in between (the paper's)",
            num_tokens=_one_per_patch,
            num_parameters=_mlp,
            linears=_mlp_linears,
        ),
        Connector(
            name="resampler",
            module="queries:Resampler",
            summary="Perceiver resampler: learned queries attend to the patches",
            num_tokens=_one_per_query,
            num_parameters=_resampler,
            linears=_resampler_linears,
            options={"num_queries": 64, "num_layers": 3, "width": 768, "num_heads": 8, "head_width": 64},
        ),
        Connector(
            name="bench_resampler",
            module="queries:BenchResampler",
            summary="TinyLLaVABench's resampler: learned queries attend only to the patches",
            num_tokens=_one_per_query,
            num_parameters=_bench_resampler,
            linears=_bench_resampler_linears,
            options={"num_queries": 128, "num_layers": 3, "width": 768, "num_heads": 12},
        ),
        Connector(
            name="pixel_shuffle",
            module="per_patch:PixelShuffle",
            summary="space to depth: block x block patches become one token, then MLP",
            num_tokens=_one_per_block,
            num_parameters=_mlp,
            linears=_mlp_linears,
            options={"block": 3},
        ),
        Connector(
            name="pool",
            module="per_patch:Pool",
            summary="average the grid to side x side cells, then MLP",
            num_tokens=_one_per_cell,
            num_parameters=_mlp,
            linears=_mlp_linears,
            options={"side": 2},
        ),
        Connector(
            name="slots",
            module="per_patch:Slots",
            summary="average the whole grid, then an MLP with a separate output for each token",
            num_tokens=lambda num_patches, options: options["num_slots"],
            num_parameters=_slots,
            linears=_slots_linears,
            options={"num_slots": 4, "dropout_percent": 0},
        ),
        Connector(
            name="qformer",
            module="queries:QFormer",
            summary="BLIP-2's Q-Former: queries in a small BERT that attends to the patches",
            num_tokens=_one_per_query,
            num_parameters=_qformer,
            linears=_qformer_linears,
            options={"num_queries": 32, "num_layers": 6, "width": 768, "num_heads": 12, "cross_every": 2},
        ),
    )
}


def find_connector(name: str) -> Connector:
    """Return the connector of that name, or of a user's code that has run.

    Raises:
        UnknownNameError: no such connector.
        CheckpointError: it is a user's, and its code has not run.
        ConfigError: the user's value is no connector.
    """
    if name not in CONNECTORS and is_reference(name):
        return _own_connector(short_reference(name), recall_value(name))
    return look_up(CONNECTORS, name, "connector")


def _own_connector(name: str, value: object) -> Connector:
    """Describe a user's connector: a ``Connector``, or the class of its module with ``num_tokens``."""
    if isinstance(value, Connector):
        return replace(value, name=name)
    count = getattr(value, "num_tokens", None)
    if not isinstance(value, type) or not callable(count):
        raise ConfigError(
            f"connector {name}: {value!r} is not a connector; give the class of a torch module with a static "
            "method num_tokens(num_patches, **options) (docs/guides/models.md)."
        )
    parameters = signature(value).parameters.values()
    options = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    for option, default in options.items():
        if type(default) is not int:
            raise ConfigError(f"connector {name}: option {option} needs a default that is a whole number.")
    return Connector(
        name=name,
        module=value,
        summary=(value.__doc__ or "").strip().partition("\n")[0],
        num_tokens=lambda num_patches, given: int(count(num_patches, **given)),
        options=options,
    )


def resolve_options(connector: Connector, options: Options) -> dict[str, int]:
    """Return every option of a connector, defaults filled in.

    Raises:
        ConfigError: an option that the connector does not have, or that is out of its range, or heads that do
            not divide the width.
    """
    for key, value in options.items():
        if key not in connector.options:
            known = ", ".join(connector.options) or "none"
            raise ConfigError(f"connector {connector.name!r} has no option {key!r}; known: {known}.")
        least = min(1, connector.options[key])  # an option that is 0 unless it is given can be given as 0
        wrong = f"connector {connector.name}: option {key} = {value}: must be"
        if value < least:
            raise ConfigError(f"{wrong} at least {least}.")
        if key.endswith("_percent") and value > 99:
            raise ConfigError(f"{wrong} at most 99.")
    resolved = {**connector.options, **options}
    _check_heads(connector.name, resolved)
    return resolved


def _check_heads(name: str, options: Options) -> None:
    """Refuse a width that its heads do not divide, where a head has no width of its own."""
    if "num_heads" not in options or "head_width" in options:
        return
    width, num_heads = options["width"], options["num_heads"]
    if width % num_heads:
        raise ConfigError(
            f"connector {name}: width = {width} is not divisible by num_heads = {num_heads}; choose "
            f"num_heads from {_divisors(width)}."
        )


def num_tokens(connector: Connector, num_patches: int, options: Options) -> int:
    """Return T, the exact number of image tokens of one image.

    Raises:
        ConfigError: an option is wrong, or the grid does not suit them; the message names sizes that do.
    """
    resolved = resolve_options(connector, options)
    try:
        return connector.num_tokens(num_patches, resolved)
    except ConfigError as error:
        raise ConfigError(f"connector {connector.name}: {error}") from error
