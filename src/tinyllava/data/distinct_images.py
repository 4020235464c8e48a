"""The images of conversations, each once, and which of them each conversation shows.

Paper: none. The sets of Table 2 show up to 1.2 million images. An image stays where it is: a name in the
mapped file of converted records, or bytes in one of its rows. Only numbers are held for it here.
"""

import os
from bisect import bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.store import StoredConversations, StoreFile

_ROWS_AT_ONCE = 4096


class Part(NamedTuple):
    """Some images of one source, which are looked at together."""

    source: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Paths:
    """Images that are files, in the order of their names."""

    folder: Path | None
    """That the names start from; None where they are whole paths."""
    names: Any
    """An Arrow array of text."""

    def __len__(self) -> int:
        return len(self.names)

    def paths(self, start: int, end: int) -> list[str]:
        """Return the paths of some of them."""
        names: list[str] = self.names.slice(start, end - start).to_pylist()
        folder = self.folder
        return names if folder is None else [os.path.join(folder, name) for name in names]  # noqa: PTH118

    def refs(self, start: int, end: int) -> list[ImageRef]:
        """Return some of them."""
        names: list[str] = self.names.slice(start, end - start).to_pylist()
        paths = map(Path, self.paths(start, end))
        return [ImageRef(path=path, name=name) for path, name in zip(paths, names, strict=True)]


@dataclass(frozen=True, eq=False)
class Cells:
    """Images whose bytes are in the rows of a converted file; none of them is held here."""

    file: StoreFile
    places: NDArray[np.int64]
    """[K], which of all the images of the file each is."""

    def __len__(self) -> int:
        return len(self.places)

    def refs(self, start: int, end: int) -> list[ImageRef]:
        """Return some of them, with their bytes."""
        firsts = self.file.image_starts
        found = []
        for place in self.places[start:end].tolist():
            batch = bisect_right(firsts, place) - 1
            columns = self.file.batches[batch]
            data, name = (
                columns.column(column).flatten()[place - firsts[batch]].as_py()
                for column in ("image_data", "image_names")
            )
            found.append(ImageRef(data=data, name=name))
        return found


@dataclass(frozen=True, eq=False)
class Held:
    """Images of conversations that are in memory."""

    all: list[ImageRef]

    def __len__(self) -> int:
        return len(self.all)

    def refs(self, start: int, end: int) -> list[ImageRef]:
        """Return some of them."""
        return self.all[start:end]


Source = Paths | Cells | Held


class DistinctImages:
    """The images of conversations, each once.

    Args:
        conversations: converted ones, or any others.
    """

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations
        self.sources: list[Source] = []
        self.numbers: NDArray[np.int32]
        """[T], of each place where a record shows an image: which image it is; -1 in records not taken."""
        self.starts: NDArray[np.int64]
        """[R + 1], where the places of each record begin."""
        if isinstance(conversations, StoredConversations):
            self._find_stored(conversations)
        else:
            self._find_held(conversations)
        self.firsts: list[int] = [0, *np.cumsum([len(source) for source in self.sources]).tolist()]
        """The number of the first image of each source, and of all."""

    def _find_held(self, conversations: Sequence[Conversation]) -> None:
        known: dict[ImageRef, int] = {}
        shown = [[known.setdefault(ref, len(known)) for ref in talk.images] for talk in conversations]
        self.sources = [Held(list(known))]
        self.numbers = np.array(list(chain.from_iterable(shown)), dtype=np.int32)
        self.starts = np.cumsum([0, *map(len, shown)])

    def _find_stored(self, conversations: StoredConversations) -> None:
        files = conversations.files
        counts = np.concatenate([np.zeros(0, np.int64), *(file.image_counts for file in files)])
        is_taken = np.zeros(len(counts), dtype=bool)
        is_taken[conversations.taken] = True
        taken = is_taken.repeat(counts)
        names, paths, data = (
            pa.chunked_array([c for file in files for c in file.image_column(name).chunks], type_)
            for name, type_ in (
                ("image_names", pa.string()),
                ("image_paths", pa.string()),
                ("image_data", pa.large_binary()),
            )
        )
        has_data, has_path = pc.is_valid(data).to_numpy(), pc.is_valid(paths).to_numpy()
        numbers = [len(file.image_column("image_names")) for file in files]
        of_file = np.arange(len(files)).repeat(numbers)
        self.numbers = np.full(len(taken), -1, dtype=np.int32)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        for folder in dict.fromkeys(file.images for file in files):
            within = np.isin(of_file, [n for n, file in enumerate(files) if file.images == folder])
            self._add_paths(folder, names, taken & within & ~has_path & ~has_data)
        self._add_paths(None, paths, taken & has_path)
        for number, (file, start) in enumerate(zip(files, [0, *accumulate(numbers)], strict=False)):
            places = np.flatnonzero(taken & has_data & (of_file == number))
            if len(places):
                self.numbers[places] = np.arange(len(places)) + sum(map(len, self.sources))
                self.sources.append(Cells(file, places - start))

    def _add_paths(self, folder: Path | None, column: Any, is_here: NDArray[np.bool_]) -> None:
        if is_here.any():
            values, codes = _sorted_distinct(column.filter(pa.array(is_here)))
            self.numbers[is_here] = codes + sum(map(len, self.sources))
            self.sources.append(Paths(folder, values))

    def __len__(self) -> int:
        return self.firsts[-1]

    def parts(self, size: int) -> list[Part]:
        """Return all of them in parts of at most ``size`` images."""
        return [
            Part(number, start, min(start + size, len(source)))
            for number, source in enumerate(self.sources)
            for start in range(0, len(source), size)
        ]

    def place(self, part: Part) -> slice:
        """Return where the images of a part are among all."""
        return slice(self.firsts[part.source] + part.start, self.firsts[part.source] + part.end)

    def ref(self, number: int) -> ImageRef:
        """Return one image."""
        source = bisect_right(self.firsts, number) - 1
        start = number - self.firsts[source]
        [found] = self.sources[source].refs(start, start + 1)
        return found

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """[N], the record of each conversation, by its number in ``starts``."""
        if isinstance(self.conversations, StoredConversations):
            return self.conversations.taken
        return np.arange(len(self.conversations), dtype=np.int64)

    def of_each(self) -> Iterator[list[int]]:
        """Yield the numbers of the images of each conversation, in order."""
        ends = self.conversations.ends if isinstance(self.conversations, StoredConversations) else {}
        place = 0
        for first in range(0, len(self._rows), _ROWS_AT_ONCE):
            rows = self._rows[first : first + _ROWS_AT_ONCE]
            spans = zip(
                rows.tolist(), self.starts[rows].tolist(), self.starts[rows + 1].tolist(), strict=True
            )
            for row, start, end in spans:
                if row in ends:
                    end = start + len(self.conversations[place].images)
                yield self.numbers[start:end].tolist() if end > start else []
                place += 1

    def showing(self, numbers: Container[int]) -> Iterator[tuple[int, int]]:
        """Yield the place of each conversation that shows one of some images, and the first such image."""
        for place, shown in enumerate(self.of_each()):
            if (found := next((number for number in shown if number in numbers), None)) is not None:
                yield place, found


def _sorted_distinct(column: Any) -> tuple[Any, NDArray[np.int32]]:
    """Return the distinct texts of a column in order, and which of them each of its texts is."""
    encoded = column.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return encoded.dictionary.take(pa.array(order)), rank[encoded.indices.to_numpy()]
