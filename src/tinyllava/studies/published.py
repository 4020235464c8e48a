"""Published numbers: the paper's Tables 1 to 3 and A1, and rows of the later code base.

Paper: Tables 1, 2, 3 and A1. Cells are kept as printed. A published number has its own type, so that it can
be next to a measured ``Result`` but never among them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tinyllava.errors import look_up

TABLES: dict[str, str] = {
    "table-1": "table-1.json",
    "table-2": "table-2.json",
    "table-3": "table-3.json",
    "table-a1": "table-a1.json",
    "factory": "factory.json",
}
ABSENT = "-"


@dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """One printed number, with its place in the paper and its protocol."""

    table: str
    """Title of the table."""
    source: str
    model: str
    benchmark: str
    value: float
    protocol: str
    saw_training_images: bool
    """Starred in the paper: the training images of the data set were part of the training."""


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A table as printed, each cell a text."""

    title: str
    source: str
    about: str
    columns: tuple[str, ...]
    """Descriptions of the model, then benchmarks by the names of our own."""
    rows: tuple[tuple[str, ...], ...]
    protocols: Mapping[str, str] = field(default_factory=dict)
    """Benchmark -> the rules of its column; empty for a table without scores."""
    protocol_note: str = ""
    """What the protocols are known from."""

    def score(self, row: tuple[str, ...], benchmark: str) -> PublishedScore | None:
        """Return the number in one cell of a row, None for a dash or a benchmark without a column."""
        if benchmark not in self.protocols:
            return None
        text = row[self.columns.index(benchmark)]
        if text == ABSENT:
            return None
        return PublishedScore(
            table=self.title,
            source=self.source,
            model=row[0],
            benchmark=benchmark,
            value=float(text.removesuffix("*")),
            protocol=self.protocols[benchmark],
            saw_training_images=text.endswith("*"),
        )

    def scores(self, model: str) -> dict[str, PublishedScore]:
        """Return the numbers of one model by benchmark, empty if the table does not have it."""
        rows = [row for row in self.rows if row[0].removeprefix("TinyLLaVA-") == model]
        found = {name: self.score(row, name) for row in rows for name in self.protocols}
        return {name: score for name, score in found.items() if score is not None}


@cache
def published_table(name: str) -> PublishedTable:
    """Return a table by name; an unknown name is answered with the known ones."""
    path = Path(__file__).with_name("published") / look_up(TABLES, name, "published table")
    values = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(tuple(row) for row in values["rows"])
    return PublishedTable(**{**values, "columns": tuple(values["columns"]), "rows": rows})


def other_name(row: tuple[str, ...]) -> str:
    """Return how a row of Table 3 is called: some models are printed at two sizes of image."""
    return f"{row[0]}, {row[2]}, {row[3]} px"


def other_scores(name: str) -> dict[str, PublishedScore]:
    """Return the numbers that Table 3 prints of another group's model, by benchmark.

    Raises:
        UnknownNameError: no row is called so.
    """
    table = published_table("table-3")
    row = look_up({other_name(row): row for row in table.rows}, name, "model of Table 3")
    found = {benchmark: table.score(row, benchmark) for benchmark in table.protocols}
    return {benchmark: score for benchmark, score in found.items() if score is not None}


def published_scores(variant: str) -> dict[str, PublishedScore]:
    """Return the paper's numbers of a variant (``base-C-TL``) : Table A1, and what only Table 3 has."""
    if not variant:
        return {}
    return {**published_table("table-3").scores(variant), **published_table("table-a1").scores(variant)}
