"""Every form in which data exists: one conversation, written in each, is read as the same one."""

import base64
import csv
import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import openpyxl
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tinyllava.config import DataConfig
from tinyllava.conversation import Conversation
from tinyllava.data.conversion import read_stored
from tinyllava.data.defects import Defect
from tinyllava.data.hashes import records_digest
from tinyllava.data.records import read_configured, read_records
from tinyllava.data.writing import write_records
from tinyllava.errors import ConfigError, DataError

QUESTION, ANSWER = 'What, "exactly",\nis it?', "Roter Käfer; müde."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "images/a.png")
    Image.new("RGB", (4, 4), (0, 255, 0)).save(tmp_path / "images/b.png")
    return tmp_path


def said(conversation: Conversation) -> list[tuple[str, str, int]]:
    return [(m.role, m.text, len(m.images)) for m in conversation.messages]


ASKED = [("user", QUESTION, 1), ("assistant", ANSWER, 0)]
TABLE = {"image": "images/a.png", "question": QUESTION, "answer": ANSWER}
DATA_URL = "data:image/png;base64,"


def chat(content: object, **fields: object) -> dict[str, object]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]
    return {"messages": turns, **fields}


def data_url(folder: Path) -> str:
    return DATA_URL + base64.b64encode((folder / "images/a.png").read_bytes()).decode()


TEXT = {"type": "text", "text": QUESTION}
MESSAGES = {
    "openai": lambda f: chat([TEXT, {"type": "image_url", "image_url": {"url": data_url(f)}}]),
    "openai's responses": lambda f: chat(
        [{"type": "input_image", "image_url": data_url(f)}, {"type": "input_text", "text": QUESTION}]
    ),
    "llama-factory": lambda _: chat(f"<image>{QUESTION}", images=["images/a.png"]),
    "ms-swift": lambda f: chat(f"<image>\n{QUESTION}", images=[str(f / "images/a.png")]),
    "trl": lambda _: chat([{"type": "image"}, TEXT], images=["images/a.png"]),
    "trl without marks": lambda _: chat(QUESTION, images=["images/a.png"]),
    "qwen": lambda f: chat([{"image": (f / "images/a.png").as_uri()}, {"text": QUESTION}]),
    "indices": lambda _: chat(
        [{"type": "image", "index": 0, "text": None}, {**TEXT, "index": None}], images=["images/a.png"]
    ),
    "prompt and completion": lambda _: {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
        "image": "images/a.png",
    },
    "sharegpt with roles": lambda _: {
        "conversations": chat(f"<image>\n{QUESTION}")["messages"],
        "images": ["images/a.png"],
    },
    "cauldron": lambda _: {
        "texts": [{"user": QUESTION, "assistant": ANSWER, "source": "x"}],
        "images": ["images/a.png"],
    },
    "llava": lambda _: {
        "image": "images/a.png",
        "conversations": [
            {"from": "human", "value": f"{QUESTION}\n<image>"},
            {"from": "gpt", "value": ANSWER},
        ],
    },
    "llava with images": lambda _: {
        "images": ["images/a.png"],
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": ANSWER},
        ],
    },
    "columns": lambda _: TABLE,
    "query and response": lambda _: {"query": QUESTION, "response": ANSWER, "images": ["images/a.png"]},
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_each_form_of_a_record(folder, kind):
    record = MESSAGES[kind](folder)
    (folder / "my.json").write_text(json.dumps([record]))
    (folder / "my.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    for name in ("my.json", "my.jsonl.gz"):
        [conversation] = read_records(folder / name, folder).conversations
        assert said(conversation) == ASKED
        [image] = conversation.images
        assert (image.data or image.path.read_bytes()) == (folder / "images/a.png").read_bytes()


def write_csv(path: Path, separator: str = ",", encoding: str = "utf-8", newline: str = "\n") -> None:
    text = io.StringIO()
    rows = csv.DictWriter(text, list(TABLE), delimiter=separator, lineterminator=newline)
    rows.writeheader()
    rows.writerow(TABLE)
    path.write_bytes(text.getvalue().encode(encoding))


def write_xlsx(path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(list(TABLE))
    book.active.append(list(TABLE.values()))
    book.save(path)


def write_parquet(path: Path, row: dict[str, object]) -> None:
    parquet.write_table(pa.Table.from_pylist([row]), path)


def image_cell(path: Path) -> dict[str, object]:
    return {"bytes": (path / "images/a.png").read_bytes(), "path": "elsewhere.png"}


TYPED = [
    {
        "role": "user",
        "content": [
            {"type": "image", "text": None, "index": 0},
            {"type": "text", "text": QUESTION, "index": None},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER, "index": None}]},
]

FILES = {
    "my.csv": lambda p, _: write_csv(p),
    "semicolons.csv": lambda p, _: write_csv(p, ";"),
    "excel.csv": lambda p, _: write_csv(p, ";", "utf-8-sig", "\r\n"),
    "unicode.csv": lambda p, _: write_csv(p, "\t", "utf-16"),
    "my.tsv": lambda p, _: write_csv(p, "\t"),
    "my.xlsx": lambda p, _: write_xlsx(p),
    "paths.parquet": lambda p, _: write_parquet(p, TABLE),
    "hub.parquet": lambda p, f: write_parquet(p, {**TABLE, "image": image_cell(f)}),
    "next.parquet": lambda p, f: write_parquet(p, {**MESSAGES["llava"](f), "image": image_cell(f)}),
    "vsft.parquet": lambda p, f: write_parquet(p, {"messages": TYPED, "images": [image_cell(f)]}),
}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_table(folder, name):
    FILES[name](folder / name, folder)
    [conversation] = read_records(folder / name, folder).conversations
    assert said(conversation) == ASKED
    [image] = conversation.images
    assert (image.data or image.path.read_bytes()) == (folder / "images/a.png").read_bytes()


def test_a_spreadsheet_with_columns_of_its_own_names(folder):
    (folder / "my.csv").write_text("Bild;Frage;Antwort;Farbe\nimages/a.png;Was?;Käfer;rot\n")
    with pytest.raises(DataError, match=r"no columns for question and answer among 'Bild', 'Frage'"):
        read_records(folder / "my.csv", folder)
    columns = ("image=Bild", "question=frage", "answer=Antwort")
    records = read_configured(DataConfig(records=(str(folder / "my.csv"),), columns=columns))
    assert said(records.conversations[0]) == [("user", "Was?", 1), ("assistant", "Käfer", 0)]
    assert records.ignored == {"Farbe": 1}
    assert records.conversations[0].place == f"{folder / 'my.csv'}: line 2"
    with pytest.raises(
        DataError, match=r"--column answer=Reply: unknown\. Give KIND=NAME, with KIND one of image"
    ):
        read_configured(DataConfig(records=(str(folder / "my.csv"),), columns=("answer=Reply",)))
    with pytest.raises(ConfigError, match="write KIND=NAME"):
        read_configured(DataConfig(records=(str(folder / "my.csv"),), columns=("answer",)))


def test_numbers_in_a_table_are_what_they_look_like(folder):
    book = openpyxl.Workbook()
    for row in (["question", "answer"], ["How many?", 5], ["How long?", 2.5], ["Sure?", True], [None, None]):
        book.active.append(row)
    book.save(folder / "my.xlsx")
    with pytest.raises(Defect, match=r"row 4: 'answer' must be text or a number, found True"):
        read_records(folder / "my.xlsx", folder)
    kept = read_records(folder / "my.xlsx", folder, ("malformed",)).conversations
    assert [c.messages[1].text for c in kept] == ["5", "2.5"]


def test_folders_of_images(folder):
    images = folder / "images"
    (images / "beetle").mkdir()
    for source, target in (("a.png", "beetle/1.png"), ("a.png", "moth_12.png"), ("b.png", "c.png")):
        (images / target).write_bytes((images / source).read_bytes())
    (images / "c.txt").write_text("A green square.\n")
    (images / "a.png").unlink()
    (images / "b.png").unlink()
    found = read_records(images, images).conversations
    assert [(c.images[0].name, c.messages[1].text) for c in found] == [
        ("beetle/1.png", "beetle"),
        ("c.png", "A green square."),
        ("moth_12.png", "moth"),
    ]
    assert found[1].messages[0].text == "Describe the image."
    (images / "IMG_0001.png").write_bytes((images / "c.png").read_bytes())
    with pytest.raises(
        Defect, match=r"file IMG_0001\.png: no label; put it into a folder .* \[empty_answer\]"
    ):
        read_records(images, images)
    (images / "metadata.csv").write_text("file_name,text\nc.png,From the table\n")
    [one] = read_records(images, images).conversations
    assert one.messages[1].text == "From the table"


def test_linked_folders_of_images_are_read_and_a_link_that_leads_back_is_not(folder, tmp_path):
    for label in ("beetle", "moth"):
        place = tmp_path / f"disk-{label}"
        place.mkdir()
        (place / "1.png").write_bytes((folder / "images" / "a.png").read_bytes())
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "moth").symlink_to(tmp_path / "disk-moth")
    (tmp_path / "disk-beetle").rename(photos / "beetle")
    (photos / "beetle" / "again").symlink_to(photos)
    found = read_stored(DataConfig(records=(str(photos),)), "", tmp_path / "store").conversations
    assert [talk.messages[-1].text for talk in found] == ["beetle", "moth"]
    (tmp_path / "disk-moth" / "2.png").write_bytes((folder / "images" / "a.png").read_bytes())
    found = read_stored(DataConfig(records=(str(photos),)), "", tmp_path / "store").conversations
    assert [talk.messages[-1].text for talk in found] == ["beetle", "moth", "moth"]


def test_a_users_own_reader(folder):
    (folder / "mine.py").write_text(
        "def read(path, images):\n"
        "    for line in path.read_text().splitlines():\n"
        "        image, question, answer = line.split('|')\n"
        "        yield {'image': image, 'question': question, 'answer': answer}\n"
    )
    (folder / "my.txt").write_text("images/a.png|What?|A beetle\n")
    data = DataConfig(records=(str(folder / "my.txt"),), reader=f"{folder / 'mine.py'}:read")
    [conversation] = read_configured(data).conversations
    assert said(conversation) == [("user", "What?", 1), ("assistant", "A beetle", 0)]
    (folder / "my.txt").write_text("images/a.png|What?\n")
    with pytest.raises(ConfigError, match=r"mine\.py: line 3: ValueError: not enough values"):
        read_configured(data)


FOREIGN = {
    "video": ({"video": "a.mp4", **TABLE}, "unsupported", "'video'"),
    "mark of a video": (
        {"question": "<video>\nWhat?", "answer": "A"},
        "unsupported",
        "<video> in a question",
    ),
    "typed video": (chat([{"type": "video", "video": "a.mp4"}]), "unsupported", "type 'video'"),
    "tool": ({"messages": [{"role": "tool", "content": "x"}]}, "unsupported", "turn 0 is from 'tool'"),
    "two fields": (
        {"image": "images/a.png", "images": ["images/b.png"], **chat("Q")},
        "malformed",
        "'image' and 'images' name different images",
    ),
    "too few": (chat("<image><image>Q", images=["images/a.png"]), "image_count", "2 <image> marks for 1"),
    "index": (
        chat([{"type": "image", "index": 3}, TEXT], images=["images/a.png"]),
        "image_count",
        "refers to image 3, but the record has 1",
    ),
    "address": (
        {**TABLE, "image": "https://example.org/a.png"},
        "missing_image",
        "example.org/a.png is a URL; allow downloads with --allow-urls",
    ),
    "several answers": ({"question": "Q", "answer": ["A", "B"]}, "malformed", "found a list of 2"),
    "broken data url": ({**TABLE, "image": "data:image/png;base64,@"}, "malformed", "cannot be read"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_cannot_be_used_is_a_named_defect(folder, case):
    record, name, message = FOREIGN[case]
    (folder / "my.jsonl").write_text(json.dumps(record))
    with pytest.raises(Defect, match=message) as caught:
        read_records(folder / "my.jsonl", folder)
    assert caught.value.name == name
    assert str(caught.value).startswith(f"{folder / 'my.jsonl'}: line 1: ")


def test_a_system_field_is_the_first_turn_and_other_fields_are_counted(folder):
    record = {**chat("Q"), "system": "Be short.", "source": "web", "rating": 3}
    (folder / "my.json").write_text(json.dumps([record, {**record, "rating": 4}, chat("Q2")]))
    records = read_records(folder / "my.json", folder)
    assert said(records.conversations[0])[0] == ("system", "Be short.", 0)
    assert records.ignored == {"source": 2, "rating": 2}


def test_images_at_addresses_are_downloaded_once_and_within_a_limit(folder, monkeypatch):
    import http.server
    import threading
    import time
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    from tinyllava.data.readers import image_values

    class Silent(http.server.SimpleHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012

        def log_message(self, *_):
            self.asked.append(self.path)

        def copyfile(self, source, outputfile):
            content = source.read()
            outputfile.write(content[:20])
            time.sleep(0.1)  # so that two readers would write at a time
            outputfile.write(content[20:])

    monkeypatch.setenv("TINYLLAVA_CACHE", str(folder / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/images/"
        (folder / "my.jsonl").write_text(json.dumps({**TABLE, "image": f"{url}a.png"}))
        with ThreadPoolExecutor(2) as threads:  # as processes that convert slices of a file do
            reads = [
                threads.submit(read_records, folder / "my.jsonl", folder, allow_urls=True) for _ in range(3)
            ]
        for read in reads:
            [one] = read.result().conversations
            assert one.images[0].path.read_bytes() == (folder / "images/a.png").read_bytes()
        assert len(Silent.asked) == 1
        (folder / "my.jsonl").write_text(json.dumps({**TABLE, "image": f"{url}none.png"}))
        with pytest.raises(Defect, match=r"none\.png cannot be downloaded \(.*404"):
            read_records(folder / "my.jsonl", folder, allow_urls=True)
        monkeypatch.setattr(image_values, "MAX_DOWNLOAD_BYTES", 10)
        (folder / "my.jsonl").write_text(json.dumps({**TABLE, "image": f"{url}b.png"}))
        with pytest.raises(Defect, match=r"b\.png is larger than 10 bytes"):
            read_records(folder / "my.jsonl", folder, allow_urls=True)
        server.shutdown()


def test_a_table_that_the_users_own_function_reads_may_have_any_columns(folder):
    (folder / "mine.csv").write_text("bild,frage,antwort\na.png,Was?,Rot\n")
    (folder / "mine.py").write_text(
        "import csv\n"
        "def read(path, images):\n"
        "    for row in csv.DictReader(path.open()):\n"
        "        yield {'image': row['bild'], 'question': row['frage'], 'answer': row['antwort']}\n"
    )
    reader = f"{folder / 'mine.py'}:read"
    [one] = read_records(folder / "mine.csv", folder / "images", reader=reader).conversations
    assert [message.text for message in one.messages] == ["Was?", "Rot"]


ODD = {
    "latin-1": (b"question,answer\nQ,M\xfcde\n", r"odd\.csv: not UTF-8 .*Save it as UTF-8"),
    "too many cells": (b"question,answer\nQ,A, B\n", r"line 2: 3 values for 2 columns"),
    "open quote": (b'question,answer\nQ,A\n"Q,A\n', r"line 3: not CSV \(unexpected end of data\)"),
    "two columns of a name": (b"answer,answer\nQ,A\n", r"two columns are named 'answer'"),
    "empty": (b"", r"odd\.csv: an empty file"),
    "names alone": (b"question,answer\n", "no records in it"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_table_that_cannot_be_read(folder, case):
    content, message = ODD[case]
    (folder / "odd.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(folder / "odd.csv", folder)


def test_archives_that_are_no_tables(folder):
    import zipfile

    with zipfile.ZipFile(folder / "my.xlsx", "w") as archive:
        archive.writestr("a.txt", "no workbook")
    with pytest.raises(DataError, match="not a workbook"):
        read_records(folder / "my.xlsx", folder)
    (folder / "my.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_records(folder / "my.parquet", folder)


@pytest.mark.parametrize("key", ["loss", "weight", "train"])
@pytest.mark.parametrize("form", ["llava", "messages"])
def test_a_turn_says_whether_it_adds_to_the_loss_and_keeps_it_when_converted(tmp_path, key, form):
    names = {"llava": ("conversations", "from", "value"), "messages": ("messages", "role", "content")}[form]
    turns = [("user", "A?", None), ("assistant", "a", 0), ("user", "B?", 0), ("assistant", "b", True)]
    turns += [("user", "C?", None), ("assistant", "c", None)]
    written = [
        {names[1]: role, names[2]: text, **({} if value is None else {key: value})}
        for role, text, value in turns
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "r", names[0]: written}]))
    before = read_records(tmp_path / "a.json", tmp_path).conversations
    assert [m.is_trained for m in before[0].messages if m.role == "assistant"] == [False, True, True]
    for name, kind in (("b.json", "llava"), ("c.jsonl", "messages"), ("d.parquet", "llava")):
        write_records(before, tmp_path / name, kind)
        [after] = read_records(tmp_path / name, tmp_path).conversations
        assert after.messages == before[0].messages
    assert records_digest(before) != records_digest(
        [replace(before[0], messages=tuple(replace(m, is_trained=True) for m in before[0].messages))]
    )


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"from": "gpt", "value": "a", "weight": 0.5}, "turn 1 has weight 0.5; allowed: 0 and 1"),
        ({"from": "gpt", "value": "a", "weight": 0, "loss": True}, "which contradict each other"),
    ],
)
def test_a_weight_that_cannot_be_followed_is_a_named_defect(tmp_path, turn, said):
    question = {"from": "human", "value": "A?"}
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": [question, turn]}]))
    with pytest.raises(Defect, match=re.escape(said)):
        read_records(tmp_path / "a.json", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": [{**question, "loss": 1}, turn]}]))
    with pytest.raises(Defect, match=r"turn 0 \(user\) has loss 1; only answers can be trained"):
        read_records(tmp_path / "a.json", tmp_path)


def place(*content: object, **turn: object) -> list[dict[str, object]]:
    answer = {"role": "assistant", "content": "A", **turn}
    return [{"role": "user", "content": list(content)}, answer]


IMAGE_A, IMAGE_B = ({"type": "image", "path": f"images/{name}.png"} for name in "ab")


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


PLACES = {
    "in front": ((IMAGE_A, IMAGE_B, text("\nAlike?")), "Alike?", ()),
    "in the middle": ((text("Is "), IMAGE_A, text(" like "), IMAGE_B, text("? ")), "Is  like ?", (3, 9)),
    "behind": ((text(" What?\n"), IMAGE_A), "What?", (5,)),
    "around": ((IMAGE_A, text(" or "), IMAGE_B), "or", (0, 2)),
}


@pytest.mark.parametrize("case", PLACES)
def test_images_stay_where_a_list_of_content_has_them(folder, case):
    content, expected, places = PLACES[case]
    (folder / "my.json").write_text(json.dumps([{"messages": place(*content)}]))
    [conversation] = read_records(folder / "my.json", folder).conversations
    message = conversation.messages[0]
    assert (message.text, message.places) == (expected, places)
    assert [ref.path.stem for ref in message.images] == ["a", "b"][: len(message.images)]


def test_images_of_llavas_records_come_first_as_published(folder):
    turns = [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "A"}]
    record = {"image": ["images/a.png", "images/b.png"], "conversations": turns}
    (folder / "my.json").write_text(json.dumps([record]))
    [conversation] = read_records(folder / "my.json", folder).conversations
    assert (conversation.messages[0].text, conversation.messages[0].places) == ("Is  like ?", ())


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    import tarfile

    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_a_webdataset_is_read_sample_by_sample(folder):
    a, b = ((folder / f"images/{name}.png").read_bytes() for name in "ab")
    record = json.dumps({"image": "elsewhere.jpg", **MESSAGES["llava"](folder)}).encode()
    members = {
        "x/0.png": a,
        "x/0.json": record,
        "1.json": record,
        "1.png": b,
        "2.png": a,
        "2.txt": b"A red square.\n",
        "3.png": b,
        "3.cls": b"square",
    }
    write_tar(folder / "my.tar", members)
    found = read_records(folder / "my.tar", folder).conversations
    assert [c.messages[-1].text for c in found] == [ANSWER, ANSWER, "A red square.", "square"]
    assert [c.images[0].data for c in found] == [a, b, a, b]
    assert found[0].place == f"{folder / 'my.tar'}: sample x/0"
    write_tar(folder / "bad.tar", {"0.json": b"{"})
    with pytest.raises(DataError, match=r"bad\.tar: 0\.json: cannot be read \(Expecting"):
        read_records(folder / "bad.tar", folder)
    write_tar(folder / "video.tar", {"0.mp4": b"", "0.txt": b"A video."})
    with pytest.raises(Defect, match=r"sample 0: 'video' = 0.mp4: only images and text"):
        read_records(folder / "video.tar", folder)
    (folder / "cut.tar").write_bytes((folder / "my.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"cut\.tar: cannot be read as a tar file"):
        read_records(folder / "cut.tar", folder)


def test_a_folder_of_the_library_datasets(folder):
    features = {"image": {"_type": "Image"}, "label": {"names": ["beetle", "moth"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    rows = [{"image": image_cell(folder), "label": label} for label in (1, 0, 1)]
    table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    saved = folder / "saved"
    saved.mkdir()
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(saved / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    parquet.write_table(table, folder / "hub.parquet")
    for path in (saved, folder / "hub.parquet"):
        found = read_records(path, folder).conversations
        assert [c.messages[1].text for c in found] == ["moth", "beetle", "moth"]
        assert found[0].images[0].data == image_cell(folder)["bytes"]
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match=r"has the splits train, test\. Give one of them: .*/train or"):
        read_records(folder, folder)
    (saved / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match="cannot be read as a folder of datasets"):
        read_records(saved, folder)
