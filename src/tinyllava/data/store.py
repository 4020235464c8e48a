"""Records on disk: converted once into a memory-mapped Arrow file, with every check in the same pass.

Paper: none. The sets of Table 2 have up to 1.2 million records. The process that trains and its workers map
the file, so none of them holds the records as Python objects.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from numpy.typing import NDArray

from tinyllava.conversation import Conversation, ImageRef, Message, Role
from tinyllava.data.cores import map_parts
from tinyllava.data.images import open_image
from tinyllava.errors import ImageError
from tinyllava.files import write_text

ROWS = 1024  # of a record batch: what is unpacked together when all are read in order
_DIGEST_LENGTH = 64
_LOOKED_AT = 4096  # images that a process looks for together
BEFORE = -1  # the place of an image that comes before its text
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("at", pa.string()),
        ("roles", pa.list_(pa.uint8())),
        ("texts", pa.list_(pa.large_string())),
        ("trained", pa.list_(pa.bool_())),
        ("image_counts", pa.list_(pa.uint16())),
        ("image_places", pa.list_(pa.int32())),
        ("image_names", pa.list_(pa.string())),
        ("image_paths", pa.list_(pa.string())),
        ("image_data", pa.list_(pa.large_binary())),
    ]
)
"""A row is a conversation. ``image_counts`` is one number a turn; the images of all turns follow each other.
A path is null where it is the name below the folder of images."""


@dataclass(eq=False)
class StoreFile:
    """One converted file of records, mapped into memory when it is first read."""

    folder: Path
    """Holds records.arrow and what was found in converting it."""
    source: str
    """The record file, as errors name it."""
    images: Path
    skipped: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    missing: str = ""
    """A digest of the missing images whose records were skipped; empty if none were."""

    @property
    def key(self) -> str:
        """A name for the contents. Where a missing image appears or another one goes, it is another one."""
        return f"{self.folder.name}-{self.missing}" if self.missing else self.folder.name

    @cached_property
    def batches(self) -> list[Any]:
        """The record batches, each of ``ROWS`` rows but the last."""
        with pa.memory_map(str(self.folder / "records.arrow")) as mapped:
            file = pa.ipc.open_file(mapped)
            return [file.get_batch(number) for number in range(file.num_record_batches)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is mapped: another process maps it for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "batches"}

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self.batches)

    def image_column(self, name: str) -> Any:
        """Return a column with one value for each place where a record shows an image, in order."""
        type_ = SCHEMA.field(name).type.value_type
        return pa.chunked_array([batch.column(name).flatten() for batch in self.batches], type_)

    @property
    def image_counts(self) -> NDArray[np.int64]:
        """[R], images of each record."""
        found = [pc.list_value_length(batch.column("image_names")) for batch in self.batches]
        counts: NDArray[np.int64] = pa.chunked_array(found, pa.int32()).to_numpy().astype(np.int64)
        return counts

    @cached_property
    def image_starts(self) -> list[int]:
        """How many images the batches before each batch show."""
        counts = [len(batch.column("image_names").flatten()) for batch in self.batches]
        return [0, *accumulate(counts)][:-1]

    def rows(self, batch: int, start: int = 0, length: int | None = None) -> list[Conversation]:
        """Return some conversations of a batch."""
        columns = self.batches[batch].slice(start, length).to_pydict()
        return [
            self._conversation(dict(zip(columns, row, strict=True)))
            for row in zip(*columns.values(), strict=True)
        ]

    def _conversation(self, row: dict[str, Any]) -> Conversation:
        named = zip(row["image_names"], row["image_paths"], row["image_data"], strict=True)
        refs = [
            ImageRef(
                path=None if data is not None else Path(path or self.images / name), data=data, name=name
            )
            for name, path, data in named
        ]
        messages, taken = [], 0
        turns = zip(row["roles"], row["texts"], row["trained"], row["image_counts"], strict=True)
        for role, text, is_trained, count in turns:
            places = row["image_places"][taken : taken + count]
            messages.append(
                Message(
                    role=ROLES[role],
                    text=text,
                    images=tuple(refs[taken : taken + count]),
                    places=() if BEFORE in places else tuple(places),
                    is_trained=is_trained,
                )
            )
            taken += count
        return Conversation(messages=tuple(messages), id=row["id"], source=self.source, at=row["at"])

    def find_gone(self) -> str:
        """Return the path of an image that is no file any more; empty if all are there."""
        names, paths = self.image_column("image_names"), self.image_column("image_paths")
        has_path = pc.is_valid(paths)
        of_folder = pc.and_not(pc.is_null(self.image_column("image_data")), has_path)
        for folder, column in ((self.images, names.filter(of_folder)), (Path(), paths.filter(has_path))):
            if gone := _first_gone(folder, pc.unique(column)):
                return gone
        return ""


def _first_gone(folder: Path, names: Any) -> str:
    def look(start: int) -> str:
        some = names.slice(start, _LOOKED_AT).to_pylist()
        paths = (os.path.join(folder, name) for name in some)  # noqa: PTH118 (a Path costs more)
        return next((path for path in paths if not os.path.isfile(path)), "")  # noqa: PTH113 (as above)

    return next(filter(None, map_parts(look, range(0, len(names), _LOOKED_AT))), "")


class StoredConversations(Sequence[Conversation]):
    """Conversations of converted files, made when asked for.

    Args:
        taken: [N], rows of the files one after the other that are taken, in this order; all if None. A row
            that is several samples comes several times.
        used: [R], the rows that the stage uses at all, ascending; all if None.
        ends: of rows that are cut at a turn's end: how many of their turns are left.
    """

    def __init__(
        self,
        files: Sequence[StoreFile],
        taken: NDArray[np.int64] | None = None,
        used: NDArray[np.int64] | None = None,
        ends: Mapping[int, int] | None = None,
    ) -> None:
        self.files = tuple(files)
        self._starts = np.cumsum([0, *map(len, self.files)])
        self.taken = np.arange(self._starts[-1], dtype=np.int64) if taken is None else taken
        self.used = used
        self.ends = dict(ends or {})

    def __len__(self) -> int:
        return len(self.taken)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredConversations": ...
    def __getitem__(self, index: int | slice) -> "Conversation | StoredConversations":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row = int(self.taken[index])
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, place = divmod(row - int(self._starts[file]), ROWS)
        return self._cut(row, self.files[file].rows(batch, place, 1)[0])

    def __iter__(self) -> Iterator[Conversation]:
        """Unpack a batch at a time, which takes a tenth of the time for all."""
        known: tuple[int, int] | None = None
        rows: list[Conversation] = []
        for row in self.taken.tolist():
            file = int(np.searchsorted(self._starts, row, side="right")) - 1
            batch, place = divmod(row - int(self._starts[file]), ROWS)
            if known != (file, batch):
                known, rows = (file, batch), self.files[file].rows(batch)
            yield self._cut(row, rows[place])

    def _cut(self, row: int, conversation: Conversation) -> Conversation:
        end = self.ends.get(row)
        return conversation if end is None else replace(conversation, messages=conversation.messages[:end])

    def select(self, kept: NDArray[np.int64]) -> "StoredConversations":
        """Return some of the conversations, by their places among these."""
        return StoredConversations(self.files, self.taken[kept], self.used, self.ends)

    @property
    def key(self) -> str:
        """A name for the contents: which files, and which of their rows."""
        digest = hashlib.sha256("\n".join(file.key for file in self.files).encode())
        digest.update(self.taken.astype(np.int64).tobytes())
        digest.update(repr(sorted(self.ends.items())).encode() if self.ends else b"")
        return digest.hexdigest()[:24]

    @property
    def image_counts(self) -> NDArray[np.int64]:
        """[N], images of each conversation."""
        counts = np.concatenate([file.image_counts for file in self.files])[self.taken]
        for place in self._cut_places():
            counts[place] = len(self[place].images)
        return counts

    @property
    def question_counts(self) -> NDArray[np.int64]:
        """[N], questions of each conversation."""
        user = ROLES.index("user")
        found = [
            np.add.reduceat((np.asarray(roles.flatten()) == user).astype(np.int64), roles.offsets[:-1])
            for roles in (batch.column("roles") for file in self.files for batch in file.batches)
        ]
        counts = np.concatenate(found).astype(np.int64)[self.taken]
        for place in self._cut_places():
            counts[place] = sum(message.role == "user" for message in self[place].messages)
        return counts

    def _cut_places(self) -> list[int]:
        found: list[int] = np.flatnonzero(np.isin(self.taken, list(self.ends))).tolist()
        return found


def image_counts(conversations: Sequence[Conversation]) -> NDArray[np.int64]:
    """Return the number of images of each conversation."""
    if isinstance(conversations, StoredConversations):
        return conversations.image_counts
    return np.array([len(conversation.images) for conversation in conversations], dtype=np.int64)


def question_counts(conversations: Sequence[Conversation]) -> NDArray[np.int64]:
    """Return the number of questions of each conversation."""
    if isinstance(conversations, StoredConversations):
        return conversations.question_counts
    counts = [sum(m.role == "user" for m in conversation.messages) for conversation in conversations]
    return np.array(counts, dtype=np.int64)


def select(conversations: Sequence[Conversation], kept: NDArray[np.int64]) -> Sequence[Conversation]:
    """Return some conversations, by their places."""
    if isinstance(conversations, StoredConversations):
        return conversations.select(kept)
    return [conversations[index] for index in kept.tolist()]


def cut(conversations: Sequence[Conversation], ends: Mapping[int, int]) -> Sequence[Conversation]:
    """Return conversations of which some end early.

    Args:
        ends: place of a conversation -> how many of its turns are left.
    """
    if not isinstance(conversations, StoredConversations):
        return [
            replace(one, messages=one.messages[: ends[place]]) if place in ends else one
            for place, one in enumerate(conversations)
        ]
    rows = {int(conversations.taken[place]): end for place, end in ends.items()}
    return StoredConversations(
        conversations.files, conversations.taken, conversations.used, {**conversations.ends, **rows}
    )


def record_numbers(conversations: Sequence[Conversation]) -> NDArray[np.int64]:
    """Return [N], which record each conversation is: a record that is several samples has one number."""
    if isinstance(conversations, StoredConversations):
        return conversations.taken
    return np.arange(len(conversations), dtype=np.int64)


def distinct(conversations: Sequence[Conversation]) -> Sequence[Conversation]:
    """Return each record once, also one that is several samples."""
    if isinstance(conversations, StoredConversations):
        _, first = np.unique(conversations.taken, return_index=True)
        return conversations if len(first) == len(conversations) else conversations.select(np.sort(first))
    return conversations


def kept_digest(
    conversations: Sequence[Conversation], name: str, digest: Callable[[Sequence[Conversation]], str]
) -> str:
    """Return a digest of conversations, which is saved with converted ones.

    Of several processes one computes it and the others wait.

    Args:
        name: of what is digested, with all that it depends on beside the conversations.
    """
    if not isinstance(conversations, StoredConversations):
        return digest(conversations)
    path = conversations.files[0].folder / f"{name}-{conversations.key}.txt"
    with FileLock(path.with_suffix(".lock")):
        known = path.read_text(encoding="ascii") if path.is_file() else ""
        if len(known) != _DIGEST_LENGTH:
            known = digest(conversations)
            write_text(path, known)
    return known


def find_good_images(
    conversations: Sequence[Conversation], progress: Callable[[int], None] = lambda n: None
) -> NDArray[np.int64]:
    """Decode every image once and return the places of the conversations with intact images."""
    good = []
    is_whole: dict[ImageRef, bool] = {}
    for place, conversation in enumerate(conversations):
        for ref in conversation.images:
            if ref not in is_whole:
                is_whole[ref] = False
                with suppress(ImageError):
                    open_image(ref)
                    is_whole[ref] = True
        if all(is_whole[ref] for ref in conversation.images):
            good.append(place)
        progress(1)
    return np.array(good, dtype=np.int64)
