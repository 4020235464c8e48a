"""``tinyllava data``: what a benchmark or a mixture needs on disk, and what of it is there."""

from pathlib import Path

from tinyllava.cli.parser import CommandParser
from tinyllava.errors import look_up

_HELP = """
Say what is present, what is missing, where each file comes from, its size and
its licence.

  tinyllava data benchmarks            the benchmarks by name
  tinyllava data benchmarks pope DIR   what POPE needs, and what of it is in DIR
  tinyllava data mixtures              the mixtures of Table 2 by name
  tinyllava data mixtures all DIR      what they need that is not below DIR
"""


def main(arguments: list[str]) -> int:
    """List files; the exit status is 1 if one that is needed is missing or doubtful."""
    parser = CommandParser("data", _HELP)
    parser.add_argument("kind", metavar="KIND", help="benchmarks, or mixtures")
    parser.add_argument("name", nargs="?", default="", help="names with commas between, or all")
    parser.add_argument(
        "folder",
        nargs="?",
        default=".",
        help="the benchmark's folder (of several: the one above), or the root of the mixtures (default: .)",
    )
    known = parser.parse_args(arguments)
    check = look_up(
        {"benchmarks": _check_benchmarks, "mixtures": _check_mixtures}, known.kind, "kind of data"
    )
    return check(known.name, Path(known.folder))


def _check_mixtures(names: str, folder: Path) -> int:
    from tinyllava.data.mixtures import MIXTURES, missing_files

    if not names:
        for mixture in MIXTURES.values():
            print(f"{mixture.name:20} {mixture.stage}: {mixture.num_samples:,} records")
        return 0
    is_complete = True
    for name in MIXTURES if names == "all" else names.split(","):
        mixture = look_up(MIXTURES, name, "mixture")
        print(
            f"{name} ({mixture.num_samples:,} records, {mixture.size_bytes / 1e9:.2f} GB; {mixture.licence})"
        )
        missing = missing_files(mixture, folder)
        for path, what in missing:
            print(f"  missing  {path}: {what}")
        if not missing:
            print(f"  all there below {folder}")
        is_complete &= not missing
    return 0 if is_complete else 1


def _check_benchmarks(names: str, folder: Path) -> int:
    from tinyllava.evaluation.benchmarks import BENCHMARKS
    from tinyllava.evaluation.checkpoint import find_benchmarks
    from tinyllava.evaluation.files import check_files

    if not names:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:20} {benchmark.title}, {benchmark.split}: {benchmark.num_questions:,} questions")
        return 0
    is_complete = True
    benchmarks = find_benchmarks(names)
    for name, benchmark in benchmarks.items():
        print(f"{name} ({benchmark.title}, {benchmark.split}; {benchmark.num_questions:,} questions)")
        for status in check_files(folder / name if len(benchmarks) > 1 else folder, benchmark.files):
            print(f"  {status}")
            is_complete &= status.is_present or status.needed.is_optional
        for note in benchmark.notes:
            print(f"  note: {note}")
    return 0 if is_complete else 1
