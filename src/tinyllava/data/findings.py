"""What comes up in converting a record file, part by part: the good records, the defects, the unused fields.

Paper: none.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tinyllava.data.defects import Defect, raise_defects
from tinyllava.data.readers.form import Reading
from tinyllava.data.records import duplicate
from tinyllava.errors import DataError

_KEPT = 100
"""Defects of a name that are kept; their report shows the first ones."""


@dataclass(kw_only=True)
class Part:
    """Some records of a file, converted."""

    batch: Any
    """The good ones, as a record batch."""
    rows: list[int]
    """Which of the part's records they are."""
    keys: list[int]
    """See ``convert_each``."""
    defects: list[tuple[int, Defect]]
    """Which record has which."""
    num_read: int
    skipped: Counter[str]
    ignored: Counter[str]


class Findings:
    """What comes up in converting a file, part by part."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.num_read = self.num_rows = 0
        self.defects: list[Defect] = []
        """The first of each name: where the folder of images is wrong, all would fill the memory."""
        self.counts: Counter[str] = Counter()
        self.missing: list[str] = []
        self.skipped: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self._seen: set[int] = set()

    def take(self, part: Part) -> Any:
        """Note what was found in a part, and return the batch of the records that are left."""
        start, self.num_read = self.num_read, self.num_read + part.num_read
        self.skipped.update(part.skipped)
        self.ignored.update(part.ignored)
        batch, repeated = part.batch, []
        for row, key in enumerate(part.keys):
            if key and key in self._seen:
                repeated.append(row)
            self._seen.add(key)
        for row in repeated:
            at, id_ = (batch.column(name)[row].as_py() for name in ("at", "id"))
            part.defects.append((part.rows[row], duplicate(self.reading, at, id_)))
        for row, defect in sorted(part.defects, key=lambda one: one[0]):
            self.note(defect, start + row)
        kept = np.setdiff1d(np.arange(batch.num_rows), repeated)
        self.keep(start + np.array(part.rows, dtype=np.int64)[kept])
        if repeated:
            batch = batch.take(pa.array(kept))
        self.num_rows += batch.num_rows
        return batch

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Note which records of the file are good, besides how many."""

    def check(self) -> None:
        """Raise what the file as a whole is refused for, once all is read.

        Raises:
            DataError: records have defects that are not skipped, or none are left.
        """
        path, skipped = self.reading.path, dict(self.skipped)
        raise_defects(path, self.defects, self.counts)
        if not self.num_read:
            raise DataError(f"{path}: no records in it. Write the records again, or give another file.")
        if not self.num_rows:
            raise DataError(f"{path}: no records left" + (f" after skips {skipped}." if skipped else "."))

    def note(self, defect: Defect, row: int) -> None:
        """Take a defect of a record of the file."""
        if defect.name in self.reading.skip:
            self.skipped[defect.name] += 1
            self.missing.extend([defect.path] if defect.path else [])
            return
        self.counts[defect.name] += 1
        if self.counts[defect.name] <= _KEPT:
            self.defects.append(defect)
