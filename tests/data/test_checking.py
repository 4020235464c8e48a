"""Own data checked, converted and split: what is counted, what comes back, what stays apart."""

import gc
import json
import os
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from studies.report.chromium import open_page
from tinyllava.cli import main
from tinyllava.config import DataConfig
from tinyllava.conversation import Conversation
from tinyllava.data.checking import Repeated, check_files, shared_images
from tinyllava.data.records import read_configured, read_records
from tinyllava.data.store import ROLES
from tinyllava.data.writing import write_records
from tinyllava.errors import ConfigError, DataError
from tinyllava.files import LOCK, sha256_of


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Eight good rows about four images of different content, and four that are not."""
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"photos/moth{number}.png")
    (tmp_path / "photos/copy.png").write_bytes((tmp_path / "photos/moth0.png").read_bytes())
    (tmp_path / "photos/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing")
    rows = [f"photos/moth{n}.png,What colour?,{'red' if n else 'black'},x" for n in range(4)]
    rows += [f"photos/moth{n}.png,How many beetles?,{n},x" for n in range(3)]
    rows += ["photos/copy.png,What colour?,red,x"]
    rows += ["photos/none.png,Q,A,", "photos/broken.png,Q,A,", "photos/moth1.png,Q,,", "gone.png,Q,A,"]
    path = tmp_path / "my.csv"
    path.write_text("image,question,answer,note\n" + "\n".join(rows) + "\n")
    return path


def test_a_check_counts_names_all_defects_and_finds_repeated_questions(table, capsys):
    page = table.with_name("check.html")
    for _ in range(2):  # a page of an earlier check is replaced
        capsys.readouterr()
        assert main(["data", "check", str(table), "--page", str(page)]) == 1
    shown = capsys.readouterr().out
    assert f"{table}: 12 records, 8 without a defect" in shown
    assert "4 different; 8 records with an image, 0 of text only" in shown
    assert "      4   50%  red" in shown
    assert "repeated questions about the same image: 1 (1 answered differently)" in shown
    assert f"{table}: line 2 | {table}: line 9" in shown
    assert "unused fields: note (12)" in shown
    assert "missing_image: 2 (an image file that does not exist)" in shown
    for line, detail in (
        (10, "none.png"),
        (11, "broken.png"),
        (12, "an answer has no text"),
        (13, "gone.png"),
    ):
        assert any(f"line {line}: " in row and detail in row for row in shown.splitlines())
    assert "train with --skip missing_image --skip broken_image --skip empty_answer." in shown
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 8
    assert "broken_image" in html
    assert "<script" not in html


def test_a_check_shows_what_a_mixture_takes_of_each_file(table, capsys):
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:9]))
    files = [f"{table},weight=3", f"{table},weight=1,limit=4"]
    assert main(["data", "check", *files]) == 0
    shown = capsys.readouterr().out
    assert f"  {table},weight=3: 9 samples of 8 records\n" in shown
    assert f"  {table},weight=1,limit=4: 3 samples of 8 records\n" in shown
    assert main(["data", "convert", f"{table},limit=4", str(table.with_name("some.json"))]) == 0
    assert len(json.loads(table.with_name("some.json").read_text())) == 4


@pytest.mark.parametrize("width_px", [390, 1280])
def test_the_page_shows_images_where_turns_have_them_and_fits_the_screen(table, tmp_path, width_px):
    one, two = ({"type": "image", "path": f"photos/moth{n}.png"} for n in range(2))
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Is "}, one, {"type": "text", "text": " red?"}],
        },
        {"role": "assistant", "content": "no " * 900, "loss": 0},
        {"role": "user", "content": [two, {"type": "text", "text": "x" * 300}]},
        {"role": "assistant", "content": "<b>yes</b>"},
    ]
    chat = table.with_name("chat.json")
    chat.write_text(json.dumps([{"id": f"m{n}", "messages": turns, "source": "web"} for n in range(3)]))
    page = table.with_name("check.html")
    assert main(["data", "check", str(chat), "--page", str(page)]) == 0
    html = page.read_text()
    assert html.count("record 1 (id m1)</p>") == 1
    assert "<b>user</b> Is &lt;image&gt; red?</p>" in html
    assert "<b>assistant</b> (not trained) no no" in html
    assert '<p class="trained"><b>assistant</b> &lt;b&gt;yes&lt;/b&gt;</p>' in html
    assert "<td>3<td>source</tr>" in html
    seen = open_page(page, tmp_path, width_px)
    assert (seen.console, len(seen.images), seen.width, seen.overflow) == ([], 6, width_px, 0)


def test_a_check_shows_what_the_template_makes_of_three_records(table, parts, capsys):
    assert main(["data", "check", str(table), "--language-model", str(parts["llama"]), "--no-images"]) == 1
    shown = capsys.readouterr().out
    assert "0 records above 2,048" in shown
    assert shown.count("supervised") == 3
    assert ">> black" in shown


def test_a_good_file_is_a_success_and_shared_images_are_found(table, capsys):
    other = table.with_name("test.json")
    write_records(read_records(table.parent / "photos", table.parent / "photos").conversations, other)
    skips = [option for name in ("missing_image", "empty_answer") for option in ("--skip", name)]
    assert main(["data", "check", str(table), *skips]) == 1  # the broken image has no skip
    table.write_text(table.read_text().replace("photos/broken.png,Q,A,\n", ""))
    capsys.readouterr()
    assert main(["data", "check", str(table), *skips, "--against", str(other)]) == 0
    shown = capsys.readouterr().out
    assert "skipped: missing_image (2), empty_answer (1)" in shown
    assert "Fix these records" not in shown
    (table.parent / "photos/broken.png").unlink()
    other.unlink()
    write_records(read_records(table.parent / "photos", table.parent / "photos").conversations, other)
    capsys.readouterr()
    assert main(["data", "check", str(other), "--against", str(other)]) == 0
    assert f"records that show an image of {other}: 5" in capsys.readouterr().out
    one = check_files(DataConfig(records=(str(table),)))
    assert len(shared_images(one, one)) == 8


CONVERSIONS = {
    "llava": ("b.json", ""),
    "lines": ("b.jsonl", ""),
    "messages": ("b.json", "messages"),
    "parquet": ("b.parquet", ""),
    "llava parquet": ("b.parquet", "llava"),
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_what_is_converted_comes_back_the_same(table, case):
    name, form = CONVERSIONS[case]
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "<image>\n<image>\nAlike?"},
        {"from": "gpt", "value": ' Yes,\n"quoted" <|im_end|> '},
        {"from": "human", "value": "And this?\n<image>"},
        {"from": "gpt", "value": "No."},
    ]
    text = [{"from": "human", "value": " Q "}, {"from": "gpt", "value": "Ä"}]
    images = [f"photos/moth{n}.png" for n in range(3)]
    records = [{"id": 7, "image": images, "conversations": turns}, {"conversations": text}]
    source = table.with_name("a.json")
    source.write_text(json.dumps(records))
    before = read_records(source, table.parent).conversations
    (table.parent / "deeper").mkdir()
    target = table.parent / "deeper" / name
    arguments = ["data", "convert", str(source), str(target)]
    assert main([*arguments, "--form", form] if form else arguments) == 0
    after = read_records(target, target.parent).conversations

    def content(conversation):
        return [
            (m.role, m.text, [ref.data or ref.path.read_bytes() for ref in m.images])
            for m in conversation.messages
        ]

    assert [content(c) for c in after] == [content(c) for c in before]
    assert [c.id for c in after] == ["7", ""]


def test_bytes_become_files_and_what_cannot_be_written_is_refused(table):
    folder = table.parent
    write_records(read_records(folder / "photos", folder / "photos").conversations, folder / "all.parquet")
    again = read_records(folder / "all.parquet", folder).conversations
    write_records(again, folder / "again.json")
    names = [record["image"] for record in json.loads((folder / "again.json").read_text())]
    assert names[0] == "again-images/000000.png"
    assert (folder / names[0]).read_bytes() == (folder / "photos/broken.png").read_bytes()
    with pytest.raises(ConfigError, match=r"choose a name that ends with \.json, \.jsonl or \.parquet"):
        write_records(again, folder / "a.csv")
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is <image>?"}]}]}
    chat["messages"].append({"role": "assistant", "content": "A tag."})
    (folder / "chat.json").write_text(json.dumps([chat]))
    with pytest.raises(DataError, match="a text contains <image>"):
        write_records(read_records(folder / "chat.json", folder).conversations, folder / "b.json")


def test_a_split_keeps_images_apart(table, capsys):
    names = ("missing_image", "empty_answer", "broken_image")
    skips = [option for name in names for option in ("--skip", name)]
    assert main(["data", "split", str(table), "--held-out", "40%", *skips]) == 0
    assert "skipped: missing_image (2), empty_answer (1), broken_image (1)" in capsys.readouterr().out
    sides = [
        check_files(DataConfig(records=(str(table.with_name(f"my-{side}.json")),)))
        for side in ("train", "held-out")
    ]
    assert shared_images(*sides) == []
    assert sum(side.num_records for side in sides) == 8
    assert not any(side.defects for side in sides)
    assert sides[1].num_records >= 1
    before = {path: path.read_bytes() for path in table.parent.glob("my-*.json")}
    for other in ((), ("--held-out", "20%")):  # the files of an earlier split may be edited, or trained on
        assert main(["data", "split", str(table), *other, *skips]) == 2
        told = f"{table.with_name('my-train.json')}: exists already. Move it, or give --overwrite to replace"
        assert told in capsys.readouterr().err
        assert {path: path.read_bytes() for path in table.parent.glob("my-*.json")} == before
    table.with_name("my-train.json").unlink()
    assert main(["data", "split", str(table), *skips]) == 2
    assert "my-held-out.json: exists already" in capsys.readouterr().err
    assert not table.with_name("my-train.json").exists()
    assert main(["data", "split", str(table), "--held-out", "40%", "--overwrite", *skips]) == 0
    assert {path: path.read_bytes() for path in table.parent.glob("my-*.json")} == before
    for wrong in ("0%", "x", "1.5"):
        assert main(["data", "split", str(table), "--held-out", wrong]) == 2
    assert "give a share between 0 and 1, such as 10%" in capsys.readouterr().err


def test_a_conversion_replaces_neither_records_nor_images_that_are_there(table, capsys):
    folder = table.parent
    write_records(read_records(folder / "photos", folder / "photos").conversations, folder / "all.parquet")
    (folder / "b-images").mkdir()
    (folder / "b-images/000000.png").write_bytes(b"somebody's")
    convert = ["data", "convert", str(folder / "all.parquet"), str(folder / "b.json")]
    assert main(convert) == 2
    assert f"{folder / 'b-images'}: exists already. Move it, or give --overwrite" in capsys.readouterr().err
    assert (folder / "b-images/000000.png").read_bytes() == b"somebody's"
    assert not (folder / "b.json").exists()
    assert main([*convert[:3], str(folder / "b.parquet")]) == 0  # which holds its images
    for target in ("b.parquet", "my.csv"):
        assert main([*convert[:3], str(folder / target)]) == 2
        assert f"{folder / target}: exists already. Move it" in capsys.readouterr().err
    assert main([*convert, "--overwrite"]) == 0
    assert (folder / "b-images/000000.png").read_bytes() == (folder / "photos/broken.png").read_bytes()


@pytest.mark.parametrize("command", ["check", "compare"])
def test_a_page_replaces_only_a_page(table, capsys, command):
    arguments = {
        "check": ["data", "check", str(table), "--page"],
        "compare": ["compare", "a", "b", "--output"],
    }
    wrong = {
        table: "is to be an HTML page. Choose a name that ends with .html",
        table.with_name("i.html"): "exists",
    }
    table.with_name("i.html").write_text("<title>mine</title>")
    for path, message in wrong.items():
        before = path.read_bytes()
        assert main([*arguments[command], str(path)]) == 2
        assert f"error: {path}: {message}" in capsys.readouterr().err
        assert path.read_bytes() == before


def by_hand(conversations: list[Conversation]) -> dict[str, object]:
    """What a check counts, with all records and texts in memory."""
    keys = [tuple(sha256_of(ref.path) for ref in talk.images) for talk in conversations]
    said = {role: [[m.text for m in c.messages if m.role == role] for c in conversations] for role in ROLES}
    asked: dict[object, list[int]] = {}
    for place, key in enumerate(keys):
        asked.setdefault((key, said["user"][place][0]), []).append(place)
    return {
        "images": len({one for key in keys for one in key}),
        "with image": sum(map(bool, keys)),
        "question words": sorted(len(text.split()) for texts in said["user"] for text in texts),
        "answer words": sorted(len(text.split()) for texts in said["assistant"] for text in texts),
        "answers": Counter(text for texts in said["assistant"] for text in texts).most_common(7),
        "repeated": [
            Repeated(
                question=text,
                places=tuple(conversations[place].place for place in places),
                answers=tuple(said["assistant"][place][0] for place in places),
            )
            for (_, text), places in asked.items()
            if len(places) > 1
        ],
    }


def test_what_a_check_counts_is_what_is_counted_by_hand(table):
    """Over two files, several batches of mapped records, ties, and defects among them."""
    chance, folder = random.Random(0), table.parent
    images = [f"photos/{name}.png" for name in ("moth0", "moth1", "moth2", "copy", "broken", "none")]
    for number in range(2):
        records = []
        for _ in range(1_500):
            shown = chance.choices(images, [9, 9, 9, 9, 1, 1], k=chance.choice((0, 1, 1, 2)))
            turns = [{"from": "system", "value": "Short."}] if chance.random() < 0.1 else []
            for _turn in range(chance.choice((1, 1, 3))):
                turns.append({"from": "human", "value": f"What {chance.randrange(90)} is it?"})
                turns.append({"from": "gpt", "value": f"It is {'very ' * chance.randrange(4)}red."})
            turns[-2]["value"] = "<image>" * len(shown) + turns[-2]["value"]
            records.append({"id": chance.randrange(40_000), "image": shown, "conversations": turns})
        (folder / f"{number}.json").write_text(json.dumps(records))
    files = tuple(str(folder / f"{number}.json") for number in range(2))
    names = ("missing_image", "broken_image", "duplicate_id")
    gc.collect()
    before = [one for one in gc.get_objects() if type(one) is Conversation]  # of other tests
    check = check_files(DataConfig(records=files, skip=names))
    counted = {
        "images": check.num_images,
        "with image": check.contents.num_with_image,
        "question words": sorted(check.contents.question_words),
        "answer words": sorted(check.contents.answer_words),
        "answers": check.contents.most_common(7),
        "repeated": check.find_repeated(),
    }
    gc.collect()
    now = [one for one in gc.get_objects() if type(one) is Conversation]
    assert {id(one) for one in now} <= {id(one) for one in before}  # records stay on disk
    stored = read_configured(DataConfig(records=files, skip=names))
    assert [*check.conversations] == [*stored.conversations]
    assert Counter(one.name for one in check.defects) == stored.skipped
    places = [int(re.search(r"record (\d+)", one.where)[1]) for one in check.defects]
    assert sum(after < before for before, after in pairwise(places)) == 1  # in order, in each of the files
    assert counted == by_hand([*stored.conversations])


def test_what_killed_checks_left_is_removed_and_a_running_one_keeps_its_own(table, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path / "cache"))
    left, running, new = (tmp_path / "cache" / f"check-{name}" for name in ("left", "running", "new"))
    for folder in (left, running, new):
        folder.mkdir(parents=True)
        (folder / "records.arrow").write_text("records")
    for folder in (left, running):
        os.utime(folder, (0, 0))
    with FileLock(running / LOCK):
        os.utime(running, (0, 0))
        check_files(DataConfig(records=(str(table),)))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["check-new", "check-running"]
    assert (running / "records.arrow").is_file()
