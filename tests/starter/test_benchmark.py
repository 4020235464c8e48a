"""The starter's benchmark and its report, on records in the form that the starter writes."""

import json

import pytest
from PIL import Image

from tinyllava.conversation import to_ref
from tinyllava.errors import DataError
from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.benchmarks.starter import BENCHMARK, QUOTAS, WHOLE, majority_answers
from tinyllava.starter.report import (
    Shown,
    choose_shown,
    choose_strip,
    draw_losses,
    draw_sheet,
    results_table,
    write_examples,
)


def write(folder, rows):
    """Write held-out records: (source, kind, question, answer)."""
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for number, (source, kind, question, answer) in enumerate(rows):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{number % 7}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append(
            {
                "id": f"q{number}",
                "image": f"{number % 7}.png",
                "conversations": turns,
                "kind": kind,
                "source": source,
            }
        )
    (folder / "held_out.json").write_text(json.dumps(records))
    return folder


def test_the_sample_is_fixed_and_keeps_its_quotas(tmp_path):
    rows = [("easy_vqa", "colour", f"what color {n}?", "red") for n in range(400)]
    rows += [("grocery_store", "fruit", f"what fruit {n}?", "pear") for n in range(50)]
    write(tmp_path, rows)
    first, again = BENCHMARK.load(tmp_path), BENCHMARK.load(tmp_path)
    assert [q.id for q in first] == [q.id for q in again]
    kinds = [q.category for q in first]
    assert kinds.count("colour") == QUOTAS["easy_vqa", "colour"] == 150
    assert kinds.count("fruit") == 50
    assert len(WHOLE.load(tmp_path)) == 450
    assert sum(QUOTAS.values()) >= 1000


def test_scores_by_kind_against_counting_by_hand(tmp_path):
    rows = [("easy_vqa", "yes_no", f"is it {n}?", "yes" if n % 4 else "no") for n in range(40)]
    rows += [("grocery_store", "fruit", f"what {n}?", "pear" if n % 2 else "apple") for n in range(10)]
    questions = BENCHMARK.load(write(tmp_path, rows))
    answers = {q.id: "Yes." if q.category == "yes_no" else "apple" for q in questions}
    result = BENCHMARK.result(questions, BENCHMARK.score(questions, answers), model="m")
    table = results_table({"model": result})
    assert table["yes_no"]["model"]["accuracy"] == 30 / 40
    assert table["fruit"]["model"]["accuracy"] == 5 / 10
    assert table["overall"]["model"] == {
        "accuracy": 35 / 50,
        "interval": table["overall"]["model"]["interval"],
        "count": 50,
    }
    low, high = table["overall"]["model"]["interval"]
    assert 0 < low < 0.7 < high < 1


def test_the_majority_answers_with_the_commonest_training_answer_of_each_kind(tmp_path):
    rows = [("easy_vqa", "yes_no", "is it?", a) for a in ("yes", "no")]
    rows += [("easy_vqa", "colour", "what color?", c) for c in ("red", "blue", "teal")]
    questions = BENCHMARK.load(write(tmp_path, rows))
    answers = majority_answers(
        questions, ["no", "no", "yes", "blue", "blue", "red", "circle", "circle", "circle"]
    )
    assert {q.category: answers[q.id] for q in questions} == {"yes_no": "no", "colour": "blue"}


@pytest.mark.parametrize("change", [{"kind": None}, {"conversations": []}, {"image": 3}])
def test_a_record_of_another_form_names_the_file(tmp_path, change):
    write(tmp_path, [("easy_vqa", "yes_no", "is it?", "yes")])
    (record,) = json.loads((tmp_path / "held_out.json").read_text())
    record = {key: value for key, value in {**record, **change}.items() if value is not None}
    (tmp_path / "held_out.json").write_text(json.dumps([record]))
    with pytest.raises(DataError, match=r"held_out.json: unexpected record format"):
        BENCHMARK.load(tmp_path)


def test_the_images_of_the_report_open(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": n, "loss": 5 / n}) + "\n" for n in range(1, 40)))
    draw_losses({"pretrain": metrics, "finetune": metrics}, tmp_path / "losses.png")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    shown = [
        Shown(image=tmp_path / "a.png", question="What?", answer=a, truth="red", is_right=a == "red")
        for a in ("red", "blue", "")
    ]
    draw_sheet(shown, tmp_path / "images.png")
    draw_sheet(shown, tmp_path / "strip.png", dpi=85, num_colours=32)
    write_examples(tmp_path / "examples.json", shown)
    examples = json.loads((tmp_path / "examples.json").read_text())
    assert [one["question"] for one in examples] == [one.question for one in shown]
    assert [to_ref(one["image"]).data for one in examples] == [one.image.read_bytes() for one in shown]
    assert (tmp_path / "strip.png").stat().st_size < (tmp_path / "images.png").stat().st_size
    for name, smallest in (("losses.png", 800), ("images.png", 1000), ("strip.png", 800)):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert image.width >= smallest
            assert len(image.convert("L").getcolors(1000) or []) > 20  # something is drawn


def test_the_sheet_mixes_the_images_of_a_file_and_is_the_same_every_time(tmp_path):
    kinds = ("yes_no", "fruit", "shape")
    predictions = [
        Prediction(
            benchmark="starter",
            question_id=f"{kind}{number}",
            image=f"{number}.png",
            prompt="What is it?",
            answer="apple",
            parsed="apple",
            score=float(number < 300),
            category=kind,
        )
        for number in range(600)
        for kind in kinds
    ]
    truths = {prediction.question_id: "apple" for prediction in predictions}
    shown = choose_shown(predictions, truths, tmp_path)
    assert shown == choose_shown(predictions, truths, tmp_path)
    assert len({one.image for one in shown}) == 24
    assert 4 < sum(one.is_right for one in shown) < 20  # of both halves of the file, right or wrong
    strip = choose_strip(predictions, truths, tmp_path)
    assert [one.is_right for one in strip] == [True] * 5 + [False]
    assert len({one.image for one in strip}) == 6
