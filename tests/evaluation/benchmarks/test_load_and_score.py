"""Each benchmark read from official files and from parquet, scored against numbers worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pytest

from evaluation import benchmark_files as files
from tinyllava.data.readers.columns import LETTER
from tinyllava.errors import DataError
from tinyllava.evaluation.benchmark import Scored
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.question import SHORT, Question


def load(name: str, folder: Path) -> dict[str, Question]:
    return {question.id: question for question in BENCHMARKS[name].load(folder)}


def score(
    name: str, questions: dict[str, Question], answers: dict[str, str], reviews: dict[str, str] | None = None
):
    return BENCHMARKS[name].score(list(questions.values()), answers, reviews)


def values(scored: Scored) -> dict[str, float]:
    return {metric.name: round(metric.value, 4) for metric in scored.metrics}


def test_vqav2_val(tmp_path: Path) -> None:
    questions = load("vqav2-val", files.vqav2_val(tmp_path))
    first = questions["262148000"]
    assert first.prompt == f"Is this sunny?\n{SHORT}"
    assert first.image == "COCO_val2014_000000262148.jpg"
    assert first.conversation.images[0].path == tmp_path / "val2014" / first.image
    answers = {"262148000": "Yes", "262148001": "two", "393225000": "RED", "393225001": "Café"}
    scored = score("vqav2-val", questions, answers)
    # "Yes" is uploaded as "yes", which all ten say: 1; six of ten: 1; three of ten, normalised: 0.9; nine: 1
    assert [p.score for p in scored.predictions] == pytest.approx([1, 1, 0.9, 1])
    assert values(scored) == {
        "accuracy": 97.5,
        "answer_type=number": 100,
        "answer_type=other": 95,
        "answer_type=yes/no": 100,
        "question_type=how many": 100,
        "question_type=is this": 100,
        "question_type=what color": 90,
        "question_type=what is": 100,
    }


def test_vqav2_test_has_no_score_but_an_upload(tmp_path: Path) -> None:
    questions = load("vqav2", files.vqav2_test(tmp_path))
    assert list(questions) == ["1000", "1001", "1002", "1003"]
    assert questions["1001"].conversation.images[0] is questions["1000"].conversation.images[0]
    answers = {"1000": "The Dog.", "1002": "two"}
    assert score("vqav2", questions, answers).metrics == ()
    export = BENCHMARKS["vqav2"].export
    assert export is not None
    (path,) = export(list(questions.values()), answers, tmp_path, tmp_path / "out")
    assert json.loads(path.read_text()) == [
        {"question_id": n, "answer": {1000: "dog", 1002: "2"}.get(n, "")} for n in range(1000, 1006)
    ]


def test_vqav2_upload_without_all_the_ids_says_so_in_its_name(tmp_path: Path) -> None:
    questions = load("vqav2", files.vqav2_test(tmp_path))
    (tmp_path / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    export = BENCHMARKS["vqav2"].export
    assert export is not None
    (path,) = export(list(questions.values()), {}, tmp_path, tmp_path / "out")
    assert path.name == "vqav2_upload_incomplete.json"
    assert len(json.loads(path.read_text())) == 4
    ids = [{"question_id": 1000 + n, "question": "?"} for n in range(6)]
    files.write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ids)  # a mirror lists them too
    (path,) = export(list(questions.values()), {}, tmp_path, tmp_path / "out")
    assert path.name == "vqav2_upload.json"
    assert [entry["question_id"] for entry in json.loads(path.read_text())] == list(range(1000, 1006))
    lines = [{"question_id": 1000, "image": "a.jpg", "text": "?"}]
    files.write_lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", lines)
    with pytest.raises(DataError, match="3 questions are missing, such as 1001"):
        export(list(questions.values()), {}, tmp_path, tmp_path / "out")


def test_vqav2_official_question_file(tmp_path: Path) -> None:
    document = {"questions": [{"image_id": 1, "question": "What?", "question_id": 1000}]}
    files.write_json(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", document)
    (question,) = BENCHMARKS["vqav2"].load(tmp_path)
    assert (question.prompt, question.image) == (f"What?\n{SHORT}", "COCO_test2015_000000000001.jpg")


def test_gqa(tmp_path: Path) -> None:
    questions = load("gqa", files.gqa(tmp_path))
    answers = {"201307251": "No.", "201640614": "Women..", "202225914": "a dress", "203": " man"}
    scored = score("gqa", questions, answers)
    assert [p.parsed for p in scored.predictions] == ["no", "women", "a dress", " man"]
    result = values(scored)
    assert (result["accuracy"], result["answer_type=binary"], result["answer_type=open"]) == (
        50,
        100,
        33.3333,
    )
    assert (result["steps=1"], result["steps=2"]) == (50, 50)
    assert (result["words=2"], result["words=3"]) == (0, 100)
    # person: women 1 of 1, man 0 of 1, sum 1; clothing: dress 0 of 1, 1; weighted (2 * 1 + 1 * 1) / 3 / 100
    assert result["distribution"] == 0.01
    export = BENCHMARKS["gqa"].export
    assert export is not None
    (path,) = export(list(questions.values()), answers, tmp_path, tmp_path)
    assert json.loads(path.read_text())[1] == {"questionId": "201640614", "prediction": "women"}


def test_gqa_leaves_out_what_is_not_balanced(tmp_path: Path) -> None:
    path = files.gqa(tmp_path) / "testdev_balanced_questions.json"
    entries = json.loads(path.read_text())
    entries["203"]["isBalanced"] = False
    files.write_json(path, entries)
    assert set(load("gqa", tmp_path)) == {"201307251", "201640614", "202225914"}


def test_gqa_takes_the_prompts_of_llavas_file(tmp_path: Path) -> None:
    files.gqa(tmp_path)
    lines = [{"question_id": "203", "image": "n2.jpg", "text": f"Who is sitting?\n{SHORT}", "category": "d"}]
    files.write_lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", lines)
    assert load("gqa", tmp_path)["203"].prompt == f"Who is sitting?\n{SHORT}"


def test_scienceqa(tmp_path: Path) -> None:
    questions = load("scienceqa", files.scienceqa(tmp_path))
    assert (
        questions["12"].prompt
        == f"Context: Look at the map.\nWhere is it?\nA. Peru\nB. Chad\nC. Fiji\n{LETTER}"
    )
    assert questions["11"].prompt.startswith("Which is a mammal?\nA. frog\n")
    assert questions["11"].image == "11/image.png"
    assert questions["13"].conversation.images == ()
    result = values(
        score("scienceqa", questions, {"11": "B. bat", "12": "E", "13": "The answer is E.", "14": "B"})
    )
    assert (result["image_accuracy"], result["accuracy"]) == (50, 50)
    assert (result["context=none"], result["subject=language science"], result["grades=1 to 6"]) == (
        0,
        50,
        66.6667,
    )
    # question 12 has a hint and an image: it counts in both contexts, as the official tool has it
    assert (result["context=image"], result["context=text"], result["grades=7 to 12"]) == (50, 50, 0)
    missing = score("scienceqa", questions, {"11": "B"})
    assert (missing.num_missing, values(missing)["image_accuracy"]) == (3, 50)  # wrong, not dropped


@pytest.mark.parametrize("with_llava", [True, False])
def test_textvqa(tmp_path: Path, with_llava: bool) -> None:
    questions = load("textvqa", files.textvqa(tmp_path, with_llava=with_llava))
    assert questions["34602"].prompt == (
        f"What is the brand of this camera?\nReference OCR token: PERFECT, DAKOTA\n{SHORT}"
    )
    assert questions["34604"].prompt.split("\n")[1] == "Reference OCR token: "
    result = values(
        score("textvqa", questions, {"34602": "Dakota Digital!", "34603": "Two", "34604": "STOP"})
    )
    assert result == {"accuracy": 100}
    result = values(score("textvqa", questions, {"34602": "unanswerable", "34603": "2,", "34604": "go"}))
    assert result == {"accuracy": pytest.approx(100 * (0.3 + 1 + 0) / 3, abs=1e-3)}


def test_textvqa_without_ocr_is_another_protocol(tmp_path: Path) -> None:
    questions = load("textvqa-no-ocr", files.textvqa(tmp_path))
    assert questions["34603"].prompt == f"What number is it?\n{SHORT}"
    assert BENCHMARKS["textvqa-no-ocr"].protocol != BENCHMARKS["textvqa"].protocol


POPE_ANSWERS = {
    "1": "Yes",
    "2": "no",
    "3": "Yes, sure",
    "4": "No",  # TP TN FP FN
    "20000001": "yes",
    "20000002": "No.",
    "20000003": "not",
    "20000004": "garbage",  # TP TN TN TP
    "10000001": "no",
    "10000002": "no",
    "10000003": "yes",  # FN TN TP
}


def test_pope_is_the_mean_f1_of_three_splits(tmp_path: Path) -> None:
    questions = load("pope", files.pope(tmp_path))
    assert questions["20000004"].category == "popular"
    result = values(score("pope", questions, POPE_ANSWERS))
    assert result["f1"] == pytest.approx(100 * (1 / 2 + 1 + 2 / 3) / 3, abs=1e-3)
    assert result["accuracy"] == pytest.approx(100 * 8 / 11, abs=1e-3)
    five = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    assert [result[f"adversarial {name}"] for name in five] == [50] * 5
    assert result["random recall"] == result["popular yes_ratio"] == 50
    counts = [[result[f"{split} {kind}"] for kind in ("TP", "FP", "TN", "FN")] for split in files.POPE]
    assert counts == [[1, 1, 1, 1], [2, 0, 2, 0], [1, 0, 1, 1]]


def test_a_missing_answer_to_pope_is_a_wrong_one(tmp_path: Path) -> None:
    questions = load("pope", files.pope(tmp_path))
    answers = {key: answer for key, answer in POPE_ANSWERS.items() if key not in ("1", "20000002")}
    result = values(score("pope", questions, answers))
    assert (result["adversarial f1"], result["adversarial recall"]) == (0, 0)
    assert (result["adversarial FN"], result["popular FP"], result["popular TN"]) == (2, 1, 1)
    assert result["popular precision"] == pytest.approx(66.6667)


def test_pope_pooled_wants_the_very_word(tmp_path: Path) -> None:
    questions = load("pope-pooled", files.pope(tmp_path))
    result = values(score("pope-pooled", questions, POPE_ANSWERS))
    # right: 1, 2, 20000001, 10000002, 10000003; "No." and the like are neither yes nor no
    assert result["accuracy"] == pytest.approx(100 * 5 / 11, abs=1e-3)
    assert (result["precision"], result["recall"]) == (100, 60)  # TP 1, 20000001, 10000003; FN "No", "no"
    assert result["f1"] == 75


def test_mme(tmp_path: Path) -> None:
    questions = load("mme", files.mme(tmp_path))
    assert questions["existence/0001.jpg#1"].prompt == f"Is there a cat?\n{SHORT}"
    assert questions["existence/0002.jpg#1"].prompt == f"Is it day?\n{SHORT}"
    assert "posters/images/tt01.jpg#2" in questions
    assert "code_reasoning/0020.png#1" in questions
    answers = {
        "existence/0001.jpg#1": "Yes",
        "existence/0001.jpg#2": "No.",
        "existence/0002.jpg#1": "YES it is",
        "existence/0002.jpg#2": "maybe no",
        "posters/images/tt01.jpg#1": "yes",
        "posters/images/tt01.jpg#2": "no",
        "code_reasoning/0020.png#1": "nope",
        "code_reasoning/0020.png#2": "no",
    }
    result = score("mme", questions, answers)
    assert values(result) == {
        "perception": 75 + 50 + 200,
        "cognition": 50,
        "total": 375,
        "existence": 125,
        "existence acc": 75,
        "existence acc+": 50,
        "posters": 200,
        "posters acc": 100,
        "posters acc+": 100,
        "code_reasoning": 50,
        "code_reasoning acc": 50,
        "code_reasoning acc+": 0,
    }
    assert result.metrics[0].num_questions == 6
    export = BENCHMARKS["mme"].export
    assert export is not None
    answers["existence/0001.jpg#1"] = "Yes\tor\nso"
    paths = export(list(questions.values()), answers, tmp_path, tmp_path / "out")
    lines = next(path for path in paths if path.name == "existence.txt").read_text().splitlines()
    assert lines[0] == "0001.jpg\tIs there a cat? Please answer yes or no.\tYes\tYes or so"
    assert [len(line.split("\t")) for line in lines] == [4] * 4


def test_mmbench_counts_a_question_only_if_all_rotations_are_right(tmp_path: Path) -> None:
    questions = load("mmbench", files.mmbench(tmp_path))
    assert questions["241"].prompt == (
        f'Look\nhere.\nWhich "one"\nis it?\nA. cat\nB. a dog\nC. bird\nD. None of these\n{LETTER}'
    )
    assert questions["1000252"].prompt == f"Pick.\nA. blue\nB. red\n{LETTER}"
    assert {q.image for q in questions.values()} == {"241", "252"}
    answers = {"241": "B", "1000241": "A.", "2000241": "D", "3000241": "a dog", "252": "A", "1000252": "A"}
    scored = score("mmbench", questions, answers)
    assert values(scored) == {
        "circular": 50,
        "category=color": 0,
        "category=ocr": 100,
        "l2-category=coarse": 50,
        "single_pass": 100,
    }
    benchmark = BENCHMARKS["mmbench"]
    result = benchmark.result(list(questions.values()), scored, model="m")
    assert (result.num_questions, result.num_images, result.is_partial) == (2, 2, True)
    assert result.notes[0] == "partial set: 2 of 1,164 questions"
    assert benchmark.export is not None
    (path,) = benchmark.export(list(questions.values()), answers, tmp_path, tmp_path / "out")
    rows = list(openpyxl.load_workbook(path).active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[6] == (1000252, "Pick.", "blue", "red", None, None, "A", "B", "dev")


def test_mmbench_stops_at_the_first_empty_option(tmp_path: Path) -> None:
    rows = files.mmbench_rows()[:1]
    rows[0] |= {"C": "NA", "hint": "nan"}
    files.write_table(tmp_path / "mmbench_dev.tsv", rows)
    assert load("mmbench", tmp_path)["241"].prompt == f'Which "one"\nis it?\nA. cat\nB. a dog\n{LETTER}'


def test_mmvet_is_scored_from_reviews(tmp_path: Path) -> None:
    questions = load("mmvet", files.mmvet(tmp_path))
    assert questions["v1_0"].prompt == "What is x in the equation?"
    answers = {"v1_0": "x = -1", "v1_1": "Zoë", "v1_2": ""}
    assert score("mmvet", questions, answers).metrics == ()
    result = values(score("mmvet", questions, answers, {"v1_0": "0.5", "v1_1": "1.0 yes", "v1_2": "1.5"}))
    assert result == {
        "accuracy": 50,
        "capability=math": 25,
        "capability=ocr": 25,
        "capability=rec": 100,
        "set=ocr+math": 25,
        "set=rec": 100,
    }


def test_llava_w_is_a_ratio_of_means(tmp_path: Path) -> None:
    questions = load("llava-w", files.llava_w(tmp_path))
    answers = dict.fromkeys(questions, "An answer.")
    reviews = {"0": "8 7\nGood.", "1": "9 6", "2": "8, 7\nthree parts", "3": "10 5"}
    result = values(score("llava-w", questions, answers, reviews))
    # the third review cannot be read: -1 and -1 enter both means; LLaVA's script prints one decimal
    assert result["all"] == round(100 * (7 + 6 - 1 + 5) / (8 + 9 - 1 + 10), 1)
    assert result["conv"] == round(100 * 12 / 18, 1)
    assert (result["complex"], result["conv reference"], result["conv model"]) == (100, 90, 60)


PARQUET: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path] | None]] = {
    "vqav2-val": (files.vqav2_val_parquet, files.vqav2_val),
    "gqa": (files.gqa_parquet, files.gqa),
    "scienceqa": (files.scienceqa_parquet, files.scienceqa),
    "textvqa": (files.textvqa_parquet, files.textvqa),
    "pope": (files.pope_parquet, files.pope),
    "mmbench": (files.mmbench_parquet, files.mmbench),
    "mmvet": (files.mmvet_parquet, files.mmvet),
    "mme": (files.mme_parquet, None),
    "llava-w": (files.llava_w_parquet, None),
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_mirrors_hold_the_same_questions(name: str, tmp_path: Path) -> None:
    from_parquet, from_files = PARQUET[name]
    mirror = BENCHMARKS[name].load(from_parquet(tmp_path / "parquet"))
    assert all(image.path and image.path.read_bytes() for q in mirror for image in q.conversation.images)
    assert any(q.conversation.images for q in mirror)
    if from_files is not None:
        official = BENCHMARKS[name].load(from_files(tmp_path / "official"))
        key = "prompt" if name == "scienceqa" else "id"  # that mirror has no ids
        by_id = {getattr(q, key): q for q in official}
        assert len(by_id) == len(mirror)
        for question in mirror:
            twin = by_id[getattr(question, key)]
            assert (question.prompt, question.target, question.category, question.groups) == (
                twin.prompt,
                twin.target,
                twin.category,
                twin.groups,
            )


def test_mmbench_new_table_shares_the_image_of_the_base_row(tmp_path: Path) -> None:
    old, new = (
        load("mmbench", write(tmp_path / write.__name__))
        for write in (files.mmbench, files.mmbench_new_table)
    )
    assert {q.id: q.prompt for q in old.values()} == {q.id: q.prompt for q in new.values()}
    assert new["1000241"].conversation.images[0].path.read_bytes() == files.png(241)


def test_exports_of_the_judged(tmp_path: Path) -> None:
    for name, write in (
        ("mmvet", files.mmvet),
        ("llava-w", files.llava_w),
        ("mmbench", files.mmbench_parquet),
    ):
        questions = list(load(name, write(tmp_path / name)).values())
        export = BENCHMARKS[name].export
        assert export is not None
        paths = export(questions, {questions[0].id: "é"}, tmp_path / name, tmp_path / "out")
        if name == "mmvet":
            assert json.loads(paths[0].read_text()) == {"v1_0": "é", "v1_1": "", "v1_2": ""}
        elif name == "llava-w":
            lines = [json.loads(line) for line in paths[0].read_text().splitlines()]
            assert [(line["question_id"], line["text"]) for line in lines] == [
                (0, "é"),
                (1, ""),
                (2, ""),
                (3, ""),
            ]
        else:
            assert list(paths) == []  # the order of the table's columns is lost in parquet


def test_every_protocol_has_a_name_of_its_own() -> None:
    benchmarks = [b for b in BENCHMARKS.values() if not b.name.startswith("starter")]
    for name in ("protocol", "title"):
        assert len({getattr(b, name) for b in benchmarks}) == len(benchmarks)
    assert [b.name for b in BENCHMARKS.values()] == list(BENCHMARKS)
