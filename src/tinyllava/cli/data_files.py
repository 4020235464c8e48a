"""``tinyllava data check|convert|split``: check your own data, convert it, or hold out records."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllava.cli.parser import CommandParser, add_data_options, own_data
from tinyllava.errors import ConfigError
from tinyllava.files import check_page

if TYPE_CHECKING:
    from tinyllava.data.checking import FileCheck
    from tinyllava.model import TinyLlavaProcessor

_CHECK = """
Read every record of a file or folder and decode every image. Prints counts,
all defects with their places, lengths, the most frequent answers and repeated
questions. The exit status is 1 if there is a defect that --skip does not name.

  tinyllava data check my.csv
  tinyllava data check my.json --language-model TinyLlama --page check.html
  tinyllava data check train.json --against test.json
"""
_CONVERT = """
Write a file of any form as LLaVA's JSON or JSON lines, or as Parquet with the
bytes of its images. Unused fields are dropped, and their names printed.

  tinyllava data convert my.csv my.json
  tinyllava data convert my.json my.jsonl --form messages
  tinyllava data convert FOLDER photos.parquet
"""
_SPLIT = """
Hold records out for a test, by their images: no image is on both sides. The
choice depends only on the contents, so it is the same on every machine. Writes
FILE-train.json and FILE-held-out.json in LLaVA's form next to the file. Files
of an earlier split are replaced only with --overwrite.

  tinyllava data split my.csv --held-out 10%
"""
_SHOWN = 20
"""Places of each defect in the terminal; the page has all."""


def check(arguments: list[str]) -> int:
    """Print the contents and the defects of a file."""
    parser = CommandParser("data check", _CHECK)
    parser.add_argument("file", nargs="+", help="record file, or folder of images")
    add_data_options(parser)
    parser.add_argument(
        "--against", default="", help="another file; list records that show one of its images"
    )
    parser.add_argument("--no-images", action="store_true", help="do not decode images, which takes longest")
    parser.add_argument("--page", default="", help="HTML file to write, with images and all defects")
    parser.add_argument("--model", default="", help="checkpoint whose tokens are counted")
    parser.add_argument("--language-model", default="", help="language model whose tokens are counted")
    parser.add_argument("--template", default="", help="template name, such as caption")
    known = parser.parse_args(arguments)
    if known.model and known.language_model:
        parser.error("give one of --model CHECKPOINT and --language-model NAME")
    if known.page:
        check_page(Path(known.page))

    found = _read(known, *known.file)
    counts = f"{_records(found.num_records)}, {len(found.conversations):,} without a defect"
    print(f"{', '.join(known.file)}: {counts}")
    if len(found.mixture) > 1 or not all(share.source.is_whole for share in found.mixture):
        print("\n".join(f"  {share}" for share in found.mixture))
    if found.conversations:
        _print_contents(found)
    if known.model or known.language_model:
        _print_tokens(found, known)
    is_good = _print_defects(found, known.skip)
    if known.against:
        _print_shared(found, _read(known, known.against), known.against)
    if known.page:
        from tinyllava.data.checking import write_page

        write_page(found, Path(known.page), Path(known.file[0]).name)
        print(f"page: {known.page}")
    return 0 if is_good else 1


def _read(known: argparse.Namespace, *files: str) -> "FileCheck":
    from rich.progress import TextColumn

    from tinyllava.data.bars import Bars
    from tinyllava.data.checking import check_files

    with Bars(TextColumn("{task.description}: {task.completed:,.0f}"), transient=True) as bar:
        records, images = (bar.add_task(what, total=None) for what in ("reading records", "decoding images"))
        return check_files(
            own_data(known, *files, skip=tuple(known.skip)),
            decode=not getattr(known, "no_images", False),
            progress=lambda n: bar.advance(records, n),
            image_progress=lambda n: bar.advance(images, n),
        )


def _print_contents(found: "FileCheck") -> None:
    from tinyllava.data.checking import describe_answers, describe_lengths

    talks, contents = len(found.conversations), found.contents
    counts = f"{_records(contents.num_with_image)} with an image, {talks - contents.num_with_image:,} of text"
    print(f"  images     {found.num_images:,} different; {counts} only")
    words = contents.question_words
    print(f"  questions  {len(words):,}; {describe_lengths(words, 'words')}")
    words = contents.answer_words
    print(f"  answers    {contents.num_answers:,} different; {describe_lengths(words, 'words')}")
    for line in describe_answers(contents):
        print(f"    {line}")
    repeated = found.find_repeated()
    if repeated:
        differing = sum(len(set(one.answers)) > 1 for one in repeated)
        print(
            f"  repeated questions about the same image: {len(repeated):,} "
            f"({differing:,} answered differently)"
        )
        for one in repeated[:3]:
            print(f"    {' | '.join(one.places)}")
    if found.ignored:
        print(f"  unused fields: {_counted(found.ignored)}")


def _print_defects(found: "FileCheck", skip: Sequence[str]) -> bool:
    """Print all defects; return whether each is skipped by its name."""
    from tinyllava.data.defects import DEFECTS, count_by_name

    for name, count in count_by_name(found.defects).items():
        print(f"{name}: {count:,} ({DEFECTS[name]})")
        places = [f"  {defect.where}: {defect.detail}" for defect in found.defects if defect.name == name]
        print("\n".join(places[:_SHOWN]))
        if count > _SHOWN:
            print(f"  and {count - _SHOWN:,} more; --page FILE.html lists all")
    skipped = [defect for defect in found.defects if defect.name in skip]
    if skipped:
        _print_left_out(count_by_name(skipped), {})
    if len(skipped) == len(found.defects):
        return True
    skips = " ".join(f"--skip {name}" for name in count_by_name(found.defects))
    print(f"Fix these records, or train with {skips}.")
    return False


def _print_tokens(found: "FileCheck", known: argparse.Namespace) -> None:
    from tinyllava.cli.record import load_processor, print_record
    from tinyllava.config import Stage
    from tinyllava.data.checking import describe_lengths
    from tinyllava.parts.templates import read_template

    known.image_tokens = 0
    processor: TinyLlavaProcessor = load_processor(known)
    template = read_template(known.template) if known.template else None
    lengths = [len(processor.encode(talk, template=template).input_ids) for talk in found.conversations]
    limit = Stage.max_length_tokens
    num_long = sum(length > limit for length in lengths)
    print(f"  tokens     {describe_lengths(lengths, 'tokens')}; {num_long:,} records above {limit:,}")
    for talk in found.conversations[:3]:
        print_record(talk, processor, template)


def _print_shared(found: "FileCheck", other: "FileCheck", name: str) -> None:
    from tinyllava.data.checking import shared_images

    shared = shared_images(found, other)
    print(f"records that show an image of {name}: {len({here for here, _ in shared}):,}")
    for here, there in shared[:_SHOWN]:
        print(f"  {here} | {there}")


def convert(arguments: list[str]) -> int:
    """Write records in another form."""
    parser = CommandParser("data convert", _CONVERT)
    parser.add_argument("file", help="record file, or folder of images")
    parser.add_argument("output", help="file to write: .json, .jsonl or .parquet")
    parser.add_argument("--form", default="", help="llava or messages (default: llava; .parquet: messages)")
    _add_overwrite(parser)
    add_data_options(parser)
    known = parser.parse_args(arguments)

    from tinyllava.data.records import read_configured
    from tinyllava.data.sources import parse_source
    from tinyllava.data.writing import check_free, write_records

    name = parse_source(known.file).name
    source = Path(name)
    if Path(known.output).exists() and source.exists() and Path(known.output).samefile(source):
        raise ConfigError(f"{known.output}: is the file that is read. Choose another name.")
    check_free(Path(known.output), overwrite=known.overwrite)
    records = read_configured(own_data(known, known.file, skip=tuple(known.skip)))
    write_records(
        records.conversations,
        Path(known.output),
        known.form,
        _evaluation_fields(known),
        overwrite=known.overwrite,
    )
    print(f"{known.output}: {_records(len(records.conversations))}")
    _write_licence(name, Path(known.output).parent)
    _print_left_out(records.skipped, records.ignored)
    return 0


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist already")


def _evaluation_fields(known: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    from tinyllava.data.mixtures import resolve
    from tinyllava.data.records import evaluation_fields

    [(_, places)] = resolve(own_data(known, known.file))
    return {
        at: fields
        for path, folder in places
        for at, fields in evaluation_fields(path, folder, known.reader).items()
    }


def _write_licence(name: str, folder: Path) -> None:
    """Write the licence of a data set of the Hub next to the records made from it."""
    from tinyllava.data.mixtures import LICENCES, hub_licence, read_licences
    from tinyllava.data.readers.hub import is_hub_name
    from tinyllava.files import write_json

    if is_hub_name(name) and (licence := hub_licence(name)):
        write_json(folder / LICENCES, read_licences(folder) | licence)
        print(f"{folder / LICENCES}: {', '.join(licence.values())}")


def _print_left_out(skipped: Mapping[str, int], ignored: Mapping[str, int]) -> None:
    if skipped:
        print(f"skipped: {_counted(skipped)}")
    if ignored:
        print(f"unused fields dropped: {_counted(ignored)}")


def _records(count: int) -> str:
    return f"{count:,} record{'s' * (count != 1)}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())


def split(arguments: list[str]) -> int:
    """Write the records of a file as two files."""
    parser = CommandParser("data split", _SPLIT)
    parser.add_argument("file", help="record file, or folder of images")
    parser.add_argument("--held-out", default="10%", help="share of the records (default: 10%%)")
    _add_overwrite(parser)
    add_data_options(parser)
    known = parser.parse_args(arguments)
    share = _share(known.held_out)

    from tinyllava.data.hashes import sha256_of_image
    from tinyllava.data.held_out import hold_out
    from tinyllava.data.readers.hub import PREFIX, is_hub_name
    from tinyllava.data.records import read_configured
    from tinyllava.data.sources import parse_source
    from tinyllava.data.writing import check_free, write_records

    name = parse_source(known.file).name
    source = Path(re.sub(r"[:@/]+", "-", name.removeprefix(PREFIX)) if is_hub_name(name) else name)
    paths = [source.with_name(f"{source.stem}-{side}.json") for side in ("train", "held-out")]
    for path in paths:
        check_free(path, overwrite=known.overwrite)
    records = read_configured(own_data(known, known.file, skip=tuple(known.skip)))
    talks = records.conversations
    hashes = {ref: sha256_of_image(ref) for ref in dict.fromkeys(r for talk in talks for r in talk.images)}
    held_out = set(hold_out(talks, hashes, share))
    fields = _evaluation_fields(known)
    sides = [[talk for at, talk in enumerate(talks) if (at in held_out) == side] for side in (False, True)]
    for path, side in zip(paths, sides, strict=True):
        check_free(path, side, overwrite=known.overwrite)  # both, before one is written
    for path, side in zip(paths, sides, strict=True):
        write_records(side, path, fields=fields, overwrite=known.overwrite)
        print(f"{path}: {_records(len(side))}")
    _write_licence(name, source.parent)
    _print_left_out(records.skipped, records.ignored)
    return 0


def _share(text: str) -> float:
    """Return a share that is written as 10% or 0.1.

    Raises:
        ConfigError: it is none, or not between 0 and 1.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0
    if not 0 < share < 1:
        raise ConfigError(f"--held-out {text}: give a share between 0 and 1, such as 10%.")
    return share


COMMANDS: dict[str, Callable[[list[str]], int]] = {"check": check, "convert": convert, "split": split}
