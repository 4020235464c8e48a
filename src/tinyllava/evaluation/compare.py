"""Compare two models on the same questions: the difference with its error, and the questions that flipped.

Paper: none; Tables 3 and A1 compare single numbers. A difference over the same questions has a smaller error
than either number, because questions that both models get right or wrong cancel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava.errors import DataError
from tinyllava.evaluation.answers import read_predictions
from tinyllava.evaluation.benchmark import Benchmark, Prediction
from tinyllava.evaluation.benchmarks import find_benchmark
from tinyllava.evaluation.metrics.statistics import PairedDifference, mcnemar, paired_bootstrap
from tinyllava.files import found_below

RIGHT = 0.5
"""From this score on, an answer counts as right in McNemar's test and in the list of flips."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """B against A on one benchmark, over the questions that both answered."""

    benchmark: str
    metric: str
    a: float
    b: float
    bootstrap: PairedDifference
    """Of the headline metric, B minus A, images resampled."""
    unit: str
    """What is counted below, as the headline metric counts it: questions, or MMBench's with all rotations."""
    num_units: int
    num_unpaired: int
    """Questions that only one of the two has; they are left out."""
    only_a: int
    """Units that A got right and B wrong."""
    only_b: int
    mcnemar_p: float
    flips: tuple[tuple[Prediction, Prediction], ...]
    """Pairs (of A, of B), one of each unit that flipped, of which one is right and the other wrong."""

    def __str__(self) -> str:
        found = self.bootstrap
        p_values = f"{self.mcnemar_p:.4f} (McNemar: {self.only_a} only A, {self.only_b} only B right)"
        if found.p_value is not None:
            p_values = f"{found.p_value:.4f} (bootstrap), {p_values}"
        return (
            f"{self.benchmark} {self.metric}: {self.a:.2f} -> {self.b:.2f}, difference "
            f"{found.difference:+.2f} [{found.describe_interval()}], p = {p_values}, "
            f"n = {self.num_units:,} {self.unit}{self.describe_unpaired(', ')}"
        )

    def describe_unpaired(self, separator: str = "") -> str:
        """Return, behind a separator, how many questions were left out; empty if none were."""
        if not self.num_unpaired:
            return ""
        return f"{separator}without {self.num_unpaired:,} that only A or B was asked"


def compare_predictions(
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    benchmark: Benchmark,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two models' scored predictions on one benchmark.

    Raises:
        DataError: no question in common, a question that differs, or answers that were not scored.
    """
    of_a, of_b = ({p.question_id: p for p in predictions} for predictions in (a, b))
    pairs = [(of_a[key], of_b[key]) for key in of_a if key in of_b]
    _check_pairs(pairs, benchmark)
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ratios_a = benchmark.summarise(left)[benchmark.metric]
    ratios_b = benchmark.summarise(right)[benchmark.metric]
    units = _group_by_unit(pairs, benchmark)
    flips = tuple(flip for unit in units if (flip := _find_flip(unit)) is not None)
    only_a = sum(_is_right(of_one) for of_one, _ in flips)
    return Comparison(
        benchmark=benchmark.name,
        metric=benchmark.metric,
        a=sum(ratio.value for ratio in ratios_a),
        b=sum(ratio.value for ratio in ratios_b),
        bootstrap=paired_bootstrap(ratios_a, ratios_b, num_resamples=num_resamples, seed=seed),
        unit=benchmark.unit,
        num_units=len(units),
        num_unpaired=len(of_a) + len(of_b) - 2 * len(pairs),
        only_a=only_a,
        only_b=len(flips) - only_a,
        mcnemar_p=mcnemar(only_a, len(flips) - only_a),
        flips=flips,
    )


Pair = tuple[Prediction, Prediction]


def _group_by_unit(pairs: Sequence[Pair], benchmark: Benchmark) -> list[list[Pair]]:
    units: dict[str, list[Pair]] = {}
    for pair in pairs:
        unit = benchmark.unit_of(pair[0])
        if unit is not None:
            units.setdefault(unit, []).append(pair)
    return list(units.values())


def _find_flip(unit: Sequence[Pair]) -> Pair | None:
    """Return the first pair that keeps a unit from being right for A and B alike, None if it is."""
    if all(_is_right(a) for a, _ in unit) == all(_is_right(b) for _, b in unit):
        return None
    return next(pair for pair in unit if _is_right(pair[0]) != _is_right(pair[1]))


def _is_right(prediction: Prediction) -> bool:
    return (prediction.score or 0.0) >= RIGHT


def _check_pairs(pairs: Sequence[Pair], benchmark: Benchmark) -> None:
    if not pairs:
        raise DataError(
            f"{benchmark.name}: A and B have no question in common; evaluate both on the same data."
        )
    judges = {one.judge for pair in pairs for one in pair} - {""}
    if len(judges) > 1:
        raise DataError(
            f"{benchmark.name}: the answers have several judges: {', '.join(sorted(judges))}. Use one judge "
            "for A and B: `tinyllava evaluate --score-only` with one --judge-model or one file of reviews."
        )
    for left, right in pairs:
        _check_same_question(left, right, benchmark)
        if left.score is None or right.score is None:
            side = "A" if left.score is None else "B"
            raise DataError(
                f"{benchmark.name}: the answers of {side} have no scores (question {left.question_id!r}). "
                + ("Judge them first." if benchmark.judging else "Only the server can score them.")
            )


def _check_same_question(left: Prediction, right: Prediction, benchmark: Benchmark) -> None:
    names = (
        ("prompt", "groups") if benchmark.is_edited else ("image", "prompt", "groups")
    )  # its images may move
    for name in names:
        ours, theirs = getattr(left, name), getattr(right, name)
        if ours != theirs:
            raise DataError(
                f"{benchmark.name}: question {left.question_id!r} differs for B: {ours!r} and {theirs!r}. "
                "Evaluate both on the same data with the same protocol or metric."
            )
    if left.target and right.target and left.target != right.target:
        raise DataError(
            f"{benchmark.name}: question {left.question_id!r} is graded against other right answers for B. "
            "Score both again on the same data: `tinyllava evaluate --score-only`, which needs no model."
        )


def compare(a: Path, b: Path, *, num_resamples: int = 2000, seed: int = 0) -> tuple[Comparison, ...]:
    """Compare two runs: folders with ``BENCHMARK/predictions.jsonl`` in them, or two such files.

    Benchmarks that only one folder has are left out, and of folders those without scores (VQAv2's answers are
    scored by its server); there has to be one in common.
    """
    from tinyllava.evaluation.own_data import PREFIX, from_predictions  # here: it opens images

    files = [(a, b)]
    if a.is_dir() and b.is_dir():
        found = [path.relative_to(a) for path in found_below(a, "*/predictions.jsonl")]
        files = [(a / path, b / path) for path in found if (b / path).exists()]
    comparisons = []
    for left, right in files:
        of_a, of_b = read_predictions(left), read_predictions(right)
        if not of_a or not of_b:
            raise DataError(f"{left if not of_a else right}:1: no predictions. Evaluate the model first.")
        if of_a[0].benchmark != of_b[0].benchmark:
            raise DataError(
                f"{left} has answers to {of_a[0].benchmark!r}, but {right} to {of_b[0].benchmark!r}; give "
                "two files of one benchmark."
            )
        name = of_a[0].benchmark
        is_own = name.startswith(PREFIX)
        benchmark = from_predictions(name, of_a) if is_own else find_benchmark(name)
        if a.is_dir() and any(one.score is None for one in (*of_a, *of_b)):
            continue
        comparisons.append(compare_predictions(of_a, of_b, benchmark, num_resamples=num_resamples, seed=seed))
    if not comparisons:
        raise DataError(f"{a} and {b} have no scored benchmark in common (NAME/predictions.jsonl).")
    return tuple(comparisons)
