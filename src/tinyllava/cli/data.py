"""``tinyllava data``: list the files that a benchmark or mixture needs; check and convert your own data."""

from pathlib import Path

from tinyllava.cli.parser import CommandParser
from tinyllava.errors import look_up

_HELP = """
Check, convert or split your own data, or list the files of a benchmark or
mixture: present or missing, source, size and licence.

  tinyllava data check FILE            counts, defects, answers, duplicates
  tinyllava data convert A B           write A as B (.json, .jsonl, .parquet)
  tinyllava data split FILE            hold records out, by their images
  tinyllava data benchmarks            list the benchmarks
  tinyllava data benchmarks pope DIR   check the files of POPE in DIR
  tinyllava data benchmarks my.py:MINE DIR   a benchmark of your own
  tinyllava data mixtures              list the mixtures of Table 2
  tinyllava data mixtures all DIR      list the files that are missing in DIR
"""


def main(arguments: list[str]) -> int:
    """List files; the exit status is 1 if one that is needed is missing or doubtful."""
    if arguments and arguments[0] in ("check", "convert", "split"):
        from tinyllava.cli import data_files

        return data_files.COMMANDS[arguments[0]](arguments[1:])
    parser = CommandParser("data", _HELP)
    parser.add_argument("kind", metavar="KIND", help="check, convert, split, benchmarks, or mixtures")
    parser.add_argument("name", nargs="?", default="", help="names separated by commas, or all")
    parser.add_argument(
        "folder",
        nargs="?",
        default=".",
        help="folder of the benchmark (for several: its parent), or root of the mixtures (default: .)",
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
            print(f"  all files present in {folder}")
        is_complete &= not missing
    return 0 if is_complete else 1


def _check_benchmarks(names: str, folder: Path) -> int:
    from tinyllava.evaluation.benchmarks import known_benchmarks
    from tinyllava.evaluation.checkpoint import find_benchmarks
    from tinyllava.evaluation.read import check_files

    if not names:
        for name, benchmark in known_benchmarks().items():
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
