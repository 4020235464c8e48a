"""``tinyllava compare A B``: compare two evaluations question by question."""

from pathlib import Path

from tinyllava.cli.parser import CommandParser, add_data_options, reading_settings
from tinyllava.files import check_page, found_below

_HELP = """
Compare two evaluations of the same questions. Prints the difference of each
headline number with its 95% interval (paired bootstrap over images) and
McNemar's test, and writes a page with the questions that flipped.

  tinyllava compare evaluations/mine evaluations/other --data /data/bench
  tinyllava compare evaluations/before evaluations/after --data my_test.json
  tinyllava compare evaluations/mine/pope evaluations/mine/pope-blind
"""


def main(arguments: list[str]) -> int:
    """Compare; print one line for each benchmark and the page's path as the last line."""
    parser = CommandParser("compare", _HELP)
    parser.add_argument("a", type=_find, help="folder of an evaluation, or of one benchmark in it")
    parser.add_argument("b", type=_find, help="the same folder of the other model")
    parser.add_argument(
        "--data",
        default="",
        help="folder of the benchmarks, or file of own questions: shows images and right answers",
    )
    add_data_options(parser)
    parser.add_argument("--output", default="flips.html", help="page to write")
    parser.add_argument("--limit", type=int, default=200, help="flipped questions to show per benchmark")
    known = parser.parse_args(arguments)
    output = Path(known.output)
    check_page(output)

    from tinyllava.evaluation.checkpoint import find_questions, is_own
    from tinyllava.evaluation.compare import compare
    from tinyllava.studies.report.flips import write_flips

    comparisons = compare(known.a, known.b)
    for comparison in comparisons:
        print(comparison)
    if known.a.is_dir():
        compared = {comparison.benchmark for comparison in comparisons}
        names = sorted(path.parent.name for path in found_below(known.a, "*/predictions.jsonl"))
        left_out = [name for name in names if name.removesuffix("-blind") not in compared]
        if left_out:
            print(f"skipped, because B has no answers or a score is missing: {', '.join(left_out)}")
    questions = {}
    if known.data:
        listed = ",".join(comparison.benchmark for comparison in comparisons)
        listed = "all" if is_own(Path(known.data), "all", known.reader) else listed
        benchmarks, folders = find_questions(known.data, listed, **reading_settings(known))
        questions = {name: benchmark.load(folders[name]) for name, benchmark in benchmarks.items()}
    write_flips(comparisons, output, a=str(known.a), b=str(known.b), questions=questions, limit=known.limit)
    print(output)
    return 0


def _find(path: str) -> Path:
    """Return the predictions of a benchmark's folder; other paths as they are."""
    inside = Path(path) / "predictions.jsonl"
    return inside if inside.is_file() else Path(path)
