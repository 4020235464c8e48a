"""What is supervised is exact in every form and template: conversations, written, read and tokenised.

The reference writes each layout by hand, as a list of texts that are learned or not, and tokenises it with
the tokenizer alone. It shares neither the readers nor the templates.
"""

import base64
import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from model.test_processing import LAYOUTS, SYSTEM, make_processors, stage_template, supervised_runs
from tinyllava.config import DataConfig
from tinyllava.data.conversion import read_stored
from tinyllava.data.records import read_records
from tinyllava.model.processing import TinyLlavaProcessor

UNMINDED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
IMAGE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
Pairs = list[tuple[str, str]]
"""The questions and answers of a conversation, whose first question shows an image."""
PIECES = [
    "ASSISTANT:",
    "USER: ",
    "assistant",
    "<b>",
    'a "red" circle',
    "12",
    "\n\n",
    ",",
    ";",
    "Ä\u2028",
    "=1",
]
SPELLED = ["</s>", "<|im_end|>", "<s>", "<|endoftext|>"]
MEANS_MORE = re.compile(r"<\|?image|<video>|<audio>|<img|<ImageHere|^nan$|^NaN$|^#[A-Z/0!?]+$")
"""What a reader takes for an image, or for a cell without a value."""
SPECIAL = re.compile(r"<s>|</s>|<unk>|<\|")
characters = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"], exclude_characters="▁")


def spoken(pieces: list[str]) -> st.SearchStrategy[str]:
    parts = st.lists(st.sampled_from(pieces) | st.text(characters, max_size=4), max_size=6)
    texts = parts.map(lambda some: "".join(some).strip())
    texts = texts.filter(lambda text: bool(text) and not MEANS_MORE.search(text))
    return texts if pieces is SPELLED else texts.filter(lambda text: not SPECIAL.search(text))


def conversations(pieces: list[str]) -> st.SearchStrategy[list[Pairs]]:
    pairs = st.lists(st.tuples(spoken(pieces), spoken(pieces)), min_size=1, max_size=3)
    return st.lists(pairs, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def processors(parts) -> dict[str, TinyLlavaProcessor]:
    return make_processors(parts)


def _llava(talks: list[Pairs], folder: Path) -> Path:
    return _json(
        folder / "llava.json", [{"image": "a.png", "conversations": _turns(pairs)} for pairs in talks]
    )


def _turns(pairs: Pairs) -> list[dict[str, str]]:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        mark = "<image>\n" if number == 0 else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return turns


def _chat(pairs: Pairs, show: Callable[[str], Any], images: list[str] | None) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns.append({"role": "user", "content": show(question) if number == 0 else question})
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns, **({"images": images} if images else {})}


def _typed(image: dict[str, Any]) -> Callable[[str], Any]:
    return lambda question: [image, {"type": "text", "text": question}]


DATA_URL = f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}"
DIALECTS: dict[str, tuple[Callable[[str], Any], list[str] | None]] = {
    "openai": (_typed({"type": "image_url", "image_url": {"url": DATA_URL}}), None),
    "trl": (_typed({"type": "image"}), ["a.png"]),
    "trl without marks": (str, ["a.png"]),
    "llama-factory": (lambda question: f"<image>{question}", ["a.png"]),
    "ms-swift": (lambda question: f"<image>\n{question}", ["a.png"]),
    "qwen": (_typed({"type": "image", "image": "a.png"}), None),
}


def _dialect(name: str) -> Callable[[list[Pairs], Path], Path]:
    show, images = DIALECTS[name]
    return lambda talks, folder: _json(folder / "m.json", [_chat(pairs, show, images) for pairs in talks])


def _texts(talks: list[Pairs], folder: Path) -> Path:
    rows = [
        {"images": [{"bytes": IMAGE}], "texts": [{"user": q, "assistant": a} for q, a in pairs]}
        for pairs in talks
    ]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "cauldron.parquet")
    return folder / "cauldron.parquet"


def _history(talks: list[Pairs], folder: Path) -> Path:
    rows = []
    for pairs in talks:
        (first, reply), *rest = pairs
        *history, (question, answer) = [(f"<image>{first}", reply), *rest]
        rows.append({"images": ["a.png"], "query": question, "response": answer, "history": history})
    (folder / "swift.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "swift.jsonl"


def _csv(talks: list[Pairs], folder: Path) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([("image", "question", "answer"), *(("a.png", *pair) for [pair] in talks)])
    (folder / "table.csv").write_bytes(text.getvalue().encode())
    return folder / "table.csv"


def _xlsx(talks: list[Pairs], folder: Path) -> Path:
    book = openpyxl.Workbook()
    book.active.append(["image", "question", "answer"])
    for row, [pair] in enumerate(talks, 2):
        for column, text in enumerate(("a.png", *pair), 1):
            cell = book.active.cell(row, column, text)
            cell.data_type = "s"  # else "=1" is a formula
    book.save(folder / "table.xlsx")
    return folder / "table.xlsx"


def _rows(talks: list[Pairs]) -> pa.Table:
    image = {"bytes": IMAGE, "path": "elsewhere.png"}
    return pa.Table.from_pylist([{"image": image, "question": q, "answer": a} for [(q, a)] in talks])


def _parquet(talks: list[Pairs], folder: Path) -> Path:
    parquet.write_table(_rows(talks), folder / "hub.parquet")
    return folder / "hub.parquet"


def _datasets(talks: list[Pairs], folder: Path) -> Path:
    (folder / "saved").mkdir(exist_ok=True)
    table = _rows(talks)
    place = str(folder / "saved/data.arrow")
    with pa.OSFile(place, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (folder / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder / "saved"


def _folder(talks: list[Pairs], folder: Path) -> Path:
    place = folder / "photos"
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    for number, [(_, answer)] in enumerate(talks):
        (place / f"{number}.png").write_bytes(IMAGE)
        (place / f"{number}.txt").write_bytes(answer.encode())
    return place


def _tar(talks: list[Pairs], folder: Path) -> Path:
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for number, pairs in enumerate(talks):
            record = json.dumps({"image": "far.png", "conversations": _turns(pairs)}).encode()
            for name, content in ((f"{number}.png", IMAGE), (f"{number}.json", record)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return folder / "shard.tar"


READER = """
import json
def read(path, images):
    for pairs in json.loads(path.read_text(encoding="utf-8")):
        for number, (question, answer) in enumerate(pairs):
            yield {"image": "a.png", "question": question, "answer": answer}
"""


def _own(talks: list[Pairs], folder: Path) -> Path:
    (folder / "mine.py").write_text(READER)
    return _json(folder / "mine.txt", talks)


def _json(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


FORMS: dict[str, Callable[[list[Pairs], Path], Path]] = {
    "llava": _llava,
    **{name: _dialect(name) for name in DIALECTS},
    "cauldron": _texts,
    "query and history": _history,
    "webdataset": _tar,
    "csv": _csv,
    "xlsx": _xlsx,
    "parquet": _parquet,
    "datasets folder": _datasets,
    "image folder": _folder,
    "own reader": _own,
}
ONE_ANSWER = list(FORMS)[-6:]
"""Forms of rows, whose conversations have one answer."""
TURN = {
    "chatml": ("<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "qwen": ("<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", ""),
}
BOS = {"llama": "<s>", "gemma": "<s>", "llama3": "<|begin_of_text|>", "caption": "<s>"}
BOS |= {
    "caption-chatml": "<|im_start|>",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
}


def by_hand(layout: str, pairs: Pairs) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a conversation in the published layout, and whether each is learned."""
    yield BOS.get(layout, ""), False
    if layout in ("phi", "llama", "gemma"):
        yield SYSTEM, False
    for number, (question, answer) in enumerate(pairs):
        image = "<image>" if number == 0 else ""
        if layout.startswith("caption"):
            yield image, False
            yield f"{answer}\n", True
            continue
        asked = f"{image}\n{question}" if image else question
        if layout in TURN:
            head, end, behind = TURN[layout]
            yield head.format(role="user") + asked + end + behind + head.format(role="assistant"), False
            yield answer + end, True
            yield behind, False
        else:
            yield f"USER: {asked} ASSISTANT:", False
            yield f" {answer}{LAYOUTS[layout][1]}", True


def tokenised(processor: TinyLlavaProcessor, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Return ids and what is learned of them: the tokenizer's, with the image's token repeated."""
    found = processor.tokenizer(
        "".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True
    )
    learned = [is_learned for text, is_learned in pieces for _ in text]
    ids: list[int] = []
    supervised: list[bool] = []
    for id_, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        times = processor.num_image_tokens if id_ == processor.image_token_id else 1
        ids += [id_] * times
        supervised += [start < end and learned[start]] * times
    return ids, supervised


def read(form: str, talks: list[Pairs], folder: Path) -> tuple[list[Any], list[Pairs]]:
    """Return what is read of the conversations in a form, and what they are in it."""
    (folder / "a.png").write_bytes(IMAGE)
    if form in ONE_ANSWER:
        talks = [[pair] for pairs in talks for pair in pairs]
    if form == "image folder":
        talks = [[("Describe the image.", answer)] for [(_, answer)] in talks]
    path = FORMS[form](talks, folder)
    reader = f"{folder / 'mine.py'}:read" if form == "own reader" else ""
    images = path if path.is_dir() else folder
    conversations = list(read_records(path, images, reader=reader).conversations)
    data = DataConfig(records=(str(path),), images=str(images), reader=reader)
    assert list(read_stored(data, "", folder / "store").conversations) == conversations
    return conversations, talks


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8, deadline=None, suppress_health_check=UNMINDED)
@given(talks=conversations(PIECES))
def test_ids_and_what_is_learned_of_them_are_those_of_every_layout_by_hand(form, talks, processors, tmp_path):
    conversations, talks = read(form, talks, tmp_path)
    assert len(conversations) == len(talks)
    for layout, processor in processors.items():
        encoded = processor.encode_all(conversations, template=stage_template(layout))
        for one, pairs in zip(encoded, talks, strict=True):
            ids, learned = tokenised(processor, list(by_hand(layout, pairs)))
            assert one.token_ids.tolist() == ids, layout
            assert one.is_supervised.tolist() == learned, layout


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=5, deadline=None, suppress_health_check=UNMINDED)
@given(talks=conversations(SPELLED))
def test_text_that_spells_special_tokens_is_learned_as_text(form, talks, processors, tmp_path):
    conversations, talks = read(form, talks, tmp_path)
    processor = processors["chatml"]
    learned = []
    for conversation in conversations:
        encoded = processor.encode(conversation)
        assert encoded.input_ids.count(processor.image_token_id) == processor.num_image_tokens
        learned += supervised_runs(processor, encoded)
    assert learned == [f"{answer}<|im_end|>" for pairs in talks for _, answer in pairs]
