"""Which run the answers on disk are of, written down beside them: answers of two runs are never mixed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava.errors import ConfigError
from tinyllava.files import read_object, whole_file


def claim_answers(
    answers: Path,
    identity: Path,
    run: Mapping[str, Any],
    *,
    fix: str,
    told_by: Mapping[str, str] | None = None,
    noted: Mapping[str, Any] | None = None,
) -> None:
    """Write down whose answers these will be, or make sure that those which are there are of the same run.

    Args:
        answers: file or folder that holds them, named in errors.
        identity: JSON file beside them, written whole or not at all.
        run: what the answers depend on, by name.
        fix: what to do where they are another run's.
        told_by: a name that may differ -> the one that has to be equal then, ``{"model": "weights"}`` where
            the model's folder may move.
        noted: further values, that the caller compares; what was noted before is replaced.

    Raises:
        ConfigError: they are of another run or nobody knows whose, or the file cannot be written.
    """
    noted = noted or {}
    if not identity.exists():
        _write(identity, {**run, **noted})
        return
    known = _read(identity, answers, fix)
    is_noted_anew = any(known.get(name) != value for name, value in noted.items())
    known = {name: value for name, value in known.items() if name not in noted}
    different = {name for name in {**known, **run} if known.get(name) != run.get(name)}
    moved = {name for name, other in (told_by or {}).items() if run.get(other) and other not in different}
    for name in {**known, **run}:
        if name in different - moved:
            raise ConfigError(
                f"{answers}: has answers of a run with {name} = {known.get(name)!r}, but this run has "
                f"{run.get(name)!r}. {fix}"
            )
    if is_noted_anew:
        _write(identity, {**known, **noted})


def _write(identity: Path, values: Mapping[str, Any]) -> None:
    try:
        with whole_file(identity) as partial:
            partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{identity}: cannot be written ({error.strerror}). Free some space, or choose another output."
        ) from error


def _read(identity: Path, answers: Path, fix: str) -> dict[str, Any]:
    known = read_object(identity)
    if known is None:
        raise ConfigError(f"{answers}: has answers, but {identity} does not name their run. {fix}")
    return known
