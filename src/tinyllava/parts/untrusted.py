"""Checkpoints are untrusted data: check their settings before a library acts on them.

Paper: none. Rejected are settings of a wrong type, more layers than the weights have, paths that leave the
folder, code in the folder, and templates that do not end. Nothing in a folder is ever executed.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from tinyllava.errors import CheckpointError, TinyLlavaError

_OF_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
SETTINGS = ("config.json", "generation_config.json", *_OF_PROCESSOR)
_MOST_LAYERS_FREE = 16  # layers that a tiny test model may have without a tensor each
_LARGEST = 2**31 - 1
_LARGEST_SIDE_PX = 16_384
_MOST_IMAGE_TOKENS = 100_000
_MEMORY_BYTES = 2**30  # what a trial may take beyond what the process has
_TRIAL_SECONDS = 10.0  # of a core, because other programs may be busy
_WAITED_SECONDS = 300.0  # by the clock, if it does not compute either


def check_weight_map(path: Path, index: Mapping[str, Any]) -> set[str]:
    """Return the weight files that an index names. Each must be a file in the same folder.

    Raises:
        CheckpointError: the index is of another form, or names a path elsewhere.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{path}: weight_map and metadata must be objects; copy the file again.")
    for tensor, name in weight_map.items():
        is_name = isinstance(name, str) and name.endswith(".safetensors") and "\0" not in name
        if not is_name or PurePosixPath(name).name != name or "\\" in name:
            raise CheckpointError(
                f"{path}: {tensor!r} is in {name!r}, which is not the name of a .safetensors file in this "
                "folder; copy the file again."
            )
    return set(weight_map.values())


def check_settings(path: Path, settings: Mapping[str, Any], num_tensors: int | None = None) -> None:
    """Refuse settings that no checkpoint has: code of its own, or numbers beyond all bounds.

    Args:
        num_tensors: of the checkpoint; no model has more layers.

    Raises:
        CheckpointError: the file, the setting and its value are named.
    """
    for place, value in _walk(settings):
        if (name := place[-1]) == "auto_map":
            raise CheckpointError(
                f"{path}: auto_map names code in the folder, which is never run. Remove auto_map."
            )
        if not isinstance(value, int | float) or isinstance(value, bool) or name == "model_max_length":
            continue
        most = _LARGEST
        if num_tensors is not None and "layers" in name:
            most = max(_MOST_LAYERS_FREE, num_tensors)
        elif any(part in ("size", "crop_size", "pad_size", "image_size") for part in place):
            most = _LARGEST_SIDE_PX
        elif name in ("num_image_tokens", "image_seq_length"):
            most = _MOST_IMAGE_TOKENS
        if not -most <= value <= most:
            where = f"{path}: {'.'.join(place)}"
            raise CheckpointError(f"{where} = {value!r}: at most {most:,} allowed; copy the file again.")


def _walk(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = value.items() if isinstance(value, dict) else ((None, one) for one in value)
    for key, one in inner:
        there = place if key is None else (*place, key)
        yield there, one
        if isinstance(one, dict | list):
            yield from _walk(one, there)


@contextmanager
def refusing(folder: Path, what: str) -> Iterator[None]:
    """Put whatever a library raises over a folder's settings into one line, as a CheckpointError."""
    try:
        yield
    except TinyLlavaError:
        raise
    except Exception as error:
        is_short = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(
            error
        )  # the words of PyTorch
        fix = "it needs more memory than is free" if is_short else "copy the folder again"
        raise CheckpointError(f"{folder}: {what} ({one_line(error)}); {fix}.") from error


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, with limited length."""
    text = " ".join(f"{error}".split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def try_out(trial: Callable[[], object], template: str = "", chats: Sequence[Any] = ()) -> str:
    """Run a function in a separate process with limited time and memory; return the problem, or nothing.

    A template can loop for ever or fill the memory. Only Linux forks safely beside the threads of libraries:
    elsewhere a fresh process renders the template first, and what ends there runs here.

    Args:
        trial: what is done; an exception says what is wrong.
        template: a chat template that the trial renders.
        chats: what it renders, in the form that templates read.
    """
    if sys.platform != "linux":
        return (_try_elsewhere(template, chats) if template else "") or _told(trial)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child uses none
        child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _limit()
            os.write(writer, (_told(trial) or "\n").encode(errors="replace"))
        finally:
            os._exit(0)
    os.close(writer)
    try:
        is_ready, _, _ = select.select([reader], [], [], _WAITED_SECONDS)
        said = os.read(reader, 4096).decode(errors="replace") if is_ready else ""
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not is_ready:
        return _endless(_WAITED_SECONDS)
    if os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
        return _endless(_TRIAL_SECONDS)
    return said.strip() if said else _TOO_LARGE


_TOO_LARGE = "it needs too much memory"


def _endless(seconds: float) -> str:
    return f"it does not finish within {seconds:.0f} seconds"


def _try_elsewhere(template: str, chats: Sequence[Any]) -> str:
    """Render a template in a fresh interpreter, which needs jinja2 alone; return what has no bound there."""
    import psutil

    program = f"from {__name__} import render_alone; render_alone()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=environment,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        end, watched = time.monotonic() + _WAITED_SECONDS, psutil.Process(child.pid)
        try:
            with child.stdin:
                child.stdin.write(json.dumps([_WAITED_SECONDS, template, chats]).encode())
            while child.poll() is None:
                if time.monotonic() > end:
                    return _endless(_WAITED_SECONDS)
                if sum(watched.cpu_times()[:2]) > _TRIAL_SECONDS:
                    return _endless(_TRIAL_SECONDS)
                if watched.memory_info().rss > _MEMORY_BYTES:
                    return _TOO_LARGE
                time.sleep(0.01)
        except (BrokenPipeError, psutil.Error):
            child.wait()  # it has just ended
        finally:
            child.kill()
    return _TOO_LARGE if child.returncode else ""


def _sandbox() -> Any:
    """Return an environment of jinja2 that reads what transformers' reads."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - as its base class has it

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )


def find_trap(template: str) -> str:
    """Return in words why a template may not end, whatever it renders; empty if nothing is found.

    A loop over ``range`` has at most 100,000 rounds, loops within it have as many each time. Such a pair can
    hide in a condition that no trial meets.
    """
    from jinja2 import TemplateError, nodes

    try:
        loops = _sandbox().parse(template).find_all(nodes.For)
    except TemplateError:
        return ""  # said where it is rendered

    def counts(loop: Any) -> bool:
        calls = [loop.iter] if isinstance(loop.iter, nodes.Call) else []
        calls += loop.iter.find_all(nodes.Call)
        return any(isinstance(call.node, nodes.Name) and call.node.name == "range" for call in calls)

    nested = any(counts(loop) and any(map(counts, loop.find_all(nodes.For))) for loop in loops)
    return "nested loops over range()" if nested else ""


def render_alone() -> None:
    """Render the template and the chats on standard input as transformers does; errors are for the caller.

    An error of the template itself comes again where it is rendered in earnest.
    """
    from jinja2 import TemplateError

    def refuse(message: str) -> None:
        raise TemplateError(message)

    seconds, text, chats = json.load(sys.stdin)
    bell = threading.Timer(seconds, os._exit, [1])  # also if the parent is killed
    bell.daemon = True
    bell.start()
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "leading_bos": "<s>", "gap": ""}
    names |= {"raise_exception": refuse, "strftime_now": time.strftime}
    room = _sandbox()
    for chat in chats:
        for is_open in (False, True):
            with suppress(Exception):
                room.from_string(text).render(messages=chat, add_generation_prompt=is_open, **names)


def _limit() -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most, seconds = pages * resource.getpagesize() + _MEMORY_BYTES, int(_TRIAL_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU, also if the parent is killed


def _told(trial: Callable[[], object]) -> str:
    try:
        trial()
    except Exception as error:  # noqa: BLE001 - see refusing
        return one_line(error)
    return ""
