"""``tinyllava reproduce``: run and draw the figures and tables of the paper, or a grid of your own."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.cli.parser import CommandParser
from tinyllava.errors import ConfigError
from tinyllava.planning.launch import choose_processes

if TYPE_CHECKING:
    from tinyllava.studies.execute import Launcher
    from tinyllava.studies.reproduce import GridPlan

_HELP = """
Reproduce a figure or table of the paper: run the missing stages and
evaluations, reuse the finished ones, and write a report.

  tinyllava reproduce figure-4 --plan      needs, progress and estimated time
  tinyllava reproduce figure-4 --data /data --benchmarks /data/benchmarks
  tinyllava reproduce figure-7 --only '*TL*' --data /data --benchmarks DIR \\
      --scale 0.02 --limit 200
  tinyllava reproduce table-a1 --data /data --benchmarks DIR --jobs slurm \\
      --gpus 8 --job slurm_partition=gpu --job gpus_per_node=8
  tinyllava reproduce my_grid.py           a grid of your own
  tinyllava reproduce starter              four ablations on two CPU cores

Names: figure-1, figure-4 to figure-9, table-1, table-2, table-3, table-A1 (or
A1), starter. Cells share stages and evaluations, which run once and stay in
--runs, also for other grids. Run the same command again to resume, retry
failures and redraw the report.
"""


def main(arguments: list[str]) -> int:
    """Run a grid; the last line printed is the path of the report. The status is 1 if a cell was not run."""
    known = _parse(arguments)
    from tinyllava.studies.paper import LISTINGS, spell_name

    if spell_name(known.name) in LISTINGS:
        from tinyllava.cli.show import format_table

        print(format_table(LISTINGS[spell_name(known.name)]()))
        return 0

    from tinyllava.studies.needs import summarise
    from tinyllava.studies.reproduce import Choices, plan_grid

    choices = Choices(
        data=known.data,
        benchmarks=known.benchmarks,
        runs=Path(known.runs),
        only=known.only,
        seeds=_seeds(known.seeds),
        limit=known.limit,
        scale=known.scale,
        parts=_pairs(known.part, "--part"),
        judge={"url": known.judge_url, "model": known.judge_model, "key": known.judge_key},
    )
    num_gpus = known.gpus if known.plan or known.gpu else 0
    plan = plan_grid(known.name, choices, gpu=known.gpu, num_gpus=num_gpus, will_run=not known.plan)
    if known.plan:
        _print_plan(plan)
    print("\n".join(summarise(plan.needs, plan.graph)))
    if plan.downloads:
        print(f"Missing {plan.downloads} are downloaded first (time not included).")
    return 0 if known.plan else _run(plan, known)


def _print_plan(plan: "GridPlan") -> None:
    from tinyllava.cli.show import format_table
    from tinyllava.studies.needs import cell_rows, explain_costs, plan_rows

    print(f"{plan.grid.title}\n")
    print(format_table(plan_rows(plan.needs)))
    if any(need.seconds is not None for need in plan.needs):
        print(f"\n{format_table(cell_rows(plan.needs, plan.graph))}")
    print("\n".join(["", *explain_costs(plan.needs, plan.machine)]))


def _run(plan: "GridPlan", known: argparse.Namespace) -> int:
    from tinyllava.studies.live import LiveView
    from tinyllava.studies.reproduce import run_grid

    with LiveView(plan.graph, plan.needs, plan.grid.title) as view:
        done = run_grid(
            plan, output=known.output, launcher=_launcher(known), retry=known.retry, watch=view.update
        )
    for id_, state in done.failed.items():
        print(f"failed: {id_}: {state.error}\n  log: {plan.graph.nodes[id_].folder / 'log.txt'}")
    if done.incomplete:
        print(
            f"incomplete: {len(done.incomplete)} of {len(plan.graph.cells)} models need the files listed as "
            f"missing above ({', '.join(done.incomplete)})"
        )
    if done.unanswered:
        counts = [f"{cell}: {count:,} of {name}" for (cell, name), count in done.unanswered.items()]
        print(f"questions without an answer, counted as wrong: {'; '.join(counts)}")
    print(done.report)
    return int(not done.is_complete)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("reproduce", _HELP)
    add = parser.add_argument
    add("name", help="figure, table, starter, FILE.py or FILE.py:NAME")
    add("--plan", action="store_true", help="print the graph with its cost and missing files, and exit")
    add("--data", default="", help="folder of Table 2's mixtures")
    add("--benchmarks", default="", help="folder with one subfolder per benchmark")
    add("--runs", default="runs", help="parent folder of all runs (default: runs)")
    add("--output", default="", help="folder of the study and its report (default: studies/NAME)")
    add(
        "--only",
        action="append",
        default=[],
        help="run only these cells: id, subplot or label, with * (repeatable)",
    )
    add("--seeds", default="", help="seeds separated by commas (default: the grid's)")
    add("--limit", type=int, default=0, help="ask only the first questions of each benchmark")
    add("--scale", type=float, default=1.0, help="train on this share of the records of every source")
    add(
        "--part",
        action="append",
        default=[],
        metavar="NAME=OTHER",
        help="replace encoder or LLM NAME with OTHER (name or folder; repeatable)",
    )
    add("--retry", type=int, default=0, help="number of retries after a failure")
    add(
        "--jobs",
        choices=["slurm", "local"],
        help="submit jobs to Slurm, or run them as local processes (submitit)",
    )
    add("--job", action="append", default=[], metavar="KEY=VALUE", help="submitit parameter (repeatable)")
    add("--at-once", type=int, default=0, help="max number of concurrent jobs (default: slurm 100, local 1)")
    add("--judge-url", default="", help="endpoint of the judge for MM-Vet and LLaVA-W, up to /v1")
    add("--judge-model", default="", help="model name of the judge")
    add("--judge-key", default="OPENAI_API_KEY", help="environment variable with the API key")
    add("--gpu", default="", help="GPU type to estimate for (default: A100-80G)")
    add(
        "--gpus",
        type=int,
        default=0,
        help="GPUs for one stage or evaluation, one process each (default: all of this machine, 1 in a job; "
        "with --job nodes=N on each of N machines); "
        "with --plan, GPUs to estimate for (default: 8). Without --gpu and --gpus, times of finished "
        "nodes are used where available",
    )
    return parser.parse_args(arguments)


def _seeds(given: str) -> list[int]:
    try:
        return [int(seed) for seed in given.split(",")] if given else []
    except ValueError:
        raise ConfigError(f"--seeds {given}: give integers separated by commas, such as 1,2,3.") from None


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{option} {text}: give NAME=VALUE.")
        pairs[name] = value
    return pairs


def _launcher(known: argparse.Namespace) -> "Launcher":
    from tinyllava.studies.execute import InProcess, Jobs

    options = {
        key: int(value) if value.isdigit() else value for key, value in _pairs(known.job, "--job").items()
    }
    if known.jobs is None:
        if options:
            raise ConfigError("--job needs --jobs slurm or --jobs local; add one of them.")
        return InProcess(choose_processes(known.gpus))
    num_at_once = known.at_once or (100 if known.jobs == "slurm" else 1)
    return Jobs(known.jobs, num_at_once=num_at_once, num_devices=known.gpus or 1, options=options)
