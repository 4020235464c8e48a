"""From cells to a graph of work, in which equal stages and evaluations are a single node.

Paper: Figure 5 inherits Figure 4's models; the recipes of Figure 8 share their first stage.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from tinyllava.config import Run, run_from_json, to_json
from tinyllava.data.mixtures import resolve
from tinyllava.errors import TinyLlavaError
from tinyllava.evaluation.benchmark import Benchmark
from tinyllava.evaluation.benchmarks import find_benchmark
from tinyllava.files import found_below, sha256_of, write_json
from tinyllava.parts.user_code import code_digest, reference_of
from tinyllava.studies.grid import Grid, GridCell

_Content = TypeVar("_Content")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One piece of work: the last stage of ``run``, or one benchmark for the model that ``run`` ends with."""

    id: str
    kind: Literal["stage", "evaluation"]
    name: str
    """Of the stage or the benchmark."""
    run: Run
    """All stages up to this one; its output is the run folder that the stage is kept in."""
    after: str = ""
    """Node whose result this one starts from; "" for none."""
    data: str = ""
    """Folder of the benchmark."""
    limit: int = 0
    judge: Mapping[str, str] = field(default_factory=dict)
    """url, model and key (an environment variable) of the judge; empty for none."""
    keep_model: bool = True
    code: str = ""
    """Of a user's benchmark: ``FILE.py:NAME`` with the whole path, for the process that does the node."""
    code_digest: str = ""
    """Of that code: when it changes, the evaluation is another one."""

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark of an evaluation; a user's code is run for it.

        Raises:
            UnknownNameError, ConfigError: see ``find_benchmark``.
        """
        return find_benchmark(self.code or self.name)

    @property
    def folder(self) -> Path:
        """Folder of the node's state and results."""
        if self.kind == "stage":
            return self.run.folder
        suffix = f"-first-{self.limit}" if self.limit else ""
        suffix += f"-judge-{_digest(self.judge['model'])[:6]}" if self.judge else ""
        suffix += f"-code-{self.code_digest[:6]}" if self.code_digest else ""
        return self.run.folder / "evaluation" / f"{self.name}{suffix}"


@dataclass(frozen=True, kw_only=True)
class SeededCell:
    """A cell with one seed, and its nodes in the order in which they run."""

    id: str
    cell: GridCell
    seed: int
    stages: tuple[str, ...]
    evaluations: tuple[str, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ids of all nodes."""
        return (*self.stages, *self.evaluations)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The work of a grid, each node after the one it needs."""

    cells: tuple[SeededCell, ...]
    nodes: Mapping[str, Node]

    def cells_of(self, node: str) -> list[str]:
        """Return the ids of the cells that need a node."""
        return [cell.id for cell in self.cells if node in cell.nodes]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are on this machine."""

    runs: Path = Path("runs")
    """Folder of all run folders; grids share it, and so their stages."""
    data_root: str = ""
    """Folder of Table 2's mixtures."""
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    """Benchmark -> its folder."""
    judge: Mapping[str, str] = field(default_factory=dict)


SEED = "{seed}"
"""In the ``start_from`` of a cell: takes the seed's place, where every seed has a checkpoint of its own."""


def expand(grid: Grid, places: Places) -> Graph:
    """Return the graph of a grid. Cells with equal first stages share those nodes.

    Raises:
        UnknownNameError: a benchmark that is not known.
    """
    nodes: dict[str, Node] = {}
    cells = []
    for cell in grid.cells:
        for seed in grid.seeds:
            run = replace(
                cell.run,
                seed=seed,
                data_root=cell.run.data_root or places.data_root,
                start_from=cell.run.start_from.replace(SEED, str(seed)),
            )
            stages = _stage_nodes(run, places)
            evaluations = [_evaluation_node(stages[-1], name, grid, places) for name in grid.benchmarks]
            for node in (*stages, *evaluations):
                known = nodes.setdefault(node.id, node)
                if node.keep_model and not known.keep_model:
                    nodes[node.id] = node
            cells.append(
                SeededCell(
                    id=cell.id if len(grid.seeds) == 1 else f"{cell.id}, seed {seed}",
                    cell=cell,
                    seed=seed,
                    stages=tuple(node.id for node in stages),
                    evaluations=tuple(node.id for node in evaluations),
                )
            )
    return Graph(cells=tuple(cells), nodes=nodes)


def _stage_nodes(run: Run, places: Places) -> list[Node]:
    """Return a node for every stage; its key is made of all that decides the stage's result."""
    nodes: list[Node] = []
    names = list(run.stages)
    for number, name in enumerate(names, 1):
        stages = {key: run.stages[key] for key in names[:number]}
        id_ = f"{name}-{_key_of(replace(run, stages=stages))}"
        part = replace(run, name=id_, recipe="", stages=stages, output=str(places.runs / id_))
        after = nodes[-1].id if nodes else ""
        nodes.append(
            Node(id=id_, kind="stage", name=name, run=part, after=after, keep_model=number == len(names))
        )
    return nodes


def _evaluation_node(trained: Node, name: str, grid: Grid, places: Places) -> Node:
    benchmark = find_benchmark(name)
    code = reference_of(benchmark)
    node = Node(
        id="",
        kind="evaluation",
        name=benchmark.name if code else name,
        run=trained.run,
        after=trained.id,
        limit=grid.limit,
        data=places.benchmarks.get(benchmark.name, ""),
        keep_model=grid.keep_models,
        judge=places.judge if benchmark.judging is not None else {},
        code=code,
        code_digest=code_digest(code),
    )
    return replace(node, id=f"{trained.id}/{node.folder.name}")


def _key_of(run: Run) -> str:
    """Return a digest of parts, stages, records and seed: all that decides the result, as it is on disk."""
    stages = []
    for stage in run.stages.values():
        values = stage.decisive()
        values["data"] = _data_digests(stage.data.records, stage.data.images, stage.data.skip, run.data_root)
        values["data"] += ["image places"] if stage.data.keep_image_places else []
        stages.append(values)
    model = asdict(run.model)
    if not run.model.add_tokens:  # came later: keys of what was trained before it stay
        del model["add_tokens"]
    for part in ("vision_encoder", "language_model"):
        model[part] = _part_digest(model[part])
    inputs = {
        "model": model,
        "stages": stages,
        "seed": run.seed,
        "precision": run.hardware.precision,
        "start_from": _part_digest(run.start_from),
    }
    return _digest(json.dumps(inputs, sort_keys=True))[:12]


def _data_digests(records: tuple[str, ...], images: str, skip: tuple[str, ...], data_root: str) -> list[str]:
    """Return a digest of each record file; of one that is not here, of its name."""
    from tinyllava.config import DataConfig

    try:
        found = resolve(DataConfig(records=records, images=images, skip=skip), data_root)
    except TinyLlavaError:
        return [*records, *skip]
    options = [source.options for source, _ in found if source.options]
    return [*(_file_digest(path) for _, places in found for path, _ in places), *options, *skip]


def read_once(read: Callable[[Path], _Content]) -> Callable[[Path], _Content]:
    """Let a function read each file once, and again when it has changed (its time, size or inode)."""
    known: dict[Path, tuple[tuple[int, ...], _Content]] = {}

    def read_or_recall(path: Path) -> _Content:
        stat = path.stat()
        version = stat.st_mtime_ns, stat.st_size, stat.st_dev, stat.st_ino
        if path not in known or known[path][0] != version:
            known[path] = version, read(path)
        return known[path][1]

    return read_or_recall


_file_digest = read_once(sha256_of)


def _part_digest(part: str) -> str:
    """Return a part's name; of a local folder the names and contents of its files.

    Sizes would not do: two trained models of one shape differ in nothing else than their contents.
    """
    folder = Path(part)
    if not part or not folder.is_dir():
        return part
    files = []
    for path in found_below(folder, "*"):
        with suppress(FileNotFoundError):  # a download that is renamed meanwhile
            files += [(path.name, _file_digest(path))] if path.is_file() else []
    return _digest(repr(files))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def save_node(node: Node, path: Path) -> None:
    """Write a node as JSON, for the job that does it."""
    values = {**asdict(node), "run": json.loads(to_json(node.run))}
    write_json(path, values)


def load_node(path: Path) -> Node:
    """Read a node back."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Node(**{**values, "run": run_from_json(json.dumps(values["run"]), str(path))})
