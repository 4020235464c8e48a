"""Errors and tests of scores against closed forms, scipy, and simulation."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tinyllava.evaluation.metrics.statistics import (
    Ratio,
    clustered_standard_error,
    estimate,
    mcnemar,
    paired_bootstrap,
    wilson_interval,
)


def singles(num: int) -> list[str]:
    return [str(i) for i in range(num)]


@pytest.mark.parametrize(("right", "num"), [(0, 5), (3, 10), (10, 10), (700, 1164), (1, 2017)])
def test_wilson_is_scipys(right: int, num: int) -> None:
    expected = stats.binomtest(right, num).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / num, num) == pytest.approx((expected.low, expected.high))


def test_plain_accuracy_has_the_binomial_error() -> None:
    metric = estimate("accuracy", [Ratio(numerators=[1.0] * 6 + [0.0] * 4, clusters=singles(10))])
    assert (metric.value, metric.num_questions) == (60, 10)
    assert metric.standard_error == pytest.approx(100 * math.sqrt(0.6 * 0.4 / 10))
    assert metric.interval == pytest.approx([100 * x for x in wilson_interval(0.6, 10)])


def test_without_shared_images_the_error_of_a_mean_is_the_usual_one() -> None:
    scores = [0.3, 0.6, 0.9, 1.0, 0.0, 1.0]
    expected = 100 * np.std(scores, ddof=1) / math.sqrt(len(scores))
    assert clustered_standard_error([Ratio(numerators=scores, clusters=singles(6))]) == pytest.approx(
        expected
    )


def test_copies_of_a_question_on_one_image_do_not_shrink_the_error() -> None:
    scores = [1.0, 0.0, 1.0, 1.0, 0.0]
    once = clustered_standard_error([Ratio(numerators=scores, clusters=singles(5))])
    copied = Ratio(
        numerators=[s for s in scores for _ in range(18)], clusters=[c for c in singles(5) for _ in range(18)]
    )
    assert clustered_standard_error([copied]) == pytest.approx(once)


def test_one_image_tells_nothing_about_the_error() -> None:
    metric = estimate("accuracy", [Ratio(numerators=[1.0, 0.0], clusters=["a", "a"])])
    assert (metric.value, metric.standard_error, metric.interval) == (50, None, None)


def test_error_of_a_sum_of_ratios_is_that_of_a_simulation() -> None:
    """The delta method against 4,000 bootstrap samples of images, on an F1-like sum."""
    generator = random.Random(1)
    names = [str(i // 6) for i in range(1800)]
    hard = {name: generator.random() for name in dict.fromkeys(names)}
    top = [float(generator.random() < hard[name]) for name in names]
    bottom = [1.0 + generator.random() for _ in names]
    ratios = [
        Ratio(numerators=top[::2], denominators=bottom[::2], clusters=names[::2], weight=50),
        Ratio(numerators=top[1::2], denominators=bottom[1::2], clusters=names[1::2], weight=50),
    ]
    zero = [Ratio(numerators=[0.0] * len(names), clusters=names)]
    sampled = paired_bootstrap(zero, ratios, num_resamples=4000, seed=2)
    error = clustered_standard_error(ratios)
    assert error is not None
    width = sampled.interval[1] - sampled.interval[0]
    assert width / (2 * 1.96) == pytest.approx(error, rel=0.06)


def test_an_empty_denominator_gives_zero() -> None:
    nothing = Ratio(numerators=[0.0, 0.0], denominators=[0.0, 0.0], clusters=["a", "b"])
    assert nothing.value == 0
    assert estimate("f1", [nothing]).value == 0
    assert estimate("f1", [Ratio(numerators=[], clusters=[])]).value == 0


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (0, 5), (5, 0), (3, 9), (40, 61), (600, 500), (999, 990)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_equal_models_do_not_differ() -> None:
    ratio = [Ratio(numerators=[1.0, 0.0, 1.0], clusters=singles(3))]
    result = paired_bootstrap(ratio, ratio)
    assert (result.difference, result.interval, result.p_value) == (0, None, None)
    assert result.describe_interval() == "no interval: the same on 3 of 3 images"


def test_a_difference_that_is_the_same_on_all_images_has_no_interval() -> None:
    names = [str(n // 2) for n in range(10)]
    wrong, right = ([Ratio(numerators=[score] * 10, clusters=names)] for score in (0.0, 1.0))
    result = paired_bootstrap(wrong, right)
    assert (result.difference, result.interval, result.p_value) == (100, None, None)
    single = paired_bootstrap(
        [Ratio(numerators=[0.0, 0.0], clusters=["a", "a"])],
        [Ratio(numerators=[1.0, 0.0], clusters=["a", "a"])],
    )
    assert (single.difference, single.interval, single.p_value) == (50, None, None)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_where_all_images_say_the_same_the_interval_is_not_a_point(score: float) -> None:
    names = [str(n // 2) for n in range(10)]
    metric = estimate("accuracy", [Ratio(numerators=[score] * 10, clusters=names)])
    expected = stats.binomtest(int(5 * score), 5).proportion_ci(0.95, method="wilson")
    assert metric.interval == pytest.approx((100 * expected.low, 100 * expected.high))
    assert metric.standard_error is None
    ratio = Ratio(numerators=[1.0] * 10, denominators=[1.0] * 10, clusters=names)  # an F1 of 100
    assert (estimate("f1", [ratio]).interval, estimate("f1", [ratio]).standard_error) == (None, None)
    halves = [Ratio(numerators=[1.0, 0.0] * 5, clusters=names)]
    assert (estimate("accuracy", halves).value, estimate("accuracy", halves).interval) == (50, None)


def test_a_clear_difference_is_seen_and_repeats() -> None:
    a = [Ratio(numerators=[0.0] * 150 + [1.0] * 50, clusters=singles(200))]
    b = [Ratio(numerators=[0.0] * 100 + [1.0] * 100, clusters=singles(200))]
    result = paired_bootstrap(a, b)
    assert result.difference == 25
    assert 18 < result.interval[0] < 25 < result.interval[1] < 32
    assert result.p_value < 0.005
    assert paired_bootstrap(a, b) == result


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from("abcde")), min_size=1), st.randoms()
)
def test_order_does_not_matter(pairs: list[tuple[float, str]], shuffler: random.Random) -> None:
    mixed = list(pairs)
    shuffler.shuffle(mixed)
    first, second = (
        estimate("x", [Ratio(numerators=[s for s, _ in one], clusters=[c for _, c in one])])
        for one in (pairs, mixed)
    )
    assert second.value == pytest.approx(first.value)
    assert second.standard_error == pytest.approx(first.standard_error, abs=1e-9)


def test_an_interval_of_shares_stays_within_0_and_100():
    numerators = [1.0] * 59 + [0.0]  # two questions an image, all but one right
    metric = estimate("accuracy", [Ratio(numerators=numerators, clusters=[str(n // 2) for n in range(60)])])
    assert metric.value + 1.96 * metric.standard_error > 100
    assert metric.interval[1] == 100
    other = estimate("sum", [Ratio(numerators=[5.0, 7.0, 0.0], clusters=["a", "b", "c"], weight=1.0)])
    assert other.interval[1] == pytest.approx(4 + 1.959964 * other.standard_error)
