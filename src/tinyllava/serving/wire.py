"""One request on the wire: its body, its time, and a client that may go away meanwhile.

Paper: none.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from tinyllava.serving.schema import Limits, RequestError

T = TypeVar("T")


class GoneError(Exception):
    """The client closed the connection."""


class EventStream(StreamingResponse):
    """Server-sent events; whatever becomes of the client, what the answer holds is given back."""

    def __init__(self, events: AsyncIterator[bytes], held: AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        async with self._held:
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
            f"not answered within {limits.timeout_seconds:g} s, the most that this server gives a request; "
            "ask for a shorter answer, or try again later.",
            code="timeout",
        ) from error


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request.

    Raises:
        RequestError: it is not JSON by its header, or too large.
        GoneError: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # browsers send it to other origins only when these agree: they do not
        raise RequestError(
            415, f"content type {kind[:60]!r}; send application/json.", code="unsupported_media_type"
        )
    body, is_more = bytearray(), True
    while is_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        body += message.get("body", b"")
        is_more = message.get("more_body", False)
        if len(body) > max_bytes:
            raise RequestError(
                413,
                f"the body is larger than {max_bytes:,} bytes; send fewer or smaller images.",
                code="body_too_large",
            )
    return bytes(body)


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
