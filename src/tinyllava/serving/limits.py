"""Limits of a request and of all requests together, and the error that refuses one.

Paper: none.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any


class RequestError(Exception):
    """A request that is refused; the client sees it in the form of OpenAI's errors.

    Args:
        status: of HTTP.
        message: what is wrong, the value, what is allowed, and the fix.
        code: a word that programs can look at.
        param: the field that is wrong, such as ``messages.0.content``.
        headers: for the response, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kind.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of one request, and the number of requests that may wait."""

    max_body_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    """Of one image; of all images of the request four times as many."""
    max_images: int = 16
    max_characters: int = 400_000
    """Of all messages together: what is far too long for any context is not tokenised first."""
    max_tokens: int = 2_048
    """Of one answer."""
    max_waiting: int = 64
    """Requests, those that are being answered included."""
    timeout_seconds: float = 300.0
    """From a request's first byte to its answer's last."""

    @property
    def max_request_pixels(self) -> int:
        """Of all images of a request: they are decoded one after another."""
        return 4 * self.max_pixels

    @property
    def max_held_bytes(self) -> int:
        """Of the bodies and downloaded images of all requests together."""
        return 8 * self.max_body_bytes


class Places:
    """Places of requests that are answered or wait, and the bytes that they hold.

    Args:
        max_waiting: how many there are.
        max_held_bytes: of all requests together.
    """

    def __init__(self, max_waiting: int, max_held_bytes: int) -> None:
        self.max_waiting, self.max_held_bytes = max_waiting, max_held_bytes
        self.num_taken = 0
        """Changed on the event loop only."""
        self.num_bytes = 0
        self._lock = Lock()  # of ``num_bytes``, which threads that download images change too
        self._seconds = 1.0  # a place is held, a running mean: what a refused client is told to wait

    @contextmanager
    def take(self) -> Iterator["Place"]:
        """Hold a place from before the body of a request is read until its answer is sent or its client gone.

        Raises:
            RequestError: all are taken; the client learns when to try again.
        """
        if self.num_taken >= self.max_waiting:
            raise self._full(f"{self.num_taken} requests are running or waiting")
        self.num_taken += 1
        started, place = time.monotonic(), Place(self)
        try:
            yield place
        finally:
            self.num_taken -= 1
            self.add(-place.num_bytes)
            self._seconds += 0.2 * (time.monotonic() - started - self._seconds)

    def add(self, num_bytes: int) -> None:
        """Count bytes that a request holds from now on, or no longer.

        Raises:
            RequestError: there is no room for them.
        """
        with self._lock:
            if num_bytes > 0:
                self.check_room(num_bytes)
            self.num_bytes += num_bytes

    def check_room(self, num_bytes: int) -> None:
        """Refuse bytes for which there is no room at present.

        Raises:
            RequestError: see above.
        """
        if self.num_bytes + num_bytes > self.max_held_bytes:
            raise self._full(
                f"the requests that are running or waiting hold {self.num_bytes:,} bytes, and "
                f"{num_bytes:,} more would be above {self.max_held_bytes:,}"
            )

    def _full(self, why: str) -> RequestError:
        seconds = max(1, round(self._seconds))
        return RequestError(
            429,
            f"the server is full: {why}. Try again in {seconds} s.",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )


class Place:
    """The place of one request."""

    def __init__(self, places: Places) -> None:
        self.places, self.num_bytes = places, 0

    def hold(self, num_bytes: int) -> None:
        """Hold so many bytes more, until the place is given back.

        Raises:
            RequestError: there is no room for them.
        """
        self.places.add(num_bytes)
        self.num_bytes += num_bytes
