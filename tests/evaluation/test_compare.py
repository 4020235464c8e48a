"""Two models compared: the difference, its error, and the flips."""

from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from evaluation import benchmark_files as files
from tinyllava.errors import DataError
from tinyllava.evaluation.answers import write_predictions
from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.benchmarks.mmbench import ROTATION
from tinyllava.evaluation.benchmarks.mme import PERCEPTION
from tinyllava.evaluation.compare import compare, compare_predictions
from tinyllava.studies.report.flips import write_flips


def predict(name: str, folder: Path, answer: str, **special: str) -> list[Prediction]:
    write = {"gqa": files.gqa, "pope": files.pope, "mme": files.mme, "mmbench": files.mmbench}[name]
    if not folder.exists():
        write(folder)
    questions = BENCHMARKS[name].load(folder)
    scored = BENCHMARKS[name].score(questions, {q.id: special.get(f"q{q.id}", answer) for q in questions})
    return list(scored.predictions)


@pytest.mark.parametrize("name", ["gqa", "pope", "mme", "mmbench"])
def test_the_compared_numbers_are_the_headlines(name: str, tmp_path: Path) -> None:
    a, b = predict(name, tmp_path / "d", "no"), predict(name, tmp_path / "d", "yes A women")
    result = compare_predictions(a, b, BENCHMARKS[name], num_resamples=200)
    for side, value in ((a, result.a), (b, result.b)):
        questions = BENCHMARKS[name].load(tmp_path / "d")
        scored = BENCHMARKS[name].score(questions, {p.question_id: p.answer for p in side})
        headline = next(m.value for m in scored.metrics if m.name == BENCHMARKS[name].metric)
        assert value == pytest.approx(headline)
    assert result.bootstrap.difference == pytest.approx(result.b - result.a)
    assert result.num_unpaired == 0


def test_flips_and_mcnemar(tmp_path: Path) -> None:
    a = predict("pope", tmp_path / "d", "yes")
    b = predict("pope", tmp_path / "d", "yes", q2="no", q3="no", q1="no")
    result = compare_predictions(a, b, BENCHMARKS["pope"])
    assert (result.only_a, result.only_b, result.num_units) == (1, 2, 11)
    assert result.mcnemar_p == pytest.approx(stats.binomtest(1, 3).pvalue)
    assert {left.question_id for left, _ in result.flips} == {"1", "2", "3"}
    assert "only A" in str(result)


def test_questions_of_one_side_are_left_out_and_counted(tmp_path: Path) -> None:
    a, b = predict("gqa", tmp_path / "d", "no"), predict("gqa", tmp_path / "d", "man")
    result = compare_predictions(a[1:], b, BENCHMARKS["gqa"])
    assert (result.num_units, result.num_unpaired) == (3, 1)
    said = "without 1 that only A or B was asked"
    assert str(result).endswith(f"n = 3 questions, {said}")
    write_flips([result], tmp_path / "flips.html", a="a", b="b")
    assert said in (tmp_path / "flips.html").read_text()


def test_folders_are_compared_by_benchmark(tmp_path: Path) -> None:
    for run, answer in (("a", "no"), ("b", "yes")):
        for name in ("gqa", "pope") if run == "a" else ("pope", "mme"):
            predictions = predict(name, tmp_path / "data" / name, answer)
            write_predictions(predictions, tmp_path / run / name / "predictions.jsonl")
    (result,) = compare(tmp_path / "a", tmp_path / "b", num_resamples=50)
    assert result.benchmark == "pope"
    for run in ("a", "b"):  # answers that only a server scores do not stop the others
        questions = BENCHMARKS["vqav2"].load(files.vqav2_test(tmp_path / "data" / "vqav2"))
        unscored = BENCHMARKS["vqav2"].score(questions, {}).predictions
        unscored = [replace(one, score=None) for one in unscored]
        write_predictions(unscored, tmp_path / run / "vqav2" / "predictions.jsonl")
    assert len(compare(tmp_path / "a", tmp_path / "b", num_resamples=50)) == 1
    with pytest.raises(DataError, match="answers of A have no scores"):
        compare(tmp_path / "a/vqav2/predictions.jsonl", tmp_path / "b/vqav2/predictions.jsonl")
    with pytest.raises(DataError, match="no scored benchmark in common"):
        compare(tmp_path / "a", tmp_path / "data")
    with pytest.raises(DataError, match="has answers to 'gqa', but"):
        compare(tmp_path / "a/gqa/predictions.jsonl", tmp_path / "b/pope/predictions.jsonl")


def test_answers_of_two_judges_are_not_compared(tmp_path: Path) -> None:
    questions = BENCHMARKS["mmvet"].load(files.mmvet(tmp_path))
    answers = {question.id: "x" for question in questions}
    grades = dict.fromkeys(answers, "1.0")
    a, b, c = (
        list(BENCHMARKS["mmvet"].score(questions, answers, grades, judge).predictions)
        for judge in ("gpt-4-0613", "another", "another")
    )
    write_predictions(a, tmp_path / "a.jsonl")
    write_predictions(b, tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="mmvet: the answers have several judges: another, gpt-4-0613"):
        compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert compare_predictions(b, c, BENCHMARKS["mmvet"], num_resamples=50).bootstrap.difference == 0


def test_units_are_those_of_the_headline(tmp_path: Path) -> None:
    """MMBench counts a question once, right in all rotations; ScienceQA and MME leave questions out."""
    mmbench = BENCHMARKS["mmbench"]
    questions = mmbench.load(files.mmbench(tmp_path / "mmbench"))
    truths = {q.id: q.target["answer"] for q in questions}
    base = next(q.id for q in questions if int(q.id) >= ROTATION)
    wrong = next(letter for letter in "AB" if letter != truths[base])
    a = mmbench.score(questions, truths).predictions
    b = mmbench.score(questions, truths | {base: wrong}).predictions
    result = compare_predictions(a, b, mmbench, num_resamples=50)
    num_bases = len({int(q.id) % ROTATION for q in questions})
    assert result.num_units == num_bases < len(questions)
    assert (result.only_a, result.only_b) == (1, 0)
    assert result.b == pytest.approx(100 * (num_bases - 1) / num_bases)
    ((left, right),) = result.flips
    assert (left.question_id, left.score, right.score) == (base, 1.0, 0.0)  # the rotation that B lost
    assert str(result).endswith(f"n = {num_bases} questions in all their rotations")
    for name, write in (("scienceqa", files.scienceqa), ("mme", files.mme)):
        benchmark = BENCHMARKS[name]
        questions = benchmark.load(write(tmp_path / name))
        of_a, of_b = (
            benchmark.score(questions, {q.id: x for q in questions}).predictions for x in ("A", "B")
        )
        result = compare_predictions(of_a, of_b, benchmark, num_resamples=50)
        in_headline = {"scienceqa": ("image",), "mme": PERCEPTION}[name]
        counted = [q for q in questions if q.category in in_headline]
        assert result.num_units == len(counted) < len(questions)
        assert {left.category for left, _ in result.flips} <= set(in_headline)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a = predict("gqa", tmp_path / "d", "no")
    gqa = BENCHMARKS["gqa"]
    with pytest.raises(DataError, match="no question in common"):
        compare_predictions(a[:1], a[1:], gqa)
    values = {name: getattr(a[0], name) for name in Prediction.__dataclass_fields__}
    for field in ("prompt", "image"):
        with pytest.raises(DataError, match=r"differs for B: .* and 'Another'"):
            compare_predictions(a[:1], [Prediction(**{**values, field: "Another"})], gqa)
    questions = gqa.load(tmp_path / "d")
    corrected = [replace(questions[0], target="another"), *questions[1:]]
    other = gqa.score(corrected, {q.id: "no" for q in corrected}).predictions
    with pytest.raises(DataError, match=f"{questions[0].id!r} is graded against other right answers for B"):
        compare_predictions(a, other, gqa)
    earlier = [replace(one, target="") for one in other]  # of a file that an earlier version wrote
    assert compare_predictions(a, earlier, gqa, num_resamples=50).num_unpaired == 0
    with pytest.raises(
        DataError, match=r"answers of B have no scores.*Judge them|answers of B have no scores"
    ):
        compare_predictions(a[:1], [Prediction(**{**values, "score": None})], gqa)
