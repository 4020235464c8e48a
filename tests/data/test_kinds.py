"""Kinds of files that cause trouble, each written to disk and checked by the command: read, or rejected.

The table in docs/guides/files.md is made of these rows: ``python tests/data/test_kinds.py`` writes it.
"""

import base64
import csv
import datetime
import gzip
import io
import json
import math
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow as pa
import pytest
from openpyxl.drawing.image import Image as Picture
from PIL import Image
from pyarrow import parquet

from documents import ROOT
from tinyllava.cli import main
from tinyllava.data.records import read_records

PAGE = ROOT / "docs/guides/files.md"
START, END = "<!-- rows of tests/data/test_kinds.py -->", "<!-- end of the rows -->"
Q, A, ID = "What is it?", "A mug.", "mug-7"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
TABLE = "image,question,answer\na.jpg,What is it?,A mug.\n"
Turns = list[tuple[str, str, int]]
"""Of a record: role, text, number of images."""
ASKED: Turns = [("user", Q, 1), ("assistant", A, 0)]
UNSEEN: Turns = [("user", Q, 0), ("assistant", A, 0)]


def answered(answer: str, question: str = Q, images: int = 1) -> Turns:
    return [("user", question, images), ("assistant", answer, 0)]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file: how it is written, and the records that are read or the words that refuse it."""

    write: Callable[[Path], Path]
    reads: tuple[Turns, ...] = ()
    says: tuple[str, ...] = ()
    """What the command prints; the first is in the documentation's table."""


def llava(
    image: Any = "a.jpg", question: Any = f"<image>\n{Q}", answer: Any = A, **more: Any
) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record = {"id": ID, "image": image, "conversations": turns, **more}
    return {key: value for key, value in record.items() if value is not ...}


def turns_of(*turns: tuple[str, str]) -> dict[str, Any]:
    return llava(conversations=[{"from": role, "value": text} for role, text in turns])


def chat(content: Any = Q, answer: Any = A, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": ID, "messages": turns, **more}


def row(answer: Any = A, **more: Any) -> dict[str, Any]:
    return {"image": "a.jpg", "question": Q, "answer": answer, **more}


def write(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return make


def array(*records: Any, name: str = "my.json") -> Callable[[Path], Path]:
    return write(name, json.dumps(list(records)))


def lines(*records: Any, name: str = "my.jsonl", between: str = "\n") -> Callable[[Path], Path]:
    return write(name, between.join(json.dumps(record) for record in records))


def shown(
    name: str, content: bytes | Callable[[Path], object], question: str = f"<image>\n{Q}"
) -> Callable[[Path], Path]:
    """A record that shows an image of that name, which is these bytes or is saved by the function."""

    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
        return array(llava(name.replace("=", "/"), question))(folder)

    return make


def moved(name: str, as_written: str) -> Callable[[Path], Path]:
    """A record that names an image as ``as_written``; its file has another name."""

    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((folder / "a.jpg").read_bytes())
        return array(llava(as_written))(folder)

    return make


def sheet(
    *rows: list[Any], merged: str = "", name: str = "my.xlsx", second: bool = False
) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        book = openpyxl.Workbook()
        page = book.create_sheet("data") if second else book.active
        for cells in rows:
            page.append(cells)
        if merged:
            page.merge_cells(merged)
        book.save(folder / name)
        return folder / name

    return make


def pasted(folder: Path) -> Path:
    book = openpyxl.Workbook()
    book.active.append(["image", "question", "answer"])
    book.active.append([None, Q, A])
    book.active.add_image(Picture(str(folder / "a.jpg")), "A2")
    book.save(folder / "my.xlsx")
    return folder / "my.xlsx"


def columns(*rows: dict[str, Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        parquet.write_table(pa.Table.from_pylist(list(rows)), folder / "my.parquet")
        return folder / "my.parquet"

    return make


def of_image(make: Callable[[bytes], Any], as_parquet: bool = False) -> Callable[[Path], Path]:
    """A table whose image is made of the bytes of one."""

    def written(folder: Path) -> Path:
        record = row(image=make((folder / "a.jpg").read_bytes()))
        return (columns if as_parquet else array)(record)(folder)

    return written


def cut(make: Callable[[Path], Path], num_bytes: int) -> Callable[[Path], Path]:
    def written(folder: Path) -> Path:
        path = make(folder)
        path.write_bytes(path.read_bytes()[:-num_bytes])
        return path

    return written


def arrow(folder: Path) -> Path:
    table = pa.Table.from_pylist([row()])
    with pa.OSFile(str(folder / "my.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "my.arrow"


def archive(members: dict[str, bytes | str], name: str = "my.tar") -> Callable[[Path], Path]:
    """A tar file; a text that is the name of an image stands for its bytes."""

    def make(folder: Path) -> Path:
        with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as tar:
            for member, content in members.items():
                data = (folder / content).read_bytes() if isinstance(content, str) else content
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return folder / name

    return make


def zipped(name: str, members: dict[str, str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w") as file:
            for member, content in members.items():
                file.writestr(member, content)
        return folder / name

    return make


def tree(*names: str, **texts: str | bytes) -> Callable[[Path], Path]:
    """A folder of copies of the image, with more files by their names (``__`` for a dot)."""

    def make(folder: Path) -> Path:
        for name in names:
            (folder / "mugs" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "mugs" / name).write_bytes((folder / "a.jpg").read_bytes())
        (folder / "mugs").mkdir(exist_ok=True)
        for name, text in texts.items():
            write(f"mugs/{name.replace('__', '.')}", text)(folder)
        return folder / "mugs"

    return make


def saved(folder: Path) -> Path:
    table = pa.Table.from_pylist([row(image={"bytes": (folder / "a.jpg").read_bytes(), "path": None})])
    (folder / "saved").mkdir()
    place = str(folder / "saved/data.arrow")
    with pa.OSFile(place, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (folder / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder / "saved"


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def rotated(path: Path) -> None:
    image = photo()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def quoted(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


DATE = datetime.datetime(2024, 3, 5)
AS_JSON = json.dumps(llava()["conversations"])
AS_REPR = repr(llava()["conversations"])
RECORD = "my.json: record 0 (id mug-7)"
HEAD = ["image", "question", "answer"]

KINDS: dict[str, dict[str, Kind]] = {
    "JSON": {
        "LLaVA's array": Kind(write=array(llava()), reads=(ASKED,)),
        "JSON lines": Kind(write=lines(llava(), llava("b.jpg")), reads=(ASKED, ASKED)),
        "JSON lines named `.json`": Kind(
            write=lines(llava(), llava("b.jpg"), name="my.json"), reads=(ASKED, ASKED)
        ),
        "an array named `.jsonl`": Kind(write=array(llava(), name="my.jsonl"), reads=(ASKED,)),
        "a single record on several lines": Kind(
            write=write("my.jsonl", json.dumps(llava(), indent=2)), reads=(ASKED,)
        ),
        "Windows line endings": Kind(
            write=lines(llava(), llava("b.jpg"), between="\r\n"), reads=(ASKED, ASKED)
        ),
        "a byte order mark (BOM)": Kind(
            write=write("my.json", "\ufeff" + json.dumps([llava()])), reads=(ASKED,)
        ),
        "UTF-16": Kind(write=write("my.json", json.dumps([llava()]).encode("utf-16")), reads=(ASKED,)),
        "UTF-16 without a BOM": Kind(
            write=write("my.json", json.dumps([llava()]).encode("utf-16-le")),
            says=("UTF-16 without a byte order mark. Save it as UTF-8.",),
        ),
        "Latin-1": Kind(
            write=write("my.json", '[{"question": "Wer?", "answer":\n"Krügel"}]'.encode("latin-1")),
            says=("not UTF-8 (invalid start byte at byte 35, line 2). Save it as UTF-8.",),
        ),
        "gzip, with any file name": Kind(
            write=write("my.json", gzip.compress(json.dumps([llava()]).encode())), reads=(ASKED,)
        ),
        "zipped": Kind(
            write=zipped("my.zip", {"my.json": json.dumps([llava()])}),
            says=("a ZIP archive, not a workbook. Unpack it, and give the record file in it.",),
        ),
        "a list inside the list": Kind(
            write=array([llava()], [llava()]),
            says=("expected an object with a non-empty list 'conversations', found a list", "record 1:"),
        ),
        "records under a key (`data`)": Kind(
            write=write("my.json", json.dumps({"version": 1, "data": [llava()]})),
            says=(
                "expected a list of records, found an object with the keys version, data.",
                "list of records",
            ),
        ),
        "COCO annotations": Kind(
            write=write(
                "my.json",
                json.dumps({"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": A}]}, indent=1),
            ),
            says=("expected a list of records, found an object with the keys images, annotations.",),
        ),
        "an object with records by id": Kind(
            write=write("my.json", json.dumps({"a": llava(), "b": llava()})),
            says=("expected a list of records, found an object with the keys a, b.",),
        ),
        "a list of data sets (LLaMA-Factory, InternVL)": Kind(
            write=write("dataset_info.json", json.dumps({"mugs": {"file_name": "my.json"}}, indent=2)),
            says=("expected a list of records, found an object with the key mugs.",),
        ),
        "a comma after the last record": Kind(
            write=write("my.json", f"[\n{json.dumps(llava())},\n]"),
            says=("a comma without a value after it at line 3 column 1. Remove the comma.",),
        ),
        "lines that end with commas": Kind(
            write=lines(llava(), llava(), between=",\n"),
            says=("a comma after a record at line 1", "Remove the commas at the ends of the lines."),
        ),
        "a missing comma": Kind(
            write=write("my.json", f"[{json.dumps(llava())}\n{json.dumps(llava())}]"),
            says=("not JSON: Expecting ',' delimiter at line 2 column 1.",),
        ),
        "single quotes": Kind(
            write=write("my.json", repr([llava()])),
            says=("single quotes at line 1 column 3. Write the file with json.dump, not with print.",),
        ),
        "a truncated file": Kind(
            write=cut(array(llava(), llava()), 40),
            says=("it ends in the middle of a record", "Write or download it again.", "line 1 column"),
        ),
        "a comment": Kind(
            write=write("my.json", f"// mugs\n{json.dumps([llava()])}"),
            says=("a comment at line 1 column 1. JSON has no comments. Remove it.",),
        ),
        "empty": Kind(write=write("my.json", ""), says=("an empty file. Write the records again.",)),
        "an empty array": Kind(write=array(), says=("no records in it.",)),
        "a Git LFS pointer": Kind(
            write=write("my.json", LFS), says=("a Git LFS pointer. Run `git lfs pull` in its folder.",)
        ),
        "a web page": Kind(
            write=write("my.json", "<!doctype html><html>404"),
            says=("a web page. Download the file itself.",),
        ),
        "a pickle": Kind(
            write=write("my.pkl", b"\x80\x04]\x94."),
            says=("a pickle, which can run code and is never opened. Write the records as JSON or Parquet.",),
        ),
        "an image file": Kind(
            write=lambda folder: folder / "a.jpg", says=("an image. Give its folder, or a record file.",)
        ),
        "an unknown file type": Kind(
            write=write("my.yaml", "- image: a.jpg\n"),
            says=("not a known file type. Rename it to end with .json, .jsonl, .csv or .tsv",),
        ),
    },
    "A record": {
        "a number instead of text": Kind(write=array(llava(answer=3)), reads=(answered("3"),)),
        "true or false instead of text": Kind(
            write=array(row(True)), says=("'answer' must be text or a number, found True",)
        ),
        "NaN": Kind(
            write=write("my.json", json.dumps([row(math.nan, id=ID)])),
            says=("an answer has no text", RECORD, "empty_answer"),
        ),
        "a list of answers": Kind(
            write=array(llava(answer=["A", "B"])), says=("turn 1 has no text 'value': ['A', 'B']", RECORD)
        ),
        "two records with one id": Kind(write=array(llava(), llava("b.jpg")), reads=(ASKED, ASKED)),
        "a duplicate record": Kind(
            write=array(llava(), llava()),
            says=("the record 'mug-7' is in the file twice", "record 1 (id mug-7)", "duplicate_id"),
        ),
        "no `conversations`": Kind(
            write=array({"id": ID, "image": "a.jpg"}),
            says=(
                "expected an object with a non-empty list 'conversations', found the fields id, image",
                RECORD,
            ),
        ),
        "an empty list of turns": Kind(
            write=array(llava(conversations=[])), says=("expected an object with a non-empty list", RECORD)
        ),
        "`null`": Kind(write=array(None), says=("found null", "my.json: record 0:")),
        "`conversation`": Kind(
            write=array({"image": "a.jpg", "conversation": llava()["conversations"]}), reads=(ASKED,)
        ),
        "turns of `input` and `output` (XTuner)": Kind(
            write=array({"image": "a.jpg", "conversation": [{"input": f"<image>\n{Q}", "output": A}]}),
            reads=(ASKED,),
        ),
        "`Human` and `GPT`": Kind(
            write=array(turns_of(("Human", f"<image>\n{Q}"), ("GPT", A))), reads=(ASKED,)
        ),
        "an unknown role": Kind(
            write=array(turns_of(("human", Q), ("bing", A))),
            says=("turn 1 is from 'bing'; allowed: human, gpt, system", RECORD),
        ),
        "two questions in a row": Kind(
            write=array(turns_of(("human", f"<image>\n{Q}"), ("human", "Full?"), ("gpt", "yes"))),
            says=("turns do not alternate: user, user, assistant", RECORD),
        ),
        "an answer as the first turn": Kind(
            write=array(turns_of(("gpt", "Hello"), ("human", f"<image>\n{Q}"), ("gpt", A))),
            says=("the conversation starts with an answer", RECORD, "--skip leading_answer"),
        ),
        "a system turn at the start": Kind(
            write=array(turns_of(("system", "Be short."), ("human", f"<image>\n{Q}"), ("gpt", A))),
            reads=([("system", "Be short.", 0), *ASKED],),
        ),
        "`system_prompt`": Kind(
            write=array(llava(system_prompt="Be short.")), reads=([("system", "Be short.", 0), *ASKED],)
        ),
        "a question as the last turn": Kind(
            write=array(turns_of(("human", f"<image>\n{Q}"))),
            says=("the conversation ends with a question", RECORD),
        ),
        "an empty answer": Kind(
            write=array(llava(answer=" ")), says=("an answer has no text", RECORD, "--skip empty_answer")
        ),
        "an answer of 50,000 words": Kind(
            write=array(llava(answer="word " * 50_000)), reads=(answered("word " * 50_000),)
        ),
        "text that contains special tokens": Kind(
            write=array(llava(answer="</s><|im_end|>")), reads=(answered("</s><|im_end|>"),)
        ),
        "an unpaired surrogate": Kind(
            write=write("my.json", json.dumps([llava(answer="x\ud800")])),
            says=("turn 1 contains an unpaired surrogate: 'x\\ud800'", RECORD),
        ),
        "`messages` of OpenAI": Kind(
            write=of_image(lambda data: "data:image/jpeg;base64," + base64.b64encode(data).decode()),
            reads=(ASKED,),
        ),
        "`messages` and `images` (TRL, LLaMA-Factory, ms-swift)": Kind(
            write=lines(chat(images=["a.jpg"]), chat(f"<image>{Q}", images="b.jpg")), reads=(ASKED, ASKED)
        ),
        "`query` and `response` (ms-swift)": Kind(
            write=lines({"query": f"<image>{Q}", "response": A, "images": ["a.jpg"]}), reads=(ASKED,)
        ),
        "`instruction`, `input` and `output` (Alpaca)": Kind(
            write=array({"instruction": "What is", "input": "it?", "output": A, "image": "a.jpg"}),
            reads=(answered(A, "What is\nit?"),),
        ),
        "`prefix` and `suffix` (PaliGemma)": Kind(
            write=lines({"image": "a.jpg", "prefix": Q, "suffix": A}), reads=(ASKED,)
        ),
        "`file_name` and `conversations`": Kind(
            write=array({"file_name": "a.jpg", "conversations": llava()["conversations"]}), reads=(ASKED,)
        ),
        "preference pairs (`chosen`, `rejected`)": Kind(
            write=array({"id": ID, "images": ["a.jpg"], "prompt": Q, "chosen": A, "rejected": "A jar."}),
            says=("'chosen': preference pairs are not supported; keep only the better answer", RECORD),
        ),
        "boxes in a separate field (ms-swift)": Kind(
            write=lines(
                chat("<image>Find the mug.", "<bbox>", images=["a.jpg"], objects={"bbox": [[1, 2, 3, 4]]})
            ),
            says=(
                "<bbox> refers to a box in 'objects'; write the coordinates into the text",
                "line 1 (id mug-7)",
            ),
        ),
        "a video": Kind(
            write=array(llava(..., f"<video>\n{Q}", video="a.mp4")),
            says=("'video' = a.mp4: only images and text are supported", RECORD),
        ),
        "an empty `video`": Kind(write=array(llava(video="")), reads=(ASKED,)),
    },
    "Images of a record": {
        "a list": Kind(
            write=array(llava(["a.jpg", "b.jpg"], f"<image><image>\n{Q}")), reads=(answered(A, images=2),)
        ),
        "two images, one `<image>`": Kind(
            write=array(llava(["a.jpg", "b.jpg"])),
            says=("1 <image> mark for 2 images (a.jpg, b.jpg); write one mark for each image", RECORD),
        ),
        "`<image>` without an image": Kind(
            write=array(llava(None)), says=("1 <image> mark for no image", RECORD)
        ),
        "an image without `<image>`": Kind(
            write=array(llava(question=Q)), says=("no <image> mark for 1 image (a.jpg)", RECORD)
        ),
        "three `<image>`, one image": Kind(
            write=array(llava(question=f"<image><image><image>{Q}")),
            says=("3 <image> marks for 1 image (a.jpg)", RECORD),
        ),
        "`<image>` in an answer": Kind(
            write=array(llava(question=Q, answer="<image> A mug.")),
            says=("<image> is in a turn of the assistant", RECORD),
        ),
        "numbered marks (`<image1>`)": Kind(
            write=array(llava(["a.jpg", "b.jpg"], f"<image1><image2>\n{Q}")),
            says=("'<image1>' is not supported; write <image>", RECORD),
        ),
        "marks of another model (`<|image|>`, `<|image_pad|>`)": Kind(
            write=array(chat(f"<|vision_start|><|image_pad|><|vision_end|>{Q}", images=["a.jpg"])),
            says=("'<|image_pad|>' is not supported; write <image>", RECORD),
        ),
        "`<img>a.jpg</img>` in the text (Qwen-VL)": Kind(
            write=lines({"query": f"<img>a.jpg</img>{Q}", "response": A}), reads=(ASKED,)
        ),
        "an object with bytes": Kind(
            write=of_image(lambda data: {"bytes": data, "path": "x.jpg"}, True), reads=(ASKED,)
        ),
        "bytes": Kind(write=of_image(lambda data: data, True), reads=(ASKED,)),
        "base64 (VLMEvalKit)": Kind(
            write=of_image(lambda data: base64.b64encode(data).decode()), reads=(ASKED,)
        ),
        "an object with base64": Kind(
            write=of_image(lambda data: {"bytes": base64.b64encode(data).decode(), "path": None}),
            reads=(ASKED,),
        ),
        "pixel values": Kind(
            write=array(row(id=ID, image=[[1, 2], [3, 4]])),
            says=("an image must be a path or a list of paths, found [[1, 2], [3, 4]]", RECORD),
        ),
        "a URL": Kind(
            write=array(llava("https://example.org/a.jpg")),
            says=("https://example.org/a.jpg is a URL; allow downloads with --allow-urls", RECORD),
        ),
        "an `s3://` URL": Kind(
            write=array(llava("s3://mugs/a.jpg")),
            says=("s3://mugs/a.jpg cannot be downloaded: only http and https can", RECORD),
        ),
        "a missing file": Kind(
            write=array(llava("none.jpg")),
            says=("image not found: {folder}/none.jpg", RECORD, "missing_image"),
        ),
        "a different case or extension": Kind(
            write=array(llava("A.png")), says=("image not found: {folder}/A.png; did you mean a.jpg?", RECORD)
        ),
        "a path with backslashes": Kind(write=moved("photos/c.jpg", "photos\\c.jpg"), reads=(ASKED,)),
        "a path from another computer": Kind(
            write=array(llava("/photos-of-ann/a.jpg")),
            says=(
                "image not found: /photos-of-ann/a.jpg; {folder} has a.jpg: write paths relative to it",
                RECORD,
            ),
        ),
        "a Windows path from another computer": Kind(
            write=array(llava("C:\\Users\\Ann\\a.jpg")),
            says=(
                "image not found: C:\\Users\\Ann\\a.jpg; {folder} has a.jpg: write paths relative to it",
                RECORD,
            ),
        ),
        "spaces around a path": Kind(write=array(llava(" a.jpg ")), reads=(ASKED,)),
        "spaces and umlauts": Kind(
            write=moved("große Tassen/Tasse 1.jpg", "große Tassen/Tasse 1.jpg"), reads=(ASKED,)
        ),
        "decomposed umlauts (NFD, macOS)": Kind(
            write=moved("Bu\u0308ro.jpg", "B\u00fcro.jpg"), reads=(ASKED,)
        ),
        "rotated by EXIF": Kind(write=shown("r.jpg", rotated), reads=(ASKED,)),
        "transparent": Kind(
            write=shown("t.png", lambda path: photo().convert("RGBA").save(path)), reads=(ASKED,)
        ),
        "an animated GIF": Kind(
            write=shown("g.gif", lambda path: photo().save(path, save_all=True, append_images=[photo(1)])),
            reads=(ASKED,),
        ),
        "CMYK": Kind(write=shown("c.jpg", lambda path: photo().convert("CMYK").save(path)), reads=(ASKED,)),
        "16 bits per channel": Kind(
            write=shown("s.png", lambda path: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path)),
            reads=(ASKED,),
        ),
        "a PNG named `.jpg`": Kind(
            write=shown("p.jpg", lambda path: photo().save(path, format="PNG")), reads=(ASKED,)
        ),
        "HEIC": Kind(
            write=shown("p.heic", HEIC),
            says=("p.heic: a HEIC image from a phone; convert it to JPEG", RECORD, "broken_image"),
        ),
        "HEIC named `.jpg`": Kind(
            write=shown("p.jpg", HEIC), says=("p.jpg: a HEIC image from a phone; convert it to JPEG", RECORD)
        ),
        "a video named `.jpg`": Kind(
            write=shown("v.jpg", b"\0\0\0\x18ftypisom" + bytes(80)),
            says=("v.jpg: a video; extract a frame as JPEG or PNG", RECORD),
        ),
        "a truncated image": Kind(
            write=shown("c.jpg", lambda path: path.write_bytes((path.parent / "a.jpg").read_bytes()[:-300])),
            says=("c.jpg: damaged (image file is truncated", RECORD, "Replace it"),
        ),
        "an empty file": Kind(write=shown("e.jpg", b""), says=("e.jpg: an empty file. Replace it", RECORD)),
        "a web page": Kind(
            write=shown("w.jpg", b"<!doctype html><html>404"), says=("w.jpg: a web page", RECORD)
        ),
        "a Git LFS pointer": Kind(
            write=shown("l.jpg", LFS), says=("l.jpg: a Git LFS pointer (run `git lfs pull`", RECORD)
        ),
    },
    "Tables": {
        "CSV": Kind(write=write("my.csv", TABLE), reads=(ASKED,)),
        "CSV from Excel: BOM, semicolons, Windows line endings": Kind(
            write=write("my.csv", "\ufeff" + TABLE.replace(",", ";").replace("\n", "\r\n")), reads=(ASKED,)
        ),
        "CSV with a first line `sep=;`": Kind(
            write=write("my.csv", "sep=;\r\n" + TABLE.replace(",", ";")), reads=(ASKED,)
        ),
        "old Mac line endings": Kind(write=write("my.csv", TABLE.replace("\n", "\r")), reads=(ASKED,)),
        "Unicode text from Excel (UTF-16, tabs)": Kind(
            write=write("my.csv", TABLE.replace(",", "\t").encode("utf-16")), reads=(ASKED,)
        ),
        "TSV": Kind(write=write("my.tsv", TABLE.replace(",", "\t")), reads=(ASKED,)),
        "gzipped CSV": Kind(write=write("my.csv.gz", gzip.compress(TABLE.encode())), reads=(ASKED,)),
        "Latin-1": Kind(
            write=write("my.csv", f"{TABLE}a.jpg,Wer?,Krügel\n".encode("latin-1")),
            says=("not UTF-8 (invalid start byte at byte 60, line 3). Save it as UTF-8.",),
        ),
        "a column of row numbers (pandas)": Kind(
            write=write("my.csv", ",image,question,answer\n0,a.jpg,What is it?,A mug.\n"), reads=(ASKED,)
        ),
        "no header line": Kind(
            write=write("my.csv", "a.jpg,What is it?,A mug.\nb.jpg,What is it?,A jar.\n"),
            says=("no columns for question and answer among 'a.jpg', 'What is it?', 'A mug.'.", "first line"),
        ),
        "two columns with one name": Kind(
            write=write("my.csv", "image,answer,answer\na.jpg,A,B\n"),
            says=("two columns are named 'answer'. Rename one of them. The first row",),
        ),
        "an image column with an unknown name": Kind(
            write=write("my.csv", "Bild,question,answer\na.jpg,What is it?,A mug.\n"),
            says=("'Bild' = a.jpg looks like an image; name the column with --column image=Bild", "line 2"),
        ),
        "an unquoted comma": Kind(
            write=write("my.csv", f"{TABLE}b.jpg,What, then?,A mug.\n"),
            says=("line 3: 4 values for 3 columns (image, question, answer).", "between quotes"),
        ),
        "an unclosed quote": Kind(
            write=write("my.csv", f'{TABLE}b.jpg,"What,A mug.\n'),
            says=("line 3: not CSV (unexpected end of data). Fix the quotes of this line.",),
        ),
        "an empty cell": Kind(
            write=write("my.csv", f"{TABLE}b.jpg,What is it?,\n"),
            says=("my.csv: line 3: an answer has no text", "--skip empty_answer"),
        ),
        "a row with too few cells": Kind(
            write=write("my.csv", f"{TABLE}b.jpg,What is it?\n"),
            says=("my.csv: line 3: an answer has no text",),
        ),
        "a cell `NaN` (pandas) or `#N/A` (Excel)": Kind(
            write=write("my.csv", f"{TABLE}b.jpg,What is it?,NaN\n"),
            says=("my.csv: line 3: 'answer' is NaN, which marks an empty or failed cell", "malformed"),
        ),
        "empty lines": Kind(
            write=write("my.csv", f"{TABLE}\n,,\nb.jpg,What is it?,A mug.\n"), reads=(ASKED, ASKED)
        ),
        "turns as JSON in a cell": Kind(
            write=write("my.csv", quoted([["image", "conversations"], ["a.jpg", AS_JSON]])), reads=(ASKED,)
        ),
        "turns as a printed Python list in a cell": Kind(
            write=write("my.csv", quoted([["image", "conversations"], ["a.jpg", AS_REPR]])),
            says=("'conversations' is a Python list, not JSON; write it with json.dumps", "line 2"),
        ),
        "only a header line": Kind(
            write=write("my.csv", "image,question,answer\n"), says=("no records in it.",)
        ),
        "empty": Kind(
            write=write("my.csv", ""), says=("an empty file. Write the column names into its first",)
        ),
        "XLSX": Kind(write=sheet(HEAD, ["a.jpg", Q, A]), reads=(ASKED,)),
        "XLSX named `.csv`": Kind(write=sheet(HEAD, ["a.jpg", Q, A], name="my.csv"), reads=(ASKED,)),
        "CSV named `.xlsx`": Kind(
            write=write("my.xlsx", TABLE), says=("not a workbook. If it is CSV, rename it to .csv.",)
        ),
        "a number in a cell": Kind(write=sheet(HEAD, ["a.jpg", Q, 5.0]), reads=(answered("5"),)),
        "a date in a cell": Kind(
            write=sheet(HEAD, ["a.jpg", Q, DATE]),
            says=("row 2: 'answer' is a date (2024-03-05 00:00:00); write it as text", "malformed"),
        ),
        "a title above the column names": Kind(
            write=sheet(["Our mugs"], HEAD, ["a.jpg", Q, A], merged="A1:C1"),
            says=(
                "two columns are named 'Our mugs'. Rename one of them. The first row",
                "with nothing above it",
            ),
        ),
        "a merged name cell over two columns": Kind(
            write=sheet(["image", "question", None], ["a.jpg", Q, A], merged="B1:C1"),
            says=("two columns are named 'question'. Rename one of them. The first row",),
        ),
        "a merged image cell over two rows": Kind(
            write=sheet(HEAD, ["a.jpg", Q, A], [None, Q, A], merged="A2:A3"), reads=(ASKED, ASKED)
        ),
        "images in cells": Kind(
            write=pasted, says=("has images in its cells. Save them as files, and write their names",)
        ),
        "data in the second sheet, the first is empty": Kind(
            write=sheet(HEAD, ["a.jpg", Q, A], second=True), reads=(ASKED,)
        ),
        "an old Excel file (`.xls`)": Kind(
            write=write("my.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500)),
            says=("an old Excel file. Save it as .xlsx or .csv.",),
        ),
        "Parquet": Kind(write=columns(row()), reads=(ASKED,)),
        "NaN in Parquet": Kind(
            write=columns(row(1.5), row(math.nan)), says=("record 1: an answer has no text",)
        ),
        "a timestamp in Parquet": Kind(
            write=columns(row(DATE)), says=("record 0: 'answer' is a date (2024-03-05 00:00:00)",)
        ),
        "truncated Parquet": Kind(
            write=cut(columns(row()), 20), says=("cannot be read as Parquet", "Download it again.")
        ),
        "Arrow": Kind(write=arrow, reads=(ASKED,)),
    },
    "Folders and archives": {
        "images in folders by label": Kind(
            write=tree("beetle/1.JPG", "moth/2.jpg"),
            reads=(
                answered(
                    "beetle", "What is in the image?\nAnswer the question using a single word or phrase."
                ),
                answered("moth", "What is in the image?\nAnswer the question using a single word or phrase."),
            ),
        ),
        "images and captions": Kind(
            write=tree("1.jpg", **{"1__txt": A}), reads=(answered(A, "Describe the image."),)
        ),
        "a caption in Latin-1": Kind(
            write=tree("1.jpg", **{"1__txt": "Krügel".encode("latin-1")}),
            says=("1.txt: not UTF-8 (invalid start byte at byte 2). Save it as UTF-8.",),
        ),
        "an empty caption": Kind(
            write=tree("1.jpg", **{"1__txt": ""}), says=("file 1.jpg: an answer has no text",)
        ),
        "images with camera names (`IMG_0001.jpg`)": Kind(
            write=tree("IMG_0001.jpg", "IMG_0002.jpg"),
            says=(
                "no image in this folder has a label or a caption.",
                "Put images into folders named by their labels",
            ),
        ),
        "`train` and `test` folders above the labels": Kind(
            write=tree("train/beetle/1.jpg", "test/moth/2.jpg"),
            says=(
                "has the splits test, train. Give one of them: {folder}/mugs/test or {folder}/mugs/train.",
            ),
        ),
        "folders in folders": Kind(
            write=tree("2024/beetle/1.jpg", "2024/moth/2.jpg"),
            says=(
                "2024/beetle/1.jpg: its label could be '2024' or 'beetle'.",
                "Put images one folder deep (beetle/1.jpg), give a folder in {folder}",
            ),
        ),
        "`metadata.jsonl` of the hub": Kind(
            write=tree("1.jpg", metadata__jsonl=json.dumps(llava(..., file_name="1.jpg"))), reads=(ASKED,)
        ),
        "a table next to the images": Kind(
            write=tree("a.jpg", labels__csv=TABLE),
            says=("has the record file labels.csv. Give that file, or move it out of the folder.",),
        ),
        "no image": Kind(write=tree(), says=("no image in this folder.",)),
        "Parquet shards": Kind(
            write=tree(**{"train-0__parquet": b"PAR1"}),
            says=("has the record file train-0.parquet. Give that file",),
        ),
        "thumbnails, notebooks' copies and waste baskets among them": Kind(
            write=tree(
                "beetle/1.jpg",
                ".thumbnails/1.jpg",
                "beetle/.ipynb_checkpoints/1-checkpoint.jpg",
                "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
                "#recycle/2.jpg",
                "$RECYCLE.BIN/3.jpg",
            ),
            reads=(
                answered(
                    "beetle", "What is in the image?\nAnswer the question using a single word or phrase."
                ),
            ),
        ),
        "system files of macOS and Windows among them": Kind(
            write=tree("beetle/1.jpg", "__MACOSX/beetle/._1.jpg", Thumbs__db=b"x", __DS_Store=b"x"),
            reads=(
                answered(
                    "beetle", "What is in the image?\nAnswer the question using a single word or phrase."
                ),
            ),
        ),
        "a folder of `datasets`": Kind(write=saved, reads=(ASKED,)),
        "a folder of `datasets` with splits": Kind(
            write=tree(dataset_dict__json=json.dumps({"splits": ["train", "test"]})),
            says=("has the splits train, test. Give one of them: {folder}/mugs/train or",),
        ),
        "WebDataset": Kind(
            write=archive({"./0.JPG": "a.jpg", "./0.TXT": A.encode()}),
            reads=(answered(A, "Describe the image."),),
        ),
        "WebDataset, gzipped (`.tgz`)": Kind(
            write=archive({"0.jpg": "a.jpg", "0.txt": A.encode()}, "my.tgz"),
            reads=(answered(A, "Describe the image."),),
        ),
        "WebDataset, two images per sample": Kind(
            write=archive(
                {"0.left.jpg": "a.jpg", "0.right.jpg": "b.jpg", "0.json": json.dumps(row()).encode()}
            ),
            reads=(answered(A, images=2),),
        ),
        "WebDataset, images and texts not adjacent": Kind(
            write=archive({"0.jpg": "a.jpg", "1.jpg": "b.jpg", "0.txt": b"A", "1.txt": b"B"}),
            says=("sample 0 is in two places. Write the files of a sample one after the other",),
        ),
        "WebDataset, JSON that is not an object": Kind(
            write=archive({"0.jpg": "a.jpg", "0.json": b"[]"}),
            says=("my.tar: 0.json: not a JSON object. Write one record into it.",),
        ),
        "WebDataset, Latin-1": Kind(
            write=archive({"0.jpg": "a.jpg", "0.txt": "Krügel".encode("latin-1")}),
            says=("my.tar: 0.txt: cannot be read ('utf-8' codec", "Fix this member."),
        ),
        "WebDataset, truncated": Kind(
            write=cut(archive({"0.jpg": "a.jpg", "0.txt": b"A"}), 10_000),
            says=("cannot be read as a tar file",),
        ),
        "WebDataset, empty": Kind(write=archive({}), says=("no records in it.",)),
        "no such file": Kind(write=lambda f: f / "none.json", says=("no such record file. Check the path.",)),
    },
}
CASES = [(form, what) for form, kinds in KINDS.items() for what in kinds]
BYTES = {name: io.BytesIO() for name in ("a.jpg", "b.jpg")}
for number, buffer in enumerate(BYTES.values()):
    photo(number).save(buffer, "JPEG")


@pytest.mark.parametrize(("form", "what"), CASES)
def test_each_kind_is_read_as_expected_or_rejected_with_its_place(form, what, tmp_path, capsys) -> None:
    for name, buffer in BYTES.items():
        (tmp_path / name).write_bytes(buffer.getvalue())
    kind = KINDS[form][what]
    path = kind.write(tmp_path)
    status = main(["data", "check", str(path)])
    output = "".join(capsys.readouterr())
    assert bool(kind.reads) != bool(kind.says)
    if kind.reads:
        assert status == 0, output
        number = len(kind.reads)
        assert f"{path}: {number} record{'s' * (number > 1)}, {number} without a defect" in output
        read = read_records(path, path if path.is_dir() else path.parent).conversations
        assert [[(m.role, m.text, len(m.images)) for m in one.messages] for one in read] == list(kind.reads)
        return
    assert status in (1, 2), output
    assert str(path) in output
    for said in kind.says:
        assert said.replace("{folder}", str(tmp_path)) in output
    assert re.search(
        r"(?i)\b(fix|give|save|write|run|unpack|remove|rename|download|check|end|put|name) ", output
    )


def table() -> str:
    """Return the rows as Markdown."""
    written = []
    for form, kinds in KINDS.items():
        written += [f"\n## {form}\n", "| file | result |", "|---|---|"]
        for what, kind in kinds.items():
            number = len(kind.reads)
            said = kind.says[0].replace("{folder}", "FOLDER").replace("|", "\\|") if kind.says else ""
            cut = "" if said.endswith(".") else " ..."
            result = f'rejected: "{said}{cut}"' if said else f"{number} record{'s' * (number > 1)}"
            written.append(f"| {what.replace('|', chr(92) + '|')} | {result.replace('<', '&lt;')} |")
    return "\n".join(written) + "\n"


def test_the_guides_table_is_made_of_them() -> None:
    assert len(CASES) >= 100
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    assert rest.partition(END)[0].strip() == table().strip()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    sys.exit()
