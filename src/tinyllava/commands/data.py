"""``tinyllava data``: what a benchmark or a mixture needs on disk, and what of it is there."""

import argparse
from pathlib import Path

_HELP = """
Say what is present, what is missing, where each file comes from, its size and its licence.

  tinyllava data benchmarks                    the benchmarks by name
  tinyllava data benchmarks pope DIR           what POPE needs, and what of it is in DIR
"""


def main(arguments: list[str]) -> int:
    """List files; the exit status is 1 if one that is needed is missing or doubtful."""
    parser = argparse.ArgumentParser(
        prog="tinyllava data", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["benchmarks"])
    parser.add_argument("name", nargs="?", default="", help="names with commas between, or all")
    parser.add_argument(
        "folder", nargs="?", default=".", help="the benchmark's folder (of several: the one above)"
    )
    known = parser.parse_args(arguments)
    return _check_benchmarks(known.name, Path(known.folder))


def _check_benchmarks(names: str, folder: Path) -> int:
    from tinyllava.commands.evaluate import find_benchmarks
    from tinyllava.evaluation.benchmarks import BENCHMARKS
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
