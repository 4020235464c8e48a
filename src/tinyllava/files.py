"""Files that survive a kill: written atomically, appended by lines, locked by one process. Strict JSON."""

import base64
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllava.errors import OutputError

if TYPE_CHECKING:
    import jinja2

CACHE_VARIABLE = "TINYLLAVA_CACHE"
LOCK = ".lock"
_GENERATOR = b'<meta name="generator" content="tinyllava">'
"""In the head of pages whose place a user names."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOKENS = re.compile(r'"(?:\\.|[^"\\])*"|[\[\]{}]', re.DOTALL)
_LONG_NUMBER = re.compile(rf"\d{{{sys.int_info.default_max_str_digits + 1},}}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SAID_OF_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter",
    "unexpected pos",
    "iostream error",
)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a place to write into; its content becomes ``path`` at the end, and nothing is left if that fails.

    The content reaches the disk before the name does, so that a power cut leaves the old file or the new one.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        open_to_others(partial)
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def cache_folder() -> Path:
    """Return the folder of everything downloaded or converted; TINYLLAVA_CACHE moves it."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "tinyllava").expanduser()


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file that a program wrote; None if it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def files_below(folder: Path, name: str = "", *, links: bool = False) -> Iterator[Path]:
    """Yield the files of a folder, of one name or all, that others may change: what vanishes is passed over.

    ``Path.rglob`` would raise for a folder that is removed before its turn.

    Args:
        links: also those of linked folders, as data have them; not of a link that leads back to a folder
            above it.
    """
    for place, folders, names in os.walk(folder, followlinks=links):
        folders[:] = [each for each in folders if not _leads_back(Path(place, each))]
        yield from (Path(place, found) for found in names if found == name or not name)


def _leads_back(path: Path) -> bool:
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def found_below(folder: Path, pattern: str) -> list[Path]:
    """Return what ``Path.glob`` finds, in order; as with ``files_below``, what vanishes is passed over."""
    names = glob(pattern, root_dir=folder, include_hidden=True)  # noqa: PTH207 (Path.glob raises for it)
    return sorted(folder / name for name in names)


def bytes_below(folder: Path) -> int:
    """Return the size of all files of a folder that others may change."""
    total = 0
    for path in files_below(folder):
        with suppress(FileNotFoundError):  # moved meanwhile
            total += path.stat().st_size
    return total


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to write into that takes the place of ``folder`` at the end."""
    partial, old = (folder.with_name(f"{folder.name}.{end}") for end in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                open_to_others(path)
                flush(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_to_others(path: Path) -> None:
    """Give a file the mode that the umask asks for: safetensors writes through a file for its owner alone."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Return the umask; it is set to be read only where the system does not tell it: other threads write."""
    with suppress(OSError):
        told = re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if told:
            return int(told[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """Have a file or a folder written to the disk, where its file system can do that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines; where the disk fills up on the way, none of them is left."""
    rest = memoryview("".join(f"{line}\n" for line in lines).encode())
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file that end; a last one that a kill cut short is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def whole_objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file that a program appends to; damaged lines are left out."""
    found = []
    for line in whole_lines(path) if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) else []
    return found


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of files, for ``find_damage``."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names
    }


def find_damage(folder: Path, files: Any) -> str:
    """Say which file in a folder is not as ``describe_files`` found it; empty if all are."""
    if not isinstance(files, dict) or not files:
        return "its list of files is missing"
    for name, known in files.items():
        path = folder / name
        try:
            if not isinstance(known, dict) or path.stat().st_size != known.get("bytes"):
                return f"{name} has a wrong size"
            if sha256_of(path) != known.get("sha256"):
                return f"{name} is damaged"
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return f"{name} is missing"
    return ""


@contextmanager
def held(place: Path, *, is_folder: bool = True, wait: bool = False) -> Iterator[None]:
    """Hold an output for this process; the system lets go of it when the process ends, however it ends.

    Args:
        place: the folder, which is made if it is not there, or the file that will be written.
        is_folder: whether ``place`` is a folder; the lock of a file is next to it.
        wait: wait for another process to end instead of giving up.

    Raises:
        OutputError: another process writes there, or nobody may.
    """
    from filelock import FileLock, Timeout  # here: what only reads files starts faster without it

    lock = place / LOCK if is_folder else place.with_name(f".{place.name}.lock")
    try:
        if is_folder:
            place.mkdir(parents=True, exist_ok=True)
        elif not place.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"no folder {place.parent}")
        holder = FileLock(lock, timeout=-1 if wait else 1)
        holder.acquire()
    except Timeout as error:
        raise OutputError(
            f"{place}: another process is writing there. Wait until it ends, or choose another output."
        ) from error
    except OSError as error:
        raise OutputError(
            f"{place}: cannot be written ({error.strerror or error}). Choose another output."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: whoever waits for the removed file opens a new one
            lock.unlink()
        holder.release()


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that the disk is full; libraries have several ways."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(said in str(error) for said in _SAID_OF_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def parse_json(text: str, *, whole_characters: bool = False) -> Any:
    """Parse JSON as ``json.loads`` does, with its error for what makes that one fail in other ways.

    Args:
        whole_characters: also refuse unpaired surrogates (``"\\ud83d"`` alone), which cannot be written.

    Raises:
        json.JSONDecodeError: not JSON, an integer of thousands of digits, nested too deeply.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, _deepest(text)) from None
    except ValueError:  # Python's limit on the digits of an integer
        found = _LONG_NUMBER.search(text)
        digits = f"an integer with {len(found[0]):,} digits" if found else "an integer with too many digits"
        raise json.JSONDecodeError(digits, text, found.start() if found else 0) from None
    if whole_characters and (escaped := _ESCAPED_SURROGATE.search(text)) and not is_text(_write(value)):
        raise json.JSONDecodeError("an unpaired surrogate", text, escaped.start())
    return value


def is_text(value: str) -> bool:
    """Whether a string is Unicode text: JSON and file names can also hold one half of a surrogate pair."""
    return not _SURROGATE.search(value)


def _write(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _deepest(text: str) -> int:
    """Return where the brackets of a text are nested most deeply."""
    depth = most = place = 0
    for token in _TOKENS.finditer(text):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth > most:
            most, place = depth, token.start()
    return place


def data_url(content: bytes, kind: str) -> str:
    """Return bytes as an address that holds them; ``kind`` is a media type such as ``image/png``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def check_page(path: Path) -> None:
    """Say before long work that an HTML page would replace what is no page of this package.

    Raises:
        OutputError: the name is not one of a page, or a file or folder of something else.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{path}: is to be an HTML page. Choose a name that ends with .html.")
    if path.exists():
        with path.open("rb") as file:
            if _GENERATOR not in file.read(1_000):
                raise OutputError(f"{path}: exists, and is not a page of tinyllava. Choose another name.")


def page_environment(folder: Path, styles: Path | None = None) -> "jinja2.Environment":
    """Return a Jinja environment for the templates of a folder.

    Args:
        styles: folder of the ``page.css`` that templates know as ``style``; the templates' own by default.
    """
    import jinja2  # here: quick commands start faster without it

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FileSystemLoader(folder),
    )
    environment.globals["style"] = ((styles or folder) / "page.css").read_text(encoding="utf-8").strip()
    return environment
