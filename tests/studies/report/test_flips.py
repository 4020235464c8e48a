"""The page of flips: self-contained, escaped, with images."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from evaluation import benchmark_files as files
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.compare import compare_predictions
from tinyllava.evaluation.own_data import own_benchmark
from tinyllava.studies.report.flips import write_flips


def test_the_page_holds_images_and_escapes_answers(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["pope"]
    questions = benchmark.load(files.pope_parquet(tmp_path))
    a, b = (
        benchmark.score(questions, {q.id: answer for q in questions}).predictions
        for answer in ("yes <script>alert(1)</script>", 'no & "nothing"')
    )
    comparison = compare_predictions(a, b, benchmark, num_resamples=50)
    write_flips(
        [comparison], tmp_path / "out" / "flips.html", a="A<1>", b="B", questions={"pope": questions}, limit=4
    )
    page = (tmp_path / "out" / "flips.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "A&lt;1&gt;" in page
    assert page.count("<article>") == 4
    assert "The first 4 of 11." in page
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(images) == 4
    assert base64.b64decode(images[0]) == questions[0].conversation.images[0].path.read_bytes()
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched
    assert page.count('class="right"') == page.count('class="wrong"') == 4
    HTMLParser().feed(page)


def test_a_benchmark_without_flips_has_no_section_of_its_own(tmp_path: Path) -> None:
    comparisons = []
    for name, write in (("pope", files.pope), ("gqa", files.gqa)):
        benchmark = BENCHMARKS[name]
        questions = benchmark.load(write(tmp_path / name))
        answers = {q.id: "yes" for q in questions}
        other = answers if name == "gqa" else dict.fromkeys(answers, "no")
        a, b = (benchmark.score(questions, given).predictions for given in (answers, other))
        comparisons.append(compare_predictions(a, b, benchmark, num_resamples=50))
    write_flips(comparisons, tmp_path / "flips.html", a="A", b="B")
    page = (tmp_path / "flips.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == page.count('<div class="cards">') == 1
    assert "<p>No question flipped: gqa.</p>" in page
    assert "no interval: the same on" in page
    write_flips(comparisons[:1], tmp_path / "flips.html", a="A", b="B")
    assert "No question flipped" not in (tmp_path / "flips.html").read_text(encoding="utf-8")


def test_all_images_of_a_question_are_shown(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "my.csv").write_text("image_1,image_2,question,answer\na.png,b.png,Is it the same?,yes\n")
    benchmark = own_benchmark(tmp_path / "my.csv")
    questions = benchmark.load(tmp_path)
    a, b = (benchmark.score(questions, {questions[0].id: text}).predictions for text in ("yes", "no"))
    comparison = compare_predictions(a, b, benchmark, num_resamples=50)
    write_flips([comparison], tmp_path / "f.html", a="A", b="B", questions={benchmark.name: questions})
    page = (tmp_path / "f.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") == 2
    assert "<dt>truth</dt><dd><pre>yes</pre></dd>" in page


def test_without_the_data_set_the_page_names_the_images(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["pope"]
    questions = benchmark.load(files.pope(tmp_path))
    a, b = (benchmark.score(questions, {q.id: text for q in questions}).predictions for text in ("yes", "no"))
    comparison = compare_predictions(a, b, benchmark, num_resamples=50)
    write_flips([comparison], tmp_path / "flips.html", a="A", b="B")
    page = (tmp_path / "flips.html").read_text(encoding="utf-8")
    assert "COCO_val2014_000000000000.jpg" in page
    assert "<img" not in page
