"""The run folders of a machine as a table, and the differences of two runs: settings, environment, results.

Paper: none. Reads the files of runs (run.json, environment.json, stage.json, results.json). Needs no torch.
"""

import operator
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tinyllava.config import flatten
from tinyllava.errors import DataError
from tinyllava.evaluation.results import BLANK
from tinyllava.files import files_below, read_object

Rows = list[Sequence[object]]


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A run folder as it is on disk."""

    folder: Path
    config: Mapping[str, Any]
    """Dotted path -> value, of run.json."""
    environment: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    """Finished stages: their metadata."""
    scores: Mapping[str, float]
    """Benchmark -> headline number; with ``-blind`` behind its name, that of blank images."""
    partial: Mapping[str, str]
    """Benchmark -> how many of its questions were asked or have no answer, unless all have one."""


def find_runs(folder: Path) -> list[FoundRun]:
    """Return the runs at or below a folder, by name.

    Raises:
        DataError: there is none.
    """
    files = sorted(path for path in files_below(folder, "run.json") if _is_run(_read(path)))
    files = [path for path in files if path.parent.name != "model"]  # a checkpoint holds a copy
    if not files:
        raise DataError(f"{folder}: no run folder (with a run.json) found. `tinyllava train` creates one.")
    return [_read_run(path.parent) for path in files]


def _is_run(config: Mapping[str, Any]) -> bool:
    """Whether a file holds the settings of a run, rather than the owner of the answers next to it."""
    model = config.get("model")
    names = ("vision_encoder", "connector", "language_model")
    is_model = isinstance(model, dict) and all(isinstance(model.get(name), str) for name in names)
    return is_model and isinstance(config.get("stages"), dict) and "seed" in config


def _read_run(folder: Path) -> FoundRun:
    config = _read(folder / "run.json")
    stages = {name: _read(folder / name / "stage.json") for name in config["stages"]}
    scores: dict[str, float] = {}
    partial: dict[str, str] = {}
    for path in sorted(files_below(folder, "results.json")):
        with suppress(KeyError, TypeError, AttributeError):  # a damaged one has no scores
            for result in _read(path)["results"]:
                name = result["benchmark"] + "-blind" * str(result.get("model")).endswith(BLANK)
                amount = _describe_amount(result)
                values = [float(one["value"]) for one in result["metrics"] if one["name"] == result["metric"]]
                if values and not (amount and name in scores and name not in partial):
                    scores[name] = values[0]
                    partial = {key: text for key, text in partial.items() if key != name}
                    partial |= {name: amount} if amount else {}
    return FoundRun(
        folder=folder,
        config=dict(flatten(config)),
        scores=scores,
        partial=partial,
        environment=dict(flatten(_read(folder / "environment.json"))),
        stages={
            n: metadata for n, metadata in stages.items() if isinstance(metadata.get("last_loss"), float)
        },
    )


def _describe_amount(result: Mapping[str, Any]) -> str:
    """Return how many of a benchmark's questions were asked and not answered; empty if all have an answer."""
    num_expected, num_missing = result.get("num_expected") or 0, result.get("num_missing", 0)
    num_asked = result.get("num_questions", num_expected)
    amount = [f"{num_asked:,} of {num_expected:,}"] if num_asked < num_expected else []
    return ", ".join(amount + ([f"{num_missing:,} unanswered"] if num_missing else []))


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; of one that is missing or damaged, nothing."""
    return read_object(path) or {}


_CONDITION = re.compile(r"([^=<>!]+?)\s*(<=|>=|!=|=|<|>)\s*(.*)", re.DOTALL)
_COMPARED = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}


def filter_runs(runs: Sequence[FoundRun], conditions: Sequence[str]) -> list[FoundRun]:
    """Keep the runs of which every condition holds.

    Args:
        conditions: ``path=pattern`` or ``path!=pattern``, with the wildcards of file names, or
            ``path<number`` (``<=``, ``>``, ``>=``). A path is that of a setting, of which the end will do, of
            a score (``pope``, ``score.pope``) or of a stage's last loss (``loss.finetune``). Where the value
            is a folder, its name will do.

    Raises:
        DataError: a condition of another form, a path that no run has, or a number that is none.
    """
    kept = list(runs)
    for condition in conditions:
        found = _CONDITION.fullmatch(condition.strip())
        if not found:
            raise DataError(
                f"--where {condition}: give PATH=VALUE, such as model.connector=mlp, or PATH>NUMBER, "
                "such as 'pope>80'."
            )
        path, sign, wanted = found.groups()
        if not any(_values(run, path) for run in runs):
            raise DataError(f"--where {condition}: no run has a setting {path!r}{_suggest(runs, path)}.")
        kept = [run for run in kept if _holds(_values(run, path), sign, wanted, condition)]
    return kept


def _holds(values: Sequence[Any], sign: str, wanted: str, condition: str) -> bool:
    if sign in ("=", "!="):
        names = {name for value in values for name in (str(value), _short(str(value)))}
        is_found = any(fnmatchcase(name, wanted) for name in names)
        return bool(values) and is_found == (sign == "=")
    try:
        return any(_COMPARED[sign](float(value), float(wanted)) for value in values)
    except (TypeError, ValueError):
        raise DataError(
            f"--where {condition}: {sign} compares numbers, but {wanted!r} or {values[0]!r} is not a number; "
            "use = or !=."
        ) from None


def _values(run: FoundRun, path: str) -> list[Any]:
    return [v for key, v in _facts(run).items() if key == path or key.endswith(f".{path}")]


def _facts(run: FoundRun) -> dict[str, Any]:
    """Return all that runs are chosen by: settings, scores, last losses."""
    losses = {f"loss.{name}": metadata["last_loss"] for name, metadata in run.stages.items()}
    return {**run.config, **{f"score.{name}": value for name, value in run.scores.items()}, **losses}


def _suggest(runs: Sequence[FoundRun], path: str) -> str:
    ends = {key.rpartition(".")[2] for run in runs for key in _facts(run)}
    close = get_close_matches(path.rpartition(".")[2], sorted(ends), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def run_rows(runs: Sequence[FoundRun]) -> Rows:
    """Return the table of runs: parts, progress and scores."""
    benchmarks = list(dict.fromkeys(name for run in runs for name in run.scores))
    rows: Rows = [
        ("run", "recipe", "encoder", "connector", "LLM", "seed", "stages", "last loss", *benchmarks)
    ]
    for run in runs:
        names = dict.fromkeys(key.split(".")[1] for key in run.config if key.startswith("stages."))
        done = [name for name in names if name in run.stages]
        losses = [f"{run.stages[name]['last_loss']:.3f}" for name in done]
        scores = [_show_score(run, name) for name in benchmarks]
        rows.append(
            (
                run.folder.name,
                run.config.get("recipe") or "-",
                _short(run.config["model.vision_encoder"]),
                run.config["model.connector"],
                _short(run.config["model.language_model"]),
                str(run.config["seed"]),
                f"{len(done)} of {len(names)} here",
                ", ".join(losses) or "-",
                *scores,
            )
        )
    return rows


def _show_score(run: FoundRun, name: str) -> str:
    if name not in run.scores:
        return "-"
    return f"{run.scores[name]:.2f}" + (f" ({run.partial[name]})" if name in run.partial else "")


def _short(part: str) -> str:
    return part.rstrip("/").rpartition("/")[2]


def diff_runs(first: FoundRun, second: FoundRun) -> Rows:
    """Return every setting, fact of the environment and score in which two runs differ."""
    rows: Rows = [("differs", first.folder.name, second.folder.name)]
    for title, left, right in (
        ("", first.config, second.config),
        ("environment.", first.environment, second.environment),
        ("score.", first.scores, second.scores),
        ("questions.", first.partial, second.partial),
    ):
        for key in dict.fromkeys([*left, *right]):
            if left.get(key) != right.get(key):
                rows.append((f"{title}{key}", str(left.get(key, "-")), str(right.get(key, "-"))))
    return rows
