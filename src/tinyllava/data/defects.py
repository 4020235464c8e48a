"""The defects that a record can have, by name, and the report of all defects of a file.

Paper: none. Nothing after the readers changes text, so a record is either read there or rejected with a
defect of this table.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tinyllava.errors import ConfigError, DataError

DEFECTS: dict[str, str] = {
    "malformed": "a record that is not an object, has no conversations, or has a value of a wrong type",
    "leading_answer": "a conversation that starts with an answer (a skip drops only that turn)",
    "roles": "turns that do not alternate between user and assistant",
    "unanswered": "a conversation that ends with a question",
    "empty_answer": "an answer without text",
    "empty_question": "a question without text and without an image",
    "image_count": "the numbers of <image> and images differ, or an answer contains <image>",
    "missing_image": "an image file that does not exist",
    "broken_image": "an image that cannot be decoded",
    "unsupported": "a video, audio, a tool call, or another input that these models do not take",
    "dialogue": "several questions in a stage whose template drops them (caption)",
    "text_only": "no image in a stage whose template drops the question (caption)",
    "untrained": "no answer adds to the loss: `loss`, `weight` or `train` of every answer is 0",
    "too_long": "more tokens than max_length_tokens, including image tokens",
    "duplicate_id": "two records of one file with the same id and the same image and turns",
}
"""Names of what may be skipped, and what each means."""

_SHOWN = 3
"""Places that an error lists of one defect; ``tinyllava data check`` lists all."""


class Defect(DataError):  # noqa: N818 (the word that users meet in skips and docs)
    """A defect of one record, by its name in ``DEFECTS``."""

    def __init__(self, name: str, where: str, detail: str) -> None:
        assert name in DEFECTS
        self.name, self.where, self.detail = name, where, detail
        self.path = ""
        """Of the image that is missing."""
        super().__init__(
            f"{where}: {detail} [{name}]. Fix the record, or skip such records with --skip {name}."
        )

    def __reduce__(self) -> tuple[type["Defect"], tuple[str, str, str], dict[str, str]]:
        """Let it be handed over by another process."""
        return Defect, (self.name, self.where, self.detail), {"path": self.path}


class Defects(DataError):  # noqa: N818 (as above)
    """All defects of a file: how many of each, and where the first ones are.

    Args:
        counts: how many there are of each name, where not all are among ``defects``.
    """

    def __init__(self, path: Path, defects: Sequence[Defect], counts: Counter[str] | None = None) -> None:
        self.path, self.defects = path, tuple(defects)
        self.counts = counts or count_by_name(defects)
        lines = [f"{path}: {self.counts.total():,} records have defects:"]
        for name, count in self.counts.items():
            of_name = [defect for defect in defects if defect.name == name]
            lines.append(f"  {name} ({DEFECTS[name]}): {count:,}")
            lines += [f"    {defect.where}: {defect.detail}" for defect in of_name[:_SHOWN]]
            lines += [f"    and {count - _SHOWN:,} more"] if count > _SHOWN else []
        skips = " ".join(f"--skip {name}" for name in self.counts)
        lines.append(
            f"`tinyllava data check {path}`, with the same options for reading, lists all. Fix the records, "
            f"or skip such records with {skips}."
        )
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type["Defects"], tuple[Path, tuple[Defect, ...], Counter[str]]]:
        """Let it be handed over by another process."""
        return Defects, (self.path, self.defects, self.counts)


def raise_defects(path: Path, defects: Sequence[Defect], counts: Counter[str] | None = None) -> None:
    """Raise the defect of a file, or the report of several, see ``Defects``. Does nothing without defects."""
    if len(defects) == 1:
        raise defects[0]
    if defects:
        raise Defects(path, defects, counts)


def count_by_name(defects: Sequence[Defect]) -> Counter[str]:
    """Return the number of defects of each name, in the order in which the names come up."""
    return Counter(defect.name for defect in defects)


def check_skip(skip: tuple[str, ...]) -> None:
    """Raise ConfigError for a name that is no defect."""
    for name in skip:
        if name not in DEFECTS:
            raise ConfigError(f"skip {name!r}: unknown; known: {', '.join(DEFECTS)}.")
