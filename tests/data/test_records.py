"""LLaVA's JSON: what a good record becomes, what each bad one is called, and that a skip drops just that."""

import gzip
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tinyllava.config import DataConfig
from tinyllava.data.conversion import read_stored
from tinyllava.data.defects import DEFECTS, Defect, Defects
from tinyllava.data.records import read_raw, read_records
from tinyllava.data.store import find_good_images
from tinyllava.errors import ConfigError, DataError


def turns(*values: str, first: str = "human") -> list[dict[str, str]]:
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def record(*values: str, **fields) -> dict[str, object]:
    return {"id": "r1", "conversations": turns(*values), **fields}


GOOD = [{**record(f"Q{n}", f"A{n}"), "id": f"good{n}"} for n in range(3)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images/folder.jpg").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "images/b.png")
    (tmp_path / "images/text.jpg").write_text("no image")
    return tmp_path / "images"


def write(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(tmp_path: Path, records: object, skip: tuple[str, ...] = ()):
    return read_records(write(tmp_path, records), tmp_path / "images", skip)


def test_a_record_becomes_a_conversation(tmp_path, images):
    raw = record("What is it?\n<image>", " A dog. \n", "Sure?", "Yes.", image="a.png", model="")
    [conversation] = read(tmp_path, [raw]).conversations
    assert (conversation.id, conversation.source) == ("r1", str(tmp_path / "data.json"))
    assert [(m.role, m.text, len(m.images)) for m in conversation.messages] == [
        ("user", "What is it?", 1),
        ("assistant", " A dog. \n", 0),
        ("user", "Sure?", 0),
        ("assistant", "Yes.", 0),
    ]
    assert conversation.images[0].path == images / "a.png"


def test_text_only_and_system_lines_and_several_images(tmp_path, images):
    system = [{"from": "system", "value": "Be short."}, *turns("Q", "A")]
    records = [
        record("Q", "A"),
        {"conversations": system},
        {"id": 7, "conversations": turns("Q", "A"), "image": ""},
        {"id": None, "conversations": turns("Q", "B"), "image": None},
        record("<image> and <image>", "A", "And?<image>", "B", image=["a.png", "b.png", "a.png"]),
    ]
    found = read(tmp_path, records).conversations
    assert [conversation.id for conversation in found] == ["r1", "", "7", "", "r1"]
    assert found[1].messages[0].role == "system"
    assert [[ref.name for ref in m.images] for m in found[4].messages] == [
        ["a.png", "b.png"],
        [],
        ["a.png"],
        [],
    ]


def test_an_image_alone_is_a_question(tmp_path, images):
    [conversation] = read(tmp_path, [record("<image>", "A dog.", image="a.png")]).conversations
    assert conversation.messages[0].text == ""


def test_jsonl_is_one_record_a_line_whatever_stands_in_its_strings(tmp_path, images):
    lines = [json.dumps(record(f"Q {mark} Q", "A"), ensure_ascii=False) for mark in "\u2028\x85\x0c"]
    path = write(tmp_path, "\n\n".join(lines) + "\n", "data.jsonl")
    assert len(read_records(path, images).conversations) == 3


def test_a_byte_order_mark_is_not_part_of_the_json(tmp_path, images):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert len(read_records(path, images).conversations) == 3


LONG = "a caption in the wrong field " * 20

DEFECTIVE: dict[str, tuple[str, object, str]] = {
    "string": ("malformed", "hello", "expected an object with a non-empty list 'conversations'"),
    "no turns": ("malformed", {"id": "r1", "conversations": []}, "expected an object with a non-empty list"),
    "truth as text": ("malformed", record("Q", True), "turn 1 must be text or a number, found True"),
    "unknown speaker": (
        "malformed",
        {"id": "r1", "conversations": [{"from": "bot", "value": "x"}]},
        "from 'bot'; allowed",
    ),
    "list as speaker": (
        "malformed",
        {"id": "r1", "conversations": [{"from": ["gpt"], "value": "x"}]},
        r"from \['gpt'\]",
    ),
    "number as image": (
        "malformed",
        record("<image>Q", "A", image=5),
        "must be a path or a list of paths, found 5",
    ),
    "zero as image": ("malformed", record("Q", "A", image=0), "must be a path or a list of paths, found 0"),
    "caption as image": ("malformed", record("<image>Q", "A", image=LONG), "is not a valid path"),
    "gpt first": (
        "leading_answer",
        {"id": "r1", "conversations": turns("A", "Q", "A", first="gpt")},
        "starts with an answer",
    ),
    "two questions": (
        "roles",
        {"id": "r1", "conversations": [*turns("Q"), *turns("Q", "A")]},
        "user, user, assistant",
    ),
    "two answers": (
        "roles",
        {"id": "r1", "conversations": [*turns("Q", "A"), *turns("A", first="gpt")]},
        "do not alternate",
    ),
    "no answer": ("unanswered", record("Q", "A", "Q"), "ends with a question"),
    "empty answer": ("empty_answer", record("Q", " \n"), "an answer has no text"),
    "no trained answer": (
        "untrained",
        {"id": "r1", "conversations": [{**turn, "loss": 0} for turn in turns("Q", "A")]},
        "no answer adds to the loss",
    ),
    "empty question": ("empty_question", record(" ", "A"), "neither text nor image"),
    "mark without image": ("image_count", record("<image>\nQ", "A"), "1 <image> mark for no image"),
    "image without mark": ("image_count", record("Q", "A", image="a.png"), "no <image> mark for 1 image"),
    "two marks": (
        "image_count",
        record("<image><image>Q", "A", image="a.png"),
        "2 <image> marks for 1 image",
    ),
    "mark in an answer": (
        "image_count",
        record("Q", "<image> A", image="a.png"),
        "is in a turn of the assistant",
    ),
    "half a character": (
        "malformed",
        record("Q", "A\ud800"),
        r"turn 1 contains an unpaired surrogate: 'A\\ud800'",
    ),
    "half a character in a path": (
        "malformed",
        record("Q<image>", "A", image="\ud800.png"),
        "'image' contains an unpaired surrogate",
    ),
    "path of 5,000 characters": (
        "malformed",
        record("Q<image>", "A", image="a" * 5000),
        "'image' is not a valid path",
    ),
    "missing image": (
        "missing_image",
        record("<image>Q", "A", image="x/none.png"),
        r"image not found: .*x/none\.png",
    ),
    "folder as image": (
        "missing_image",
        record("<image>Q", "A", image="folder.jpg"),
        "a folder, not an image",
    ),
}


@pytest.mark.parametrize("case", DEFECTIVE)
def test_a_defect_is_named_with_file_record_and_fix(tmp_path, images, case):
    name, raw, message = DEFECTIVE[case]
    with pytest.raises(Defect, match=message) as caught:
        read(tmp_path, [*GOOD, raw])
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'data.json'}: record 3")
    assert ("(id r1)" in text) == isinstance(raw, dict)
    assert f"[{name}]" in text
    assert f"skip such records with --skip {name}." in text
    assert len(text) < 500


@pytest.mark.parametrize("case", DEFECTIVE)
def test_a_skip_leaves_out_that_record_counted_and_no_other(tmp_path, images, case):
    name, raw, _ = DEFECTIVE[case]
    records = read(tmp_path, [GOOD[0], raw, *GOOD[1:]], (name,))
    assert records.skipped == {name: 1}
    kept = [conversation.id for conversation in records.conversations]
    assert [kept_id for kept_id in kept if kept_id != "r1"] == ["good0", "good1", "good2"]
    assert ("r1" in kept) == (name == "leading_answer")


@pytest.mark.parametrize("case", DEFECTIVE)
def test_another_skip_does_not_hide_a_defect(tmp_path, images, case):
    name, raw, _ = DEFECTIVE[case]
    others = tuple(other for other in DEFECTS if other != name)
    with pytest.raises(Defect) as caught:
        read(tmp_path, [*GOOD, raw], others)
    assert caught.value.name == name


def test_of_a_leading_answer_only_that_turn_is_dropped(tmp_path, images):
    system = {"from": "system", "value": "Be short."}
    for before in ([], [system]):
        raw = {"id": "r1", "conversations": [*before, *turns("Hello", "Q", "A", first="gpt")]}
        [conversation] = read(tmp_path, [raw], ("leading_answer",)).conversations
        assert [m.text for m in conversation.messages][-2:] == ["Q", "A"]
        assert len(conversation.messages) == 2 + len(before)


@pytest.mark.parametrize(
    "place", ["C:\\Users\\Ann\\shots\\red\\1.png", "/shots/red/1.png", "wrong/red/1.png"]
)
def test_of_a_path_of_another_computer_its_end_is_looked_for(tmp_path, images, place, monkeypatch):
    known = "red/1.png" if place.startswith("wrong") else "shots/red/1.png"
    (images / known).parent.mkdir(parents=True)
    (images / known).write_bytes(b"")
    with pytest.raises(Defect, match=f"; {images} has {known}: write paths relative to it"):
        read(tmp_path, [record("<image>Q", "A", image=place)])
    monkeypatch.chdir(images)  # which "." would not tell
    with pytest.raises(Defect, match=f"; {images} has {known}: write paths relative to it"):
        read_records(tmp_path / "data.json", Path())


def test_all_defects_of_a_file_are_in_one_report(tmp_path, images):
    gone = [record("<image>Q", f"A{n}", image=f"gone{n}.png") for n in range(5)]
    with pytest.raises(Defects) as caught:
        read(tmp_path, [*GOOD, *gone, record("Q"), record("Q", " ")], ("empty_answer",))
    assert [defect.name for defect in caught.value.defects] == ["missing_image"] * 5 + ["unanswered"]
    lines = str(caught.value).split("\n")
    file = tmp_path / "data.json"
    assert lines[0] == f"{file}: 6 records have defects:"
    assert lines[1] == "  missing_image (an image file that does not exist): 5"
    assert lines[2] == f"    {file}: record 3 (id r1): image not found: {images / 'gone0.png'}"
    assert lines[5] == "    and 2 more"
    assert lines[-1].endswith("or skip such records with --skip missing_image --skip unanswered.")


def test_the_same_record_twice(tmp_path, images):
    with pytest.raises(Defect, match=r"record 3 \(id good0\): the record 'good0' is in the file twice"):
        read(tmp_path, [*GOOD, GOOD[0]])
    assert read(tmp_path, [*GOOD, GOOD[0]], ("duplicate_id",)).skipped == {"duplicate_id": 1}
    other = {**GOOD[0], "conversations": turns("Q0", "another answer")}
    assert len(read(tmp_path, [*GOOD, other]).conversations) == 4  # one id for several records is common


def test_images_that_cannot_be_decoded_are_found(tmp_path, images):
    broken = record("<image>Q", "A", image="text.jpg")
    fine = {**record("<image>Q", "A", image="a.png"), "id": "fine"}
    conversations = read(tmp_path, [*GOOD, broken, fine]).conversations
    seen: list[int] = []
    assert find_good_images(conversations, seen.append).tolist() == [0, 1, 2, 4]
    assert sum(seen) == 5


def test_every_defect_of_a_record_has_a_case():
    elsewhere = {"unsupported", "broken_image", "dialogue", "duplicate_id", "text_only", "too_long"}
    assert {name for name, _, _ in DEFECTIVE.values()} | elsewhere == set(DEFECTS)


FILES = {
    "malformed json": (
        '[{"id": 1},\n {"id": }]',
        r"data\.json: not JSON: Expecting value at line 2 column 9\.",
    ),
    "cut short": (
        '[{"id": "1", "conv',
        r"middle of a record \(Unterminated.*\) at line 1 column 14\. Write or download",
    ),
    "an object": ({"data": GOOD}, "expected a list of records, found an object with the key data"),
    "empty file": ("", "an empty file. Write the records again"),
    "empty array": ("[]", "no records in it"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_array_of_records(tmp_path, case):
    content, message = FILES[case]
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content)
    assert str(tmp_path / "data.json") in str(caught.value)


def test_malformed_jsonl_names_the_line(tmp_path):
    path = write(tmp_path, json.dumps(GOOD[0]) + '\n\n{"id": "x",,}\n', "data.jsonl")
    with pytest.raises(DataError, match=r"data\.jsonl: not JSON: .* at line 3 column 12"):
        read_records(path, tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.json").write_bytes('[{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(
        DataError, match=r"latin\.json: not UTF-8 \(.* at byte 9, line 1\)\. Save it as UTF-8"
    ):
        read_records(tmp_path / "latin.json", tmp_path)
    with pytest.raises(DataError, match=r"none\.json: no such record file"):
        read_records(tmp_path / "none.json", tmp_path)
    with pytest.raises(DataError, match="no image in this folder"):
        read_records(tmp_path, tmp_path)


def test_a_pipe_is_not_waited_for_and_damaged_gzip_is_told(tmp_path):
    os.mkfifo(tmp_path / "my.json")
    with pytest.raises(DataError, match=r"my\.json: not a regular file"):
        list(read_raw(tmp_path / "my.json"))
    packed = bytearray(gzip.compress(b"[" + b"1, " * 500 + b"1]"))
    for damaged in (packed[:15], packed[:10] + b"\xff" * 9 + packed[19:], packed[:-5] + b"00000"):
        (tmp_path / "my.json.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"my\.json\.gz: cannot be read as a record file"):
            list(read_raw(tmp_path / "my.json.gz"))


def test_all_records_skipped_is_an_error_with_the_counts(tmp_path, images):
    with pytest.raises(DataError, match=r"no records left after skips \{'unanswered': 1\}"):
        read(tmp_path, [record("Q")], ("unanswered",))


def test_an_unknown_skip_lists_the_known_ones(tmp_path, images):
    with pytest.raises(
        ConfigError, match=r"skip 'unanswerd': unknown; known: malformed, leading_answer, roles"
    ):
        read(tmp_path, GOOD, ("unanswerd",))


OTHER_FORMS = {
    "lists without end": (
        "a.json",
        "[" * 100_000,
        r"a\.json: not JSON: nested too deeply at line 1 column 1000",
    ),
    "a number without end": (
        "a.jsonl",
        f'\n{{"id": {"9" * 5000}}}',
        "not JSON: an integer with 5,000 digits at line 2 column 8",
    ),
}


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_a_file_of_another_form_is_told_its_name(tmp_path, case):
    name, text, message = OTHER_FORMS[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name, tmp_path)


@pytest.mark.parametrize("id_", ["\ud800", ["r1"], {"a": 1}])
def test_an_id_that_cannot_be_written_is_malformed(tmp_path, id_):
    raw = {**record("Q", "A"), "id": id_}
    with pytest.raises(Defect, match=r"record 0 .*'id' must be text or a number.* \[malformed\]"):
        read(tmp_path, [raw])


def test_records_without_or_with_the_same_id_are_told_apart_by_their_place(tmp_path, images):
    """Whatever is said of a record later names where it is in its file."""
    raw = [{"conversations": turns("Q", f"A{n}")} for n in range(2)]
    raw += [record("Q<image>", f"A{n}", image="a.png") for n in range(2)]
    found = [conversation.place for conversation in read(tmp_path, raw).conversations]
    json_file, lines_file = tmp_path / "data.json", tmp_path / "data.jsonl"
    assert found == [
        f"{json_file}: record 0",
        f"{json_file}: record 1",
        f"{json_file}: record 2 (id r1)",
        f"{json_file}: record 3 (id r1)",
    ]
    lines_file.write_text("\n".join(["", *map(json.dumps, raw)]))
    found = [conversation.place for conversation in read_records(lines_file, images).conversations]
    assert found == [f"{lines_file}: line {n}" for n in (2, 3)] + [
        f"{lines_file}: line {n} (id r1)" for n in (4, 5)
    ]


def test_images_of_llavas_records_stay_in_their_text_where_that_is_asked_for(tmp_path):
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "No."}]
    lead = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    (tmp_path / "my.json").write_text(
        json.dumps(
            [{"image": ["a.png", "b.png"], "conversations": turns}, {"image": "a.png", "conversations": lead}]
        )
    )
    (tmp_path / "t.csv").write_text("image,question,answer\na.png,See <image> here?,yes\n")
    files = (str(tmp_path / "my.json"), str(tmp_path / "t.csv"))
    kept, published = (
        [one.messages[0] for one in read_stored(data, "", tmp_path / "store").conversations]
        for data in (DataConfig(records=files, keep_image_places=True), DataConfig(records=files))
    )
    marked = ["Is <image> like <image>?", "<image>What?", "See <image> here?"]
    assert [message.marked("<image>") for message in kept] == marked
    assert [message.marked("<image>") for message in published] == [
        "<image><image>Is  like ?",
        "<image>What?",
        "<image>See  here?",
    ]
    assert kept[1] == published[1]
