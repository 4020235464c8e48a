"""Metrics of own questions: what is read out of an answer, against values worked out by hand."""

import itertools
import random

import pytest

from tinyllava.evaluation.metrics.choices import find_choice, find_numbers
from tinyllava.evaluation.metrics.references import METRICS, Reference

OPTIONS = {"A": "a cat", "B": "a dog", "C": "a hot dog"}


def read(metric: str, answer: str, *answers: str, **more) -> tuple[str, float, bool]:
    return tuple(METRICS[metric].read(answer, Reference(answers=answers, **more)))


@pytest.mark.parametrize(
    ("metric", "answer", "right", "parsed", "score", "is_clear"),
    [
        ("exact", " “Red”. ", "red", "red", 1, True),
        ("exact", "ＲＥＤ", "red", "red", 1, True),
        ("exact", "dark red", "red", "dark red", 0, True),
        ("exact", "", "red", "", 0, False),
        ("exact", "Straße", "STRASSE", "strasse", 1, True),
        ("contains", "It is a dark-red car.", "red car", "red car", 1, True),
        ("contains", "It is a shared car.", "red car", "it is a shared car", 0, True),
        ("contains", "これは赤い車です", "赤い車", "赤い車", 1, True),
        ("yes_no", "Yes, it is not far.", "yes", "yes", 1, True),
        ("yes_no", "There is no dog. Yes.", "no", "no", 1, True),
        ("yes_no", "There isn’t one", "No", "no", 1, True),
        ("yes_no", "It says yes and no", "yes", "", 0, False),
        ("yes_no", "A dog.", "yes", "", 0, False),
        ("yes_no", "Notable eyes", "no", "", 0, False),
        ("number", "There are three.", "3", "3", 1, True),
        ("number", "about 1,234.5 kg", "1234.5", "1234.5", 1, True),
        ("number", "3,5", "3.5", "3.5", 1, True),
        ("number", "−7 °C", "-7", "-7", 1, True),
        ("number", "2 of 3", "2", "", 0, False),
        ("number", "at 12:30", "12", "", 0, False),
        ("number", "1.234,5", "1.234", "", 0, False),
        ("number", "B52", "52", "", 0, False),
        ("number", "some", "2", "", 0, False),
        ("f1", "cats, dogs and cows", "dogs; cats", "cats, cows, dogs", 0.8, True),
        ("f1", "", "dogs", "", 0, False),
    ],
)
def test_what_is_read_out_of_an_answer(metric, answer, right, parsed, score, is_clear) -> None:
    assert read(metric, answer, right) == (parsed, pytest.approx(score), is_clear)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("b) a cat", "B"),
        ("The answer is **B**.", "B"),
        ("Answer: C", "C"),
        ("A dog", "B"),  # an article is no letter
        ("A dog is there.", "B"),
        ("I see a hot dog", "C"),  # the longest option that it has
        ("a cat and a dog", ""),
        ("the answer is A dog", "B"),
        ("D", ""),
        ("nothing", ""),
    ],
)
def test_which_option_an_answer_means(text: str, letter: str) -> None:
    assert find_choice(text, OPTIONS) == letter


def test_a_right_answer_may_be_the_letter_or_the_text_of_an_option() -> None:
    for right in ("B", "a dog"):
        assert read("choice", "It is a dog", right, choices=OPTIONS) == ("B", 1.0, True)
        assert read("choice", "A", right, choices=OPTIONS) == ("A", 0.0, True)


@pytest.mark.parametrize(
    ("answer", "tolerance", "score"),
    [("10.5", "0.5", 1), ("10.51", "0.5", 0), ("9.5", "5%", 1), ("9.4", "5%", 0), ("10", "0", 1)],
)
def test_a_number_may_be_off_by_its_tolerance(answer: str, tolerance: str, score: float) -> None:
    assert read("number", answer, "10", tolerance=tolerance)[1] == score
    assert read("number", answer, "-3", "10", tolerance=tolerance)[1] == score  # any of the right ones


def test_every_written_number_is_read_back() -> None:
    chance = random.Random(0)
    for _ in range(300):
        value = chance.choice([chance.randint(-9999999, 9999999), round(chance.uniform(-1e4, 1e4), 3)])
        for text in (f"{value}", f"{value:,}", f"about {value:,} m.", f"({value})"):
            assert find_numbers(text) == [value], text


def test_vqa_accuracy_is_the_official_tools_with_both_sides_normalised() -> None:
    humans = ["red"] * 2 + ["dark red"] * 8
    assert read("vqa", "Red.", *humans)[1] == pytest.approx(0.6)
    for answer, right in (
        ("Red.", "red"),
        ("red", "Red"),
        ("the dog", "a dog"),
        ("cafe\u0301", "café"),
        ("A", "a"),
    ):
        assert read("vqa", answer, *[right] * 4)[1] == 1, answer  # also where all annotators agree
    assert tuple(read("vqa", " ", *["a"] * 4))[1:] == (0, False)
    assert "at least 4 annotators, found 2" in METRICS["vqa"].check(Reference(answers=("a", "b")))


def longest_common(a: list[str], b: list[str]) -> int:
    """Try all of the shorter list's subsequences: another way than rouge-score's table."""
    a, b = sorted((a, b), key=len)
    for size in range(len(a), 0, -1):
        for part in itertools.combinations(a, size):
            rest = iter(b)
            if all(word in rest for word in part):
                return size
    return 0


def test_rouge_is_the_f_of_the_longest_common_subsequence_in_any_script() -> None:
    chance = random.Random(1)
    for text in ("the cat sat on a red mat", "猫 在 红 色 垫 子 上", "die Tür schließt für Öl"):
        words = text.split()
        glue = "" if words[0] == "猫" else " "
        for _ in range(20):
            a, b = (chance.choices(words, k=chance.randint(1, 8)) for _ in range(2))
            expected = 2 * longest_common(a, b) / (len(a) + len(b))
            assert read("rouge", glue.join(a), glue.join(b))[1] == pytest.approx(expected)
    assert read("rouge", "a red mat", "no word", "a red mat")[1] == 1  # the best of several references


@pytest.mark.parametrize(
    ("metric", "right", "choices", "problem"),
    [
        ("number", "some", {}, "'some' is not one number"),
        ("choice", "B", {}, "has no choices"),
        ("choice", "a cow", OPTIONS, "'a cow' is not one of its choices: A. a cat, B. a dog"),
        ("yes_no", "red", {}, "'red' is neither yes nor no"),
    ],
)
def test_a_right_answer_that_the_metric_cannot_read_is_named(metric, right, choices, problem) -> None:
    assert problem in METRICS[metric].check(Reference(answers=(right,), choices=choices))
