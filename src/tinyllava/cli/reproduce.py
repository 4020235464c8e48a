"""``tinyllava reproduce``: run and draw the figures and tables of the paper, or a grid of your own."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.cli.parser import CommandParser
from tinyllava.errors import ConfigError, DataError, require
from tinyllava.planning.launch import choose_processes

if TYPE_CHECKING:
    from tinyllava.studies.execute import Launcher
    from tinyllava.studies.graph import Graph, Places
    from tinyllava.studies.grid import Grid
    from tinyllava.studies.needs import Need

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
    from tinyllava.studies.paper import LISTINGS, STARTER, find_grid, spell_name

    known.name = spell_name(known.name)
    if known.name in LISTINGS:
        from tinyllava.cli.show import format_table

        print(format_table(LISTINGS[known.name]()))
        return 0

    if not known.plan:
        require("matplotlib", "report", "draws the report")
    grid = _adjusted(find_grid(known.name), known)
    if known.name == STARTER and not known.plan:
        from tinyllava.studies.starter import prepare_starter_grid

        prepare_starter_grid()
    places = _places(grid, known)
    grid = _scaled(grid, places, known)
    from tinyllava.studies.graph import expand

    return _plan_or_run(grid, expand(grid, places), known)


def _plan_or_run(grid: "Grid", graph: "Graph", known: argparse.Namespace) -> int:
    from tinyllava.cli.show import format_table
    from tinyllava.studies.costs import Machine
    from tinyllava.studies.grid import Costs
    from tinyllava.studies.needs import as_fetched, cell_rows, explain_costs, plan_graph, plan_rows, summarise

    default = Machine()
    machine = Machine(gpu=known.gpu or default.gpu, num_gpus=known.gpus or default.num_gpus)
    is_asked = bool(known.gpu or (known.plan and known.gpus))
    costs = Costs() if is_asked else grid.costs
    needs = plan_graph(graph, costs, machine=machine if is_asked else None)
    fetched_first = known.plan and grid.fetches and any(need.status == "missing" for need in needs)
    if fetched_first:
        needs = as_fetched(needs)
    if known.plan:
        print(f"{grid.title}\n")
        print(format_table(plan_rows(needs)))
        if any(need.seconds is not None for need in needs):
            print(f"\n{format_table(cell_rows(needs, graph))}")
        print("\n".join(["", *explain_costs(needs, machine)]))
    print("\n".join(summarise(needs, graph)))
    if fetched_first:
        print(f"Missing {grid.fetches} are downloaded first (time not included).")
    if known.plan:
        return 0
    if all(need.status == "missing" for need in needs):
        raise DataError("nothing can run: add the files listed as missing above, then run the command again.")
    return _run(grid, graph, needs, known)


def _run(grid: "Grid", graph: "Graph", needs: "list[Need]", known: argparse.Namespace) -> int:
    from tinyllava.studies.execute import execute
    from tinyllava.studies.live import LiveView

    output = Path(known.output or f"studies/{grid.name}")
    skip = frozenset(need.node.id for need in needs if need.status == "missing")
    with LiveView(graph, needs, grid.title) as view:
        states = execute(graph, _launcher(known), retry=known.retry, skip=skip, report=view.update)
    for id_, state in states.items():
        if state.status == "failed":
            print(f"failed: {id_}: {state.error}\n  log: {graph.nodes[id_].folder / 'log.txt'}")
    if lacking := [cell.id for cell in graph.cells if skip.intersection(cell.nodes)]:
        print(
            f"incomplete: {len(lacking)} of {len(graph.cells)} models need the files listed as missing above "
            f"({', '.join(lacking)})"
        )
    from tinyllava.files import held
    from tinyllava.studies.collect import write_study
    from tinyllava.studies.report.page import write_report

    with held(output, wait=True):
        study = write_study(grid, graph, output)
        unanswered = [
            f"{cell.id}: {result.num_missing:,} of {result.benchmark}"
            for cell in study.cells
            for result in cell.results
            if result.num_missing
        ]
        if unanswered:
            print(f"questions without an answer, counted as wrong: {'; '.join(unanswered)}")
        print(write_report(output))
    is_failed = any(state.status == "failed" for state in states.values())
    return int(bool(lacking or unanswered) or is_failed)


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
        help="GPUs for one stage or evaluation, one process each (default: all of this machine, 1 in a job); "
        "with --plan, GPUs to estimate for (default: 8). Without --gpu and --gpus, times of finished "
        "nodes are used where available",
    )
    return parser.parse_args(arguments)


def _adjusted(grid: "Grid", known: argparse.Namespace) -> "Grid":
    """Apply --only, --seeds, --limit and --part."""
    from tinyllava.studies.grid import exchange_parts, select_cells

    grid = select_cells(grid, known.only)
    if known.seeds:
        try:
            seeds = tuple(int(seed) for seed in known.seeds.split(","))
        except ValueError:
            raise ConfigError(
                f"--seeds {known.seeds}: give integers separated by commas, such as 1,2,3."
            ) from None
        grid = replace(grid, seeds=tuple(dict.fromkeys(seeds)))
    if known.limit:
        note = f"Only the first {known.limit:,} questions of each benchmark were asked."
        grid = replace(grid, limit=known.limit, notes=(*grid.notes, note))
    return exchange_parts(grid, _pairs(known.part, "--part"))


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{option} {text}: give NAME=VALUE.")
        pairs[name] = value
    return pairs


def _places(grid: "Grid", known: argparse.Namespace) -> "Places":
    from tinyllava.errors import look_up
    from tinyllava.evaluation.benchmarks import BENCHMARKS
    from tinyllava.evaluation.checkpoint import find_folders
    from tinyllava.studies.graph import Places
    from tinyllava.studies.paper import STARTER

    folders: dict[str, str] = {}
    if grid.name == STARTER:
        from tinyllava.starter.packages import cache_folder
        from tinyllava.studies.starter import CENTRE, records_folder

        folders = {name: str(records_folder(CENTRE["data"], cache_folder())) for name in grid.benchmarks}
    elif known.benchmarks:
        for name in grid.benchmarks:
            try:
                found = find_folders({name: look_up(BENCHMARKS, name, "benchmark")}, Path(known.benchmarks))
            except DataError:
                continue  # the plan lists it as missing
            folders[name] = str(found[name])
    judge = {"url": known.judge_url, "model": known.judge_model, "key": known.judge_key}
    if bool(known.judge_url) != bool(known.judge_model):
        raise ConfigError(
            "--judge-url and --judge-model go together: every result records the name of its judge."
        )
    return Places(
        runs=Path(known.runs),
        data_root=known.data,
        benchmarks=folders,
        judge=judge if known.judge_url else {},
    )


def _scaled(grid: "Grid", places: "Places", known: argparse.Namespace) -> "Grid":
    """Apply --scale; the plan lists record files that are missing."""
    from tinyllava.studies.scale import scale_grid, scale_run

    scaled = scale_grid(grid, known.scale)
    if scaled is grid:
        return grid
    cells = []
    for cell in scaled.cells:
        run = replace(cell.run, data_root=cell.run.data_root or places.data_root)
        cells.append(replace(cell, run=scale_run(run, known.scale, places.runs / ".records")))
    return replace(scaled, cells=tuple(cells))


def _launcher(known: argparse.Namespace) -> "Launcher":
    from tinyllava.studies.execute import InProcess
    from tinyllava.studies.jobs import Jobs

    options = {
        key: int(value) if value.isdigit() else value for key, value in _pairs(known.job, "--job").items()
    }
    if known.jobs is None:
        if options:
            raise ConfigError("--job needs --jobs slurm or --jobs local; add one of them.")
        return InProcess(choose_processes(known.gpus))
    num_at_once = known.at_once or (100 if known.jobs == "slurm" else 1)
    return Jobs(known.jobs, num_at_once=num_at_once, num_devices=known.gpus or 1, options=options)
