"""Own questions on the command line: asked, resumed, graded again, blind, compared; the page in Chromium."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyllava
from chats import make_chat
from evaluation import benchmark_files as files
from studies.report.chromium import open_page
from tinyllava.cli import main
from tinyllava.cli.evaluate import describe_readings
from tinyllava.evaluation.answers import read_predictions
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.own_data import own_benchmark
from tinyllava.evaluation.results import load_results
from tinyllava.studies.report.answers import write_answers

PHONE, DESKTOP = 390, 1280
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    chat = make_chat(folder, "llama")
    chat.model.save_pretrained(folder / "model")
    chat.processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    records = []
    for n in range(6):
        pixels = np.random.default_rng(n).integers(0, 255, (40 + 20 * n, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{n}.jpg")
        colour = COLOURS[n % 3]
        for kind, question, answer in (
            ("c", "Which colour?", colour),
            ("y", "Is it red?", "no" if n % 3 else "yes"),
        ):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{kind}{n}", "image": f"{n}.jpg", "conversations": turns})
    (tmp_path / "my_test.json").write_text(json.dumps(records))
    return tmp_path / "my_test.json"


def asked(model: Path, data: Path, *more: str) -> list[str]:
    output = ("--output", str(data.parent / "out"), "--max-tokens", "6")
    return [
        "evaluate",
        str(model),
        "--data",
        str(data),
        "--images",
        str(data.parent / "photos"),
        *output,
        *more,
    ]


def test_own_questions_are_asked_once_and_graded_as_often_as_one_likes(model, data, capsys) -> None:
    assert main(asked(model, data, "--limit", "4")) == 0
    assert main(asked(model, data)) == 0
    output = data.parent / "out"
    lines = (output / "own-my_test/answers-000.jsonl").read_text().splitlines()
    assert len(lines) == 12
    capsys.readouterr()
    assert main(asked(model, data, "--metric", "contains")) == 0
    assert (output / "own-my_test/answers-000.jsonl").read_text().splitlines() == lines
    printed = capsys.readouterr().out
    assert re.search(r"own-my_test \(own/contains\): contains \d+\.\d\d \[.*\] \(n=12\)", printed)
    assert "  kind: short answers " in printed
    assert "  baseline: most frequent answer 50" in printed  # 2 of 6 colours, 4 of 6 times no
    assert "  metric contains: 12 answers (chosen with --metric)" in printed
    assert "  read as: " in printed
    assert printed.splitlines()[-1] == str(output / "results.json")
    assert str(output / "own-my_test/answers.html") in printed


def test_blind_then_seeing_then_compared(model, data, capsys) -> None:
    for more in (["--blind"], []):
        assert main(asked(model, data, *more)) == 0
    assert "  with blank images: mean score " in capsys.readouterr().out
    output = data.parent / "out"
    assert [one.model.endswith("(blank images)") for one in load_results(output / "results.json")] == [
        True,
        False,
    ]
    page = data.parent / "flips.html"
    a, b = output / "own-my_test", output / "own-my_test-blind"
    predictions = [json.loads(line) for line in (b / "predictions.jsonl").read_text().splitlines()]
    predictions[0]["score"] = 1 - predictions[0]["score"]
    (b / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in predictions))
    shown = ["--data", str(data), "--images", str(data.parent / "photos"), "--output", str(page)]
    for _ in range(2):  # a page of an earlier comparison is replaced
        capsys.readouterr()
        assert main(["compare", str(a), str(b), *shown]) == 0
    assert re.search(r"own-my_test mean score: .* n = 12 questions", capsys.readouterr().out)
    assert "data:image/jpeg;base64" in page.read_text()
    assert "<dt>truth</dt><dd><pre>red</pre></dd>" in page.read_text()
    assert main(asked(model, data, "--metric", "contains")) == 0
    assert main(["compare", str(a), str(b)]) == 2
    assert "Evaluate both on the same data with the same protocol or metric" in capsys.readouterr().err


def test_an_image_that_changed_is_not_answered_by_what_the_old_one_showed(model, data, capsys) -> None:
    assert main(asked(model, data)) == 0
    Image.new("RGB", (30, 30)).save(data.parent / "photos/0.jpg")
    for more in ([], ["--score-only"]):
        assert main(asked(model, data, *more)) == 2
        told = capsys.readouterr().err
        assert f"{data}: record 0 (id c0): its image, the image's place or an earlier turn changed" in told
    records = json.loads(data.read_text())
    data.write_text(json.dumps(records[2:]))  # without its questions, the other answers still count
    before = load_results(data.parent / "out/results.json")[-1].decoding
    assert main(asked(model, data, "--score-only", "--max-tokens", "99")) == 0
    assert load_results(data.parent / "out/results.json")[-1].decoding == before  # that of the answers


def test_an_image_at_another_place_is_another_question(model, data, capsys) -> None:
    """By default, images come before the text, which is the same then as with the image in it."""
    records = json.loads(data.read_text())[:2]
    records[0]["conversations"][0]["value"] = "Which colour has <image> this?"
    data.write_text(json.dumps(records))
    assert main(asked(model, data)) == 0
    assert main(asked(model, data, "--keep-image-places")) == 2
    assert "record 0 (id c0): its image, the image's place or an earlier turn" in capsys.readouterr().err
    assert main(asked(model, data)) == 0


def test_in_python(model, data, tmp_path: Path) -> None:
    results = tinyllava.evaluate(
        model, data, images=data.parent / "photos", output=tmp_path / "py", metric="exact", max_tokens=6
    )
    (result,) = results.values()
    assert (result.benchmark, result.metric, result.num_questions) == ("own-my_test", "exact match", 12)
    assert main(asked(model, data, "--metric", "exact")) == 0
    (printed,) = load_results(data.parent / "out/results.json")
    assert printed.metrics == result.metrics


def test_a_folder_of_images_in_folders_by_label_asks_for_the_label(model, tmp_path: Path, capsys) -> None:
    for label in ("cup", "jar"):
        (tmp_path / "kitchen" / label).mkdir(parents=True)
        Image.new("RGB", (30, 40), (len(label), 90, 90)).save(tmp_path / f"kitchen/{label}/1.png")
    output = ["--output", str(tmp_path / "out"), "--max-tokens", "3"]
    assert main(["evaluate", str(model), "--data", str(tmp_path / "kitchen"), *output]) == 0
    predictions = read_predictions(tmp_path / "out/own-kitchen/predictions.jsonl")
    assert [one.image for one in predictions] == ["cup/1.png", "jar/1.png"]
    assert "exact match: 2 answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--benchmarks", "pope"], "is a file of your own questions, which excludes --benchmarks"),
        (["--metric", "exakt"], "unknown metric 'exakt'.*Did you mean 'exact'"),
        (["--images", "nowhere"], "nowhere: no such image folder. Set data.images"),
    ],
)
def test_wrong_requests_are_told_before_a_model_is_opened(data, more, message, capsys) -> None:
    assert main(asked(Path("no-such-model"), data, *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    folder = asked(Path("no-such-model"), data.parent)
    assert main([*folder, "--benchmarks", "pope"]) == 2
    assert "--images is for a file of your own questions" in capsys.readouterr().err


def answered(data: Path):
    benchmark = own_benchmark(data, images=data.parent / "photos")
    questions = benchmark.load(data)
    given = {q.id: "red" if q.id[0] == "c" else "maybe" if q.id == "y0" else "No." for q in questions}
    given["c1"] = "<script>alert(1)</script>" + "a very long answer " * 60
    return benchmark, questions, benchmark.score(questions, given)


def test_what_was_read_is_listed_and_what_could_not_be_is_quoted(data) -> None:
    _, _, scored = answered(data)
    read, unread = describe_readings(scored.predictions)
    assert read == "read as: red 5, no 5, <script>alert(1)</script>a very long... 1"
    assert unread == "not read: 'maybe' (question y0)"


def test_the_page_says_what_was_measured_and_escapes_answers(data, tmp_path: Path) -> None:
    benchmark, questions, scored = answered(data)
    result = benchmark.result(questions, scored, model="mine")
    blind = benchmark.result(questions, benchmark.score(questions, {}), model="mine (blank images)")
    page = write_answers(tmp_path / "p.html", benchmark, questions, scored.predictions, result, blind)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<dt>mean score with blank images</dt><dd>0.0" in text
    assert "<summary>short answers: 4 wrong, 2 right</summary>" in text
    assert '<th>red</th><td class="number"></td><td class="number"></td><td class="number hit">2</td>' in text
    write_answers(page, benchmark, questions, scored.predictions, result, blind)
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("width_px", [PHONE, DESKTOP])
def test_the_page_in_a_browser(width_px: int, data, tmp_path: Path) -> None:
    benchmark, questions, scored = answered(data)
    result = benchmark.result(questions, scored, model="mine")
    page = write_answers(tmp_path / "p.html", benchmark, questions, scored.predictions, result)
    seen = open_page(page, tmp_path, width_px)
    assert seen.console == []
    assert len(seen.images) == 12
    assert min(seen.images) > 0
    assert (seen.width, seen.overflow, seen.fetched) == (width_px, 0, [])


@pytest.mark.parametrize(("name", "write"), [("pope", files.pope), ("gqa", files.gqa)])
def test_a_benchmark_has_the_same_page_also_without_its_images(name, write, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    questions = benchmark.load(write(tmp_path))
    scored = benchmark.score(questions, {question.id: "yes" for question in questions})
    result = benchmark.result(questions, scored, model="mine")
    text = write_answers(tmp_path / "p.html", benchmark, questions, scored.predictions, result).read_text()
    assert text.count("<article") == len(questions)
    assert "<img" not in text
    assert "Numbers by" in text


def test_a_judges_reviews_score_what_waits_for_them(model, data, capsys) -> None:
    assert main(asked(model, data, "--metric", "judge")) == 0
    printed = capsys.readouterr().out
    assert "own-my_test (own/judge): answers saved, no score without a judge" in printed
    page = data.parent / "out/own-my_test/answers.html"
    assert "<summary>short answers: 6 not scored</summary>" in page.read_text()
    reviews = data.parent / "reviews.jsonl"
    ids = [f"{kind}{n}" for n in range(6) for kind in "cy"]
    reviews.write_text("".join(json.dumps({"question_id": i, "content": "Grade: 4"}) + "\n" for i in ids))
    judged = ("--metric", "judge", "--score-only", "--reviews", str(reviews), "--judge-model", "some-judge")
    assert main(asked(model, data, *judged)) == 0
    assert "own-my_test (own/judge): judge 40.00" in capsys.readouterr().out
    assert "<summary>short answers: 6 wrong</summary>" in page.read_text()
    lines = [json.loads(line) for line in (data.parent / "out/own-my_test/answers-000.jsonl").open()]
    texts = {line["question_id"]: line["text"] for line in lines}
    hashes = {i: hashlib.sha256(texts[i].encode()).hexdigest()[:12] for i in ids}
    rows = [{"question_id": i, "content": "5", "answer_hash": hashes[i]} for i in ids]
    files.write_lines(reviews, rows)
    assert main(asked(model, data, *judged)) == 0
    files.write_lines(reviews, [{**rows[0], "answer_hash": "0" * 12}, *rows[1:]])
    assert main(asked(model, data, *judged)) == 2
    assert "1 of 12 reviews by some-judge are about other answers" in capsys.readouterr().err
    assert load_results(data.parent / "out/results.json")[-1].value == 50
