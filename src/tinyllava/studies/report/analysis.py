"""Analyse the answers of a study: which claims of the paper hold, and the errors on POPE.

Paper: sections 4.2.1 and 4.2.2 compare single numbers. Here the images are resampled, the same ones for both
sides and for all seeds, and each seed is also examined alone. A claim holds if the interval is on the claimed
side of zero and no seed contradicts it. Section 4.2.3 compares with other groups' models, whose printed
number is taken as exact. Section 4.2.2 leaves open whether more trained parameters cost small models accuracy
on POPE. F1 alone does not distinguish a model that says yes too often from one that says no too often. The
anatomy of its answers does: how often it says yes, to which absent objects, and how splits differ.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinyllava.evaluation.benchmark import Benchmark, Prediction
from tinyllava.evaluation.benchmarks import known_benchmarks
from tinyllava.evaluation.benchmarks.pope import FIRST_ID
from tinyllava.evaluation.compare import Comparison, compare_predictions
from tinyllava.evaluation.metrics.choices import YES
from tinyllava.evaluation.metrics.statistics import PairedDifference, Ratio, paired_bootstrap
from tinyllava.studies.published import other_scores, published_scores
from tinyllava.studies.study import BenchmarkScores, Claim, Study, StudyCell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    benchmark = known_benchmarks().get(benchmark_name)
    if scores is None or benchmark is None:
        return empty
    measured = [pair for pair in pairs if all(_is_scored(scores, cell.id) for cell in pair)]
    if not measured:
        return empty
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


_MARKS = {"random": ("o", 0.93), "popular": ("s", 1.0), "adversarial": ("D", 1.07)}
"""Split -> its mark, and by how much it is drawn aside of the others."""
_OBJECT = re.compile(r"^Is there an? (.+?) in the (?:image|picture|photo)\?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class SplitAnatomy:
    """One split of POPE; shares in percent."""

    split: str
    num_questions: int
    yes_ratio: float
    """Answers that are yes; half of the questions have the truth yes."""
    false_positive_rate: float
    """Absent objects that were seen."""
    false_negative_rate: float
    """Present objects that were not seen."""
    f1: float


@dataclass(frozen=True, kw_only=True)
class ObjectErrors:
    """How often one kind of absent object was seen."""

    name: str
    num_asked: int
    num_seen: int


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """All of it for one model."""

    splits: tuple[SplitAnatomy, ...]
    """Random, popular, adversarial: from the easiest to the hardest; only those that were asked."""
    objects: tuple[ObjectErrors, ...]
    """Most often seen first."""

    @property
    def split_gap(self) -> float | None:
        """F1 on random minus F1 on adversarial questions: the cost of objects that occur together."""
        f1 = {one.split: one.f1 for one in self.splits}
        return f1["random"] - f1["adversarial"] if {"random", "adversarial"} <= f1.keys() else None

    @property
    def yes_ratio(self) -> float:
        """Yes among all answers, in percent."""
        total = sum(one.num_questions for one in self.splits)
        return sum(one.yes_ratio * one.num_questions for one in self.splits) / total if total else 0.0


def dissect(predictions: Sequence[Prediction]) -> Anatomy:
    """Return the anatomy of a model's answers to POPE; an answer that is missing is no yes and is wrong."""
    order = [split for split in ("random", "popular", "adversarial") if split in FIRST_ID]
    splits = [_split(split, [p for p in predictions if p.category == split]) for split in order]
    asked: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for prediction in predictions:
        name = _object(prediction.prompt)
        if "label=no" in prediction.groups and name:
            asked[name] += 1
            seen[name] += prediction.parsed == YES
    errors = [ObjectErrors(name=name, num_asked=num, num_seen=seen[name]) for name, num in asked.items()]
    return Anatomy(
        splits=tuple(split for split in splits if split.num_questions),
        objects=tuple(sorted(errors, key=lambda one: (-one.num_seen, one.num_asked, one.name))),
    )


def _object(prompt: str) -> str:
    found = _OBJECT.match(prompt)
    return found[1].lower() if found else ""


def _split(split: str, predictions: Sequence[Prediction]) -> SplitAnatomy:
    yes = [p for p in predictions if "label=yes" in p.groups]
    no = [p for p in predictions if "label=yes" not in p.groups]
    hits = sum(p.parsed == YES for p in yes)
    false_positives = sum(p.parsed == YES for p in no)
    wrong_no = sum(p.parsed in (YES, "") for p in no)  # a missing answer is a false one of its label
    misses = len(yes) - hits
    return SplitAnatomy(
        split=split,
        num_questions=len(predictions),
        yes_ratio=_percent(hits + false_positives, len(predictions)),
        false_positive_rate=_percent(false_positives, len(no)),
        false_negative_rate=_percent(misses, len(yes)),
        f1=_percent(2 * hits, 2 * hits + wrong_no + misses),
    )


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


@dataclass(frozen=True, kw_only=True)
class CellAnatomy:
    """The anatomy of a cell with the number of parameters that its stages trained."""

    cell: StudyCell
    anatomy: Anatomy
    num_pretrained: int
    num_finetuned: int


def dissect_study(study: Study, scores: Mapping[str, BenchmarkScores]) -> list[CellAnatomy]:
    """Return the anatomy of every cell that answered POPE, [] where none did."""
    pope = scores.get("pope")
    if pope is None:
        return []
    return [
        CellAnatomy(
            cell=cell,
            anatomy=dissect(pope.predictions("pope", cell.id)),
            num_pretrained=_num_trained(cell, "pretrain"),
            num_finetuned=_num_trained(cell, "finetune"),
        )
        for cell in study.cells
        if cell.id in pope.scores
    ]


def _num_trained(cell: StudyCell, name: str) -> int:
    """Return the most parameters that one stage of this kind trained."""
    return max((sum(s.num_trained_parameters.values()) for s in cell.stages if name in s.name), default=0)


def draw_anatomy(cells: Sequence[CellAnatomy]) -> "Figure":
    """Draw seen absent objects and the share of yes against the parameters trained in pre-training."""
    from tinyllava.studies.report.figures import COLOURS, new_figure

    several = len({one.cell.panel for one in cells}) > 1
    names = [f"{one.cell.panel}, {one.cell.label}" if several else one.cell.label for one in cells]
    order = list(dict.fromkeys(names))
    with new_figure(9.6, 3.5) as figure:
        left, right = figure.subplots(1, 2)
        for one, name in zip(cells, names, strict=True):
            colour = COLOURS[order.index(name) % len(COLOURS)]
            x = max(1, one.num_pretrained) / 1e6
            for split in one.anatomy.splits:
                mark, aside = _MARKS[split.split]
                left.plot(x * aside, split.false_positive_rate, mark, color=colour, markersize=5)
            right.plot(x, one.anatomy.yes_ratio, "o", color=colour, label=name)
        for axes, title in ((left, "false positives, percent"), (right, "yes answers, percent")):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.margins(x=0.12)
            axes.set_xlabel("million parameters trained in pre-training")
            axes.set_title(title, loc="left")
            axes.grid(color="#e5e7eb")
        right.axhline(50, color="#6b7280", linestyle="--", linewidth=0.8)
        for title, (mark, _) in _MARKS.items():
            left.plot([], [], mark, color="#6b7280", markersize=5, label=title)
        left.legend(
            loc="upper left",
            bbox_to_anchor=(0, -0.2),  # below the axes: inside it could cover points
            frameon=False,
            fontsize=8,
            ncols=len(_MARKS),
        )
        handles, texts = right.get_legend_handles_labels()
        once = dict(zip(texts, handles, strict=True))
        figure.legend(once.values(), once.keys(), frameon=False, fontsize=8, loc="outside right center")
    return figure
