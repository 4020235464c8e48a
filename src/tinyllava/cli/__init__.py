"""The command line: a table of commands. A command is imported when it runs, which keeps help fast."""

import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from types import FrameType

from tinyllava import __version__
from tinyllava.errors import ConfigError, LostProcessError, Stopped, TinyLlavaError, look_up
from tinyllava.files import is_full_disk, is_text
from tinyllava.parts.user_code import is_reference, run_code
from tinyllava.planning.lost import is_first_to_tell, is_of_another_process, lost_process, name_lost


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: where its ``main(arguments) -> exit status`` is, and one line of help."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "starter": Command(module="starter", help="train and evaluate a small real model end to end"),
    "chat": Command(module="chat", help="ask a model about an image"),
    "serve": Command(module="serve", help="serve a model: a web page and an API like OpenAI's"),
    "train": Command(module="train", help="train a variant of the paper or your own model"),
    "record": Command(module="record", help="show records as training sees them, supervised text in colour"),
    "show": Command(module="show", help="list parts, recipes and variants, or estimate the cost of a run"),
    "evaluate": Command(module="evaluate", help="evaluate a checkpoint on benchmarks or your own questions"),
    "compare": Command(module="compare", help="compare two evaluations question by question"),
    "reproduce": Command(
        module="reproduce", help="reproduce a figure or table of the paper, or run your own grid"
    ),
    "runs": Command(module="runs", help="list and filter runs, or compare two of them"),
    "data": Command(module="data", help="check, convert or split your data; list what benchmarks need"),
    "import": Command(module="import_", help="convert a checkpoint from another layout"),
    "export": Command(
        module="export", help="write a checkpoint for transformers, vLLM, llama.cpp or the Hub"
    ),
}
RESUMED = ("starter", "train", "evaluate", "reproduce")
"""Commands that resume after a stop. The others are short and start over."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. Errors of this package are printed without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"tinyllava {__version__}")
        return 0
    try:
        _refuse_bytes(arguments)
        arguments = _run_own_code(arguments)
        command = look_up(COMMANDS, arguments[0], "command")
        run: Callable[[list[str]], int] = import_module(f"tinyllava.cli.{command.module}").main
        from tinyllava.data.reporting import reporting

        with _ended_by_sigterm(), reporting(is_shown=True):
            status = run(arguments[1:])
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_is_gone():  # a pipe of its own, to a worker that died
            raise
        return 141  # as a shell counts it: head, for one, has what it wanted
    except LostProcessError as error:
        return _tell(name_lost(error))
    except TinyLlavaError as error:
        return _tell(str(error))
    except Exception as error:
        if is_of_another_process(error):
            return _tell(name_lost(lost_process(error)))
        if line := _describe(error):
            return _tell(line)
        if not is_first_to_tell():
            return 1
        raise
    except KeyboardInterrupt as stop:
        again = " Run the same command again to resume." if arguments[0] in RESUMED else ""
        if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
            print(f"\nStopped.{again}", file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def _tell(line: str) -> int:
    """Print an error, once for all processes of a run, and return the exit status."""
    if is_first_to_tell():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


_OF_THE_MACHINE = (
    errno.EACCES,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
    errno.ETXTBSY,
)
"""What a file system refuses; other errors are the program's own, and keep their traceback."""


def _describe(error: Exception) -> str:
    """Return one line for an error that the machine causes, wherever it comes up; empty for others."""
    if is_full_disk(error):
        where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
        if isinstance(error, OSError) and not error.filename and _drop_output():
            return "cannot write the output: its disk is full. Free some space and run the command again."
        return f"the disk is full{where}. Free some space and run the command again."
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = os.fsdecode(error.filename or "")
        return f"{name[:80]}... ({len(name):,} characters): too long for a path. Use a shorter name."
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE and error.filename:
        return f"{error.filename}: {error.strerror}. Check its permissions, or use another path."
    return ""


def _drop_output() -> bool:
    """Return whether the output itself cannot be written; the rest of the output is then discarded."""
    try:
        print(flush=True)
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end a command as Ctrl-C does: its files are put in order first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, ended = os.getpid(), threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            ended.set()
            raise Stopped(number)
        os._exit(128 + number)  # a process of its own, forked from this one

    is_one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    numbers = (signal.SIGTERM, signal.SIGINT) if is_one_of_several else (signal.SIGTERM,)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        with _ended_while_waiting(stop, ended) if is_one_of_several else nullcontext():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ended_while_waiting(stop: object, ended: threading.Event) -> Iterator[None]:
    """End this process some seconds after a signal that its handler was not called for.

    Python calls none while PyTorch waits for another process. In training, which has handlers of its own, the
    process goes on: it saves first.

    Args:
        stop: the handler.
        ended: which it sets.
    """

    def watch() -> None:
        while number := reader.recv(1):
            # Several short waits: after a pause of the whole process, the main thread still has its turn.
            if signal.getsignal(number[0]) is stop and not any(ended.wait(0.5) for _ in range(6)):
                os._exit(128 + number[0])

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # it would speak for this process
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


def _run_own_code(arguments: list[str]) -> list[str]:
    """Run the code named by ``--with FILE.py``, which any command takes, and return the other arguments."""
    rest = list(arguments)
    while "--with" in rest[1:] and rest[0] != "starter":  # whose --with names data sets
        at = rest.index("--with", 1)
        if at + 1 == len(rest):
            raise ConfigError("--with needs a Python file or a module, as in --with FILE.py.")
        place = rest[at + 1]
        run_code(place.rpartition(":")[0] if is_reference(place) else place)
        del rest[at : at + 2]
    return rest


def _refuse_bytes(arguments: list[str]) -> None:
    """Raise for an argument that is not UTF-8: no file that records it could be written.

    Raises:
        ConfigError: its number and its bytes.
    """
    for number, argument in enumerate(arguments, 1):
        if not is_text(argument):
            raise ConfigError(
                f"argument {number}: {os.fsencode(argument)[:80]!r} is not UTF-8. Rename the file, or use "
                "a UTF-8 locale."
            )


def _reader_is_gone() -> bool:
    """Return whether the reader of the output is gone; the rest of the output is then discarded."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _help() -> str:
    lines = [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tinyllava COMMAND [ARGUMENTS]",
            "",
            "Build, train, evaluate and ship small vision-language models.",
            "",
            *lines,
            "",
            "Run `tinyllava COMMAND --help` for details. Start with `tinyllava starter`.",
            "`--with FILE.py` first runs your code, if a checkpoint or a saved run needs it.",
        ]
    )
