"""Standard errors, intervals and paired tests for scores whose questions share images.

A score is a weighted sum of ratios of sums: a mean (denominators 1), an F1 (2 TP over 2 TP + FP + FN), a
ratio of means, or MME's sum of fourteen accuracies. One linearisation (the delta method) and one bootstrap
serve them all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from tinyllava.evaluation.results import Metric

Floats = NDArray[np.float64]
Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """``weight * sum(numerators) / sum(denominators)``; 0 where the denominators sum to 0.

    The three sequences are aligned, one entry a question (or another unit); ``clusters`` names the image.
    """

    numerators: Sequence[float]
    clusters: Sequence[str]
    denominators: Sequence[float] | None = None
    weight: float = 100.0
    num_questions: int | None = None
    """Questions that this ratio adds to the count; one an entry if not given."""
    most: float = 1.0
    """The most that a numerator can be of its denominator, where it is bounded at all."""
    decimals: tuple[int, int] | None = None
    """Decimals to which the official tool rounds both means before it divides them, and their ratio."""

    @property
    def bottom(self) -> Sequence[float]:
        """The denominators, ones where none are given."""
        return [1.0] * len(self.numerators) if self.denominators is None else self.denominators

    @property
    def exact(self) -> float:
        """The weighted ratio before any rounding."""
        total = math.fsum(self.bottom)
        return self.weight * math.fsum(self.numerators) / total if total else 0.0

    @property
    def value(self) -> float:
        """The weighted ratio, rounded where the official tool rounds."""
        if self.decimals is None or not self.numerators:
            return self.exact
        num, (of_means, of_result) = len(self.numerators), self.decimals
        top, bottom = (round(math.fsum(part) / num, of_means) for part in (self.numerators, self.bottom))
        return round(top / bottom * self.weight, of_result) if bottom else 0.0


def estimate(name: str, ratios: Sequence[Ratio]) -> Metric:
    """Return the sum of the ratios with its standard error and 95% interval.

    A plain accuracy over questions of different images gets the binomial error and Wilson's interval;
    everything else the cluster-robust error (with the factor G/(G-1) for G images) and the normal
    interval. With a single image nothing can be said about the error. Where all images say the same, that
    error is 0 and no measure: a share of 0 or 1 gets Wilson's interval of G trials, other sums none.
    """
    value = math.fsum(ratio.value for ratio in ratios)
    num = sum(
        len(ratio.numerators) if ratio.num_questions is None else ratio.num_questions for ratio in ratios
    )
    if len(ratios) == 1 and _is_plain_accuracy(ratios[0]):
        share, weight = value / ratios[0].weight, ratios[0].weight
        num_units = len(ratios[0].numerators)
        low, high = wilson_interval(share, num_units)
        error = weight * math.sqrt(share * (1 - share) / num_units)
        return Metric(
            name=name,
            value=value,
            num_questions=num,
            standard_error=error,
            interval=(weight * low, weight * high),
        )
    standard_error = clustered_standard_error(ratios)
    interval = None
    if standard_error is not None and standard_error <= _ROUNDING * abs(value):
        standard_error, interval = None, _interval_of_equals(ratios)
    elif standard_error is not None:
        low, high = _bounds(ratios)
        margin = Z_95 * standard_error
        interval = max(low, value - margin), min(high, value + margin)
    return Metric(name=name, value=value, num_questions=num, standard_error=standard_error, interval=interval)


_ROUNDING = 1e-12


def _interval_of_equals(ratios: Sequence[Ratio]) -> tuple[float, float] | None:
    """Return the interval of a share of 0 or 1 out of as many trials as there are images."""
    is_share = len(ratios) == 1 and ratios[0].denominators is None and ratios[0].most == 1
    if not is_share or ratios[0].value not in _bounds(ratios):
        return None
    weight = ratios[0].weight
    ends = wilson_interval(ratios[0].value / weight, len(set(ratios[0].clusters)))
    return weight * ends[0], weight * ends[1]


def _bounds(ratios: Sequence[Ratio]) -> tuple[float, float]:
    """Return the bounds of a sum of these ratios; a share, or an F1, is in [0, weight]."""
    if any(ratio.weight < 0 or min((*ratio.numerators, *ratio.bottom), default=0) < 0 for ratio in ratios):
        return -math.inf, math.inf
    are_bounded = all(
        top <= ratio.most * bottom
        for ratio in ratios
        for top, bottom in zip(ratio.numerators, ratio.bottom, strict=True)
    )
    return 0.0, math.fsum(ratio.weight * ratio.most for ratio in ratios) if are_bounded else math.inf


def _is_plain_accuracy(ratio: Ratio) -> bool:
    return (
        ratio.denominators is None
        and len(ratio.numerators) > 0
        and set(ratio.numerators) <= {0.0, 1.0}
        and len(set(ratio.clusters)) == len(ratio.clusters)
    )


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion, both ends within [0, 1] (E. B. Wilson, 1927)."""
    z2 = Z_95**2
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    margin = Z_95 * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2)) / (1 + z2 / num)
    return max(0.0, centre - margin), min(1.0, centre + margin)


def clustered_standard_error(ratios: Sequence[Ratio]) -> float | None:
    """Return the standard error of a sum of ratios whose units come in images; None below two images."""
    names = sorted({cluster for ratio in ratios for cluster in ratio.clusters})  # the same sum every time
    if len(names) < 2:
        return None
    index = {cluster: i for i, cluster in enumerate(names)}
    influence = np.zeros(len(index))
    for ratio in ratios:
        bottom = np.asarray(ratio.bottom, dtype=np.float64)
        if bottom.sum() == 0:
            continue
        residual = ratio.weight * np.asarray(ratio.numerators) - ratio.exact * bottom
        np.add.at(influence, [index[cluster] for cluster in ratio.clusters], residual / bottom.sum())
    return math.sqrt(len(index) / (len(index) - 1) * float(influence @ influence))


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """B minus A over the same questions, with a bootstrap 95% interval and a two-sided p-value.

    Where every resample gives the same difference, neither is known: both are None.
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float | None
    num_images: int
    num_resamples: int

    def describe_interval(self, between: str = ", ") -> str:
        """Return the two ends, or why there are none."""
        if self.interval is None:
            return f"no interval: the same on {self.num_images:,} of {self.num_images:,} images"
        return between.join(f"{end:+.2f}" for end in self.interval)


def paired_bootstrap(
    a: Sequence[Ratio], b: Sequence[Ratio], *, num_resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Resample images with replacement, the same ones for A and B, and compare the two scores each time."""
    names = sorted({cluster for ratio in (*a, *b) for cluster in ratio.clusters})
    index = {cluster: i for i, cluster in enumerate(names)}
    sums_a, sums_b = _sums_by_cluster(a, index), _sums_by_cluster(b, index)
    generator = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for start in range(0, num_resamples, 64):
        size = min(64, num_resamples - start)
        times = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)
        draws[start : start + size] = _resampled(sums_b, times) - _resampled(sums_a, times)
    low, high = np.quantile(draws, (0.025, 0.975))
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    difference = math.fsum(ratio.value for ratio in b) - math.fsum(ratio.value for ratio in a)
    varies = float(np.ptp(draws)) > _ROUNDING * max(1.0, abs(difference))
    return PairedDifference(
        difference=difference,
        interval=(float(low), float(high)) if varies else None,
        p_value=min(1.0, 2 * (tail + 1) / (num_resamples + 1)) if varies else None,
        num_images=len(names),
        num_resamples=num_resamples,
    )


def _sums_by_cluster(ratios: Sequence[Ratio], index: dict[str, int]) -> list[tuple[float, Floats, Floats]]:
    sums = []
    for ratio in ratios:
        where = [index[cluster] for cluster in ratio.clusters]
        top, bottom = np.zeros(len(index)), np.zeros(len(index))
        np.add.at(top, where, np.asarray(ratio.numerators, dtype=np.float64))
        np.add.at(bottom, where, np.asarray(ratio.bottom, dtype=np.float64))
        sums.append((ratio.weight, top, bottom))
    return sums


def _resampled(sums: list[tuple[float, Floats, Floats]], times: NDArray[np.int64]) -> Floats:
    total = np.zeros(len(times))
    for weight, top, bottom in sums:
        denominator = times @ bottom
        safe = np.where(denominator == 0, 1.0, denominator)
        total += weight * np.where(denominator == 0, 0.0, (times @ top) / safe)
    return total


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: questions that only A, only B got right."""
    num = only_a + only_b
    term, tail = 1, 0  # integers: exact for any number of questions
    for k in range(min(only_a, only_b) + 1):
        tail += term
        term = term * (num - k) // (k + 1)
    p_value: float = 2 * tail / 2**num
    return min(1.0, p_value)
