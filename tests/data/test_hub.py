"""Data sets of the hub by name, from a server that stands in for it, and from the cache without a network."""

import io
import json
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pytest
from huggingface_hub import constants
from PIL import Image
from pyarrow import parquet

from tinyllava.cli import main
from tinyllava.config import DataConfig
from tinyllava.data.readers.hub import HubName, parse_hub_name
from tinyllava.data.records import read_configured
from tinyllava.errors import ConfigError
from tinyllava.evaluation.checkpoint import find_questions
from tinyllava.evaluation.own_data import own_benchmark
from training_toys import toy_run, write_run

COMMIT = "c0ffee" + "0" * 34


def image(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def parquet_bytes(*answers: str, **fields: object) -> bytes:
    shown = {"bytes": image("red"), "path": "a.png"}
    rows = [{"image": shown, "question": f"Q {one}?", "answer": one, **fields} for one in answers]
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


CARD = """---
license: cc-by-4.0
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
        "full/train-0.parquet": parquet_bytes("a", "b", "c", kind="letters"),
        "full/train-1.parquet": parquet_bytes("d", kind="digits"),
        "full/test-0.parquet": parquet_bytes("e"),
        "full/test-1.parquet": parquet_bytes("g"),
        "small/0.parquet": parquet_bytes("f"),
    },
    "owner/name": {  # of the guide
        "README.md": b"---\nconfigs:\n- {config_name: config, default: true, data_files: "
        b"[{split: train, path: train.parquet}, {split: test, path: test.parquet}]}\n---\n",
        "train.parquet": parquet_bytes(*"abcdefgh"),
        "test.parquet": parquet_bytes("a"),
    },
    "somebody/looks": {
        f"{name[0]}.jsonl": json.dumps(
            {"image": f"{name}.png", "question": "Q?", "answer": name, "kind": name[0]}
        ).encode()
        for name in ("red", "blue")
    }
    | {f"{name}.png": image(name) for name in ("red", "blue")},
    "somebody/beside": {
        "test.jsonl": b'{"image": "images/a.png", "question": "Q?", "answer": "A"}',
        "images/a.png": image("red"),
    },
    "somebody/folders": {
        f"data/{split}/{colour}/{number}.png": image(colour)
        for split, numbers in (("train", (1, 2)), ("test", (3,)))
        for colour in ("red", "blue")
        for number in numbers
    },
    "somebody/described": {
        "train/metadata.csv": b"file_name,question,answer\na.png,Which colour?,red\n",
        "train/a.png": image("red"),
    },
    "somebody/mixed": {"train_red_1.png": image("red"), "test_red_2.png": image("red")},
    "somebody/packed": {
        "chat.json": b'[{"image": "a.png", "question": "Q?", "answer": "A"}]',
        "chat_meta.json": b"[]",
        "images.zip": b"PK",
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


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(endpoint, tmp_path, monkeypatch) -> Path:
    """A cache that is empty, and the hub that is asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_the_parts_of_a_name() -> None:
    assert parse_hub_name("hf:a/b") == HubName(repository="a/b")
    whole = HubName(repository="a/b", config="c", split="test", revision="v1.0")
    assert parse_hub_name("hf:a/b/c:test@v1.0") == whole
    assert str(whole) == "hf:a/b/c:test@v1.0"
    with pytest.raises(ConfigError, match="hf:mugs: write hf:owner/name"):
        parse_hub_name("hf:mugs")


def tell(capsys, *words: str) -> tuple[int, str]:
    status = main(list(words))
    said = capsys.readouterr()
    return status, " ".join((said.out + said.err).split())


def test_a_split_is_read_once_from_the_hub_and_then_offline(hub, monkeypatch, capsys) -> None:
    status, said = tell(capsys, "data", "check", "hf:somebody/mugs")
    assert (status, "4 records, 4 without a defect" in said) == (0, True), said
    _, said = tell(capsys, "data", "check", "hf:somebody/mugs:valid")
    assert "no split 'valid'; it has train, test. Write hf:somebody/mugs:train." in said
    _, said = tell(capsys, "data", "check", "hf:somebody/none")
    assert "the hub has no such data set or revision" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, said = tell(capsys, "data", "convert", "hf:somebody/mugs:train,limit=3", "some.json")
    assert status == 0, said
    assert len(json.loads(Path("some.json").read_text())) == 3
    status, said = tell(capsys, "data", "check", "hf:somebody/other")
    assert (status, "hf:somebody/other: not in the cache" in said) == (2, True), said
    assert "HF_HUB_OFFLINE is set" in said


def test_all_files_of_a_split_are_questions_and_sides_of_a_split(hub, capsys) -> None:
    whole = own_benchmark("hf:somebody/mugs/full:train")
    questions = whole.load(Path())
    assert [question.target["answers"] for question in questions] == [["a"], ["b"], ["c"], ["d"]]
    assert [question.id for question in questions][2:] == [
        "train-0.parquet: record 2",
        "train-1.parquet: record 0",
    ]
    assert [question.category for question in questions][2:] == ["letters", "digits"]
    assert len(find_questions("hf:somebody/mugs:test", "all")[0]["own-mugs_test"].load(Path())) == 2
    assert tell(capsys, "data", "convert", "hf:somebody/mugs", "all.json")[0] == 0
    written = json.loads(Path("all.json").read_text())
    assert [record["kind"] for record in written] == ["letters"] * 3 + ["digits"]
    assert json.loads(Path("licences.json").read_text()) == {"hf:somebody/mugs": "cc-by-4.0"}
    status, said = tell(capsys, "data", "split", "hf:somebody/looks", "--held-out", "50%")
    assert status == 0, said
    sides = [json.loads(Path(f"somebody-looks-{side}.json").read_text()) for side in ("train", "held-out")]
    assert sorted(len(side) for side in sides) == [1, 1]
    assert sorted(record["kind"] for side in sides for record in side) == ["b", "r"]


def test_images_come_in_folders_beside_records_or_are_refused_with_the_way_out(hub, capsys) -> None:
    [folder] = read_configured(DataConfig(records=("hf:somebody/folders:train",))).conversations[:1]
    assert folder.messages[1].text == "blue"
    status, said = tell(capsys, "data", "check", "hf:somebody/folders:test")
    assert (status, "2 records, 2 without a defect" in said, "1 50% red" in said) == (0, True, True), said
    for name in ("beside", "described"):
        status, said = tell(capsys, "data", "check", f"hf:somebody/{name}")
        assert (status, "1 record, 1 without a defect" in said) == (0, True), said
    status, said = tell(capsys, "data", "check", "hf:somebody/mixed:train")
    assert (status, "test_red_2.png of another split is in the same folder" in said) == (2, True), said
    status, said = tell(capsys, "data", "check", "hf:somebody/packed/chat.json")
    assert status == 2
    assert "its images are in images.zip. Download it with `hf download somebody/packed images.zip" in said
    Path("unpacked").mkdir()
    Path("unpacked/a.png").write_bytes(image("red"))
    status, said = tell(capsys, "data", "check", "hf:somebody/packed/chat.json", "--images", "unpacked")
    assert (status, "1 record, 1 without a defect" in said) == (0, True), said


def test_a_run_records_the_commit_of_its_data_and_its_model_the_licence(
    hub, parts, records, tmp_path, capsys
) -> None:
    named = write_run(toy_run(parts, records, tmp_path / "run"), tmp_path)
    options = ["--data", "hf:somebody/mugs/full:train", "--only", "finetune", "--finetune.max-steps", "1"]
    options += ["--held-out", "hf:somebody/mugs/full:test"]
    status, said = tell(capsys, "train", named, *options)
    assert status == 0, said
    kept = json.loads((tmp_path / "run/run.json").read_text())["stages"]["finetune"]["data"]["records"]
    assert kept == [f"hf:somebody/mugs/full:train@{COMMIT}"]
    held_out = json.loads((tmp_path / "run/finetune/stage.json").read_text())["data"]["held_out"]
    assert (held_out["num_samples"], held_out["num_with_seen_image"]) == (2, 2)  # all show one image
    status, said = tell(capsys, "export", str(tmp_path / "run/model"), str(tmp_path / "out"))
    assert status == 0, said
    assert "| data: hf:somebody/mugs | cc-by-4.0 |" in (tmp_path / "out/README.md").read_text()
