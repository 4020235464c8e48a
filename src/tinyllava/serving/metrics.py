"""Counts of requests, tokens and seconds in the format of Prometheus."""

from collections.abc import Callable, Iterable, Mapping

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tinyllava.serving.queue import End

_WORDS = {
    "places": "Requests that are answered or wait.",
    "held_bytes": "Bytes of the bodies and downloaded images of these requests.",
    "running": "Answers that are being decoded.",
    "kept_tokens": "Tokens of remembered conversations.",
    "reused_tokens": "Tokens of prompts, so far, that were not computed again.",
    "ahead_tokens": "Tokens of next turns, so far, that were computed before anybody asked.",
}

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _Gauges(Collector):
    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self.read = read

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Read the numbers."""
        for name, value in self.read().items():
            yield GaugeMetricFamily(f"tinyllava_{name}", _WORDS[name], value)


class Metrics:
    """The numbers of one server.

    Args:
        gauges: numbers of this moment, by name.
    """

    def __init__(self, gauges: Callable[[], Mapping[str, int]]) -> None:
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
        self._registry.register(_Gauges(gauges))

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
