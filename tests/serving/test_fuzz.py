"""Requests made up from the server's OpenAPI file: each gets an answer that the file names, no failure."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from served import Served, data_url, serve

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))  # more make a longer search
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    "POST /v1/chat/completions",
    *(f"GET {p}" for p in ("/v1/models", "/v1/models/{name}", "/health", "/metrics")),
]
IMAGE = data_url(200, 30, 30)


@pytest.fixture(scope="module")
def fuzzed(toy: Path) -> Iterator[Served]:
    with serve(toy, "--max-tokens", "6") as served:
        yield served


def improve(body: Any) -> None:
    """Let a request get further: to the model that is there, and to an image that can be opened."""
    body["model"] = "toy"
    for message in body.get("messages") or ():
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image_url"), dict):
                part["image_url"]["url"] = IMAGE


def test_whatever_is_sent_is_answered_or_refused_by_name(fuzzed: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.address}/openapi.json")
    operations = {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}
    assert set(operations) == set(OPERATIONS)
    statuses: set[int] = set()
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    for name, operation in operations.items():
        num = EXAMPLES if "POST" in name else 5
        for mode in modes if "POST" in name else modes[:1]:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=num,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def ask(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict) and len(json.dumps(case.body, default=str)) % 3:
                    improve(case.body)
                response = case.call()
                statuses.add(response.status_code)
                case.validate_response(response, checks=CHECKS)

            ask()
    assert {200, 400, 404} <= statuses, statuses
    fuzzed.wait_for("tinyllava_places", 0)
    assert fuzzed.post(max_tokens=3).status_code == 200
