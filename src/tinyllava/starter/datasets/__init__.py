"""The labelled images of the starter, from public packages.

Paper: none. An option adds a data set to both training and evaluation. The default held-out part stays the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyllava.starter.datasets.cifar10 import read_cifar10
from tinyllava.starter.datasets.tux_paint import read_tux_paint
from tinyllava.starter.packages import CIFAR10, EASY_VQA, GROCERY_STORE, TUX_PAINT_STAMPS
from tinyllava.starter.records import Amount

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tinyllava.data.packages import Package
    from tinyllava.starter.datasets.default import LabelledImage
    from tinyllava.starter.records import Length


@dataclass(frozen=True, kw_only=True)
class Option:
    """A data set: its package, its reader, and how much of it each length of the starter takes."""

    package: Package
    read: Callable[[Path], list[LabelledImage]]
    amounts: Mapping[Length, Amount]


OPTIONS: dict[str, Option] = {
    "cifar10": Option(
        package=CIFAR10,
        read=read_cifar10,
        amounts={
            "short": Amount(captions=48, conversations=24),
            "default": Amount(captions=1000, conversations=600),
            "full": Amount(captions=3000, conversations=2400),
        },
    ),
    "tux_paint": Option(
        package=TUX_PAINT_STAMPS,
        read=read_tux_paint,
        amounts={
            "short": Amount(captions=48, conversations=24),
            "default": Amount(captions=600, conversations=300),
            "full": Amount(captions=1200, conversations=900),
        },
    ),
}
"""By the name that `tinyllava starter --with` takes; it is also the `source` of their questions."""


def licence_of(source: str) -> str:
    """Return the licence of a data set by its ``source``."""
    if source == "drawn":
        return "Apache-2.0"  # tinyllava's own
    packages = {"easy_vqa": EASY_VQA, "grocery_store": GROCERY_STORE}
    return (packages[source] if source in packages else OPTIONS[source].package).licence
