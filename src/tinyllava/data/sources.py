"""The sources of a stage: how much of each record file is used, how often, and with which seed.

Paper: none; each stage of the paper trains on one whole file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllava.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of ``DataConfig.records``: a mixture, file or folder, and how much of it is trained on."""

    name: str
    weight: float | None = None
    """Share of the samples, relative to the weights of the stage's other sources; None if none is given."""
    repeat: float = 1
    """How often each record is a sample; 2.5 is twice all of them and once half of them."""
    limit: int = 0
    """At most so many records, drawn at random; 0 means all."""
    seed: int = 0
    """Of what is drawn."""

    @property
    def is_whole(self) -> bool:
        """Whether each record is one sample."""
        return self.weight is None and self.repeat == 1 and not self.limit

    @property
    def options(self) -> str:
        """The options as written after the name: ``,limit=500,seed=1``; empty if there are none."""
        given = {"weight": self.weight, "repeat": self.repeat, "limit": self.limit, "seed": self.seed}
        changed = {key: value for key, value in given.items() if value != _DEFAULTS[key]}
        return "".join(
            f",{key}={value:.12g}" if key in _REAL else f",{key}={value}" for key, value in changed.items()
        )

    @property
    def label(self) -> str:
        """How others than the owner of the files see it: a name without folders, with its options."""
        is_public = self.name.startswith("hf:")
        return (self.name if is_public else Path(self.name).name) + self.options


_DEFAULTS: dict[str, float | None] = {"weight": None, "repeat": 1, "limit": 0, "seed": 0}
_REAL = ("weight", "repeat")


def parse_source(record: str) -> Source:
    """Return an entry of ``DataConfig.records`` by its parts: ``my.json,repeat=2,limit=500,seed=1``.

    Raises:
        ConfigError: an unknown option, one that is given twice, or a value out of its range.
    """
    found = re.fullmatch(r"(.+?)((?:,\s*\w+=[^,]*)+)", record)
    if not found or Path(record).exists():
        return Source(name=record)
    values: dict[str, Any] = {}
    for option in found[2].lstrip(",").split(","):
        key, _, text = option.strip().partition("=")
        if key not in _DEFAULTS or key in values:
            what = "given twice" if key in values else f"unknown; known: {', '.join(_DEFAULTS)}"
            raise ConfigError(f"{record}: option {key!r}: {what}. Write {found[1]},repeat=2,limit=500.")
        values[key] = _option(key, text.strip(), record)
    return Source(name=found[1], **values)


def _option(key: str, text: str, record: str) -> float | int:
    try:
        value = float(text) if key in _REAL else int(text)
    except ValueError:
        value = -1
    if key in _REAL and not 0 < value <= _MOST:
        raise ConfigError(f"{record}: {key}={text}: must be a number above 0 and at most {_MOST:g}.")
    if key not in _REAL and not (key == "limit") <= value < 2**32:
        raise ConfigError(f"{record}: {key}={text}: must be a whole number from {int(key == 'limit')}.")
    return value


_MOST = 1e6


def refuse_both(sources: Sequence[Source]) -> None:
    """Reject stages with both weights and repeats.

    Raises:
        ConfigError: a stage has both.
    """
    weighted = next((source for source in sources if source.weight is not None), None)
    repeated = next((source for source in sources if source.repeat != 1), None)
    if weighted and repeated:
        raise ConfigError(
            f"{weighted.name}{weighted.options} and {repeated.name}{repeated.options}: weight and repeat "
            "both set how often records are sampled. Use only one of them in a stage."
        )


def count_samples(sources: Sequence[Source], num_records: Sequence[int]) -> list[int]:
    """Return how many samples each source of a stage gives.

    With weights, there are as many samples as records, split by the weights; a source without a weight has 1.
    Fractions are rounded so that the sum is exact: down, then up where the remainder is largest, the first of
    equals. Without weights a source gives its records times ``repeat``, rounded, a half up.

    Args:
        num_records: of each source, before ``limit``.

    Raises:
        ConfigError: see ``refuse_both``; or a source would give no sample.
    """
    refuse_both(sources)
    weighted = any(source.weight is not None for source in sources)
    used = [min(count, source.limit or count) for source, count in zip(sources, num_records, strict=True)]
    if weighted:
        weights = [Fraction(str(1 if one.weight is None else one.weight)) for one in sources]
        exact = [sum(used) * weight / sum(weights) for weight in weights]
        counts = [int(value) for value in exact]
        order = sorted(range(len(sources)), key=lambda i: (counts[i] - exact[i], i))
        for place in order[: sum(used) - sum(counts)]:
            counts[place] += 1
    else:
        counts = [
            int(count * Fraction(str(one.repeat)) + Fraction(1, 2))
            for one, count in zip(sources, used, strict=True)
        ]
    for source, count, had in zip(sources, counts, used, strict=True):
        if had and not count:
            raise ConfigError(
                f"{source.name}{source.options}: no sample of its {had:,} records is used. Raise its "
                "weight or repeat, or remove it."
            )
    return counts


def draw_rows(source: Source, num_records: int, num_samples: int) -> "NDArray[np.int64]":
    """Return the records of a source that are its samples, by index: whole passes, then drawn ones.

    The draw depends on the seed and the number of records alone. A larger limit keeps what a smaller drew.
    """
    import numpy as np

    def draw(rows: "NDArray[np.int64]", number: int) -> "NDArray[np.int64]":
        generator = np.random.RandomState(source.seed)  # the one whose numbers no release of numpy changes
        return rows[np.sort(generator.permutation(len(rows))[:number])]

    rows = np.arange(num_records, dtype=np.int64)
    if source.limit:
        rows = draw(rows, source.limit)
    num_passes, rest = divmod(num_samples, max(1, len(rows)))
    return np.concatenate([*[rows] * num_passes, draw(rows, rest)])


@dataclass(frozen=True, kw_only=True)
class Share:
    """The contribution of one source to a stage."""

    source: Source
    num_records: int
    num_samples: int

    def summary(self) -> dict[str, object]:
        """Return the counts for the run's metadata."""
        name = self.source.name + self.source.options
        return {"records": name, "num_records": self.num_records, "num_samples": self.num_samples}

    def __str__(self) -> str:
        name = f"{self.source.name}{self.source.options}"
        return f"{name}: {self.num_samples:,} samples of {self.num_records:,} records"


def mix(
    sources: Sequence[Source], num_records: Sequence[int]
) -> tuple[list[Share], "NDArray[np.int64] | None"]:
    """Return the share of each source, and the indices of the samples in the joined records.

    Returns:
        One share a source, and [N] places; None where each record is one sample.

    Raises:
        ConfigError: see ``count_samples``.
    """
    counts = count_samples(sources, num_records)
    shares = [
        Share(source=one, num_records=records, num_samples=samples)
        for one, records, samples in zip(sources, num_records, counts, strict=True)
    ]
    if all(source.is_whole for source in sources):
        return shares, None
    import numpy as np

    starts = np.cumsum([0, *num_records])
    drawn = [draw_rows(one.source, one.num_records, one.num_samples) for one in shares]
    return shares, np.concatenate([rows + start for rows, start in zip(drawn, starts, strict=False)])
