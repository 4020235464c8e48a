"""What is supervised stays exact in every form: generated conversations, written, read and tokenised."""

import base64
import csv
import io
import json
import tarfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tinyllava.config import DataConfig, ModelConfig
from tinyllava.data.conversion import read_stored
from tinyllava.data.records import read_records
from tinyllava.model.assemble import assemble
from tinyllava.model.processing import TinyLlavaProcessor

IMAGE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
Pair = tuple[str, str]
PIECES = ["ASSISTANT:", "USER: ", "</s>", "<|im_end|>", 'a "red" circle', "12", "\n\n", ",", ";", "Ä\u2028"]
characters = st.characters(codec="utf-8", exclude_characters="▁\x00\r")
texts = st.lists(st.sampled_from(PIECES) | st.text(characters, max_size=4), max_size=6)
spoken = texts.map(lambda parts: "".join(parts).strip()).filter(
    lambda text: bool(text) and "<image>" not in text and "<video>" not in text
)


@pytest.fixture(scope="module")
def processor(parts) -> TinyLlavaProcessor:
    config = ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts["chatml"]))
    return assemble(config)[1]


def _llava(pairs: list[Pair], folder: Path) -> Path:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        mark = "<image>\n" if number == 0 else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return _json(folder / "llava.json", [{"image": "a.png", "conversations": turns}])


def _messages(pairs: list[Pair], folder: Path) -> Path:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        content = [{"type": "image", "path": "a.png"}] if number == 0 else []
        turns.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        turns.append({"role": "assistant", "content": answer})
    return _json(folder / "messages.json", [{"messages": turns}])


def _texts(pairs: list[Pair], folder: Path) -> Path:
    texts = [{"user": question, "assistant": answer} for question, answer in pairs]
    path = folder / "cauldron.parquet"
    parquet.write_table(pa.Table.from_pylist([{"images": [{"bytes": IMAGE}], "texts": texts}]), path)
    return path


def _history(pairs: list[Pair], folder: Path) -> Path:
    *history, (question, answer) = pairs
    if history:
        history[0] = (f"<image>{history[0][0]}", history[0][1])
    row = {"images": ["a.png"], "query": question, "response": answer, "history": history}
    path = folder / "swift.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    return path


def _csv(pairs: list[Pair], folder: Path) -> Path:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["image", "question", "answer"])
    rows.writerows(["a.png", *pair] for pair in pairs)
    (folder / "table.csv").write_bytes(text.getvalue().encode())
    return folder / "table.csv"


def _tar(pairs: list[Pair], folder: Path) -> Path:
    data = json.dumps(json.loads(_llava(pairs, folder).read_bytes())[0]).encode()
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for name, content in (("0.png", IMAGE), ("0.json", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / "shard.tar"


def _json(path: Path, records: list[object]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


FORMS: dict[str, Callable[[list[Pair], Path], Path]] = {
    "llava": _llava,
    "messages": _messages,
    "cauldron": _texts,
    "query and history": _history,
    "csv": _csv,
    "webdataset": _tar,
}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(spoken, spoken), min_size=1, max_size=3))
def test_what_is_supervised_is_every_answer_and_nothing_else(form, pairs, processor, tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGE)
    path = FORMS[form](pairs, tmp_path)
    conversations = read_records(path, tmp_path, ("duplicate_id",)).conversations
    stored = read_stored(DataConfig(records=(str(path),), skip=("duplicate_id",)), "", tmp_path / "store")
    assert list(stored.conversations) == list(conversations)
    learned = []
    for conversation in conversations:
        encoded = processor.encode(conversation)
        runs = groupby(zip(encoded.supervised, encoded.input_ids, strict=True), key=lambda pair: pair[0])
        for is_supervised, run in runs:
            if is_supervised:
                ids = [token for _, token in run]
                learned.append(processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        images = encoded.input_ids.count(processor.image_token_id)
        assert images == processor.num_image_tokens * len(conversation.images)
    assert learned == [f"{answer}<|im_end|>" for _, answer in pairs]
    assert sum(len(conversation.images) for conversation in conversations) == (
        len(pairs) if form == "csv" else 1
    )
