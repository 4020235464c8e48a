"""The HTTP server: OpenAI's chat completions and models, health, metrics, and the web page.

Paper: none. The server never opens a file that a client names, and connects only to allowed hosts.
"""

import asyncio
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.resources import files
from ipaddress import ip_address
from socket import socket
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from tinyllava import __version__
from tinyllava.errors import DataError, ImageError, TinyLlavaError
from tinyllava.serving.fetch import ImageHosts
from tinyllava.serving.limits import Limits, Places, RequestError
from tinyllava.serving.metrics import Metrics
from tinyllava.serving.queue import End, Engine
from tinyllava.serving.schema import Question, read_request
from tinyllava.serving.wire import (
    EventStream,
    GoneError,
    ImpatientProtocol,
    before,
    describe,
    read_body,
    while_connected,
)

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_WITH_KEY = ("/v1/", "/metrics", "/examples")
"""Beginnings of paths that need a key; compared with the path by which the route is found, see ``check``."""
_PAGE_HEADERS = {
    # Nothing from another host, no inline script; images are those that the user has chosen.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is served.

    Args:
        model: name under which clients ask for it.
        host: address that the server listens on; on loopback, requests that name another host are refused
            (a web site could reach the server through the user's browser otherwise).
        image_hosts: hosts whose images may be given by their address; see ``ImageHosts``.
        examples: JSON for the page: a list of {image, question}, each image a data URL.
        api_keys: one of them has to come with each request; without any, none is asked for.
    """

    model: str
    host: str = "127.0.0.1"
    image_hosts: tuple[str, ...] = ()
    examples: bytes = b"[]"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    limits: Limits = field(default_factory=Limits)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class _Service:
    """State shared by the routes."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings, self.limits = engine, settings, settings.limits
        self.hosts = ImageHosts(settings.image_hosts, settings.limits.max_body_bytes)
        self.places = Places(self.limits.max_waiting, self.limits.max_held_bytes)
        self.metrics = Metrics(self._gauges)
        self.created = int(time.time())

    def _gauges(self) -> dict[str, int]:
        places = self.places
        return {"places": places.num_taken, "held_bytes": places.num_bytes, **self.engine.counts()}

    def check(self, request: Request) -> None:
        """Refuse who has no key, and browsers that were led here under another host's name.

        Raises:
            RequestError: see above.
        """
        host = re.sub(r":\d*$", "", request.headers.get("host", ""))
        if is_loopback(self.settings.host) and not is_loopback(host):
            raise RequestError(
                403,
                f"host {host[:60]!r}: this server accepts only localhost and 127.0.0.1. Use one of them, or "
                "start the server with --host.",
                code="host_not_allowed",
            )
        # The path of request.url is read from a text with the client's Host header in it.
        if not self.settings.api_keys or not request.scope["path"].startswith(_WITH_KEY):
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        matches = [
            hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.settings.api_keys
        ]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestError(
                401,
                "no API key, or a wrong one; send the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def complete(self, request: Request) -> Response:
        """Answer a chat request, whole or as a stream.

        Raises:
            RequestError: the request is refused, or takes too long.
            GoneError: its client went away.
        """
        deadline = asyncio.get_running_loop().time() + self.limits.timeout_seconds
        async with AsyncExitStack() as stack:
            place = stack.enter_context(self.places.take())
            body = await before(deadline, self.limits, read_body(request, self.limits.max_body_bytes, place))
            downloads = self.hosts.begin(place.hold)
            question = await run_in_threadpool(
                read_request, body, self.settings.model, self.limits, downloads
            )
            del body
            pieces = await stack.enter_async_context(aclosing(self._answer(question, deadline)))
            if not question.is_streamed:
                return JSONResponse(await while_connected(request, self._whole(pieces)))
            # What is refused is known with the first piece: the status can still say it.
            first = await while_connected(request, anext(pieces))
            return EventStream(self._events(question, first, pieces), stack.pop_all(), deadline)

    async def _answer(self, question: Question, deadline: float) -> AsyncGenerator[str | End, None]:
        """Yield the pieces of an answer, with what the model refuses as an error of the request."""
        started, is_first = time.monotonic(), True
        async with aclosing(self.engine.answer(question)) as events:
            while True:
                try:
                    event = await before(deadline, self.limits, anext(events))
                except ImageError as error:
                    raise RequestError(400, str(error), code="invalid_image", param="messages") from error
                except DataError as error:
                    raise RequestError(
                        400, str(error), code="context_length_exceeded", param="messages"
                    ) from error
                except TinyLlavaError as error:
                    raise RequestError(500, str(error), code="model_error") from error
                if is_first:
                    self.metrics.first_piece.observe(time.monotonic() - started)
                    is_first = False
                if isinstance(event, End):
                    self.metrics.count_tokens(event)
                yield event
                if isinstance(event, End):
                    return

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.settings.model,
        }

    async def _whole(self, pieces: AsyncIterator[str | End]) -> dict[str, Any]:
        text: list[str] = []
        async for piece in pieces:
            if isinstance(piece, End):
                message = {"role": "assistant", "content": "".join(text), "refusal": None}
                choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.reason}
                return {**self._envelope("chat.completion"), "choices": [choice], "usage": _usage(piece)}
            text.append(piece)
        raise RuntimeError("an answer without an end")

    async def _events(
        self, question: Question, first: str | End, pieces: AsyncIterator[str | End]
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events; an error on the way is the last of them."""
        head = self._envelope("chat.completion.chunk")

        def chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            usage = {"usage": None} if question.has_usage else {}
            return _event({**head, "choices": [choice], **usage})

        start, piece = chunk({"role": "assistant", "content": ""}), first  # sent with the first piece
        try:
            while not isinstance(piece, End):
                yield start + chunk({"content": piece})
                start, piece = b"", await anext(pieces)
        except RequestError as error:
            yield _event(error.body)
            return
        except Exception:
            yield _event(_internal().body)
            raise
        usage = _event({**head, "choices": [], "usage": _usage(piece)}) if question.has_usage else b""
        yield start + chunk({}, piece.reason) + usage + b"data: [DONE]\n\n"


def _internal() -> RequestError:
    return RequestError(500, "internal error; see the server's log. Try again.", code="internal_error")


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _usage(end: End) -> dict[str, int]:
    return {
        "prompt_tokens": end.num_prompt_tokens,
        "completion_tokens": end.num_answer_tokens,
        "total_tokens": end.num_prompt_tokens + end.num_answer_tokens,
    }


def run(engine: Engine, settings: Settings, listening: socket, drain_seconds: int) -> None:
    """Serve until Ctrl-C or SIGTERM, finish running requests, and raise it again.

    Args:
        listening: the socket that clients connect to.
        drain_seconds: what running requests get at the end.

    Raises:
        KeyboardInterrupt: the signal that ended it.
    """
    config = uvicorn.Config(
        make_app(engine, settings),
        http=ImpatientProtocol,
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=drain_seconds,
        timeout_keep_alive=75,  # longer than clients keep a connection: none asks on one that is being closed
        server_header=False,
    )
    uvicorn.Server(config).run([listening])


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """Return the server's application (ASGI).

    Args:
        engine: answers; it is closed at the end.
    """
    service = _Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.close)

    app = FastAPI(title="tinyllava", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app, service)
    _add_routes(app, service)
    describe(app, has_keys=bool(settings.api_keys))
    return app


def _refuse(error: RequestError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _add_errors(app: FastAPI, service: _Service) -> None:
    """Check each request, count it, and give every error the form of OpenAI's."""

    async def refuse_path(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        phrase = HTTPStatus(status).phrase.lower()
        asked = f"{request.method} {request.scope['path'][:100]}"
        message = f"{asked}: {phrase}; POST /v1/chat/completions asks the model."
        return _refuse(RequestError(status, message, code=phrase.replace(" ", "_")))

    async def hide(request: Request, error: Exception) -> Response:
        return _refuse(_internal())  # the traceback goes to the log

    app.add_exception_handler(404, refuse_path)
    app.add_exception_handler(405, refuse_path)
    app.add_exception_handler(Exception, hide)
    app.add_middleware(_Guard, service=service)


class _Guard:
    """Checks each request before anything of it is read, and counts the answers."""

    def __init__(self, app: Any, service: _Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.count_request(request, message["status"])
            await send(message)

        try:
            self.service.check(request)
        except RequestError as error:
            await _refuse(error)(scope, receive, counting)
            return
        await self.app(scope, receive, counting)


def _add_routes(app: FastAPI, service: _Service) -> None:
    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        """Answer the last message of a conversation."""
        try:
            return await service.complete(request)
        except RequestError as error:
            return _refuse(error)
        except GoneError:
            return Response(status_code=499)  # nobody reads it; the metrics count it

    model = {
        "id": service.settings.model,
        "object": "model",
        "created": service.created,
        "owned_by": "tinyllava",
        "context_tokens": service.engine.context_tokens,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """Describe a model."""
        if name == service.settings.model:
            return JSONResponse(model)
        message = f"model {name[:100]!r} is not served here; this server has {service.settings.model!r}."
        return _refuse(RequestError(404, message, code="model_not_found", param="model"))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server takes requests."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Count requests and tokens, for Prometheus."""
        content, kind = service.metrics.page()
        return Response(content, media_type=kind)

    for path, (name, kind) in _PAGE.items():
        _add_page(app, path, (files("tinyllava.serving") / "page" / name).read_bytes(), kind)
    _add_page(app, "/examples.json", service.settings.examples, "application/json")


def _add_page(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    async def page() -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    app.get(path, include_in_schema=False)(page)
