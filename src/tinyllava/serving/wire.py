"""HTTP details: request bodies, time limits, disconnected clients, and ``/openapi.json``.

Paper: none. The routes read bodies themselves and return errors in OpenAI's form, so FastAPI cannot describe
them.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import StreamingResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinyllava.serving.limits import Limits, Place, RequestError
from tinyllava.serving.schema import ChatRequest

T = TypeVar("T")
_HEADER_SECONDS = 20.0  # from a connection's first moment, or a request's first byte, to its headers' end
_BODY_SECONDS, _BODY_BYTES_PER_SECOND = 15.0, 16_384  # what a body may take: so long, and this much more
_UNREAD_SECONDS = 10.0  # from a request's deadline until an answer that nobody reads is given up


class GoneError(Exception):
    """The client closed the connection."""


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP, except that connections without a whole header are closed: it would keep them open."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Read on, and wait for the rest if a request has begun."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _watch(self) -> None:
        cycle: Any = self.cycle  # None before the first request
        if cycle is not None and not cycle.response_complete:
            self._stop_waiting()  # a request is being answered, which has limits of its own
        elif self._waiting is None:
            self._waiting = self.loop.call_later(_HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class EventStream(StreamingResponse):
    """Server-sent events. Whatever happens to the client, the answer is closed.

    Args:
        events: their bytes; the last of them come at the deadline at the latest.
        held: what the answer holds.
        deadline: of the event loop's clock. A client that reads nothing keeps the server from sending, and is
            left ten seconds later.
    """

    def __init__(self, events: AsyncIterator[bytes], held: AsyncExitStack, deadline: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._held, self._deadline = held, deadline

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        async with self._held:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._deadline + _UNREAD_SECONDS):
                    await super().__call__(scope, receive, send)


async def before(deadline: float, limits: Limits, work: Awaitable[T]) -> T:
    """Wait for work until the time of its request is over.

    Raises:
        RequestError: it is.
    """
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError as error:
        raise RequestError(
            504,
            f"not answered within the server's time limit of {limits.timeout_seconds:g} s. Ask for a "
            "shorter answer, or try again later.",
            code="timeout",
        ) from error


async def read_body(request: Request, max_bytes: int, place: Place) -> bytes:
    """Return the body of a request.

    Args:
        place: holds it, piece by piece.

    Raises:
        RequestError: it is not JSON by its header, too large, or too slow, or there is no room for it.
        GoneError: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # browsers send it to other origins only when these agree: they do not
        raise RequestError(
            415, f"content type {kind[:60]!r}; send application/json.", code="unsupported_media_type"
        )
    announced = int(request.headers.get("content-length", "0"))  # digits: h11 refuses others
    _check_length(announced, max_bytes)
    place.places.check_room(announced)
    body, is_more, started = bytearray(), True, asyncio.get_running_loop().time()
    while is_more:
        until = started + _BODY_SECONDS + len(body) / _BODY_BYTES_PER_SECOND
        try:
            async with asyncio.timeout_at(until):
                message = await request.receive()
        except TimeoutError as error:
            raise RequestError(
                408,
                f"{len(body):,} bytes of the body came within {until - started:.0f} s; send at least "
                f"{_BODY_BYTES_PER_SECOND:,} a second, or a smaller image.",
                code="body_too_slow",
                headers={"Connection": "close"},
            ) from error
        if message["type"] == "http.disconnect":
            raise GoneError
        piece = message.get("body", b"")
        _check_length(len(body) + len(piece), max_bytes)
        place.hold(len(piece))
        body += piece
        is_more = message.get("more_body", False)
    return bytes(body)


def _check_length(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise RequestError(
            413,
            f"the body is larger than {max_bytes:,} bytes; send fewer or smaller images.",
            code="body_too_large",
        )


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Wait for work, and stop it when the client goes away.

    Raises:
        GoneError: it did.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def run() -> T:
        return await work

    working, watching = asyncio.ensure_future(run()), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


_ERRORS = {
    400: "The request is invalid, has an unusable image, or is too long.",
    401: "The API key is missing or wrong.",
    403: "The request is for another host.",
    404: "No such model.",
    408: "The body comes too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests; Retry-After has the seconds to wait.",
    500: "The model failed.",
    504: "The request took too long.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_ALWAYS = (401, 403)
_OF_PATH: dict[str, tuple[int, ...]] = {
    "/v1/chat/completions": (400, 404, 408, 413, 415, 429, 500, 504),
    "/v1/models/{name}": (404,),
}


def describe(app: FastAPI, *, has_keys: bool) -> None:
    """Let an application describe itself in full."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app, has_keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI documents it


def _describe(app: FastAPI, has_keys: bool) -> dict[str, Any]:
    said: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    request = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = said.setdefault("components", {}).setdefault("schemas", {})
    schemas |= {**request.pop("$defs"), "ChatRequest": request, "Error": _ERROR}
    for path, methods in said["paths"].items():
        for operation in methods.values():
            codes = (*_OF_PATH.get(path, ()), *_ALWAYS)
            operation["responses"] = {
                code: value for code, value in operation["responses"].items() if code != "422"
            }
            for code in sorted(codes):
                operation["responses"][str(code)] = {
                    "description": _ERRORS[code],
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
    chat = said["paths"]["/v1/chat/completions"]["post"]
    chat["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    }
    answer = {"type": "object", "required": ["id", "object", "created", "model", "choices"]}
    chat["responses"]["200"]["content"] = {
        "application/json": {"schema": answer},
        "text/event-stream": {"schema": {"type": "string"}},
    }
    said["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {
        "text/plain": {"schema": {"type": "string"}}
    }
    if has_keys:
        said["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        said["security"] = [{"key": []}]
    return said
