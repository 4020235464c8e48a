"""Pushing to a hub, against a stand-in that speaks the hub's HTTP API and keeps what it gets."""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from layouts import make_checkpoint
from tinyllava.checkpoints.exporting import check_repository, push
from tinyllava.cli import main
from tinyllava.errors import CheckpointError

TOKEN = "hf_" + "t" * 30


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a dictionary of files; objects of LFS by their digest."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.broken_uploads = 0
        """Uploads that break off before one is taken."""
        self.messages: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        read = b""
        while size := int(self.rfile.readline(), 16):
            read += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return read

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            if name in self.server.repositories:
                return self.answer(
                    {"error": "You already created this", "url": f"{self.server.address}/{name}"}, 409
                )
            self.server.repositories[name] = {}
            self.server.private[name] = values.get("private") is True or values.get("visibility") == "private"
            return self.answer({"url": f"{self.server.address}/{name}"})
        if self.path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self.answer({"errors": [], "warnings": []}, 200 if front["license"] else 400)
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
            return self.answer(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(files, modes, strict=True)
                    ]
                }
            )
        if self.path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            places = [{"upload": {"href": f"{self.server.address}/lfs/{each['oid']}"}} for each in asked]
            objects = [each | {"actions": place} for each, place in zip(asked, places, strict=True)]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            return self.commit(body)
        return self.answer({"error": f"unexpected {self.path}"}, 404)

    def do_PUT(self) -> None:
        if self.server.broken_uploads:
            self.server.broken_uploads -= 1
            self.rfile.read(1000)
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data = self.body()
        digest = self.path.rpartition("/")[2]
        status = 200 if hashlib.sha256(data).hexdigest() == digest else 400
        self.server.objects[digest] = data
        self.answer({}, status)

    def do_GET(self) -> None:
        self.answer({"error": "not here"}, 404)

    def commit(self, body: bytes) -> None:
        name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        files = self.server.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.objects[value["oid"]]
        address = f"{self.server.address}/{name}/commit/{'0' * 40}"
        self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": address, "hookOutput": ""})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def login(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET set when the library is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return monkeypatch


@pytest.mark.usefixtures("login")
def test_a_checkpoint_arrives_whole(
    parts: dict[str, Path], tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    out = tmp_path / "out"
    arguments = ["export", str(checkpoint), str(out), "--format", "llava", "--push", "alice/toy", "--private"]
    assert main(arguments) == 0
    assert f"pushed: {hub.address}/alice/toy/commit/" in capsys.readouterr().out
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.repositories == {"alice/toy": written}
    assert hub.private == {"alice/toy": True}
    assert 'from_pretrained("alice/toy")' in written["README.md"].decode()


@pytest.mark.usefixtures("login")
def test_without_a_folder_nothing_is_left_here(parts: dict[str, Path], tmp_path: Path, hub: Hub) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "phi", "clip")
    assert main(["export", str(checkpoint), "--push", "alice/toy"]) == 0
    card = hub.repositories["alice/toy"]["README.md"].decode()
    assert "$ hf download alice/toy --local-dir toy\n$ tinyllava chat image.jpg" in card
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_wrong_token_is_said_with_its_fix(tmp_path: Path, hub: Hub, login: pytest.MonkeyPatch) -> None:
    login.setenv("HF_TOKEN", "hf_wrong")
    (tmp_path / "file.txt").touch()
    with pytest.raises(CheckpointError, match=r"alice/toy: the hub answered 401.*hf auth login"):
        push(tmp_path, "alice/toy")
    assert hub.repositories == {}


def test_no_server_is_said_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file.txt").touch()
    with pytest.raises(CheckpointError, match=r"alice/toy: could not be pushed.*network"):
        push(tmp_path, "alice/toy")


@pytest.mark.parametrize("name", ["toy", "a/b/c", "alice/to y", "alice/toy.git"])
def test_names_that_cannot_be_a_repository(name: str) -> None:
    with pytest.raises(CheckpointError, match="--push"):
        check_repository(name)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's pauses between two tries are left out."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("login", "impatient")
def test_an_upload_that_breaks_off_is_taken_up_again_or_told_with_its_fix(
    parts: dict[str, Path], tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    hub.broken_uploads = 2
    assert main(["export", str(checkpoint), "--push", "alice/toy"]) == 0
    assert (checkpoint / "model.safetensors").read_bytes() == hub.repositories["alice/toy"][
        "model.safetensors"
    ]
    hub.repositories.clear()
    hub.broken_uploads = 99
    capsys.readouterr()
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--push", "alice/toy"]) == 2
    told = capsys.readouterr()
    assert f"written: {tmp_path / 'out'}" in told.out
    assert "alice/toy: could not be pushed" in told.err
    assert f"`hf upload alice/toy {tmp_path / 'out'} .`." in told.err
    assert hub.repositories == {"alice/toy": {}}


@pytest.mark.usefixtures("login")
def test_a_repository_that_is_there_gets_a_further_commit(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "file.txt").write_text("one")
    push(tmp_path, "alice/toy")
    (tmp_path / "file.txt").write_text("two")
    push(tmp_path, "alice/toy", message="Second")
    assert hub.repositories["alice/toy"] == {"file.txt": b"two"}
    assert hub.messages == ["Upload model", "Second"]


@pytest.mark.usefixtures("impatient")
def test_a_server_that_does_not_answer_is_said(tmp_path: Path, login: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        login.setattr("huggingface_hub.constants.ENDPOINT", address)
        (tmp_path / "file.txt").touch()
        with pytest.raises(CheckpointError, match=r"could not be pushed \(ConnectError: .*network"):
            push(tmp_path, "alice/toy")


def test_who_is_not_logged_in_hears_it_before_the_export(
    parts: dict[str, Path], tmp_path: Path, login: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    login.delenv("HF_TOKEN")
    login.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    checkpoint = make_checkpoint(parts, tmp_path / "own", "phi", "clip")
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--push", "alice/toy"]) == 2
    assert "not logged in; log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
