"""Check a record file before training: its contents and its defects.

Paper: none.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tinyllava.config import DataConfig
from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.defects import DEFECTS, Defect
from tinyllava.data.hashes import sha256_of_image
from tinyllava.data.images import open_image, thumbnail_url
from tinyllava.data.readers.form import IMAGE_MARK
from tinyllava.data.records import iter_conversations, open_readings
from tinyllava.data.sources import Share, mix
from tinyllava.errors import ImageError
from tinyllava.files import page_environment, write_text

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
    """The result of checking one or more record files."""

    conversations: list[Conversation] = field(default_factory=list)
    """The records without a defect."""
    defects: list[Defect] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    """Unused fields, with the number of records that have them."""
    hashes: dict[ImageRef, str] = field(default_factory=dict)
    """SHA-256 of each image that could be read."""
    mixture: list[Share] = field(default_factory=list)
    """What each file gives to a stage that is trained on these."""

    @property
    def num_records(self) -> int:
        """Records of the files, good or not."""
        return len(self.conversations) + len(self.defects)

    @property
    def answers(self) -> Counter[str]:
        """How often each text is the answer."""
        return Counter(m.text for c in self.conversations for m in c.messages if m.role == "assistant")

    def image_keys(self, conversation: Conversation) -> tuple[str, ...]:
        """Return the content of the images of a record."""
        return tuple(self.hashes.get(ref, str(ref)) for ref in conversation.images)

    def find_repeated(self) -> list[Repeated]:
        """Return the questions that come up again about the same images."""
        found: dict[tuple[object, ...], list[tuple[str, str]]] = defaultdict(list)
        for conversation in self.conversations:
            turns = [message for message in conversation.messages if message.role != "system"]
            key = (self.image_keys(conversation), turns[0].text)
            found[key].append((conversation.place, turns[1].text))
        return [
            Repeated(
                question=str(key[1]),
                places=tuple(place for place, _ in group),
                answers=tuple(answer for _, answer in group),
            )
            for key, group in found.items()
            if len(group) > 1
        ]


def check_files(
    data: DataConfig, *, decode: bool = True, progress: Callable[[int], None] = lambda n: None
) -> FileCheck:
    """Read every record of some files, and decode every image once.

    Args:
        decode: whether images are opened; without it a broken one is found when it is trained on.

    Raises:
        ConfigError, DataError: a file as a whole cannot be read.
    """
    check = FileCheck()
    sources, counts = [], []
    for source, readings in open_readings(data):
        before = len(check.conversations)
        for reading in readings:
            for found in iter_conversations(reading, data.reader):
                if isinstance(found, Conversation) and decode:
                    found = _decode(found, check.hashes)
                if isinstance(found, Conversation):
                    check.conversations.append(found)
                else:
                    check.defects.append(found)
                progress(1)
            check.ignored.update(reading.ignored)
        sources.append(source)
        counts.append(len(check.conversations) - before)
    check.mixture, _ = mix(sources, counts)
    return check


def _decode(conversation: Conversation, hashes: dict[ImageRef, str]) -> Conversation | Defect:
    for ref in conversation.images:
        if ref in hashes:
            continue
        try:
            open_image(ref)
            hashes[ref] = sha256_of_image(ref)
        except ImageError as error:
            return Defect("broken_image", conversation.place, str(error).rstrip("."))
    return conversation


def shared_images(one: FileCheck, other: FileCheck) -> list[tuple[str, str]]:
    """Return the places of records of two files that show the same image: (in the one, in the other)."""
    there = {key: c.place for c in other.conversations for key in other.image_keys(c)}
    return [(c.place, there[key]) for c in one.conversations for key in one.image_keys(c) if key in there]


def describe_lengths(values: Iterable[int], unit: str) -> str:
    """Return the median and the extremes of some lengths in words."""
    known = sorted(values)
    if not known:
        return f"no {unit}"
    share = known[int(0.95 * (len(known) - 1))]
    return f"median {median(known):,.0f} {unit}, 95% at most {share:,}, longest {known[-1]:,}"


def describe_answers(answers: Mapping[str, int], most: int = 10) -> list[str]:
    """Return the most frequent answers with their shares, a line each."""
    total = sum(answers.values())
    ranked: Sequence[tuple[str, int]] = Counter(answers).most_common(most)
    lines = [f"{count:>7,}  {count / total:>4.0%}  {_short(text)}" for text, count in ranked]
    if len(answers) > most:
        lines.append(f"and {len(answers) - most:,} other answers")
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
            is_one_file=len({c.source for c in check.conversations}) == 1,
            check=check,
            defects=defects,
            meanings=DEFECTS,
            repeated=check.find_repeated(),
            answers=check.answers.most_common(50),
            shown=shown,
        )
    )
    write_text(path, text)
