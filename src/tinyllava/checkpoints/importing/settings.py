"""Values of a foreign config.json, read so that one of another type is an error that names it."""

from typing import Any

from tinyllava.errors import CheckpointError


def whole(config: dict[str, Any], name: str, default: int | None, where: str) -> int:
    """Return a whole number; ``default`` stands for a setting that is absent or null.

    Raises:
        CheckpointError: another type of value, or no value where there is no default.
    """
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{where}: {name} = {value!r}; expected a whole number. Fetch the file again.")
    return value


def objects(config: dict[str, Any], *names: str, where: str) -> list[dict[str, Any]]:
    """Return the settings of several parts.

    Raises:
        CheckpointError: some are missing or of another form; all of them are listed.
    """
    values = [config.get(name) for name in names]
    absent = [name for name, value in zip(names, values, strict=True) if not isinstance(value, dict)]
    if absent:
        raise CheckpointError(
            f"{where}: config.json has no {' and no '.join(absent)}, the settings of a part; fetch the "
            "folder again."
        )
    return [value for value in values if isinstance(value, dict)]
