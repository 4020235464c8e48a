"""What a row holds in several columns, or as a list: images, options, and all right answers."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tinyllava.data.defects import Defect
from tinyllava.data.readers.columns import LETTER
from tinyllava.data.records import read_records
from tinyllava.evaluation import own_data

ASKED = f"Which is red?\nA. a cup\nB. a jar\n{LETTER}"


@pytest.fixture
def read(tmp_path: Path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")

    def read(rows: str | list[dict]):
        path = tmp_path / ("t.csv" if isinstance(rows, str) else "t.json")
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return read_records(path, tmp_path)

    return read


@pytest.mark.parametrize(
    "rows",
    [
        "image,question,A,B,answer\na.png,Which is red?,a cup,a jar,B\n",
        "image,question,option_a,option_b,option_c,answer\na.png,Which is red?,a cup,a jar,,A JAR\n",
        "image,question,choice 1,choice 2,answer\na.png,Which is red?,a cup,a jar,(b)\n",
        'image;question;choices;answer\na.png;Which is red?;"[""a cup"", ""a jar""]";B\n',
        [{"image": "a.png", "question": "Which is red?", "options": ["a cup", "a jar"], "answer": 1}],
        [
            {
                "image": "a.png",
                "question": "Which is red?",
                "choices": {"A": "a cup", "B": "a jar"},
                "answer": "B",
            }
        ],
        [{"image": "a.png", "question": ASKED, "choices": ["a cup", "a jar"], "answer": "a jar"}],
    ],
)
def test_options_become_lines_of_the_question_and_the_answer_its_letter(read, rows) -> None:
    records = read(rows)
    (conversation,) = records.conversations
    assert [message.text for message in conversation.messages] == [ASKED, "B"]
    assert records.ignored == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"choices": ["2", "3", "4"], "answer": 2},
            "the answer '2' is not one of the options A. 2.*or could be two",
        ),
        (
            {"choices": ["red", "blue"], "answer": "C"},
            "the answer 'C' is not one of the options A. red, B. blue",
        ),
        ({"choices": ["red", "blue"], "answer": 2}, "the answer '2' is not one of the options"),
        ({"choices": ["red", ["blue"]], "answer": "A"}, r"the option \['blue'\] must be text or a number"),
        ({"choices": "red or blue", "answer": "A"}, "'choices' must be a list of texts"),
    ],
)
def test_an_answer_that_could_be_two_options_or_is_none_is_a_defect(read, row, message) -> None:
    with pytest.raises(Defect, match=message):
        read([{"image": "a.png", "question": "Which?", **row}])


@pytest.mark.parametrize(
    "rows",
    [
        "image_1,image_2,question,answer\na.png,b.png,What changed?,all\n",
        "image,image2,question,answer\na.png,b.png,What changed?,all\n",
        "image_2,question,answer,image_1\nb.png,What changed?,all,a.png\n",
        'image;question;answer\n"[""a.png"", ""b.png""]";What changed?;all\n',
        [{"images": ["a.png", "b.png"], "question": "What changed?", "answer": "all"}],
    ],
)
def test_several_images_of_a_row_keep_their_order(read, rows) -> None:
    (conversation,) = read(rows).conversations
    assert [image.name for image in conversation.images] == ["a.png", "b.png"]


def test_a_row_with_fewer_images_than_others_has_those(read) -> None:
    rows = "image_1,image_2,question,answer\na.png,b.png,What?,x\nc.png,,What?,y\n"
    assert [len(one.images) for one in read(rows).conversations] == [2, 1]


def test_columns_that_are_no_options_stay_unused(read) -> None:
    records = read("image,question,answer,B,C\na.png,What?,x,1,2\n")  # no column A
    assert records.conversations[0].messages[0].text == "What?"
    assert records.ignored == {"B": 1, "C": 1}


@pytest.mark.parametrize("form", ["parquet", "json", "csv"])
def test_a_list_of_right_answers_trains_the_most_frequent_and_counts_whole_in_an_evaluation(tmp_path, form):
    rows = [
        {"question": "What colour?", "answers": ["crimson", "red", "red"]},
        {"question": "How many?", "answers": ["2", "two"]},
        {"question": "Where?", "answers": ["here"]},
    ]
    path = tmp_path / f"my.{form}"
    if form == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif form == "json":
        path.write_text(
            json.dumps([{**rows[0], "answers": [{"answer": a} for a in rows[0]["answers"]]}, *rows[1:]])
        )
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "answers"])
            writer.writerows([row["question"], json.dumps(row["answers"])] for row in rows)
    talks = read_records(path, tmp_path).conversations
    assert [talk.messages[1].text for talk in talks] == ["red", "2", "here"]
    questions = own_data.own_benchmark(path).load(tmp_path)
    assert [question.target["answers"] for question in questions] == [row["answers"] for row in rows]


@pytest.mark.parametrize("value", [["a", "b"], [0.1, 0.2, 0.3, 0.4]])
def test_a_list_in_another_column_may_be_labels_or_a_box_and_is_refused(tmp_path, value):
    path = tmp_path / "my.json"
    path.write_text(json.dumps([{"question": "Q", "answer": "[1, 2]"}]))
    assert read_records(path, tmp_path).conversations[0].messages[1].text == "[1, 2]"
    path.write_text(json.dumps([{"question": "Q", "answer": value}]))
    with pytest.raises(Defect, match=rf"'answer' must be text or a number, found a list of {len(value)}"):
        read_records(path, tmp_path)
