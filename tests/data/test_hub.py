"""Data sets of the hub by name, from a server that stands in for it, and from the cache without a network."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tinyllava.data.readers.hub import HubName, parse_hub_name
from tinyllava.errors import ConfigError
from training_toys import toy_run, write_run

COMMIT = "c0ffee" + "0" * 34


def parquet_bytes(*answers: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": "a.png"}
    rows = [{"image": image, "question": f"Q {answer}?", "answer": answer} for answer in answers]
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


CARD = """---
configs:
- config_name: small
  data_files: [{split: train, path: small/*.parquet}]
- config_name: full
  default: true
  data_files:
  - {split: train, path: "full/train-*.parquet"}
  - {split: test, path: "full/test-*.parquet"}
---
"""
FILES = {
    "somebody/mugs": {
        "README.md": CARD.encode(),
        "full/train-0.parquet": parquet_bytes("a", "b", "c"),
        "full/train-1.parquet": parquet_bytes("d"),
        "full/test-0.parquet": parquet_bytes("e"),
        "small/0.parquet": parquet_bytes("f"),
    },
    "somebody/plain": {
        "test.jsonl": b'{"image": "images/a.png", "question": "Q?", "answer": "A"}',
        "images/a.png": Image.new("RGB", (8, 8)).tobytes(),
    },
}


class Hub(BaseHTTPRequestHandler):
    """The two addresses of the hub that the client asks: what a repository holds, and a file of it."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        for name, files in FILES.items():
            if path == f"api/datasets/{name}" or path.startswith(f"api/datasets/{name}/revision/"):
                siblings = [{"rfilename": file} for file in files]
                self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
                return
            start = f"datasets/{name}/resolve/"
            file = path.removeprefix(start).partition("/")[2] if path.startswith(start) else ""
            if file in files:
                self.answer(files[file])
                return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    places = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    yield os.environ | places | {"HF_HUB_OFFLINE": "0"}
    server.shutdown()
    server.server_close()


def run(environment: dict[str, str], *words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tinyllava", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_parts_of_a_name() -> None:
    assert parse_hub_name("hf:a/b") == HubName(repository="a/b")
    whole = HubName(repository="a/b", config="c", split="test", revision="v1.0")
    assert parse_hub_name("hf:a/b/c:test@v1.0") == whole
    assert str(whole) == "hf:a/b/c:test@v1.0"
    with pytest.raises(ConfigError, match="hf:mugs: write hf:owner/name"):
        parse_hub_name("hf:mugs")


def test_a_split_is_read_once_from_the_hub_and_then_offline(environment, tmp_path) -> None:
    status, said = run(environment, "data", "check", "hf:somebody/mugs")
    assert (status, "4 records, 4 without a defect" in said) == (0, True), said
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    made = tmp_path / "some.json"
    status, said = run(offline, "data", "convert", "hf:somebody/mugs:train,limit=3", str(made))
    assert status == 0, said
    assert len(json.loads(made.read_text())) == 3
    status, said = run(offline, "data", "check", "hf:somebody/other")
    assert status != 0
    assert "hf:somebody/other: not in the cache" in said
    assert "HF_HUB_OFFLINE is set" in said
    status, said = run(environment, "data", "check", "hf:somebody/mugs:valid")
    assert "no split 'valid'; it has train, test. Write hf:somebody/mugs:train." in " ".join(said.split())
    status, said = run(environment, "data", "check", "hf:somebody/none")
    assert "the hub has no such data set or revision" in " ".join(said.split())


def test_a_run_records_the_commit_of_its_data(environment, parts, records, tmp_path) -> None:
    toy = toy_run(parts, records, tmp_path / "run")
    named = write_run(toy, tmp_path)
    options = ["--data", "hf:somebody/mugs/full:train", "--only", "finetune", "--finetune.max-steps", "1"]
    status, said = run(environment, "train", named, *options)
    assert status == 0, said
    kept = json.loads((tmp_path / "run/run.json").read_text())["stages"]["finetune"]["data"]["records"]
    assert kept == [f"hf:somebody/mugs/full:train@{COMMIT}"]
