"""Counts of requests, tokens and seconds, in the form that Prometheus reads."""

from collections.abc import Callable

from fastapi import Request
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from tinyllava.serving.queue import End

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one server.

    Args:
        num_places: tells how many requests are being answered or wait.
    """

    def __init__(self, num_places: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tinyllava_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self._tokens = Counter("tinyllava_tokens", "Tokens by kind.", ["kind"], registry=self._registry)
        self.first_piece = Histogram(
            "tinyllava_first_piece_seconds",
            "From a place in the queue to the first text.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        places = Gauge("tinyllava_places", "Requests that are answered or wait.", registry=self._registry)
        places.set_function(num_places)

    def count_request(self, request: Request, status: int) -> None:
        """Count a request; the path is the route's, so that clients cannot make up labels."""
        route = request.scope.get("route")
        self._requests.labels(getattr(route, "path", "other"), str(status)).inc()

    def count_tokens(self, end: End) -> None:
        """Count the tokens of an answer."""
        self._tokens.labels("prompt").inc(end.num_prompt_tokens)
        self._tokens.labels("answer").inc(end.num_answer_tokens)

    def page(self) -> tuple[bytes, str]:
        """Return the text for Prometheus and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
