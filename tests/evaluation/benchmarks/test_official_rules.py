"""Rules of the official tools on the answers that tell them apart from rules that are almost the same."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation import benchmark_files as files
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.results import Metric


def metrics(name: str, folder: Path, answers: Mapping[str, str]) -> dict[str, Metric]:
    scored = BENCHMARKS[name].score(BENCHMARKS[name].load(folder), answers)
    return {metric.name: metric for metric in scored.metrics}


@pytest.mark.parametrize(
    ("answer", "human", "score"),
    [
        ("Yes", "yes", 1),
        ("Yes.", "yes", 1),
        ("Two", "2", 1),
        ("a dog", "dog", 1),
        ("dog", "Dog", 0),
        ("a dog", "a dog", 0),
    ],
)
def test_vqav2_val_scores_what_would_be_uploaded(
    answer: str, human: str, score: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all ten agree the official tool compares as it stands, but the upload is normalised before."""
    table = [(1000, 1, "What?", "other", "what is", [human] * 10)]
    monkeypatch.setattr(files, "VQA_QUESTIONS", table)
    (question,) = BENCHMARKS["vqav2-val"].load(files.vqav2_val(tmp_path))
    assert BENCHMARKS["vqav2-val"].grade(question, answer).score == score


def test_an_empty_answer_to_pope_pooled_is_neither_yes_nor_missing(tmp_path: Path) -> None:
    """lmms-eval's sums: empty is no false yes and no false no, whereas a missing answer is a false one."""
    folder = files.pope(tmp_path)
    questions = BENCHMARKS["pope-pooled"].load(folder)
    answers = {question.id: question.target for question in questions}
    yes, no = (next(q.id for q in questions if q.target == label) for label in ("yes", "no"))
    empty = metrics("pope-pooled", folder, {**answers, yes: "", no: " "})
    assert (empty["precision"].value, empty["recall"].value, empty["f1"].value) == (100, 100, 100)
    assert empty["accuracy"].value == pytest.approx(100 * 9 / 11)
    rest = {key: answer for key, answer in answers.items() if key not in (yes, no)}
    missing = metrics("pope-pooled", folder, rest)
    assert missing["precision"].value == missing["recall"].value == pytest.approx(100 * 5 / 6)
    assert any("lmms-eval prints that of the labels" in note for note in BENCHMARKS["pope-pooled"].notes)


@pytest.mark.parametrize(
    "answer", ["\n\nYes", "\tYes", "Yes\tno", "n\no", "no\r\nyes", "\r\n Yes", "   yes", ""]
)
def test_the_upload_of_mme_scores_as_here(answer: str, tmp_path: Path) -> None:
    folder = files.mme(tmp_path)
    questions = BENCHMARKS["mme"].load(folder)
    ours = metrics("mme", folder, dict.fromkeys([question.id for question in questions], answer))
    export = BENCHMARKS["mme"].export
    assert export is not None
    official = 0.0
    for path in export(questions, {question.id: answer for question in questions}, folder, tmp_path / "out"):
        with path.open(encoding="utf-8") as file:
            cells = [line.split("\t") for line in file]
        rights = []
        for _, _, gold, given in cells:  # four cells a line: another number ends the official tool
            start = given.lower()[:4]
            rights.append(gold.lower() == ("yes" if "yes" in start else "no" if "no" in start else "other"))
        pairs = [first and second for first, second in zip(rights[::2], rights[1::2], strict=True)]
        official += 100 * sum(rights) / len(rights) + 100 * sum(pairs) / len(pairs)
    assert ours["total"].value == pytest.approx(official)


def test_scienceqa_has_the_topics_and_the_blanks_of_llavas_question_file(tmp_path: Path) -> None:
    files.scienceqa(tmp_path)
    problems = {
        **files.SCIENCE,
        "12": {**files.SCIENCE["12"], "question": "Greenland. The  is in the   north.", "hint": " \n"},
    }
    files.write_json(tmp_path / "problems.json", problems)
    questions = {question.id: question for question in BENCHMARKS["scienceqa"].load(tmp_path)}
    # one pass over the text, as there: of three blanks two are left
    assert questions["12"].prompt.startswith("Greenland. The is in the  north.\nA. Peru\n")
    topics = {name for name in metrics("scienceqa", tmp_path, {}) if name.startswith("topic=")}
    assert topics == {"topic=biology", "topic=geography", "topic=verbs", "topic=word-study"}


def test_a_metric_counts_the_questions_that_it_is_of(tmp_path: Path) -> None:
    mme = metrics("mme", files.mme(tmp_path / "mme"), {})
    assert {name: mme[name].num_questions for name in ("existence", "existence acc", "existence acc+")} == {
        "existence": 4,
        "existence acc": 4,
        "existence acc+": 4,
    }
    assert (mme["perception"].num_questions, mme["total"].num_questions) == (6, 8)
    pope = metrics("pope", files.pope(tmp_path / "pope"), {})
    for split, labels in files.POPE.items():
        parts = [metric for name, metric in pope.items() if name.startswith(f"{split} ")]
        assert {metric.num_questions for metric in parts} == {len(labels)}


def test_llava_w_is_rounded_where_llavas_script_rounds(tmp_path: Path) -> None:
    """Both means to three decimals, then their ratio to one, which is another number now and then."""
    first, *_ = BENCHMARKS["llava-w"].load(files.llava_w(tmp_path))
    questions = [replace(first, id=str(n), image=str(n)) for n in range(7)]
    num_different = 0
    for seed in range(400):
        generator = random.Random(seed)
        pairs = [(generator.randint(1, 10), generator.randint(1, 10)) for _ in questions]
        reviews = {q.id: f"{one} {other}" for q, (one, other) in zip(questions, pairs, strict=True)}
        scored = BENCHMARKS["llava-w"].score(questions, dict.fromkeys(reviews, "x"), reviews)
        result = {metric.name: metric for metric in scored.metrics}
        reference, model = (round(sum(part) / 7, 3) for part in zip(*pairs, strict=True))
        expected = round(model / reference * 100, 1), round(reference * 10, 1), round(model * 10, 1)
        assert tuple(result[name].value for name in ("all", "all reference", "all model")) == expected
        num_different += expected[0] != round(100 * sum(b for _, b in pairs) / sum(a for a, _ in pairs), 1)
        for name in ("all reference", "all model"):
            low, high = result[name].interval or (0, 0)
            assert 0 <= low <= high <= 100
    assert num_different


@pytest.mark.parametrize("name", ["pope", "pope-pooled"])
def test_the_interval_of_an_f1_stays_within_0_and_100(name: str, tmp_path: Path) -> None:
    folder = files.pope(tmp_path)
    questions = BENCHMARKS[name].load(folder)
    for seed in range(40):
        generator = random.Random(seed)
        scored = metrics(name, folder, {q.id: generator.choice(["yes", "no"]) for q in questions})
        for metric in scored.values():
            low, high = metric.interval or (0.0, 100.0)
            assert 0 <= low <= high <= 100, metric


def test_mmvet_keeps_the_trailing_blank_of_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Question 129 of the published file ends with one, and LLaVA's script asks it so."""
    entry = files.MMVET["v1_1"] | {"question": "What is to the left of the laptop? "}
    monkeypatch.setattr(files, "MMVET", {"v1_129": entry})
    (question,) = BENCHMARKS["mmvet"].load(files.mmvet(tmp_path))
    assert question.prompt == "What is to the left of the laptop? "
