"""The results of evaluations, typed and versioned: the JSON behind every number of a table.

Paper: the cells of Tables 3 and A1.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinyllava.errors import DataError, look_up
from tinyllava.files import parse_json, write_json

FORMAT_VERSION = 1
BLANK = " (blank images)"  # behind a model's name in results without images
_AGAIN = (
    "Delete it, and score the answers again with `tinyllava evaluate --score-only`, which needs no model."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number, in the unit of the benchmark's table (mostly percent), with its uncertainty.

    ``interval`` is the 95% confidence interval, clustered by image if questions share images.
    """

    name: str
    value: float
    num_questions: int
    standard_error: float | None = None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        error = "" if self.interval is None else f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"
        return f"{self.name} {self.value:.2f}{error} (n={self.num_questions:,})"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The score of one model on one benchmark, with everything needed to trust and repeat the number."""

    benchmark: str
    protocol: str
    """The rules of prompt, parsing and metric; numbers of two protocols do not belong in one column."""
    split: str
    model: str
    metric: str
    """Name of the headline metric among ``metrics``."""
    metrics: tuple[Metric, ...]
    """Empty if the answers are not public and the score comes from a server."""
    num_questions: int
    num_images: int
    num_missing: int = 0
    """Questions without an answer; each counts as wrong."""
    num_unclear: int = 0
    """Answers that could not be parsed, such as neither yes nor no; counted as in the official tool."""
    num_cut: int = 0
    """Answers that reached their max length."""
    num_expected: int | None = None
    """Questions in the published set; fewer in ``num_questions`` means a partial set."""
    data_sha256: str = ""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""
    judge: str | None = None
    date: str = ""
    weights: str = ""
    """Hash of the checkpoint, which identifies the model wherever its folder is; empty if unknown."""
    notes: tuple[str, ...] = ()
    version: int = FORMAT_VERSION

    @property
    def value(self) -> float | None:
        """The headline number, or None if there is no local score."""
        return next((metric.value for metric in self.metrics if metric.name == self.metric), None)

    @property
    def is_partial(self) -> bool:
        """Whether some of the published questions are absent or unanswered."""
        return self.num_missing > 0 or (self.num_expected or 0) > self.num_questions

    def metric_named(self, name: str) -> Metric:
        """Return one metric; the error for an unknown name lists the known ones."""
        return look_up({metric.name: metric for metric in self.metrics}, name, f"metric of {self.benchmark}")


@dataclass(frozen=True, kw_only=True)
class ResultTable:
    """Results of models (rows) on benchmarks (columns). A column has one protocol, data set and judge."""

    results: tuple[Result, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, Result] = {}
        cells: set[tuple[str, str]] = set()
        for result in self.results:
            if (result.model, result.benchmark) in cells:
                raise DataError(
                    f"two results of {result.model!r} on {result.benchmark!r} in one table; keep one of them."
                )
            cells.add((result.model, result.benchmark))
            _check_same_column(seen.setdefault(result.benchmark, result), result)

    @property
    def models(self) -> tuple[str, ...]:
        """Rows, in order of first appearance."""
        return tuple(dict.fromkeys(result.model for result in self.results))

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Columns, in order of first appearance."""
        return tuple(dict.fromkeys(result.benchmark for result in self.results))

    def cell(self, model: str, benchmark: str) -> Result | None:
        """Return the result of one cell, or None if nothing was measured."""
        found = (r for r in self.results if r.model == model and r.benchmark == benchmark)
        return next(found, None)

    def with_result(self, result: Result) -> "ResultTable":
        """Return a table in which ``result`` replaces an older result of its cell."""
        cell = (result.model, result.benchmark)
        kept = tuple(r for r in self.results if (r.model, r.benchmark) != cell)
        return ResultTable(results=(*kept, result))

    def fitting(self, result: Result) -> "ResultTable":
        """Return the table without results from other data or another judge than ``result``."""
        kept = tuple(r for r in self.results if r.benchmark != result.benchmark or not _find_clash(r, result))
        return ResultTable(results=kept)

    def save(self, path: Path) -> None:
        """Write the table as JSON, atomically."""
        save_results(self.results, path)

    @staticmethod
    def load(path: Path) -> "ResultTable":
        """Read a table from JSON.

        Raises:
            DataError: not a results file, a later version, or a column that mixes judges or protocols.
        """
        return ResultTable(results=load_results(path))


def _find_clash(first: Result, other: Result) -> str:
    """Return what keeps two results of a benchmark out of one column, "" if nothing does."""
    for name in ("protocol", "split", "judge", "data_sha256"):
        left, right = getattr(first, name), getattr(other, name)
        if left != right and not (name == "data_sha256" and not (left and right)):
            return name
    return ""


def _check_same_column(first: Result, other: Result) -> None:
    name = _find_clash(first, other)
    if name:
        raise DataError(
            f"column {first.benchmark!r} would mix two values of {name}: {first.model!r} has "
            f"{getattr(first, name)!r}, {other.model!r} has {getattr(other, name)!r}. Score one of them "
            "again, or put them in separate tables."
        )


def save_results(results: Iterable[Result], path: Path) -> None:
    """Write results as JSON, atomically."""
    document = {"version": FORMAT_VERSION, "results": [asdict(result) for result in results]}
    write_json(path, document)


def load_results(path: Path) -> tuple[Result, ...]:
    """Read results from JSON.

    Raises:
        DataError: the file is missing, is not JSON, or does not follow the format.
    """
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such results file; `tinyllava evaluate` writes one.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: not JSON ({error}). {_AGAIN}") from None
    version = document.get("version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: results format version {version!r}; this program reads version {FORMAT_VERSION}. "
            "Read it with the program that wrote it, or delete it and score the answers again with "
            "`tinyllava evaluate --score-only`."
        )
    try:
        return tuple(parse_result(values) for values in document["results"])
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a results file ({error}). {_AGAIN}") from None


def parse_result(values: dict[str, Any]) -> Result:
    """Return a result from its JSON; a missing or unknown field raises KeyError or TypeError."""
    metrics = tuple(
        Metric(**{**metric, "interval": tuple(metric["interval"]) if metric.get("interval") else None})
        for metric in values["metrics"]
    )
    return Result(**{**values, "metrics": metrics, "notes": tuple(values.get("notes", ()))})
