"""Values from a user's own code, named ``FILE.py:NAME`` or ``package.module:NAME``.

Code runs only if the user names it, in a setting or with ``--with``. A name in a checkpoint or a saved run is
data: ``recall_value`` looks it up among the code that has already run, and never runs any.
"""

import hashlib
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from tinyllava.errors import CheckpointError, ConfigError, TinyLlavaError, look_up

T = TypeVar("T")
_MODULES: dict[str, ModuleType] = {}
"""Place as a checkpoint names it (the file's name, or the dotted module) -> the module that has run."""
_STAMPS: dict[str, tuple[str, int, int]] = {}
"""Place -> path, time and size of the file that ran; one that changed runs again."""


def is_reference(name: str) -> bool:
    """Whether a name means a value of a user's code."""
    place, colon, value = name.rpartition(":")
    is_module = all(part.isidentifier() for part in place.split("."))
    return bool(colon) and value.isidentifier() and (place.endswith(".py") or is_module)


def short_reference(reference: str) -> str:
    """Return a reference as a checkpoint keeps it: a file by its name, without anybody's folders."""
    place, _, name = reference.rpartition(":")
    return f"{_key(place)}:{name}"


def _key(place: str) -> str:
    return Path(place).name if place.endswith(".py") else place


def run_code(place: str) -> Mapping[str, object]:
    """Run a Python file, or import a module, and return its names.

    As for the file that Python is started with, its folder is put on the import path. A file that has run and
    did not move runs once.

    Raises:
        ConfigError: it is missing or fails, with file and line; an error of ours comes through as it is.
    """
    path, key = Path(place).resolve(), _key(place)
    if place.endswith(".py") and not path.is_file():
        raise ConfigError(f"{place}: no such file.")
    stamp = (str(path), path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else (place, 0, 0)
    if _STAMPS.get(key) == stamp:
        return vars(_MODULES[key])
    try:
        module = _run_file(path) if place.endswith(".py") else import_module(place)
    except TinyLlavaError:
        raise  # says itself what is wrong
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{locate(error, place)}: {type(error).__name__}: {error}") from error
    _MODULES[key], _STAMPS[key] = module, stamp
    return vars(module)


def _run_file(path: Path) -> ModuleType:
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = util.spec_from_file_location(f"tinyllava_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def locate(error: BaseException, place: str) -> str:
    """Return the file and line of a user's code at which an error arose."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename}: line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).name == Path(_file(place)).name]
    return f"{own[-1].filename}: line {own[-1].lineno}" if own else place


def _file(place: str) -> str:
    return place if place.endswith(".py") else f"{place.rpartition('.')[2]}.py"


def run_value(reference: str) -> object:
    """Run the code of a reference that the user gave, and return its value.

    Raises:
        ConfigError: the code is missing or fails.
        UnknownNameError: it has no such name.
    """
    place, _, name = reference.rpartition(":")
    return look_up({key: v for key, v in run_code(place).items() if key[0] != "_"}, name, f"name in {place}")


def recall_value(reference: str, where: str = "") -> object:
    """Return the value of a reference out of code that has run; nothing is run for it.

    Args:
        where: the checkpoint or file that names it, for the message.

    Raises:
        CheckpointError: its code has not run.
        UnknownNameError: it has no such name.
    """
    place, _, name = reference.rpartition(":")
    module = _MODULES.get(_key(place))
    if module is None:
        raise CheckpointError(
            f"{where or reference}: needs your code {reference!r}, which runs only if you name it; add "
            f"--with {place} (in Python: tinyllava.run_code({place!r}))."
        )
    return look_up({key: v for key, v in vars(module).items() if key[0] != "_"}, name, f"name in {place}")


def recall_as(reference: str, kind: type[T]) -> T:
    """Return a value as ``recall_value`` does, of one kind.

    Raises:
        ConfigError: it is of another.
    """
    value = recall_value(reference)
    if not isinstance(value, kind):
        raise ConfigError(f"{reference}: expected a {kind.__name__}, found a {type(value).__name__}.")
    return value


def loaded_values() -> list[object]:
    """Return the values of all code that has run."""
    return [value for module in _MODULES.values() for value in vars(module).values()]


def reference_of(value: object) -> str:
    """Return the reference of a value of code that has run, with the full path of a file; else empty."""
    for place, module in _MODULES.items():
        for name, own in vars(module).items():
            if own is value and name[0] != "_":
                return f"{module.__file__ if place.endswith('.py') else place}:{name}"
    return ""


def code_digest(reference: str) -> str:
    """Return a hash of the file that defines a value; empty if it is not a reference."""
    module = _MODULES.get(_key(reference.rpartition(":")[0])) if is_reference(reference) else None
    if module is None or module.__file__ is None:
        return ""
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:24]
