"""A toy model behind ``tinyllava serve`` in a process of its own, on a free port of this machine."""

import json
import os
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from chats import make_chat


def save_toy(folder: Path) -> Path:
    """Save a checkpoint whose answers hang on what is asked, and are long."""
    chat = make_chat(folder / "parts", "phi")
    chat.model.save_pretrained(folder / "toy")
    chat.processor.save_pretrained(folder / "toy")
    return folder / "toy"


def data_url(*colour: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> str:
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True, kw_only=True)
class Served:
    address: str
    process: "subprocess.Popen[str]"

    def post(self, content: bytes | None = None, **fields: Any) -> httpx.Response:
        """Ask; fields replace those of a short question."""
        body = {"model": "toy", "messages": [{"role": "user", "content": "Is there a dog?"}], "max_tokens": 8}
        sent = json.dumps({**body, **fields}).encode() if content is None else content
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{self.address}/v1/chat/completions", content=sent, headers=headers, timeout=600)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.address}/metrics", timeout=600).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def wait_for(self, name: str, value: float) -> None:
        until = time.monotonic() + 600
        while self.metric(name) != value:
            assert time.monotonic() < until, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.05)


@contextmanager
def serve(
    model: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    program: tuple[str, str] = ("-m", "tinyllava"),
) -> Iterator[Served]:
    command = [sys.executable, *program, "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        if not address:
            pytest.fail(process.communicate()[1])
        yield Served(address=address, process=process)
    finally:
        process.kill()
        process.communicate()
