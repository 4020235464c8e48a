"""Whether the measured answers bear out what the paper's text claims: every difference with its error.

Paper: sections 4.2.1 and 4.2.2 compare single numbers. Here the images are resampled, the same ones for
both sides and for all seeds, and the seeds are looked at one by one: a claim holds when the interval leaves
zero on the claimed side and no seed points the other way. Section 4.2.3 compares with other groups' models:
their printed number stands for that side, as if it were exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tinyllava.evaluation.benchmark import Benchmark, Prediction
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.compare import Comparison, compare_predictions
from tinyllava.evaluation.metrics.statistics import PairedDifference, Ratio, paired_bootstrap
from tinyllava.studies.published import other_scores, published_scores
from tinyllava.studies.study import BenchmarkScores, Claim, Study, StudyCell

Pair = tuple[StudyCell, StudyCell]
"""The side that is claimed to be worse, and the one that is claimed to be better."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One claim on one benchmark, everything that it does not name being equal."""

    claim: Claim
    benchmark: str
    metric: str
    context: Mapping[str, str]
    """The labels that both sides share and that vary in the study."""
    published: float | None
    """Claimed better minus claimed worse in the paper's numbers."""
    seeds: tuple[int, ...] = ()
    worse: float | None = None
    better: float | None = None
    difference: PairedDifference | None = None
    """Better minus worse, mean over the seeds; None where it was not measured."""
    differences: tuple[float, ...] = ()
    """Better minus worse of each seed."""
    by_seed: tuple[Comparison, ...] = ()
    """The same questions answered by both sides, for each seed; none where one side is a printed number."""

    @property
    def outcome(self) -> str:
        """``holds``, ``reversed``, ``open`` (the error is too large), or ``not measured``."""
        if self.difference is None:
            return "not measured"
        if self.difference.interval is None:
            return "open"
        low, high = self.difference.interval
        if min(low, *self.differences) > -self.claim.margin:
            return "holds"
        return "reversed" if max(high, *self.differences) < -self.claim.margin else "open"


def judge_claims(study: Study, scores: Mapping[str, BenchmarkScores]) -> list[Verdict]:
    """Test every claim of the study on every benchmark and in every context that it speaks of."""
    verdicts = []
    for claim in study.claims:
        found = [
            _judge(claim, benchmark, context, pairs, scores.get(benchmark))
            for context, pairs in _pairs_by_context(study, claim)
            for benchmark in _benchmarks_of(claim, pairs, scores)
        ]
        nothing = Verdict(
            claim=claim, benchmark=claim.benchmark, metric=claim.metric, context={}, published=None
        )
        verdicts += found or [nothing]
    return verdicts


def _pairs_by_context(study: Study, claim: Claim) -> list[tuple[dict[str, str], list[Pair]]]:
    named = {*claim.better, *claim.worse}
    shared_axes = [axis for axis, labels in study.axes.items() if axis not in named and len(labels) > 1]
    found: dict[tuple[str, ...], dict[int, Pair]] = {}
    for worse in study.cells:
        for better in study.cells:
            is_pair = (
                _matches(worse, claim.worse)
                and _matches(better, claim.better)
                and (worse is better if claim.rival else worse.seed == better.seed)
                and all(worse.labels[axis] == better.labels[axis] for axis in shared_axes)
            )
            if is_pair:
                key = tuple(worse.labels[axis] for axis in shared_axes)
                found.setdefault(key, {}).setdefault(worse.seed, (worse, better))
    return [
        (dict(zip(shared_axes, key, strict=True)), [pairs[seed] for seed in sorted(pairs)])
        for key, pairs in found.items()
    ]


def _matches(cell: StudyCell, labels: Mapping[str, str]) -> bool:
    return all(cell.labels.get(axis) == label for axis, label in labels.items())


def _benchmarks_of(claim: Claim, pairs: Sequence[Pair], scores: Mapping[str, BenchmarkScores]) -> list[str]:
    if claim.benchmark:
        return [claim.benchmark]
    if claim.rival:
        return list(other_scores(claim.rival))
    printed = [name for side in pairs[0] for name in published_scores(side.published)]
    return list(dict.fromkeys([*scores, *printed]))


def _judge(
    claim: Claim,
    benchmark_name: str,
    context: Mapping[str, str],
    pairs: Sequence[Pair],
    scores: BenchmarkScores | None,
) -> Verdict:
    empty = Verdict(
        claim=claim,
        benchmark=benchmark_name,
        metric=claim.metric,
        context=context,
        published=None if claim.metric else _published_difference(claim, pairs[0], benchmark_name),
    )
    if scores is None or benchmark_name not in BENCHMARKS:
        return empty
    measured = [pair for pair in pairs if all(_is_scored(scores, cell.id) for cell in pair)]
    if not measured:
        return empty
    benchmark = BENCHMARKS[benchmark_name]
    metric = claim.metric or benchmark.metric
    benchmark = replace(benchmark, metric=metric)
    empty = replace(empty, metric=metric, seeds=tuple(better.seed for _, better in measured))
    sides = [[_predictions(scores, benchmark, pair[side].id) for pair in measured] for side in (0, 1)]
    if claim.rival:
        return _against_print(empty, benchmark, sides[1])
    ratios = [_mean_over_seeds(benchmark, side) for side in sides]
    by_seed = tuple(
        compare_predictions(worse, better, benchmark) for worse, better in zip(*sides, strict=True)
    )
    return replace(
        empty,
        worse=_value(ratios[0]),
        better=_value(ratios[1]),
        difference=paired_bootstrap(*ratios),
        differences=tuple(one.bootstrap.difference for one in by_seed),
        by_seed=by_seed,
    )


def _against_print(empty: Verdict, benchmark: Benchmark, seeds: Sequence[Sequence[Prediction]]) -> Verdict:
    """Test measured answers against the printed number of the rival, which is the same in every draw."""
    printed = other_scores(empty.claim.rival).get(benchmark.name)
    if printed is None or empty.claim.metric:
        return empty
    measured = _mean_over_seeds(benchmark, seeds)
    images = sorted({cluster for ratio in measured for cluster in ratio.clusters})
    constant = Ratio(numerators=[1.0] * len(images), clusters=images, weight=printed.value)
    each = [_value(_mean_over_seeds(benchmark, [predictions])) for predictions in seeds]
    return replace(
        empty,
        worse=printed.value,
        better=_value(measured),
        difference=paired_bootstrap([constant], measured),
        differences=tuple(value - printed.value for value in each),
    )


def _is_scored(scores: BenchmarkScores, cell: str) -> bool:
    return cell in scores.scores and None not in scores.scores[cell]


def _predictions(scores: BenchmarkScores, benchmark: Benchmark, cell: str) -> list[Prediction]:
    """Return a cell's predictions; for a metric of a group, those of the group alone."""
    every = scores.predictions(benchmark.name, cell)
    of_group = [one for one in every if benchmark.metric in one.groups]
    return of_group or every


def _mean_over_seeds(benchmark: Benchmark, seeds: Sequence[Sequence[Prediction]]) -> list[Ratio]:
    return [
        replace(ratio, weight=ratio.weight / len(seeds))
        for predictions in seeds
        for ratio in benchmark.summarise(predictions)[benchmark.metric]
    ]


def _value(ratios: Sequence[Ratio]) -> float:
    return sum(ratio.value for ratio in ratios)


def _published_difference(claim: Claim, pair: Pair, benchmark: str) -> float | None:
    worse, better = (published_scores(cell.published).get(benchmark) for cell in pair)
    if claim.rival:
        worse = other_scores(claim.rival).get(benchmark)
    return None if worse is None or better is None else better.value - worse.value
