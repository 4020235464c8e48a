"""``tinyllava runs``: list and filter the runs of a folder, or compare two of them."""

from pathlib import Path

from tinyllava.cli.parser import CommandParser

_HELP = """
List the runs of a folder with parts, seed, stages, final losses and scores.

  tinyllava runs                        list the runs in runs/
  tinyllava runs FOLDER --where connector=mlp --where seed=1 --where 'pope>80'
  tinyllava runs --diff runs/A runs/B   compare settings, versions, scores
"""


def main(arguments: list[str]) -> int:
    """Print the table, or the differences of two runs."""
    parser = CommandParser("runs", _HELP)
    parser.add_argument("folder", nargs="?", default="runs", help="parent folder of the runs (default: runs)")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="filter by setting, part (a folder name works), score or final loss: PATH=VALUE with * and ? "
        "as wildcards, or PATH with <, >, <=, >= or != (repeatable)",
    )
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="two run folders to compare")
    known = parser.parse_args(arguments)

    from tinyllava.cli.show import format_table
    from tinyllava.studies.runs import diff_runs, filter_runs, find_runs, run_rows

    if known.diff:
        first, second = (find_runs(Path(folder))[0] for folder in known.diff)
        rows = diff_runs(first, second)
        print(format_table(rows) if len(rows) > 1 else "no difference")
        return 0
    print(format_table(run_rows(filter_runs(find_runs(Path(known.folder)), known.where))))
    return 0
