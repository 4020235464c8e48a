"""Hallucination anatomy of POPE: how often a model says yes, to which absent objects, and how splits differ.

Paper: the open question of section 4.2.2, whether more trained parameters cost small models accuracy on POPE.
F1 alone does not tell a model that says yes too often from one that says no too often; these numbers do.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.benchmarks.pope import FIRST_ID
from tinyllava.evaluation.metrics.yes_no import YES
from tinyllava.studies.study import BenchmarkScores, Study, StudyCell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        """F1 on random minus F1 on adversarial questions: what co-occurrence of objects costs."""
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
    """The anatomy of a cell beside the number of parameters that its stages trained."""

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
        for axes, title in (
            (left, "absent objects seen, percent"),
            (right, "yes among the answers, percent"),
        ):
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
