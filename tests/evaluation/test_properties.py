"""What holds for every benchmark, whatever the model answers."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import benchmark_files as files
from tinyllava.errors import DataError
from tinyllava.evaluation.benchmark import Benchmark, hash_questions
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.question import Question

WRITERS = {
    "vqav2": files.vqav2_test,
    "vqav2-val": files.vqav2_val,
    "gqa": files.gqa,
    "scienceqa": files.scienceqa,
    "textvqa": files.textvqa,
    "textvqa-no-ocr": files.textvqa,
    "pope": files.pope,
    "pope-pooled": files.pope,
    "mme": files.mme,
    "mmbench": files.mmbench,
    "mmvet": files.mmvet,
    "llava-w": files.llava_w,
}
UNJUDGED = [name for name in WRITERS if BENCHMARKS[name].judging is None and name != "vqav2"]
ANSWERS = st.one_of(
    st.sampled_from(
        ["", "yes", "No", "A", "B. x", "two", "The answer is C.", "ÉCLAIR 日本", "Z", "\n", "a\tb", "1,000."]
    ),
    st.text(max_size=12),
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Question]]:
    return {
        name: BENCHMARKS[name].load(write(tmp_path_factory.mktemp(name))) for name, write in WRITERS.items()
    }


def numbers(benchmark: Benchmark, questions: list[Question], answers: dict[str, str]) -> dict[str, float]:
    return {metric.name: metric.value for metric in benchmark.score(questions, answers).metrics}


@pytest.mark.parametrize("name", UNJUDGED)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_order_of_questions_and_answers_does_not_matter(
    name: str, loaded: dict[str, list[Question]], data: st.DataObject
) -> None:
    questions, benchmark = loaded[name], BENCHMARKS[name]
    texts = data.draw(st.lists(ANSWERS, min_size=len(questions), max_size=len(questions)))
    answers = {question.id: text for question, text in zip(questions, texts, strict=True)}
    shuffled = random.Random(len(texts[0])).sample(questions, len(questions))
    reordered = dict(reversed(answers.items()))
    assert numbers(benchmark, shuffled, reordered) == pytest.approx(numbers(benchmark, questions, answers))


@pytest.mark.parametrize("name", UNJUDGED)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_missing_answer_never_raises_the_headline(
    name: str, loaded: dict[str, list[Question]], data: st.DataObject
) -> None:
    questions, benchmark = loaded[name], BENCHMARKS[name]
    texts = data.draw(st.lists(ANSWERS, min_size=len(questions), max_size=len(questions)))
    answers = {question.id: text for question, text in zip(questions, texts, strict=True)}
    whole = numbers(benchmark, questions, answers)[benchmark.metric]
    dropped = data.draw(st.sampled_from(sorted(answers)))
    rest = {key: text for key, text in answers.items() if key != dropped}
    scored = benchmark.score(questions, rest)
    assert scored.num_missing == 1
    assert numbers(benchmark, questions, rest)[benchmark.metric] <= whole + 1e-9


@pytest.mark.parametrize("name", UNJUDGED)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_scores_lie_in_their_range_and_the_headline_is_there(
    name: str, loaded: dict[str, list[Question]], data: st.DataObject
) -> None:
    questions, benchmark = loaded[name], BENCHMARKS[name]
    answers = {question.id: data.draw(ANSWERS) for question in questions}
    scored = benchmark.score(questions, answers)
    assert all(0 <= (prediction.score or 0) <= 1 for prediction in scored.predictions)
    assert benchmark.metric in {metric.name for metric in scored.metrics}
    top = 2000 if name == "mme" else 100
    for metric in scored.metrics:
        if metric.name != "distribution":
            assert -1e-9 <= metric.value <= top


@pytest.mark.parametrize("name", WRITERS)
def test_answers_of_other_data_are_refused(name: str, loaded: dict[str, list[Question]]) -> None:
    with pytest.raises(DataError, match="1 of 1 answers match no question, the first with id 'no such id'"):
        BENCHMARKS[name].score(loaded[name], {"no such id": "yes"})


@pytest.mark.parametrize("name", WRITERS)
def test_a_question_that_is_there_twice_is_refused(name: str, loaded: dict[str, list[Question]]) -> None:
    with pytest.raises(DataError, match="occurs 2 times"):
        BENCHMARKS[name].score([*loaded[name], loaded[name][0]], {})


@pytest.mark.parametrize("name", UNJUDGED)
def test_no_answer_at_all_scores_zero(name: str, loaded: dict[str, list[Question]]) -> None:
    scored = BENCHMARKS[name].score(loaded[name], {})
    assert scored.num_missing == len(loaded[name])
    assert numbers(BENCHMARKS[name], loaded[name], {})[BENCHMARKS[name].metric] == 0


@pytest.mark.parametrize("name", WRITERS)
def test_the_hash_tells_data_apart_but_not_their_order(name: str, loaded: dict[str, list[Question]]) -> None:
    questions = loaded[name]
    assert hash_questions(questions) == hash_questions(questions[::-1])
    assert hash_questions(questions) != hash_questions(questions[:-1])
    assert hash_questions(questions) != hash_questions(loaded["mme" if name != "mme" else "gqa"])


@pytest.mark.parametrize("name", UNJUDGED)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_is_right_was_understood_and_what_is_empty_was_not(
    name: str, loaded: dict[str, list[Question]], data: st.DataObject
) -> None:
    questions, benchmark = loaded[name], BENCHMARKS[name]
    texts = data.draw(st.lists(ANSWERS, min_size=len(questions), max_size=len(questions)))
    answers = {question.id: text for question, text in zip(questions, texts, strict=True)}
    scored = benchmark.score(questions, answers)
    for prediction in scored.predictions:
        if not prediction.answer.strip():
            assert not prediction.is_clear
        elif prediction.score and "pope" not in name:  # of POPE, what is unclear counts as yes
            assert prediction.is_clear
    assert scored.num_unclear == sum(not prediction.is_clear for prediction in scored.predictions)
    result = benchmark.result(questions, scored, model="m")
    assert result.num_unclear == scored.num_unclear
    assert benchmark.score(questions, {}).num_unclear == 0, "a missing answer is counted as missing"


UNCLEAR = {
    "pope": (["Yes", "no.", "It is not there", "YES!"], ["maybe", "a cat", "nothing", "Yesterday"]),
    "pope-pooled": (["Yes", "no"], ["no.", "maybe"]),
    "mme": (["Yes, it is", "no"], ["I say yes", "maybe"]),
    "mmbench": (["A", "B."], ["I do not know what it shows", "Z"]),
    "scienceqa": (["A", "The answer is B."], ["the second", "a"]),
    "vqav2": (["anything", "7"], [""]),
    "textvqa": (["anything"], ["", "  "]),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_an_answer_of_another_kind_is_counted(name: str, loaded: dict[str, list[Question]]) -> None:
    question, benchmark = loaded[name][0], BENCHMARKS[name]
    clear, unclear = UNCLEAR[name]
    assert [benchmark.predict(question, text).is_clear for text in clear] == [True] * len(clear)
    assert [benchmark.predict(question, text).is_clear for text in unclear] == [False] * len(unclear)


def test_where_the_right_answer_tells_the_kind_an_answer_of_another_is_counted(
    loaded: dict[str, list[Question]],
) -> None:
    def clear(name: str, question: Question, text: str) -> bool:
        return BENCHMARKS[name].predict(question, text).is_clear

    gqa = next(q for q in loaded["gqa"] if q.target in ("yes", "no"))
    assert [clear("gqa", gqa, text) for text in ("Yes.", "a dog")] == [True, False]
    other = next(q for q in loaded["gqa"] if q.target not in ("yes", "no"))
    assert clear("gqa", other, "a dog")
    kinds = {"yes/no": ("no", "a dog"), "number": ("Two", "many"), "other": ("a dog", "")}
    for kind, (good, bad) in kinds.items():
        question = replace(loaded["vqav2-val"][0], groups=(f"answer_type={kind}",))
        assert [clear("vqav2-val", question, text) for text in (good, bad)] == [True, False]


@pytest.mark.parametrize(
    ("name", "good", "bad"), [("mmvet", "0.5", "quite good"), ("llava-w", "8 7", "well")]
)
def test_a_reply_of_the_judge_that_cannot_be_read_is_counted(
    name: str, good: str, bad: str, loaded: dict[str, list[Question]]
) -> None:
    questions, benchmark = loaded[name], BENCHMARKS[name]
    answers = {q.id: "a dog" for q in questions}
    replies = {q.id: (bad if n == 0 else good) for n, q in enumerate(questions)}
    assert benchmark.score(questions, answers, replies, "gpt").num_unclear == 1
    assert benchmark.score(questions, answers).num_unclear == 0, "not judged yet"
