"""``tinyllava serve MODEL``: serve a model over HTTP, to programs and on a web page."""

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.cli.parser import CommandParser, add_bits, find_model
from tinyllava.errors import ConfigError, require
from tinyllava.parts.folders import short_name

if TYPE_CHECKING:
    from tinyllava.serving.queue import Engine

_HELP = """
Serve a model on this machine: a web page, and an API like OpenAI's.

  tinyllava serve runs/share-Sig-Phi/model
  tinyllava serve runs/share-Sig-Phi/model --port 9000 --name my-model
  tinyllava serve gguf-folder --engine llama.cpp

Open the printed address in a browser, or use it as base_url of an OpenAI
client. Clients send images as data URLs. The server never opens a file that a
client names, and opens addresses only with --allow-image-hosts. Requests are
batched continuously, and shared prefixes are computed once. Ctrl-C or SIGTERM
finishes the running requests and exits.
"""
_MAX_EXAMPLES_BYTES = 4 * 2**20
KEY_VARIABLE = "TINYLLAVA_API_KEY"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser("serve", _HELP)
    parser.add_argument("model", nargs="?", default="", help="checkpoint folder (default: the starter's)")
    parser.add_argument("--name", default="", help="model name in the API (default: its folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        help=f"key that clients must send (repeatable; default: the keys in {KEY_VARIABLE}, "
        "separated by commas, which other users of this machine cannot see)",
    )
    parser.add_argument(
        "--no-api-key", action="store_true", help="accept requests without a key from all who reach --host"
    )
    parser.add_argument(
        "--allow-image-hosts",
        default="",
        metavar="HOSTS",
        help="hosts, separated by commas, on which clients may name images by address (default: none)",
    )
    parser.add_argument(
        "--engine",
        choices=["own", "llama.cpp"],
        default="own",
        help="llama.cpp serves a folder that `tinyllava export --format gguf` has written",
    )
    parser.add_argument("--device", default="", help="torch device (default: a GPU if available)")
    add_bits(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-tokens", type=int, default=2_048, help="max length of an answer in tokens")
    limits.add_argument("--max-images", type=int, default=16, help="max images per request")
    limits.add_argument("--max-pixels", type=int, default=50_000_000, help="max pixels per image")
    limits.add_argument("--max-body-mib", type=int, default=32, help="max size of a request in MiB")
    limits.add_argument("--max-waiting", type=int, default=64, help="max requests, running and waiting")
    limits.add_argument("--max-running", type=int, default=32, help="max answers decoded together")
    room = "max tokens of running and cached conversations (default: as many as fit in 4 GiB)"
    limits.add_argument("--cache-tokens", type=int, default=0, help=room)
    limits.add_argument("--timeout", type=float, default=300, help="max seconds per request, wait included")
    limits.add_argument("--drain", type=int, default=60, help="seconds to finish running requests at exit")
    known = parser.parse_args(arguments)
    positive = [name for name in vars(known) if name.startswith("max_")]
    for name in (*positive, "timeout", "drain"):
        if not 0 < getattr(known, name) < 10**12:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if known.bits != 16 and known.engine != "own":
        parser.error("--bits works only with --engine own; for llama.cpp, export with --quantize")
    if known.cache_tokens < 0:
        parser.error("--cache-tokens must be above 0")
    if not 0 <= known.port < 2**16:
        parser.error("--port must be from 0 to 65535")
    environment = os.environ.get(KEY_VARIABLE, "").split(",")
    known.api_keys = tuple(key.strip() for key in known.api_key or environment if key.strip())
    if not all(key.isascii() and key.isprintable() and " " not in key for key in known.api_keys):
        parser.error("an API key may contain only printable ASCII characters, and no spaces")
    if known.api_key and not known.api_keys:
        parser.error("--api-key is empty; give a key, or remove the option")
    return known


def main(arguments: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; the first line printed is the address."""
    known = _parse(arguments)
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve", "serves a model over HTTP")
    if known.engine == "llama.cpp":
        require("xllamacpp", "gguf", "has llama.cpp inside")
        folder = Path(known.model)
    else:
        folder = find_model(known.model, "`tinyllava serve DIR`")

    from tinyllava.serving.fetch import ImageHosts
    from tinyllava.serving.limits import Limits
    from tinyllava.serving.server import Settings, is_loopback, run

    if not (is_loopback(known.host) or known.api_keys or known.no_api_key):
        raise ConfigError(
            f"--host {known.host}: everyone who can reach it could use the model; set {KEY_VARIABLE} to a "
            "key, or add --no-api-key to serve without one."
        )
    limits = Limits(
        max_body_bytes=known.max_body_mib * 2**20,
        max_pixels=known.max_pixels,
        max_images=known.max_images,
        max_tokens=known.max_tokens,
        max_waiting=known.max_waiting,
        timeout_seconds=known.timeout,
    )
    name = known.name or short_name(folder)
    hosts = tuple(host.strip() for host in known.allow_image_hosts.split(",") if host.strip())
    ImageHosts(hosts, limits.max_body_bytes)  # says what is wrong with them before a model is opened
    settings = Settings(
        model=name,
        host=known.host,
        image_hosts=hosts,
        examples=_read_examples(folder.resolve().parent / "report" / "examples.json"),
        api_keys=known.api_keys,
        limits=limits,
    )
    with _listen(
        known.host, known.port
    ) as listening:  # a port that is taken is told before a model is opened
        engine = _open_engine(known, folder)
        host = f"[{known.host}]" if ":" in known.host else known.host
        print(f"http://{host}:{listening.getsockname()[1]}", flush=True)
        print(
            f"serving {name}: web page at this address, API under /v1, metrics at /metrics. Ctrl-C stops "
            "the server.",
            file=sys.stderr,
        )
        try:
            run(engine, settings, listening, known.drain)
        except KeyboardInterrupt:  # when everything is finished
            print("stopped.", file=sys.stderr)
    return 0


def _read_examples(file: Path) -> bytes:
    """Return the images and questions of the report next to a model, as JSON; empty if there is no report."""
    try:
        examples = json.loads(file.read_bytes()) if file.stat().st_size < _MAX_EXAMPLES_BYTES else []
    except (OSError, ValueError):
        return b"[]"
    good = [
        {"image": one["image"], "question": one["question"]}
        for one in (examples if isinstance(examples, list) else [])
        if isinstance(one, dict)
        and isinstance(one.get("question"), str)
        and isinstance(one.get("image"), str)
        and one["image"].startswith("data:image/")
    ]
    return json.dumps(good).encode()


def _open_engine(known: argparse.Namespace, folder: Path) -> "Engine":
    sizes = {"cache_tokens": known.cache_tokens, "max_running": known.max_running}
    if known.engine == "llama.cpp":
        from tinyllava.serving.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(folder, **sizes)
    from tinyllava.inference.chat import Chat
    from tinyllava.serving.engine import OwnEngine

    return OwnEngine(Chat.open(folder, device=known.device, bits=known.bits), **sizes)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the address does not exist here, or is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2_048)
        # Connections take it over. asyncio sets it only on sockets of its own; without it, what is sent in
        # two pieces waits 40 ms for the client to acknowledge the first.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error}. Choose another one with --host and --port "
            "(--port 0 takes a free one)."
        ) from error
