"""What an answer means: yes or no, a letter, a share of ten annotators."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava.evaluation.metrics.choices import (
    extract_option,
    parse_exact,
    parse_mme,
    parse_pope,
    parse_scienceqa,
)
from tinyllava.evaluation.metrics.vqa import accuracy_of_matches, grade_textvqa, grade_vqa

POPE = [
    ("Yes", "yes"),
    ("No", "no"),
    ("no", "no"),
    ("NO", "yes"),
    ("nO", "yes"),
    ("", "yes"),
    ("garbage", "yes"),
    ("No, there is not", "no"),
    ("No.", "no"),
    ("Yes. No", "yes"),
    ("There is not a cat", "no"),
    ("There is no cat", "no"),
    ("nothing", "yes"),
    ("cannot", "yes"),
    ("Yes, not no", "no"),
    ("not.", "no"),
    ("no\nyes", "yes"),
    ("Yes\nno", "yes"),
    (" no", "no"),
    ("no!", "yes"),
    (".no", "yes"),
    ("Non", "yes"),
    ("n,o", "no"),
    ("knot", "yes"),
    ("Nein, 否", "yes"),
    ("no  way", "no"),
]
MME = [
    ("yes", "yes"),
    ("Yes", "yes"),
    ("YES.", "yes"),
    ("no", "no"),
    ("No", "no"),
    ("NO!", "no"),
    ("", "other"),
    ("y", "other"),
    ("n", "other"),
    ("maybe", "other"),
    ("none", "no"),
    ("not", "no"),
    ("unknown", "other"),
    ("  no", "no"),
    ("   no", "other"),
    (" yes", "yes"),
    ("  yes", "other"),
    ("I say yes", "other"),
    ("yesno", "yes"),
    ("noyes", "no"),
    ("aye", "other"),
    ("nyes", "yes"),
    ("know", "no"),
    ("ja", "other"),
    ("no\n", "no"),
    ("é no", "no"),
]
SCIENCE = [
    ("A", "A"),
    ("E", "E"),
    ("F", ""),
    ("a", ""),
    ("", ""),
    ("A.", ""),
    ("A. ", "A"),
    ("B. frog", "B"),
    ("B.frog", ""),
    ("B) frog", ""),
    ("The answer is C.", "C"),
    ("The answer is C", ""),
    ("The answer is C!", "C"),
    ("So: The answer is D. Yes.", "D"),
    ("The answer is A. The answer is A.", ""),
    ("The answer is A. The answer is B.", ""),
    ("the answer is B.", ""),
    ("The answer is Z.", "Z"),
    ("AB", ""),
    ("ABC", ""),
    (" A", ""),
    ("A ", ""),
    ("F. no", ""),
    ("E. x", "E"),
    ("The answer is Banana", "B"),
    ("A\n", ""),
    ("É. x", ""),
]
OPTIONS = {"A": "cat", "B": "a dog", "C": "Bird", "D": "None of these"}
CHOICES = [
    ("A", "A"),
    ("B.", "B"),
    ("(C)", "C"),
    ("[D]", "D"),
    ("D!", "D"),
    ("{A}", "A"),
    ("#B", "B"),
    ("*C*", "C"),
    ("a", ""),
    ("E", ""),
    ("Z", "Z"),
    ("", ""),
    ("A B", ""),
    ("A or B", ""),
    ("A: cat", "A"),
    ("A A", "A"),
    ("A because it is", "A"),
    ("A because it is so", ""),
    ("I think that it must be B", "B"),
    ("B I think that it is", ""),
    ("it is a cat", "A"),
    ("cat", "A"),
    ("CAT", "A"),
    ("a bird", "C"),
    ("cat and bird", ""),
    ("none of these", "D"),
    ("a dog", "B"),
    ("dog", ""),
    ("Answer is B and so on it goes", "B"),
    ("the correct answer is **C** as we saw before in it", "C"),
    ("The answer is a dog", "A"),
    ("The answer is dog", "D"),
    ("answer is E", ""),
    ("Cannot determine the answer", "Z"),
    ("I can't process this file.", "Z"),
    ("Sorry, I can't help with images of people yet. A", "Z"),
    ("Failed to obtain answer via API", ""),
    ("Failed to obtain answer via API A", ""),
    ("A Z", "A"),
    ("Z Z", "Z"),
    ("B/C", ""),
    ("日本 B", "B"),
    ("B,C", ""),
    ("cat" + " x" * 40, ""),
    ("A\nB", ""),
    ("C\n", "C"),
]


@pytest.mark.parametrize(("answer", "expected"), POPE)
def test_pope(answer: str, expected: str) -> None:
    assert parse_pope(answer) == expected


@pytest.mark.parametrize(("answer", "expected"), MME)
def test_mme(answer: str, expected: str) -> None:
    assert parse_mme(answer) == expected


@pytest.mark.parametrize(("answer", "expected"), SCIENCE)
def test_scienceqa(answer: str, expected: str) -> None:
    assert parse_scienceqa(answer) == expected


@pytest.mark.parametrize(("answer", "expected"), CHOICES)
def test_option(answer: str, expected: str) -> None:
    assert extract_option(answer, OPTIONS) == expected


def test_options_that_are_not_there_are_not_found() -> None:
    two = {"A": "red", "B": "blue"}
    assert extract_option("C", two) == ""
    assert extract_option("C. It's blue", two) == "B"
    assert extract_option("C or A", two) == "A"


@pytest.mark.parametrize(("answer", "expected"), [(" Yes ", "yes"), ("No.", "no."), ("", ""), ("YES", "yes")])
def test_exact(answer: str, expected: str) -> None:
    assert parse_exact(answer) == expected


@pytest.mark.parametrize(
    ("num_matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (9, 1), (10, 1)]
)
def test_accuracy_of_matches(num_matches: int, expected: float) -> None:
    assert accuracy_of_matches(num_matches) == pytest.approx(expected)


def leave_one_out(answer: str, humans: list[str]) -> float:
    """The formula as it is written: each annotator is left out once."""
    scores = []
    for left_out in range(len(humans)):
        others = [human for i, human in enumerate(humans) if i != left_out]
        scores.append(min(1, sum(human == answer for human in others) / 3))
    return sum(scores) / len(scores)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abcd"))
def test_closed_form_is_the_leave_one_out_mean(humans: list[str], answer: str) -> None:
    assert accuracy_of_matches(humans.count(answer), len(humans)) == pytest.approx(
        leave_one_out(answer, humans)
    )


@pytest.mark.parametrize(
    ("answer", "humans", "expected"),
    [
        ("yes", ["yes"] * 10, 1.0),
        ("Yes", ["yes"] * 10, 0.0),  # all agree: to the letter
        ("yes.", ["yes"] * 10, 0.0),
        ("Yes", ["Yes"] * 10, 1.0),
        (" yes\n", ["yes", " yes"] * 5, 1.0),  # cleaned before it is seen whether all agree
        ("Yes.", ["yes"] * 9 + ["no"], 1.0),
        ("two", ["2"] * 2 + ["3"] * 8, 0.6),
        ("2", ["two"] + ["3"] * 9, 0.3),
        ("", ["yes"] * 9 + ["no"], 0.0),
        ("the", ["a", "b"] * 5, 1.0),  # both become nothing
    ],
)
def test_official_grades(answer: str, humans: list[str], expected: float) -> None:
    assert grade_vqa(answer, humans)[1] == pytest.approx(expected)


def test_textvqa_normalises_also_where_all_agree() -> None:
    assert grade_textvqa("Yes.", ["yes"] * 10) == ("yes", 1.0)
    assert grade_textvqa("cat's", ["cat 's"] * 10)[1] == 1.0
