"""From record files to conversations: detect the form of each record, and report all defects at once.

Paper: section 4.1.2 (the four data sets of Table 2 are LLaVA's JSON; see ``tinyllava.data.readers``).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava.config import DataConfig
from tinyllava.conversation import Conversation
from tinyllava.data.defects import Defect, check_skip, raise_defects
from tinyllava.data.mixtures import resolve
from tinyllava.data.readers import columns as table
from tinyllava.data.readers import llava, messages
from tinyllava.data.readers.containers import is_table
from tinyllava.data.readers.containers import read_raw as read_container
from tinyllava.data.readers.folder import METADATA
from tinyllava.data.readers.form import EVALUATION_KEYS, ImageValue, Reading, Turn, make_conversation
from tinyllava.data.sources import Share, Source, mix
from tinyllava.errors import ConfigError, DataError
from tinyllava.parts.user_code import locate, run_value


@dataclass(frozen=True, kw_only=True)
class Records:
    """The conversations of one or more files, and the skipped defects by name."""

    conversations: Sequence[Conversation]
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of records left out (or, for leading_answer, turns dropped), by the name of the defect."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Fields that mean nothing here, with the number of records that have them."""
    mixture: Sequence[Share] = ()
    """What each file gives, where not every record is one sample."""


def read_records(
    path: Path,
    images: Path,
    skip: tuple[str, ...] = (),
    *,
    columns: Mapping[str, str] | None = None,
    reader: str = "",
    allow_urls: bool = False,
    keep_places: bool = False,
) -> Records:
    """Read a file of records of any known form.

    Args:
        path: a file or a folder of images; see ``tinyllava.data.readers``.
        images: folder that image paths start from.
        skip: names out of ``DEFECTS`` whose records are left out and counted.
        columns: of a table: ``image``, ``question`` or ``answer`` -> the name of that column.
        reader: ``FILE.py:NAME`` of a function of the user's, in place of the known forms.
        allow_urls: whether images at http(s) addresses are downloaded.
        keep_places: whether images stay where LLaVA's records have ``<image>``.

    Raises:
        ConfigError: an unknown name in ``skip``.
        DataError: the file is missing or cannot be read; ``Defect`` for one record with a defect that is not
            skipped, ``Defects`` for several.
    """
    check_skip(skip)
    reading = Reading(
        path=path,
        images=images,
        skip=skip,
        columns=columns or {},
        allow_urls=allow_urls,
        keep_places=keep_places,
    )
    defects: list[Defect] = []
    conversations = []
    for found in iter_conversations(reading, reader):
        if isinstance(found, Conversation):
            conversations.append(found)
        elif found.name in skip:
            reading.skipped[found.name] += 1
        else:
            defects.append(found)
    raise_defects(path, defects)
    skipped = dict(reading.skipped)
    if not conversations:
        raise DataError(f"{path}: no records left" + (f" after skips {skipped}." if skipped else "."))
    return Records(conversations=tuple(conversations), skipped=skipped, ignored=dict(reading.ignored))


def read_configured(data: DataConfig, data_root: str = "") -> Records:
    """Read all records of a stage; images are decoded if records with broken ones are to be skipped.

    Raises:
        ConfigError, DataError: see ``resolve`` and ``read_records``.
    """
    from tinyllava.data.store import find_good_images  # here: what only converts starts without pyarrow

    skipped: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    sources, counts = [], []
    found: list[Conversation] = []
    for source, readings in open_readings(data, data_root):
        before = len(found)
        for one in readings:
            part = read_records(
                one.path,
                one.images,
                one.skip,
                columns=one.columns,
                reader=data.reader,
                allow_urls=one.allow_urls,
                keep_places=one.keep_places,
            )
            skipped.update(part.skipped)
            ignored.update(part.ignored)
            found += part.conversations
        sources.append(source)
        counts.append(len(found) - before)
    shares, rows = mix(sources, counts)
    taken = found if rows is None else [found[row] for row in rows.tolist()]
    if "broken_image" in data.skip:
        good = find_good_images(taken).tolist()
        skipped.update({"broken_image": len(taken) - len(good)} if len(good) < len(taken) else {})
        taken = [taken[place] for place in good]
        if not taken:
            raise DataError(f"{', '.join(data.records)}: no records left after skips {dict(skipped)}.")
    return Records(
        conversations=tuple(taken),
        skipped=dict(skipped),
        ignored=dict(ignored),
        mixture=() if rows is None else shares,
    )


def open_readings(data: DataConfig, data_root: str = "") -> list[tuple[Source, list[Reading]]]:
    """Return how the files of each source of a stage are read.

    Raises:
        ConfigError, DataError: see ``resolve``; a skip or a column that cannot be.
    """
    check_skip(data.skip)
    columns = parse_columns(data.columns)
    return [
        (
            source,
            [
                Reading(
                    path=path,
                    images=images,
                    skip=data.skip,
                    columns=columns,
                    allow_urls=data.allow_urls,
                    keep_places=data.keep_image_places,
                )
                for path, images in places
            ],
        )
        for source, places in resolve(data, data_root)
    ]


def parse_columns(columns: tuple[str, ...]) -> dict[str, str]:
    """Return the columns of a table by kind.

    Raises:
        ConfigError: one is not KIND=NAME.
    """
    wrong = next((column for column in columns if "=" not in column), None)
    if wrong is not None:
        raise ConfigError(f"--column {wrong}: write KIND=NAME, such as question=Frage.")
    return {kind: name for kind, _, name in (column.partition("=") for column in columns)}


def iter_conversations(reading: Reading, reader: str = "") -> Iterator[Conversation | Defect]:
    """Yield the conversation or the defect of each record, in the order of the file.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    seen: set[int] = set()
    is_empty = True
    raws = read_raw(reading.path, reading.images, reader)
    for found, key in convert_each(raws, reading, fallback_form(reading, reader)):
        is_empty = False
        if key and isinstance(found, Conversation) and key in seen:
            yield duplicate(reading, found.at, found.id)
        else:
            seen.add(key)
            yield found
    if is_empty:
        raise DataError(f"{reading.path}: no records in it. Write the records again, or give another file.")


Form = Callable[[Any, str, Reading], Conversation]
"""What reads a record of one form."""


def convert_each(
    raws: Iterable[tuple[str, Any]], reading: Reading, fallback: Form
) -> Iterator[tuple[Conversation | Defect, int]]:
    """Yield the conversation or the defect of each record, and a key by which a repeated one is found.

    The key is 0 for defects, and for records without an id, which may be repeated.

    Args:
        fallback: see ``fallback_form``.
    """
    for at, raw in raws:
        try:
            one = _convert(raw, at, reading, fallback)
            yield one, hash((one.id, one.messages)) if one.id else 0
        except Defect as defect:
            yield defect, 0


def duplicate(reading: Reading, at: str, id_: str) -> Defect:
    """Return the defect of a record that is in its file already."""
    return Defect("duplicate_id", reading.place(at, {"id": id_}), f"the record {id_!r} is in the file twice")


def read_raw(path: Path, images: Path | None = None, reader: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place in the file, record as it is there).

    Raises:
        DataError: the file is missing or cannot be read.
    """
    if reader:
        return _read_by_user(path, images or path.parent, reader)
    if path.is_dir():
        path = next((path / name for name in METADATA if (path / name).is_file()), path)
    return read_container(path)


def evaluation_fields(path: Path, images: Path, reader: str = "") -> dict[tuple[str, str], dict[str, Any]]:
    """Return the fields of a file's records for ``tinyllava evaluate``, by file and place in it."""
    return {
        (str(path), at): {key: raw[key] for key in EVALUATION_KEYS if raw.get(key) not in (None, "")}
        for at, raw in read_raw(path, images, reader)
        if isinstance(raw, dict)
    }


def fallback_form(reading: Reading, reader: str = "") -> Form:
    """Return the form of a record that looks like none; a table is opened for it.

    Raises:
        DataError: a table without the columns that are needed, unless the user's own function reads it.
    """
    if reader or not is_table(reading.path):
        return llava.read_record
    _, first = next(read_container(reading.path), ("", {}))
    if first and _form_of(first, reading) is None:
        raise DataError(
            f"{reading.path}: no columns for question and answer among {', '.join(map(repr, first))}. Name "
            "them: --column question=NAME --column answer=NAME --column image=NAME. The first line must have "
            "the column names."
        )
    return table.read_record


def _form_of(raw: Any, reading: Reading) -> Form | None:
    if not isinstance(raw, dict):
        return None
    turns = raw.get("conversations", raw.get("conversation"))
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" not in turns[0]:
        return messages.read_record if {"role", "input"} & turns[0].keys() else llava.read_record
    if isinstance(turns, str) and '"role"' in turns:
        return messages.read_record
    if "conversations" in raw or "conversation" in raw:
        return llava.read_record
    if "messages" in raw or any(isinstance(raw.get(key), list) for key in ("texts", "prompt")):
        return messages.read_record
    return table.read_record if table.find_columns(raw, reading.columns) else None


def _convert(raw: Any, at: str, reading: Reading, fallback: Form) -> Conversation:
    if isinstance(raw, Conversation):  # of a user's reader: checked like any other
        turns = [Turn(m.role, [*map(ImageValue, m.images), m.text]) for m in raw.messages]
        return make_conversation({"id": raw.id}, turns, at, reading, listed=[])
    form = _form_of(raw, reading) or fallback
    return form(raw, at, reading)


def _read_by_user(path: Path, images: Path, reader: str) -> Iterator[tuple[str, Any]]:
    """Yield the results of a user's function for a file: records of a known form, or conversations.

    Raises:
        ConfigError: it is no function, or it fails; its file and line are named.
    """
    function = run_value(reader)
    if not callable(function):
        raise ConfigError(
            f"{reader}: expected a function (path, images) that returns records, found a "
            f"{type(function).__name__}."
        )
    try:
        yield from ((f"record {index}", raw) for index, raw in enumerate(function(path, images)))
    except (DataError, ConfigError):
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"{locate(error, reader.rpartition(':')[0])}: {type(error).__name__}: {error}"
        ) from error
