"""Which run the answers on disk are of, written down beside them: answers of two runs are never mixed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava.errors import ConfigError


def claim_answers(
    answers: Path,
    identity: Path,
    run: Mapping[str, Any],
    *,
    fix: str,
    told_by: Mapping[str, str] | None = None,
) -> None:
    """Write down whose answers these will be, or make sure that those which are there are of the same run.

    Args:
        answers: file or folder that holds them, named in errors.
        identity: JSON file beside them, written whole or not at all.
        run: what the answers depend on, by name.
        fix: what to do where they are another run's.
        told_by: a name that may differ -> the one that has to be equal then, ``{"model": "weights"}`` where
            the model's folder may move.

    Raises:
        ConfigError: they are of another run or nobody knows whose, or the file cannot be written.
    """
    if not identity.exists():
        partial = identity.with_name(f"{identity.name}.partial")
        try:
            partial.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(identity)
        except OSError as error:
            raise ConfigError(
                f"{identity}: cannot be written ({error.strerror}); make room, or choose another output."
            ) from error
        return
    known = _read(identity, answers, fix)
    different = {name for name in {**known, **run} if known.get(name) != run.get(name)}
    moved = {name for name, other in (told_by or {}).items() if other in run and other not in different}
    for name in {**known, **run}:
        if name in different - moved:
            raise ConfigError(
                f"{answers}: holds answers of a run with {name} = {known.get(name)!r}, this one has "
                f"{run.get(name)!r}. {fix}"
            )


def _read(identity: Path, answers: Path, fix: str) -> dict[str, Any]:
    try:
        known = json.loads(identity.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict):
        raise ConfigError(f"{answers}: holds answers, but {identity} does not say of which run. {fix}")
    return known
