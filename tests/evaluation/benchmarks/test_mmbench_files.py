"""MMBench's releases and languages: which file is read, and when a run over it is complete."""

import base64
from pathlib import Path

import openpyxl
import pytest

from evaluation import benchmark_files as files
from tinyllava.data.readers.columns import LETTER
from tinyllava.errors import DataError
from tinyllava.evaluation.answers import read_llava_answers, write_llava_answers
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.read import check_files

MMBENCH = BENCHMARKS["mmbench"]
CHINESE = "哪一个是正确的？"


def release(folder: Path, num_left_out: int) -> Path:
    """A file with as many questions, options and rotations as mmbench_dev_20230712, less some questions."""
    shapes = [(4, 4)] * (938 - num_left_out) + [(3, 3)] * 96 + [(2, 2)] * 89 + [(4, 3)] * 53
    image = base64.b64encode(files.png()).decode()
    rows = []
    for base, (num_options, num_rotations) in enumerate(shapes):
        options = ["red", "blue", "green", "black"][:num_options]
        for turn in range(num_rotations):
            letters = dict(zip("ABCD", [*options[turn:], *options[:turn]], strict=False))
            rows.append(
                {
                    **dict.fromkeys(files.MMBENCH_HEADER, ""),
                    "question": "Which?",
                    **letters,
                    "answer": "A",
                    "index": str(base + turn * 1_000_000),
                    "image": image,
                    "category": "c",
                    "l2-category": "l",
                }
            )
    files.write_table(folder / "mmbench_dev_20230712.tsv", rows)
    return folder


@pytest.mark.parametrize(("num_left_out", "num_rows", "num_bases"), [(0, 4_377, 1_176), (12, 4_329, 1_164)])
def test_a_whole_release_is_complete(
    num_left_out: int, num_rows: int, num_bases: int, tmp_path: Path
) -> None:
    """53 questions have four options and three rotations in the published files."""
    questions = MMBENCH.load(release(tmp_path, num_left_out))
    assert len(questions) == num_rows
    answers = {question.id: "A" for question in questions}
    result = MMBENCH.result(questions, MMBENCH.score(questions, answers), model="m")
    assert (result.num_questions, result.num_expected, result.is_partial) == (num_bases, num_bases, False)
    assert result.metric_named("circular").num_questions == num_bases
    some = questions[:100]
    result = MMBENCH.result(some, MMBENCH.score(some, {one.id: "A" for one in some}), model="m")
    assert result.notes[0] == f"partial set: 25 of {num_bases:,} questions"


def test_a_file_that_is_cut_short_is_partial(tmp_path: Path) -> None:
    path = release(tmp_path, 0) / "mmbench_dev_20230712.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    questions = MMBENCH.load(tmp_path)
    result = MMBENCH.result(questions, MMBENCH.score(questions, {}), model="m")
    assert (result.num_questions, result.num_expected) == (1_176 - 53, 1_176)


@pytest.mark.parametrize(
    "chinese", ["MMBench_DEV_CN.tsv", "mmbench_dev_cn_20231003.tsv", "MMBENCH_DEV_CN.tsv"]
)
@pytest.mark.parametrize(
    "english",
    [
        "MMBench_DEV_EN.tsv",
        "mmbench_dev_20230712.tsv",
        "mmbench_dev_en_20231003.tsv",
        "MMBench_DEV_EN_V11.tsv",
    ],
)
def test_the_chinese_file_beside_the_english_one_is_not_read(
    chinese: str, english: str, tmp_path: Path
) -> None:
    files.write_table(tmp_path / chinese, [row | {"question": CHINESE} for row in files.mmbench_rows()])
    with pytest.raises(DataError, match=r"no questions of mmbench; looked for .*MMBench_DEV_EN"):
        MMBENCH.load(tmp_path)
    (status,) = check_files(tmp_path, MMBENCH.files)
    assert not status.is_present
    files.write_table(tmp_path / english, files.mmbench_rows())
    assert CHINESE not in "".join(question.prompt for question in MMBENCH.load(tmp_path))
    (status,) = check_files(tmp_path, MMBENCH.files)
    assert [path.name for path in status.found] == [english]


def test_chinese_questions_under_an_english_name_are_refused(tmp_path: Path) -> None:
    rows = [row | {"question": CHINESE} for row in files.mmbench_rows()]
    files.write_table(tmp_path / "MMBench_DEV_EN.tsv", rows)
    with pytest.raises(
        DataError, match=r"6 of 6 questions are in Chinese; this benchmark is dev \(English\)"
    ):
        MMBENCH.load(tmp_path)


def test_two_releases_in_a_folder_are_refused(tmp_path: Path) -> None:
    for name in ("MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv"):
        files.write_table(tmp_path / name, files.mmbench_rows())
    with pytest.raises(
        DataError, match=r"several tables .*: MMBench_DEV_EN.tsv, MMBench_DEV_EN_V11.tsv.*Keep one"
    ):
        MMBENCH.load(tmp_path)


def test_of_a_mirror_in_two_languages_the_english_shards_are_read(tmp_path: Path) -> None:
    (shard,) = files.mmbench_parquet(tmp_path / "en").rglob("*.parquet")
    for language in ("en", "cn"):
        (tmp_path / "mirror" / language).mkdir(parents=True)
        (tmp_path / "mirror" / language / shard.name).write_bytes(shard.read_bytes())
    assert len(MMBENCH.load(tmp_path / "mirror")) == 6


@pytest.mark.parametrize("answer", ["A\x00", "\x0bB\x1f.", "=1+1", "#N/A"])
def test_the_upload_holds_any_answer(answer: str, tmp_path: Path) -> None:
    """Control characters are none of a table's; what begins like a formula stays the text that it is."""
    folder = files.mmbench(tmp_path)
    questions = MMBENCH.load(folder)
    assert MMBENCH.export is not None
    (path,) = MMBENCH.export(
        questions, {question.id: answer for question in questions}, folder, tmp_path / "o"
    )
    rows = list(openpyxl.load_workbook(path, data_only=True).active.values)
    expected = "".join(character for character in answer if character >= " ")
    assert [row[6] for row in rows[1:]] == [expected] * 6


def test_llavas_own_answer_file_has_no_suffix_in_its_prompts(tmp_path: Path) -> None:
    questions = MMBENCH.load(files.mmbench(tmp_path))
    lines = [
        {
            "question_id": int(q.id),
            "round_id": 0,
            "prompt": q.prompt.removesuffix(f"\n{LETTER}"),
            "text": "A",
            "options": ["x"],
            "option_char": ["A"],
            "answer_id": "i",
            "model_id": "m",
            "metadata": {},
        }
        for q in questions
    ]
    files.write_lines(tmp_path / "theirs.jsonl", lines)
    answers = {question.id: "A" for question in questions}
    assert read_llava_answers(tmp_path / "theirs.jsonl", questions) == answers
    write_llava_answers(questions, answers, tmp_path / "ours.jsonl", model="m", number_ids=True)
    assert read_llava_answers(tmp_path / "ours.jsonl", questions) == answers
    assert LETTER not in (tmp_path / "ours.jsonl").read_text()
