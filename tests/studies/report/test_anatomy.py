"""POPE's anatomy against numbers worked out by hand, and against the benchmark's own summary."""

import pytest

from studies.studies import make_study, pope_predictions
from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.studies.report.analysis import ObjectErrors, dissect, dissect_study
from tinyllava.studies.study import pack_predictions


def answer(split: str, name: str, truth: str, parsed: str, number: int) -> Prediction:
    return Prediction(
        benchmark="pope",
        question_id=str(number),
        image="a.jpg",
        answer=parsed,
        parsed=parsed,
        prompt=f"Is there a {name} in the image?\nShort.",
        score=float(truth == parsed),
        category=split,
        groups=(f"label={truth}",),
    )


HAND_MADE = [
    answer(*one, number)
    for number, one in enumerate(
        [
            ("random", "cat", "yes", "yes"),
            ("random", "dog", "yes", "no"),
            ("random", "snowboard", "no", "no"),
            ("random", "cell phone", "no", "no"),
            ("adversarial", "cat", "yes", "yes"),
            ("adversarial", "dog", "yes", "yes"),
            ("adversarial", "snowboard", "no", "yes"),
            ("adversarial", "cell phone", "no", "yes"),
            ("adversarial", "snowboard", "no", "yes"),
            ("adversarial", "cat", "no", ""),
        ]
    )
]


def test_hand_made_answers() -> None:
    anatomy = dissect(HAND_MADE)
    random, adversarial = anatomy.splits
    # random: one hit, one miss, no false yes: precision 1, recall 1/2, F1 2/3
    assert (random.split, random.num_questions) == ("random", 4)
    assert (random.yes_ratio, random.false_positive_rate, random.false_negative_rate) == (25, 0, 50)
    assert random.f1 == pytest.approx(200 / 3)
    # adversarial: two hits, no miss, three false yes and one missing: F1 = 4 / (4 + 4)
    assert adversarial.yes_ratio == pytest.approx(500 / 6)
    assert (adversarial.false_positive_rate, adversarial.false_negative_rate, adversarial.f1) == (75, 0, 50)
    assert anatomy.split_gap == pytest.approx(200 / 3 - 50)
    assert anatomy.yes_ratio == pytest.approx(60)
    assert anatomy.objects == (
        ObjectErrors(name="snowboard", num_asked=3, num_seen=2),
        ObjectErrors(name="cell phone", num_asked=2, num_seen=1),
        ObjectErrors(name="cat", num_asked=1, num_seen=0),
    )


def test_it_agrees_with_the_benchmark() -> None:
    predictions = pope_predictions(0.8, 0.2, "agree")
    predictions[3] = answer("adversarial", "cat", "yes", "", 999)
    summary = BENCHMARKS["pope"].summarise(predictions)
    for split in dissect(predictions).splits:
        (f1,), (yes_ratio,) = summary[f"{split.split} f1"], summary[f"{split.split} yes_ratio"]
        assert split.f1 == pytest.approx(f1.value)
        assert split.yes_ratio == pytest.approx(yes_ratio.value)


def test_names_of_two_words_and_with_a_vowel_are_read() -> None:
    objects = dissect(pope_predictions(0.5, 0, "names")).objects
    assert {one.name for one in objects} == {"dining table", "snowboard"}  # asked in vain in that study


def test_a_study_gives_the_parameters_of_pre_training() -> None:
    study, answers = make_study()
    found = dissect_study(study, {"pope": pack_predictions(answers["pope"])})
    by_id = {one.cell.id: one for one in found}
    assert len(found) == 7
    assert by_id["base-C-Phi-2-seed0"].num_pretrained == 6_300_000
    assert by_id["share-C-Phi-2-seed0"].num_pretrained == 1_256_300_000
    assert by_id["share-C-Phi-2-seed0"].anatomy.yes_ratio > by_id["base-C-Phi-2-seed0"].anatomy.yes_ratio
    assert dissect_study(study, {}) == []


def test_one_split_has_no_gap() -> None:
    assert dissect(HAND_MADE[:4]).split_gap is None
