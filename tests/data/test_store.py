"""Converted records: the conversations of the file, found again, and converted again when they must be."""

import dataclasses
import gzip
import io
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import csv as pa_csv
from pyarrow import parquet

from tinyllava.config import DataConfig, ModelConfig
from tinyllava.data import batches, conversion, cores, hashes, records, store
from tinyllava.data.conversion import read_stored
from tinyllava.data.dataset import Examples, measure
from tinyllava.data.defects import Defect, Defects
from tinyllava.data.distinct_images import DistinctImages
from tinyllava.data.hashes import ImageHashes, images_digest, known_sha256, records_digest, sha256_of_image
from tinyllava.data.readers import containers, json_slices
from tinyllava.data.records import read_configured
from tinyllava.data.store import StoredConversations
from tinyllava.data.writing import write_records
from tinyllava.errors import DataError
from tinyllava.files import sha256_of
from tinyllava.model.assemble import assemble

NUM_RECORDS = 2 * store.ROWS + 10


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Two files: one of more than two batches, with several and no images, and one with bytes of an image."""
    for name in "abc":
        Image.new("RGB", (4, 4), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    records = []
    for n in range(NUM_RECORDS):
        images = [["a.png"], [], ["b.png", "c.png"]][n % 3]
        talk = turns(f"{'<image>' * len(images)}Q{n}", "A", "And?", f"B{n}\n")
        records.append({"id": n, "image": images, "conversations": talk[: 2 + 2 * (n % 2)]})
    (tmp_path / "many.json").write_text(json.dumps(records))
    url = "data:image/png;base64,iVBORw0KGgo="
    system = [{"from": "system", "value": "Be short."}]
    record = {"image": url, "conversations": [*system, *turns("<image>Ä", "a\u2028b")]}
    (tmp_path / "one.jsonl").write_text(json.dumps(record))
    files = (str(tmp_path / "many.json"), str(tmp_path / "one.jsonl"))
    return DataConfig(records=files, images=str(tmp_path))


def test_converted_records_are_the_records(data, tmp_path):
    plain = read_configured(data).conversations
    stored = read_stored(data, "", tmp_path / "store").conversations
    assert isinstance(stored, StoredConversations)
    assert len(stored) == NUM_RECORDS + 1
    assert list(stored) == list(plain)
    assert [stored[i] for i in (0, 1023, 1024, NUM_RECORDS, -1)] == [
        plain[i] for i in (0, 1023, 1024, NUM_RECORDS, -1)
    ]
    assert list(stored[5:2000:7]) == list(plain[5:2000:7])
    assert stored.image_counts.tolist() == [len(c.images) for c in plain]
    assert stored.question_counts.tolist() == store.question_counts(plain).tolist()
    kept = np.array([3, 2, 1500, NUM_RECORDS])
    some = stored.select(kept)
    assert list(some) == [plain[i] for i in kept]
    assert records_digest(stored) == records_digest(plain)


def test_images_of_converted_records_are_those_of_the_records(data, tmp_path):
    """Files of several folders, under other spellings, and bytes; also of a part, repeated, and cut."""
    (tmp_path / "more").mkdir()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "more/d e.png")
    rows = [{"image": name, "conversations": turns("<image>Q", "A")} for name in ("more\\d e.png", "./a.png")]
    rows += [{"images": ["a.png", "b.png"], "conversations": turns("<image>Q", "A", "<image>Q", "A")}]
    (tmp_path / "more.json").write_text(json.dumps(rows))
    data = DataConfig(records=(*data.records, str(tmp_path / "more.json")), images=data.images)
    plain = read_configured(data).conversations
    stored = read_stored(data, "", tmp_path / "store").conversations
    last = len(plain) - 1
    kept = np.array([last, 3, 2, last - 1, 2, NUM_RECORDS, last - 2])
    kept_hashes = ImageHashes(tmp_path / "hashes.sqlite")
    for one, expected in (
        (stored, plain),
        (stored.select(kept), [plain[i] for i in kept]),
        (store.cut(stored.select(kept[:4]), {0: 2}), store.cut([plain[i] for i in kept[:4]], {0: 2})),
    ):
        refs = [ref for talk in expected for ref in talk.images]
        images = DistinctImages(one)
        listed = [images.ref(number) for number in range(len(images))]
        assert {(ref.path, ref.data) for ref in refs} <= {(ref.path, ref.data) for ref in listed}
        found = kept_hashes.find(images)
        digests = {ref: sha256_of_image(ref) for ref in set(refs)}
        assert list(found.of_each()) == [[digests[ref] for ref in talk.images] for talk in expected]
        assert {ref: found[ref] for ref in digests} == digests
        assert images_digest(found) == images_digest(kept_hashes.find(DistinctImages(list(expected))))


def test_bytes_of_images_in_rows_are_not_held_and_are_hashed_once(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (10, 200, 200, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{number}.bmp")
    rows = [{"image": f"{n % 10}.bmp", "conversations": turns("<image>Q", f"A{n}")} for n in range(100)]
    (tmp_path / "my.json").write_text(json.dumps(rows))
    plain = read_configured(DataConfig(records=(str(tmp_path / "my.json"),))).conversations
    write_records(plain, tmp_path / "my.parquet")
    stored = read_stored(DataConfig(records=(str(tmp_path / "my.parquet"),)), "", tmp_path / "store")
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)
    monkeypatch.setattr(cores, "num_cores", lambda: 1)  # otherwise other processes hold what there is
    kept_hashes = ImageHashes(tmp_path / "hashes.sqlite")
    tracemalloc.start()
    images = DistinctImages(stored.conversations)
    digests = [kept_hashes.find(images), kept_hashes.find(images)]
    broken = [kept_hashes.find_broken(images), kept_hashes.find_broken(images)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * noise[0].nbytes  # of 100 in the file
    assert (kept_hashes.num_read, kept_hashes.num_decoded, broken) == (100, 100, [{}, {}])
    assert [found for [found] in digests[0].of_each()] == [sha256_of_image(c.images[0]) for c in plain]
    assert np.array_equal(digests[0].found, digests[1].found)


TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
FORMS = {
    "array": json.dumps,
    "indented": lambda some: " " + json.dumps(some, indent=1, ensure_ascii=False) + "\n\n",
    "with a mark": lambda some: "\ufeff" + json.dumps(some),
    "lines": lambda some: "\n\n".join(map(json.dumps, some)) + "\n",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind", ["usual", "cut inside a record", "damaged", "extra comma", "with defects", "blanks"]
)
def test_a_large_file_is_read_in_slices_as_if_whole(form, kind, tmp_path, monkeypatch):
    """By two processes, each of which holds a part of the file; places of records are those of the file."""
    monkeypatch.setattr(json_slices, "SLICE_BYTES", 2000)
    monkeypatch.setattr(cores, "num_cores", lambda: 2)
    records = [{"id": f"Ä{n}", "conversations": turns("Q" * (1 + n % 90), f"B {n}")} for n in range(1, 300)]
    if kind == "cut inside a record":  # its turns look like the beginning of a record
        records = [
            {"id": "n", **one, "conversations": [{"id": 1, **TURNS[0]}, TURNS[1]] * 30} for one in records
        ]
    if has_defects := kind in ("with defects", "blanks"):
        records[7:9] = [{"id": "x", "conversations": turns("Q")}] * 2
        records[250:252] = [
            records[3],
            {"id": "y", "image": "gone.png", "conversations": turns("<image>Q", "A")},
        ]
    text = FORMS[form](records)
    path = tmp_path / ("my.jsonl" if form == "lines" else "my.json")
    last = text.rindex("]")
    texts = {"damaged": text[:-150], "extra comma": f"{text[:last]},{text[last:]}"}
    if kind == "blanks":
        text = f"\n \r\n{text}" if form != "with a mark" else f"{text[0]}\n \n{text[1:]}"
    path.write_text(texts.get(kind, text), encoding="utf-8")
    data = DataConfig(records=(str(path),))
    if kind in texts or has_defects:
        found = []
        for read in (lambda: read_stored(data, "", tmp_path / "store"), lambda: read_configured(data)):
            with pytest.raises(DataError) as caught:
                read()
            found.append(str(caught.value))
        assert found[0] == found[1]
        assert kind in texts or ": 4 records have defects" in found[0]
        data = DataConfig(records=data.records, skip=("unanswered", "duplicate_id", "missing_image"))
    if kind not in texts:
        stored, plain = read_stored(data, "", tmp_path / "store"), read_configured(data)
        assert list(stored.conversations) == list(plain.conversations)
        assert (stored.skipped, stored.ignored) == (plain.skipped, plain.ignored)
        is_cut = kind == "cut inside a record" and form in ("array", "with a mark")
        slices = json_slices.split(path)
        assert len(slices) > 10
        assert (None in [one.count() for one in slices]) == is_cut


def write_tar(path: Path, rows: list[dict], start: int, end: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(start, end):
            picture = (path.parent / "a.png").read_bytes()
            for end_of_name, data in ((".png", picture), (".json", json.dumps(rows[number]).encode())):
                member = tarfile.TarInfo(f"{number:05}{end_of_name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["csv", "parquet", "tar", "gz"])
@pytest.mark.parametrize("has_defects", [False, True])
def test_all_cores_convert_other_forms_to_the_same_bytes_as_one(kind, has_defects, tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"id": f"n{n}", "conversations": turns("<image>Q", f"A{n}")} for n in range(600)]
    if has_defects:
        rows[5]["conversations"] = rows[505]["conversations"] = turns("<image>Q", " ")
        rows[400] = rows[3]
    if kind == "csv":
        table = [
            {"id": r["id"], "image": "a.png", "question": "Q", "answer": r["conversations"][1]["value"]}
            for r in rows
        ]
        pa_csv.write_csv(pa.Table.from_pylist(table), tmp_path / "my.csv")
        files = [tmp_path / "my.csv"]
    elif kind == "parquet":
        images = {"images": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}]}
        table = pa.Table.from_pylist([{**row, **images} for row in rows])
        parquet.write_table(table, tmp_path / "my.parquet", row_group_size=200)
        files = [tmp_path / "my.parquet"]
    elif kind == "tar":
        files = [tmp_path / f"{n}.tar" for n in range(4)]
        for n, path in enumerate(files):
            write_tar(path, rows, 150 * n, 150 * (n + 1))
    else:
        text = "\n".join(json.dumps({**row, "image": "a.png"}) for row in rows)
        (tmp_path / "my.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        files = [tmp_path / "my.jsonl.gz"]
    read = []
    read_text = containers._read_text
    monkeypatch.setattr(containers, "_read_text", lambda path: read.append(path) or read_text(path))
    data = DataConfig(records=tuple(map(str, files)), images=str(tmp_path))
    found = []
    for number in (1, 2):
        monkeypatch.setattr(cores, "num_cores", lambda number=number: number)
        with nullcontext() if not has_defects else pytest.raises(DataError) as caught:
            read_stored(data, "", tmp_path / f"store{number}")
        skip = dataclasses.replace(data, skip=("empty_answer", "duplicate_id"))
        stored = read_stored(skip, "", tmp_path / f"store{number}")
        written = [(file.folder / "records.arrow").read_bytes() for file in stored.conversations.files]
        found.append((str(caught.value) if has_defects else "", stored.skipped, written))
        assert not list((tmp_path / f"store{number}").rglob("parts*"))
        for file in stored.conversations.files:  # as a process that is killed leaves them
            left = tmp_path / "store2" / file.folder.name / "parts"
            left.mkdir(parents=True, exist_ok=True)
            (left / "7.arrow").touch()
    assert found[0] == found[1]
    assert len(read) <= 2 * 2 * 2  # not once for each part of the file
    plain = read_configured(skip)
    assert list(stored.conversations) == list(plain.conversations)
    assert stored.skipped == plain.skipped


def test_a_process_that_dies_while_records_are_read_is_told(monkeypatch):
    monkeypatch.setattr(cores, "num_cores", lambda: 2)

    def work(part: int) -> int:
        if part == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * part

    with pytest.raises(DataError, match="one of several processes died, possibly because memory"):
        list(cores.map_parts(work, range(9)))
    assert list(cores.map_parts(lambda part: 2 * part, range(9))) == list(range(0, 18, 2))
    # What ends the others is no handler of this process: one that waits for a lock would not call it.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        handlers = set(cores.map_parts(lambda part: signal.getsignal(signal.SIGTERM), range(9)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handlers == {signal.SIG_DFL}


def test_where_forks_are_not_safe_the_work_is_done_here(monkeypatch):
    monkeypatch.setattr(cores.sys, "platform", "darwin")
    assert set(cores.map_parts(lambda part: os.getpid(), range(9))) == {os.getpid()}


def test_another_process_maps_the_file_for_itself(data, tmp_path):
    stored = read_stored(data, "", tmp_path / "store").conversations
    again = pickle.loads(pickle.dumps(stored))
    assert len(pickle.dumps(stored[:10])) < 2000  # no record travels
    assert again[1500] == stored[1500]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(stored.__getitem__, (1500,)) == stored[1500]


def count_conversions(monkeypatch) -> list[str]:
    converted = []
    convert = conversion._convert

    def counted(place, reading, reader):
        converted.append(reading.path.name)
        return convert(place, reading, reader)

    monkeypatch.setattr(conversion, "_convert", counted)
    return converted


def test_a_file_is_converted_once_and_again_when_something_changed(data, tmp_path, monkeypatch):
    converted = count_conversions(monkeypatch)
    folder = tmp_path / "store"
    for _ in range(2):
        read_stored(data, "", folder)
    assert converted == ["many.json", "one.jsonl"]
    one = tmp_path / "one.jsonl"
    one.write_text(one.read_text().replace("short", "brief"))
    assert read_stored(data, "", folder).conversations[-1].messages[0].text == "Be brief."
    assert converted[2:] == ["one.jsonl"]
    (tmp_path / "b.png").unlink()
    with pytest.raises(Defects, match=r"missing_image \(an image file that does not exist\): 686"):
        read_stored(data, "", folder)
    skip = DataConfig(records=data.records, images=data.images, skip=("missing_image",))
    left = read_stored(skip, "", folder)
    assert left.skipped == {"missing_image": 686}
    num_before = len(converted)
    assert len(read_stored(skip, "", folder).conversations) == len(left.conversations) == NUM_RECORDS - 685
    assert len(converted) == num_before
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert read_stored(skip, "", folder).skipped == {}
    assert converted[num_before:] == ["many.json"]


def test_where_one_missing_image_appears_and_another_goes_nothing_of_the_other_records_is_used(tmp_path):
    """As many records are left each time, and they are other ones: what is kept beside them is not theirs."""
    rows = [{"image": f"{n}.png", "conversations": turns("<image>Q", f"A{n}")} for n in range(4)]
    (tmp_path / "my.json").write_text(json.dumps(rows))
    data = DataConfig(records=(str(tmp_path / "my.json"),), skip=("missing_image",))
    found = []
    for gone in (1, 2, None, 1):
        for n in range(4):
            (tmp_path / f"{n}.png").unlink(missing_ok=True)
            if n != gone:
                Image.new("RGB", (4, 4)).save(tmp_path / f"{n}.png")
        stored = read_stored(data, "", tmp_path / "store").conversations
        assert [talk.messages[1].text for talk in stored] == [f"A{n}" for n in range(4) if n != gone]
        found.append(store.kept_digest(stored, "records", records_digest))
        assert found[-1] == records_digest(list(stored))
    assert len(set(found)) == 3


def test_a_large_file_is_not_read_again_to_see_that_it_is_the_same(tmp_path, monkeypatch):
    path, kept, read = tmp_path / "my.json", tmp_path / "files.sqlite", []
    monkeypatch.setattr(hashes, "sha256_of", lambda path: read.append(path) or sha256_of(path))
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    path.write_text("one")
    assert known_sha256(path, kept) == known_sha256(path, kept) == sha256_of(path)
    assert len(read) == 2  # it was just written, and may change again within the same moment
    monkeypatch.setattr(time, "time_ns", lambda: now + 24 * 3600 * 10**9)
    assert known_sha256(path, kept) == known_sha256(path, kept) == sha256_of(path)
    assert len(read) == 3
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # within one tick of the clock
        path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known_sha256(path, kept) == sha256_of(path)


def test_each_look_for_images_that_are_gone_looks_at_all_of_them(data, tmp_path):
    many = read_stored(data, "", tmp_path / "store").conversations.files[0]
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").unlink()
    assert many.find_gone() == str(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes(content)
    (tmp_path / "a.png").unlink()
    assert many.find_gone() == str(tmp_path / "a.png")


def test_of_processes_that_wait_together_not_each_looks_for_images(data, tmp_path, monkeypatch):
    """A look begins after all have come. A process that comes later looks for itself."""
    expected = [*read_stored(data, "", tmp_path / "store").conversations]
    looks, look, open_store = [], store.StoreFile.find_gone, conversion._open_store
    all_have_come, come = threading.Barrier(8), threading.local()

    def open_later(*arguments):
        if not hasattr(come, "together"):
            come.together = all_have_come.wait(600)
        return open_store(*arguments)

    monkeypatch.setattr(store.StoreFile, "find_gone", lambda self: looks.append(self.source) or look(self))
    with monkeypatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(conversion, "_open_store", open_later)
        found = list(pool.map(lambda _: read_stored(data, "", tmp_path / "store"), range(8)))
    assert all([*records.conversations] == expected for records in found)
    assert len(looks) == len(data.records)
    looks.clear()
    next(path for path in tmp_path.rglob("*.png")).unlink()
    with pytest.raises(DataError):
        read_stored(data, "", tmp_path / "store")
    assert looks


def test_a_table_is_opened_once_for_its_form_and_once_for_its_rows(tmp_path, monkeypatch):
    """A workbook is parsed whole each time."""
    opened = []
    read = records.read_container
    monkeypatch.setattr(records, "read_container", lambda path: opened.append(path) or read(path))
    monkeypatch.setattr(conversion, "_AT_ONCE", 2)
    rows = "".join(f"Q{n},A{n}\n" for n in range(9))
    (tmp_path / "my.csv").write_text(f"question,answer\n{rows}")
    stored = read_stored(DataConfig(records=(str(tmp_path / "my.csv"),)), "", tmp_path / "store")
    assert len(stored.conversations) == 9
    assert len(opened) == 2


def test_of_several_processes_one_makes_a_digest(data, tmp_path):
    """They prepare a stage at the same time; each would move the other's file away."""
    stored = read_stored(data, "", tmp_path / "store").conversations
    made = []

    def digest(conversations):
        made.append(len(conversations))
        time.sleep(0.05)
        return records_digest(conversations)

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: store.kept_digest(stored, "records", digest), range(4)))
    assert (len(found), len(made)) == (1, 1)


def test_a_file_with_a_defect_leaves_nothing_behind(tmp_path):
    (tmp_path / "my.json").write_text(json.dumps([{"conversations": turns("Q")}]))
    data = DataConfig(records=(str(tmp_path / "my.json"),))
    for _ in range(2):
        with pytest.raises(Defect, match=r"record 0: the conversation ends with a question \[unanswered\]"):
            read_stored(data, "", tmp_path / "store")
    assert not list((tmp_path / "store").rglob("*.arrow"))
    (tmp_path / "store").rename(tmp_path / "old")
    (tmp_path / "store").write_text("a file")
    with pytest.raises(DataError, match=r"converted records cannot be written"):
        read_stored(data, "", tmp_path / "store")


def test_a_file_that_is_removed_while_it_is_read_is_named(data, tmp_path, monkeypatch):
    gone = Path(data.records[0].partition(",")[0])
    known_sha256 = conversion.known_sha256

    def vanish(path: Path, kept: Path) -> str:
        path.unlink()
        return known_sha256(path, kept)

    monkeypatch.setattr(conversion, "known_sha256", vanish)
    with pytest.raises(
        DataError, match=rf"^{gone}: cannot be read \(No such file.*run the same command again"
    ):
        read_stored(data, "", tmp_path / "store")


def test_lengths_are_counted_once_by_all_cores_and_kept(data, tmp_path, parts, monkeypatch):
    monkeypatch.setattr(cores, "num_cores", lambda: 2)
    processor = assemble(
        ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["chatml"]))
    )[1]
    stored = read_stored(data, "", tmp_path / "store").conversations
    examples = Examples(conversations=stored, processor=processor)
    seen: list[int] = []
    measured, skipped = measure(examples, 512, (), seen.append)
    assert sum(seen) == len(stored)
    chosen = (0, 1, 2, 1500, NUM_RECORDS)
    encoded = [examples.encode(stored[i]) for i in chosen]
    assert [measured.lengths[i] for i in chosen] == [len(e.input_ids) for e in encoded]
    assert [measured.supervised_lengths[i] for i in chosen] == [sum(e.supervised) for e in encoded]
    in_memory = measure(Examples(conversations=list(stored[:50]), processor=processor), 512, ())[0]
    assert list(in_memory.lengths) == list(measured.lengths[:50])

    monkeypatch.setattr(batches, "_measure", lambda *_: pytest.fail("counted again"))
    again, _ = measure(examples, 512, ())
    assert again.lengths == measured.lengths
    limit = sorted(measured.lengths)[NUM_RECORDS // 2]
    kept, skipped = measure(examples, limit, ("too_long",))
    assert skipped["too_long"] > 0
    assert skipped == {"too_long": sum(length > limit for length in measured.lengths)}
    assert len(kept) == len(stored) - skipped["too_long"]
    monkeypatch.undo()
    processor.num_image_tokens += 1
    longer, _ = measure(examples, 512, ())
    grown = np.array(longer.lengths) - np.array(measured.lengths)
    assert grown.tolist() == stored.image_counts.tolist()


def test_a_defect_of_the_last_stage_is_told_before_the_first_is_trained(parts, tmp_path):
    from tinyllava.training.run import train
    from training_toys import toy_run

    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")
    (tmp_path / "records.json").write_text(
        json.dumps([{"image": "a.png", "conversations": turns("<image>Q", "A " * 60)}] * 8)
    )
    run = toy_run(parts, tmp_path / "records.json", tmp_path / "run")
    last = dataclasses.replace(run.stages["finetune"], max_length_tokens=90)
    with pytest.raises(Defects, match=r"too_long \(more tokens than max_length_tokens.*\): 8"):
        train(dataclasses.replace(run, stages={**run.stages, "finetune": last}))
    assert not list((tmp_path / "run").rglob("stage.json"))
