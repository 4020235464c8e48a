"""Check a record file before training: its contents and its defects.

Paper: none.
"""

import hashlib
import os
import shutil
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from tinyllava.config import DataConfig
from tinyllava.conversation import Conversation
from tinyllava.data.conversion import naming_place, write_store
from tinyllava.data.defects import DEFECTS, Defect
from tinyllava.data.distinct_images import DistinctImages
from tinyllava.data.findings import Findings, Part
from tinyllava.data.hashes import ImageHashes
from tinyllava.data.images import thumbnail_url
from tinyllava.data.readers.form import IMAGE_MARK, Reading
from tinyllava.data.records import open_readings
from tinyllava.data.sources import Share, mix
from tinyllava.data.store import StoredConversations, StoreFile
from tinyllava.files import LOCK, cache_folder, found_below, held, page_environment, write_text

_DIGEST_BYTES = 16
_PREFIX = "check-"
_NEW_SECONDS = 60
"""In which a folder may not be locked yet."""
STYLES = Path(__file__).parent
"""Of the pages that show records."""


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """One question about the same images in several records."""

    question: str
    places: tuple[str, ...]
    answers: tuple[str, ...]
    """Of the records in order; more than one different answer is a contradiction, or chance."""


@dataclass(kw_only=True)
class FileCheck:
    """The result of checking one or more record files; the records are mapped, and not held in memory."""

    conversations: StoredConversations
    """The records without a defect."""
    defects: list[Defect]
    ignored: Counter[str]
    """Unused fields, with the number of records that have them."""
    mixture: list[Share]
    """What each file gives to a stage that is trained on these."""
    images: DistinctImages
    """Those of the records without a defect."""
    keys: NDArray[np.uint8]
    """[K, 32], the content of each image: its SHA-256, or that of its name if images were not opened."""

    @property
    def num_records(self) -> int:
        """Records of the files, good or not."""
        return len(self.conversations) + len(self.defects)

    @property
    def num_images(self) -> int:
        """Images of different content."""
        return len(np.unique(self.keys, axis=0))

    @cached_property
    def contents(self) -> "Contents":
        """What is counted in one pass over the records."""
        return Contents(self)

    def find_repeated(self) -> list[Repeated]:
        """Return the questions that come up again about the same images."""
        asked = _digests(self.contents.asked)
        _, group, counts = np.unique(asked, return_inverse=True, return_counts=True)
        places = np.flatnonzero(counts[group] > 1)
        found: dict[int, list[tuple[str, str, str]]] = {}
        for number, talk in zip(group[places].tolist(), self.conversations.select(places), strict=True):
            question, answer, *_ = (message.text for message in talk.messages if message.role != "system")
            found.setdefault(number, []).append((question, talk.place, answer))
        return [
            Repeated(
                question=records[0][0],
                places=tuple(place for _, place, _ in records),
                answers=tuple(answer for _, _, answer in records),
            )
            for records in found.values()
        ]


class Contents:
    """What a check counts in its records. Of each text only a digest is held."""

    def __init__(self, check: FileCheck) -> None:
        self._conversations = check.conversations
        self.num_with_image = 0
        self.sources: set[str] = set()
        """Files of the records."""
        self.question_words, self.answer_words = array("I"), array("I")
        """Words of each question, and of each answer."""
        self.asked = bytearray()
        """A digest for each record, of its images and its first question."""
        self._answers, self._num_answers = bytearray(), array("I")
        for talk, numbers in zip(check.conversations, check.images.of_each(), strict=True):
            self._add(talk, [check.keys[number].tobytes() for number in numbers])

    def _add(self, talk: Conversation, keys: list[bytes]) -> None:
        self.num_with_image += bool(keys)
        self.sources.add(talk.source)
        questions, answers = (
            [message.text for message in talk.messages if message.role == role]
            for role in ("user", "assistant")
        )
        self.question_words.extend(len(text.split()) for text in questions)
        self.answer_words.extend(len(text.split()) for text in answers)
        first = next(message.text for message in talk.messages if message.role != "system")
        self.asked += _digest(b"%d " % len(keys) + b"".join(keys) + first.encode())
        self._num_answers.append(len(answers))
        for text in answers:
            self._answers += _digest(text.encode())

    @cached_property
    def _ranked(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first place of each different answer, and how often it comes; the most frequent first."""
        _, first, counts = np.unique(_digests(self._answers), return_index=True, return_counts=True)
        order = np.lexsort((first, -counts))
        return first[order], counts[order]

    @property
    def num_answers(self) -> int:
        """Different texts of answers."""
        return len(self._ranked[0])

    def most_common(self, most: int) -> list[tuple[str, int]]:
        """Return the most frequent answers, each with how often it comes."""
        ends = np.cumsum(np.array(self._num_answers, dtype=np.int64))
        found = []
        for place, count in zip(*(column[:most].tolist() for column in self._ranked), strict=True):
            talk = int(np.searchsorted(ends, place, side="right"))
            texts = [m.text for m in self._conversations[talk].messages if m.role == "assistant"]
            found.append((texts[place - int(ends[talk])], count))  # counted from the last one
        return found


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _digests(joined: bytearray) -> NDArray[np.void]:
    return np.frombuffer(joined, dtype=f"V{_DIGEST_BYTES}")


class _AllFindings(Findings):
    """All defects of a file, with the numbers of their records, and which records are good."""

    def __init__(self, reading: Reading, start: int, progress: Callable[[int], None]) -> None:
        super().__init__(reading)
        self.start, self.progress = start, progress
        self.found: list[tuple[int, Defect]] = []
        self.good = [np.zeros(0, dtype=np.int64)]

    @property
    def end(self) -> int:
        """The number after that of the last record."""
        return self.start + self.num_read

    def take(self, part: Part) -> Any:
        self.progress(part.num_read)
        return super().take(part)

    def keep(self, rows: NDArray[np.int64]) -> None:
        self.good.append(self.start + rows)

    def note(self, defect: Defect, row: int) -> None:
        self.found.append((self.start + row, defect))

    def check(self) -> None:
        if not self.num_read:
            super().check()


def check_files(
    data: DataConfig,
    *,
    decode: bool = True,
    progress: Callable[[int], None] = lambda n: None,
    image_progress: Callable[[int], None] = lambda n: None,
) -> FileCheck:
    """Read every record of some files, and decode every image once, by all cores.

    Args:
        decode: whether images are opened; without it a broken one is found when it is trained on.
        progress: takes how many more records were read.
        image_progress: takes how many more images were looked at.

    Raises:
        ConfigError, DataError: a file as a whole cannot be read.
    """
    sources, ends, files = [], [0], []
    found: list[_AllFindings] = []
    with _scratch() as scratch:
        for source, readings in open_readings(data):
            for reading in readings:
                found.append(_AllFindings(reading, found[-1].end if found else 0, progress))
                file = _convert(found[-1], data.reader, scratch / str(len(found)))
                files += [file] if len(file) else []  # mapped by this: it is removed in the end
            sources.append(source)
            ends.append(found[-1].end)
        conversations = StoredConversations(files)
        images, hashes = DistinctImages(conversations), ImageHashes(scratch / "images.sqlite")
        rows = np.concatenate([rows for one in found for rows in one.good])
        defects = [defect for one in found for defect in one.found]
        if decode:
            broken = _find_broken(images, hashes, image_progress)
            defects += [(int(rows[place]), defect) for place, defect in broken.items()]
            kept = np.setdiff1d(np.arange(len(rows)), list(broken))
            conversations, rows = conversations.select(kept), rows[kept]
            images = DistinctImages(conversations)
        keys = hashes.find(images).found if decode else _name_keys(images)
    return FileCheck(
        conversations=conversations,
        defects=[defect for _, defect in sorted(defects, key=lambda one: one[0])],
        ignored=sum((one.ignored for one in found), Counter()),
        mixture=mix(sources, np.diff(np.searchsorted(rows, ends)).tolist())[0],
        images=images,
        keys=keys,
    )


def _convert(found: _AllFindings, reader: str, place: Path) -> StoreFile:
    with naming_place(found.reading.path, place.parent):
        place.mkdir()
        write_store(place, found.reading, reader, found)
    return StoreFile(place, str(found.reading.path), found.reading.images)


def _find_broken(
    images: DistinctImages, hashes: ImageHashes, progress: Callable[[int], None]
) -> dict[int, Defect]:
    """Return the defect of each conversation that shows an image which cannot be decoded, by its place."""
    broken, talks = hashes.find_broken(images, progress), images.conversations
    return {
        place: Defect("broken_image", talks[place].place, str(broken[image]).rstrip("."))
        for place, image in (images.showing(broken) if broken else ())
    }


@contextmanager
def _scratch() -> Iterator[Path]:
    """Give a folder on a disk for converted records; what killed checks left beside it is removed first."""
    place: Path | None = None
    with suppress(OSError):  # such as a read-only home: then in the system's folder
        cache_folder().mkdir(parents=True, exist_ok=True)
        place = cache_folder() if os.access(cache_folder(), os.W_OK) else None
        for left in found_below(cache_folder(), f"{_PREFIX}*"):
            if time.time() - left.stat().st_mtime > _NEW_SECONDS:
                with suppress(OSError), FileLock(left / LOCK, timeout=0):  # whose process has ended
                    shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=_PREFIX, dir=place) as name, held(Path(name)):
        yield Path(name)


def _name_keys(images: DistinctImages) -> NDArray[np.uint8]:
    names = (str(images.ref(number)).encode() for number in range(len(images)))
    joined = b"".join(hashlib.sha256(name).digest() for name in names)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(images), -1)


def shared_images(one: FileCheck, other: FileCheck) -> list[tuple[str, str]]:
    """Return the places of records of two files that show the same image: (in the one, in the other)."""
    both, numbers = np.unique(np.concatenate([one.keys, other.keys]), axis=0, return_inverse=True)
    last = np.full(len(both), -1, dtype=np.int64)
    for place, shown in enumerate(other.images.of_each()):
        last[numbers[len(one.keys) :][shown]] = place
    found = (
        (place, there)
        for place, shown in enumerate(one.images.of_each())
        for there in (last[numbers[shown]].tolist() if shown else ())
        if there >= 0
    )
    return [(one.conversations[here].place, other.conversations[there].place) for here, there in found]


def describe_lengths(values: Sequence[int], unit: str) -> str:
    """Return the median and the extremes of some lengths in words."""
    if not values:
        return f"no {unit}"
    known = np.sort(np.array(values))
    share = known[int(0.95 * (len(known) - 1))]
    return f"median {np.median(known):,.0f} {unit}, 95% at most {share:,}, longest {known[-1]:,}"


def describe_answers(contents: Contents, most: int = 10) -> list[str]:
    """Return the most frequent answers with their shares, a line each."""
    total, ranked = len(contents.answer_words), contents.most_common(most)
    lines = [f"{count:>7,}  {count / total:>4.0%}  {_short(text)}" for text, count in ranked]
    if contents.num_answers > most:
        lines.append(f"and {contents.num_answers - most:,} other answers")
    return lines


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."


def write_page(check: FileCheck, path: Path, name: str, num_shown: int = 60) -> None:
    """Write one HTML page with all defects, the answers, and some records with their images."""
    step = max(1, -(-len(check.conversations) // num_shown))
    shown = [
        (c, [(message, [thumbnail_url(ref) for ref in message.images]) for message in c.messages])
        for c in check.conversations[::step]
    ]
    defects: dict[str, list[Defect]] = defaultdict(list)
    for defect in check.defects:
        defects[defect.name].append(defect)
    text = (
        page_environment(STYLES)
        .get_template("check.html")
        .render(
            name=name,
            mark=IMAGE_MARK,
            is_one_file=len(check.contents.sources) == 1,
            check=check,
            defects=defects,
            meanings=DEFECTS,
            repeated=check.find_repeated(),
            answers=check.contents.most_common(50),
            shown=shown,
        )
    )
    write_text(path, text)
