"""A user's own questions as a benchmark: metrics by looks or by choice, scores by hand, errors in place."""

import json
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from tinyllava.cli import main
from tinyllava.errors import ConfigError, DataError, UnknownNameError
from tinyllava.evaluation.own_data import from_predictions, own_benchmark
from tinyllava.evaluation.question import Judging
from tinyllava.evaluation.results import Metric
from tinyllava.studies.report.answers import OTHER, UNREAD, count_confusions


def record(question: str, answer: str, **fields) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": "a.png", "conversations": turns, **fields}


@pytest.fixture
def write(tmp_path: Path):
    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 30), (20, 20, 200)).save(tmp_path / "b.png")

    def write(*records: dict, name: str = "my_test.json") -> Path:
        (tmp_path / name).write_text(json.dumps(records), encoding="utf-8")
        return tmp_path / name

    return write


def by_name(metrics: tuple[Metric, ...]) -> Mapping[str, float]:
    return {metric.name: pytest.approx(metric.value) for metric in metrics}


LOOKS = (
    record("Which colour?", "Red."),
    record("Which colour?", "blue"),
    record("Is it red?", "Yes"),
    record("How many?", "3"),
    record("Which?\nA. red\nB. blue", "B"),
    record("Which?", "blue", choices=["red", "blue"]),
    record("What is it?", "cup", answers=["cup"] * 3 + ["mug"] * 7),
    record("Describe it.", "A red cup on a large table.", kind="caption"),
)


def test_auto_chooses_by_what_right_answers_look_like_and_says_so(write) -> None:
    benchmark = own_benchmark(write(*LOOKS))
    metrics = [question.target["metric"] for question in benchmark.load(Path())]
    assert metrics == ["exact", "exact", "yes_no", "number", "choice", "choice", "vqa", "rouge"]
    assert benchmark.notes[0] == "metric exact match: 2 answers (short answers; --metric chooses another)"
    assert "metric ROUGE-L: 1 answer (long answers; --metric chooses another)" in benchmark.notes
    assert (benchmark.name, benchmark.metric) == ("own-my_test", "mean score")
    assert benchmark.protocol == "own/choice+exact+number+rouge+vqa+yes_no"
    assert own_benchmark(write(*LOOKS[:2])).metric == "exact match"


def test_scores_by_kind_metric_and_answer_with_the_most_frequent_answer_beside_them(write) -> None:
    benchmark = own_benchmark(
        write(
            *(
                record("Which colour?", answer, id=f"c{n}")
                for n, answer in enumerate(("Red.", "red", "red", "blue"))
            ),
            *(record("Is it red?", answer, id=f"y{n}") for n, answer in enumerate(("yes", "no", "no"))),
        )
    )
    questions = benchmark.load(Path())
    answers = {
        "c0": "RED",
        "c1": "red",
        "c2": "blue",
        "c3": "Blue.",
        "y0": "Yes, it is.",
        "y1": "maybe",
        "y2": "no",
    }
    scored = benchmark.score(questions, answers)
    assert by_name(scored.metrics) == {
        "mean score": 500 / 7,
        "answer=no": 50,
        "answer=red": 200 / 3,
        "kind=short answers": 75,
        "kind=yes or no": 200 / 3,
        "baseline=most frequent answer": 500 / 7,  # red, red, red and no, no
    }
    assert scored.num_unclear == 1
    colours, yes_no = count_confusions(questions, scored.predictions)
    assert (colours.truths, colours.answers, colours.counts) == (
        ("blue", "red"),
        ("blue", "red"),
        ((1, 0), (1, 2)),
    )
    assert yes_no.answers == ("no", "yes", UNREAD)
    assert yes_no.counts == ((1, 0, 1), (0, 1, 0))
    again = from_predictions("own-my_test", scored.predictions)
    assert again.metric == "mean score"
    assert {name: ratios[0].value for name, ratios in again.summarise(scored.predictions).items()} == {
        name: value for name, value in by_name(scored.metrics).items() if "baseline" not in name
    }


def test_another_answer_than_the_labels_is_other_and_any_right_one_counts_as_the_first(write) -> None:
    data = write(
        *(record("What?", "cup", id=f"c{n}", answers=["cup", "mug"]) for n in range(2)),
        *(record("What?", "jar", id=f"j{n}") for n in range(2)),
    )
    benchmark = own_benchmark(data)
    questions = benchmark.load(data)
    scored = benchmark.score(questions, {"c0": "A mug", "c1": "mug", "j0": "jar", "j1": "pot"})
    (table,) = count_confusions(questions, scored.predictions)
    assert table.answers == ("cup", "jar", OTHER)
    assert table.counts == ((1, 0, 1), (0, 1, 1))


def test_f1_of_labels_over_records_and_over_labels(write) -> None:
    benchmark = own_benchmark(
        write(record("What?", "cat, dog", id="0"), record("What?", "cow", id="1")), metric="f1"
    )
    scored = benchmark.score(benchmark.load(Path()), {"0": "dog and cow", "1": "cow"})
    # per record 1/2 and 1; right/said/both: cat 1/0/0, cow 1/2/1, dog 1/1/1
    found = by_name(scored.metrics)
    assert found["F1 of labels"] == 75
    assert found["labels=micro F1"] == 100 * 2 * 2 / 6
    assert found["labels=macro F1"] == 100 * (0 + 2 / 3 + 1) / 3


def test_each_answer_of_a_dialogue_is_asked_for_after_the_turns_before_it(write) -> None:
    dialogue = record("Which colour?", "red", id="d")
    dialogue["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
    first, second, *rest = own_benchmark(write(dialogue, record("A?", "x"), record("B?", "y"))).load(Path())
    assert (first.id, second.id) == ("d#1", "d#2")
    assert [message.text for message in second.conversation.messages] == ["Which colour?", "red", "Sure?"]
    assert (first.target["answers"], second.target["answers"]) == (["red"], ["yes"])
    assert [question.id for question in rest] == ["record 1", "record 2"]


def test_one_id_on_two_records_stays_two_questions(write) -> None:
    questions = own_benchmark(write(record("A?", "x", id="1"), record("B?", "y", id="1"))).load(Path())
    assert [question.id for question in questions] == ["1 record 0", "1 record 1"]


def test_what_is_left_out_of_a_file_is_said(write) -> None:
    lost = {**record("What?", "cup"), "image": "nowhere.png"}
    data = write(record("What?", "cup", kind="x", colour="red"), record("What?", "jar", colour="blue"), lost)
    benchmark = own_benchmark(data, skip=("missing_image",))
    assert benchmark.notes[1:] == ("skipped records (missing_image): 1", "unused fields: colour (2)")
    (data.parent / "b.png").write_bytes(b"no image")
    broken = {**record("What?", "jar"), "image": "b.png"}
    benchmark = own_benchmark(write(record("What?", "cup"), broken), skip=("broken_image",))
    assert benchmark.num_questions == 1
    assert benchmark.notes[1:] == ("skipped records (broken_image): 1",)


def test_options_in_columns_are_asked_as_lines_and_graded_by_letter_or_text(write, tmp_path: Path) -> None:
    write()
    (tmp_path / "my.csv").write_text("image,question,A,B,answer\na.png,Which?,red,blue,blue\n")
    benchmark = own_benchmark(tmp_path / "my.csv")
    (question,) = benchmark.load(Path())
    assert "A. red\nB. blue" in question.prompt
    for answer, score in (("B", 1), ("It is blue.", 1), ("A", 0)):
        assert benchmark.grade(question, answer).score == score


def test_several_images_of_a_question_are_one_cluster(write) -> None:
    two = record("<image>\nWhich is red?", "the first", id="t")
    two["image"] = ["a.png", "b.png"]
    (question,) = own_benchmark(write(two)).load(Path())
    assert question.image == "a.png, b.png"
    assert [image.path.name for image in question.conversation.images] == ["a.png", "b.png"]


FORMS = {
    "my.csv": "image,question,answer,kind\na.png,Which colour?,red,colour\nb.png,How many?,2,number\n",
    "my.jsonl": (
        '{"image": "a.png", "question": "Which colour?", "answer": "red", "kind": "colour"}\n'
        '{"messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", '
        '"text": "How many?"}]}, {"role": "assistant", "content": "2"}], "kind": "number"}\n'
    ),
}


def test_a_split_keeps_what_records_say_to_the_evaluation(write, tmp_path: Path) -> None:
    write()
    rows = "image,question,answer,kind,tolerance\na.png,How wide?,3,size,0.5\nb.png,How wide?,4,size,0.5\n"
    (tmp_path / "my.csv").write_text(rows)
    assert main(["data", "split", str(tmp_path / "my.csv"), "--held-out", "50%"]) == 0
    assert main(["data", "convert", str(tmp_path / "my.csv"), str(tmp_path / "all.json")]) == 0
    assert own_benchmark(tmp_path / "all.json").load(Path())[1].category == "size"
    for side in ("train", "held-out"):
        (question,) = own_benchmark(tmp_path / f"my-{side}.json").load(Path())
        assert (question.category, question.target["tolerance"]) == ("size", "0.5")


def test_a_label_column_called_category_is_no_kind(write, tmp_path: Path) -> None:
    write()
    (tmp_path / "my.csv").write_text("image,category\na.png,cup\nb.png,jar\n")
    assert {question.category for question in own_benchmark(tmp_path / "my.csv").load(Path())} == {
        "short answers"
    }


@pytest.mark.parametrize("name", FORMS)
def test_every_form_that_training_reads_is_evaluated(write, tmp_path: Path, name: str) -> None:
    write()
    (tmp_path / name).write_text(FORMS[name])
    colour, number = own_benchmark(tmp_path / name).load(Path())
    assert (colour.prompt, colour.target["answers"], colour.category) == ("Which colour?", ["red"], "colour")
    assert (number.target["metric"], number.category, number.image) == ("number", "number", "b.png")


def test_images_without_a_name_are_told_apart_by_their_bytes(write) -> None:
    data = write()
    urls = [
        "data:image/png;base64," + b64encode((data.parent / name).read_bytes()).decode()
        for name in ("a.png", "b.png", "a.png")
    ]
    rows = [{"image": url, "question": "Which?", "answer": "red"} for url in urls]
    data.write_text(json.dumps(rows))
    first, second, third = own_benchmark(data).load(Path())
    assert first.image == third.image != second.image


@pytest.mark.parametrize(
    ("fields", "metric", "tolerance", "error", "message"),
    [
        (
            {"metric": "exakt"},
            "auto",
            "0",
            DataError,
            "record 0: unknown metric 'exakt'.*Did you mean 'exact'",
        ),
        ({"metric": "mine.py:f"}, "auto", "0", DataError, "record 0: unknown metric 'mine.py:f'"),
        (
            {"metric": "number"},
            "auto",
            "0",
            DataError,
            "record 0: metric number: the right answer 'red' is not",
        ),
        ({"answers": [["red"]]}, "auto", "0", DataError, "record 0: 'answers' is .*Write a list of texts"),
        ({"tolerance": "much"}, "auto", "0", ConfigError, "record 0: tolerance 'much' is not a number"),
        ({}, "exakt", "0", UnknownNameError, "Did you mean 'exact'"),
        ({}, "number", "-1", ConfigError, "tolerance '-1' is not a number. Write 0.5, or 5%"),
        ({}, "choice", "0", DataError, "has no choices. Add 'choices'"),
        ({}, "nowhere.py:f", "0", ConfigError, "nowhere.py: no such file"),
    ],
)
def test_what_cannot_be_graded_is_told_with_its_place(
    write, fields, metric, tolerance, error, message
) -> None:
    with pytest.raises(error, match=message):
        own_benchmark(write(record("Which?", "red", **fields)), metric=metric, tolerance=tolerance)


CODE = """
def half(answer, right, record):
    return 0.5 if answer == record["hint"] else right == [answer]

def fails(answer, right, record):
    return record["nothing"]

def unread(answer, right, record):
    return None if answer == "?" else (1.0, "seen")

def wrong(answer, right, record):
    return 7

VALUE = 3
"""


def test_a_users_own_metric_grades_and_its_errors_show_their_line(write, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    data = write(record("Which?", "red", id="0", hint="reddish"), record("Which?", "blue", id="1", hint=""))

    def score(name: str, *given: str):
        benchmark = own_benchmark(data, metric=f"{tmp_path / 'mine.py'}:{name}")
        return benchmark, benchmark.score(benchmark.load(data), dict(zip("01", given, strict=True)))

    benchmark, scored = score("half", "reddish", "blue")
    assert by_name(scored.metrics)["half"] == 75
    assert "mine.py:half@" in benchmark.protocol
    (tmp_path / "mine.py").write_text(CODE + "\n")
    assert score("half", "reddish", "blue")[0].protocol != benchmark.protocol  # other code, other column
    _, scored = score("unread", "?", "x")
    assert [(one.parsed, one.score, one.is_clear) for one in scored.predictions] == [
        ("", 0, False),
        ("seen", 1, True),
    ]
    with pytest.raises(ConfigError, match=r"mine\.py: line 6: KeyError: 'nothing' \(metric .*, answer 'x'\)"):
        score("fails", "x", "y")
    with pytest.raises(ConfigError, match=r"returned 7 for the answer 'x'\. Return a score from 0 to 1"):
        score("wrong", "x", "y")
    with pytest.raises(ConfigError, match="expected a function, found int"):
        own_benchmark(data, metric=f"{tmp_path / 'mine.py'}:VALUE")


def test_a_function_is_a_metric_in_python(write) -> None:
    def same_length(answer, right, record):
        return len(answer) == len(right[0])

    benchmark = own_benchmark(write(record("Which?", "red", id="0")), metric=same_length)
    assert benchmark.score(benchmark.load(Path()), {"0": "abc"}).metrics[0].value == 100
    assert benchmark.metric == "same_length"


def test_a_judge_grades_from_0_to_10(write) -> None:
    benchmark = own_benchmark(write(record("Which {colour}?", "red", id="0")), metric="judge")
    (question,) = benchmark.load(Path())
    assert isinstance(benchmark.judging, Judging)
    request = benchmark.judging.ask(benchmark.judging.wording(Path()), question, "a {reply}", 0)
    for part in ("Question: Which {colour}?", "Right answer: red", "Reply: a {reply}"):
        assert part in request.messages[0]["content"]
    for reply, score, is_clear in (
        ("7", 70, True),
        ("Grade: 10/10", 100, True),
        ("11", 0, False),
        ("no", 0, False),
    ):
        scored = benchmark.score([question], {"0": "reddish"}, {"0": reply}, "some judge")
        assert (scored.metrics[0].value, scored.num_unclear) == (pytest.approx(score), int(not is_clear))
    assert benchmark.score([question], {"0": "reddish"}).metrics == ()
