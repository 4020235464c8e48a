"""Reproduce a comparison, optionally on a share of its data: find what is missing, run it, report.

Paper: section 4. Table 2's mixtures contain images of several sources in known shares, and a smaller run
keeps these shares. ``tinyllava reproduce`` only parses and prints; all its work is here.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyllava.config import DataConfig, Run
from tinyllava.data.mixtures import resolve
from tinyllava.data.records import read_raw
from tinyllava.errors import ConfigError, DataError, require
from tinyllava.evaluation.benchmarks import find_benchmark
from tinyllava.evaluation.checkpoint import find_folders
from tinyllava.files import held, sha256_of, write_text
from tinyllava.planning.launch import choose_processes
from tinyllava.studies.collect import write_study
from tinyllava.studies.execute import InProcess, Launcher, States, execute
from tinyllava.studies.graph import Graph, Places, expand
from tinyllava.studies.grid import Costs, Grid, exchange_parts, select_cells
from tinyllava.studies.needs import Machine, Need, as_fetched, plan_graph
from tinyllava.studies.paper import STARTER, find_grid, spell_name
from tinyllava.studies.study import Study
from tinyllava.studies.work import State


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The cells of a grid to run, their data, and the folders for the work."""

    data: str = ""
    """Folder of Table 2's mixtures."""
    benchmarks: str = ""
    """Folder with one subfolder per benchmark."""
    runs: Path = Path("runs")
    """Parent folder of all runs; finished stages and evaluations in it are reused."""
    only: Sequence[str] = ()
    """Cells to run, by id, subplot or label, with ``*``; empty for all."""
    seeds: Sequence[int] = ()
    """Seeds to use instead of the grid's."""
    limit: int = 0
    """Ask only the first questions of each benchmark; 0 for all."""
    scale: float = 1.0
    """Share of the records of every source to train on."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Replacements: encoder or language model of the grid -> name or folder to use instead."""
    judge: Mapping[str, str] = field(default_factory=dict)
    """``url``, ``model`` and ``key`` (an environment variable) of the judge of MM-Vet and LLaVA-W."""

    def __post_init__(self) -> None:
        if bool(self.judge.get("url")) != bool(self.judge.get("model")):
            raise ConfigError(
                "--judge-url and --judge-model go together: every result records the name of its judge."
            )


@dataclass(frozen=True, kw_only=True)
class GridPlan:
    """A grid with its work: finished nodes, and the needs and costs of the others."""

    grid: Grid
    graph: Graph
    needs: Sequence[Need]
    machine: Machine
    """The GPUs that estimates are for."""
    downloads: str = ""
    """What is missing here and is downloaded first when the grid runs; empty for nothing."""


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """A study, its report, and what is missing in them."""

    study: Study
    report: Path
    failed: Mapping[str, State]
    """Failed nodes by id. The state has the error, and ``log.txt`` in the node's folder has the log."""
    incomplete: tuple[str, ...]
    """Models that could not run because files are missing."""
    unanswered: Mapping[tuple[str, str], int]
    """(Model, benchmark) -> number of questions without an answer, which count as wrong."""

    @property
    def is_complete(self) -> bool:
        """Whether every model has run and has answered every question."""
        return not (self.failed or self.incomplete or self.unanswered)


def plan_grid(
    grid: str | Grid, choices: Choices, *, gpu: str = "", num_gpus: int = 0, will_run: bool = False
) -> GridPlan:
    """Return the open needs and costs of a grid, without training anything.

    Args:
        grid: figure, table, ``starter``, ``FILE.py``, ``FILE.py:NAME``, or a grid.
        choices: what of it is run.
        gpu: GPU type to estimate for.
        num_gpus: GPUs to estimate for; with neither, times of finished nodes are used where available.
        will_run: whether it is run next: the starter's records are then written, and reports can be drawn.

    Raises:
        UnknownNameError: no such grid, cell, part, GPU or benchmark.
        ConfigError: a value is not allowed.
        DataError: a record file to be scaled is missing or damaged.
    """
    if will_run:
        require("matplotlib", "report", "draws the report")
    found = _chosen(find_grid(spell_name(grid)) if isinstance(grid, str) else grid, choices)
    if found.name == STARTER and will_run:
        from tinyllava.studies.starter import prepare_starter_grid

        prepare_starter_grid(found)
    places = Places(
        runs=choices.runs,
        data_root=choices.data,
        benchmarks=_find_folders(found, choices.benchmarks),
        judge=choices.judge if choices.judge.get("url") else {},
    )
    found = _scaled(found, places, choices.scale)
    graph = expand(found, places)
    default, is_asked = Machine(), bool(gpu or num_gpus)
    machine = Machine(gpu=gpu or default.gpu, num_gpus=num_gpus or default.num_gpus)
    needs = plan_graph(graph, Costs() if is_asked else found.costs, machine=machine if is_asked else None)
    downloads = found.fetches if any(need.status == "missing" for need in needs) and not will_run else ""
    return GridPlan(
        grid=found,
        graph=graph,
        needs=as_fetched(needs) if downloads else needs,
        machine=machine,
        downloads=downloads,
    )


def _chosen(grid: Grid, choices: Choices) -> Grid:
    """Return the chosen cells of a grid, with the chosen seeds, questions and parts."""
    grid = select_cells(grid, choices.only)
    if choices.seeds:
        grid = replace(grid, seeds=tuple(dict.fromkeys(choices.seeds)))
    if choices.limit:
        note = f"Only the first {choices.limit:,} questions of each benchmark were asked."
        grid = replace(grid, limit=choices.limit, notes=(*grid.notes, note))
    return exchange_parts(grid, choices.parts)


def run_grid(
    plan: GridPlan,
    *,
    output: str | Path = "",
    launcher: Launcher | None = None,
    retry: int = 0,
    watch: Callable[[States], None] = lambda states: None,
) -> Reproduced:
    """Run the missing nodes of a planned grid, collect its study and draw the report.

    Args:
        plan: of ``plan_grid`` with ``will_run``.
        output: folder of the study and its report (default: ``studies/NAME``).
        launcher: what starts the nodes: processes on this machine by default, or ``studies.execute.Jobs``.
        retry: number of retries after a failure.
        watch: called with the state of every node whenever one may have changed.

    Raises:
        DataError: nothing can run, because files are missing.
    """
    if all(need.status == "missing" for need in plan.needs):
        first, *others = dict.fromkeys(line for need in plan.needs for line in need.missing)
        more = f" (and {len(others)} more)" if others else ""
        raise DataError(f"nothing can run: missing {first}{more}. Add the missing files, then run it again.")
    graph, folder = plan.graph, Path(output or f"studies/{plan.grid.name}")
    skip = frozenset(need.node.id for need in plan.needs if need.status == "missing")
    launcher = launcher or InProcess(choose_processes(0))
    states = execute(graph, launcher, retry=retry, skip=skip, report=watch)
    from tinyllava.studies.report.page import write_report

    with held(folder, wait=True):
        study = write_study(plan.grid, graph, folder)
        report = write_report(folder)
    return Reproduced(
        study=study,
        report=report,
        failed={id_: state for id_, state in states.items() if state.status == "failed"},
        incomplete=tuple(cell.id for cell in graph.cells if skip.intersection(cell.nodes)),
        unanswered={
            (cell.id, result.benchmark): result.num_missing
            for cell in study.cells
            for result in cell.results
            if result.num_missing
        },
    )


def reproduce(
    grid: str | Grid,
    *,
    data: str = "",
    benchmarks: str | Path = "",
    runs: str | Path = "runs",
    output: str | Path = "",
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    limit: int = 0,
    scale: float = 1.0,
    parts: Mapping[str, str] | None = None,
    judge: Mapping[str, str] | None = None,
    launcher: Launcher | None = None,
    retry: int = 0,
) -> Reproduced:
    """Reproduce a figure or table of the paper, or run your own grid, as ``tinyllava reproduce`` does.

    Finished stages and evaluations in ``runs`` are reused. Call it again to resume after a stop.

    Args:
        grid: figure, table, ``starter``, ``FILE.py``, ``FILE.py:NAME``, or a grid.
        output: folder of the study and its report; see ``run_grid``, also for ``launcher`` and ``retry``.
        data: folder of the training data; see ``Choices``, also for all other arguments.

    Raises:
        UnknownNameError, ConfigError, DataError: see ``plan_grid`` and ``run_grid``.
    """
    choices = Choices(
        data=data,
        benchmarks=str(benchmarks),
        runs=Path(runs),
        only=only,
        seeds=seeds,
        limit=limit,
        scale=scale,
        parts=parts or {},
        judge=judge or {},
    )
    plan = plan_grid(grid, choices, will_run=True)
    return run_grid(plan, output=output, launcher=launcher, retry=retry)


def _find_folders(grid: Grid, benchmarks: str) -> dict[str, str]:
    """Return the folder of each benchmark that is here; the plan lists the others as missing."""
    if grid.name == STARTER:
        from tinyllava.files import cache_folder
        from tinyllava.studies.starter import CENTRE, records_folder

        return {name: str(records_folder(CENTRE["data"], cache_folder())) for name in grid.benchmarks}
    folders: dict[str, str] = {}
    for benchmark in map(find_benchmark, grid.benchmarks if benchmarks else ()):
        try:
            folders[benchmark.name] = str(
                find_folders({benchmark.name: benchmark}, Path(benchmarks))[benchmark.name]
            )
        except DataError:
            continue
    return folders


def _scaled(grid: Grid, places: Places, scale: float) -> Grid:
    """Return the grid on a share of its records; the plan lists record files that are missing."""
    scaled = scale_grid(grid, scale)
    if scaled is grid:
        return grid
    cells = []
    for cell in scaled.cells:
        run = replace(cell.run, data_root=cell.run.data_root or places.data_root)
        cells.append(replace(cell, run=scale_run(run, scale, places.runs / ".records")))
    return replace(scaled, cells=tuple(cells))


def choose_records(records: list[Any], scale: float) -> list[Any]:
    """Return of every source the share ``scale`` of its records, at least one, in the order of the file.

    The source is the first folder of the image's path; records without an image are one more. Of each, the
    records whose content hashes lowest are taken: a smaller share is a part of every larger one.
    """
    sources: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        sources[_source_of(record)].append(index)
    kept: list[int] = []
    for indices in sources.values():
        count = max(1, round(scale * len(indices)))
        kept += sorted(indices, key=lambda index: _hash_of(records[index]))[:count]
    return [records[index] for index in sorted(kept)]


def _source_of(record: Any) -> str:
    image = record.get("image") if isinstance(record, dict) else None
    first = image[0] if isinstance(image, list) and image else image
    folder, slash, _ = str(first or "").partition("/")
    return folder if slash else ("" if first else "(no image)")


def _hash_of(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def scale_grid(grid: Grid, scale: float) -> Grid:
    """Return the grid under a name that says at which part of the data it is run.

    Raises:
        ConfigError: not a share above 0 and at most 1.
    """
    if not 0 < scale <= 1:
        raise ConfigError(
            f"--scale {scale:g}: give a share of the records above 0 and at most 1, such as 0.02."
        )
    if scale == 1:
        return grid
    note = f"Trained on a fixed {scale:.2%} of the records of every source: not the paper's experiment."
    return replace(
        grid,
        name=f"{grid.name}-scale-{scale:g}",
        title=f"{grid.title}, at {scale:.2%} of the data",
        notes=(*grid.notes, note),
    )


def scale_run(run: Run, scale: float, folder: Path) -> Run:
    """Return the run on the chosen part of its records, which is written below ``folder`` if need be.

    Raises:
        DataError, ConfigError: a record file is missing or is not of its format.
    """
    stages = {
        name: replace(stage, data=_scale_data(stage.data, run.data_root, scale, folder))
        for name, stage in run.stages.items()
    }
    return replace(run, stages=stages)


def _scale_data(data: DataConfig, data_root: str, scale: float, folder: Path) -> DataConfig:
    files, roots = [], set()
    for source, places in resolve(data, data_root):
        if not source.is_whole:
            raise ConfigError(
                f"{source.name}{source.options}: a scaled study takes whole files. Remove the options."
            )
        for file, images in places:
            path = folder / f"{file.stem}-{sha256_of(file)[:10]}-{scale:g}.json"
            if not path.exists():
                chosen = choose_records([record for _, record in read_raw(file)], scale)
                write_text(path, json.dumps(chosen, ensure_ascii=False))
            files.append(str(path))
            roots.add(str(images))
    if len(roots) > 1:
        raise ConfigError(
            f"data.records = {list(data.records)}: their images are in different folders "
            f"({', '.join(sorted(roots))}); scale them separately."
        )
    return replace(data, records=tuple(files), images=roots.pop())
