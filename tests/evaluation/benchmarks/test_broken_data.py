"""Broken benchmark data: each error names the file, the line, what is wrong and what to do."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation import benchmark_files as files
from tinyllava.errors import DataError
from tinyllava.evaluation.benchmarks import BENCHMARKS


def edit(name: str, old: str, new: str, count: int = 1) -> Callable[[Path], None]:
    """Replace text in a file; the old text has to be there."""

    def apply(folder: Path) -> None:
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, count), encoding="utf-8")

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return apply


def append(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


VAL_Q, VAL_A = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
TESTDEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
GQA = "testdev_balanced_questions.json"
TSV = "mmbench_dev_20230712.tsv"
MME = "MME_Benchmark_release_version/existence/0001.txt"
POPE = "coco_pope_adversarial.json"

# benchmark, files, what breaks them, file:line in the message, and its gist
CASES = {
    "vqav2: not JSON": ("vqav2", files.vqav2_test, cut(TESTDEV, 0.9), f"{TESTDEV}:4", "not JSON at column"),
    "vqav2: another prompt": (
        "vqav2",
        files.vqav2_test,
        edit(TESTDEV, "single word", "few words"),
        f"{TESTDEV}:1",
        "another protocol",
    ),
    "vqav2: no field": (
        "vqav2",
        files.vqav2_test,
        edit(TESTDEV, '"image"', '"photo"'),
        f"{TESTDEV}:1",
        "no field 'image'; the record has: question_id, photo",
    ),
    "vqav2: id twice": (
        "vqav2",
        files.vqav2_test,
        edit(TESTDEV, "1003", "1001"),
        f"{TESTDEV}:4",
        "is used twice",
    ),
    "vqav2: empty file": ("vqav2", files.vqav2_test, cut(TESTDEV, 0), f"{TESTDEV}:1", "the file is empty"),
    "vqav2: not text": (
        "vqav2",
        files.vqav2_test,
        edit(TESTDEV, '"Question 0?\\nAnswer the question using a single word or phrase."', "7.5"),
        f"{TESTDEV}:1",
        "field 'text' is 7.5; it must be text",
    ),
    "vqav2-val: nine answers": (
        "vqav2-val",
        files.vqav2_val,
        edit(
            VAL_A,
            '{\n     "answer": "yes",\n     "answer_confidence": "yes",\n     "answer_id": 1\n    },',
            "",
        ),
        f"{VAL_A}:56, entry '262148000'",
        "has 9 entries; it must have 10",
    ),
    "vqav2-val: no annotation": (
        "vqav2-val",
        files.vqav2_val,
        edit(VAL_A, '"question_id": 393225001', '"question_id": 5'),
        f"{VAL_Q}:21, entry '393225001'",
        "has no annotation in",
    ),
    "vqav2-val: no annotations": ("vqav2-val", files.vqav2_val, remove(VAL_A), VAL_A, "no such file"),
    "gqa: types": (
        "gqa",
        files.gqa,
        edit(GQA, '"structural": "verify"', '"structural": null'),
        f"{GQA}:2, entry '201307251'",
        "field 'structural' is None",
    ),
    "gqa: not JSON": (
        "gqa",
        files.gqa,
        edit(GQA, '"isBalanced": true', '"isBalanced": True'),
        f"{GQA}:6",
        "not JSON at column 17",
    ),
    "scienceqa: answer": (
        "scienceqa",
        files.scienceqa,
        edit("problems.json", '"answer": 4', '"answer": 5'),
        "problems.json:29, entry '13'",
        "there are choices 0 to 4",
    ),
    "scienceqa: one choice": (
        "scienceqa",
        files.scienceqa,
        edit("problems.json", '   "frog",\n', ""),
        "problems.json:2, entry '11'",
        "has 1 entries; it must have 2 to 5",
    ),
    "scienceqa: unknown id": (
        "scienceqa",
        files.scienceqa,
        edit("pid_splits.json", '"12"', '"99"'),
        "pid_splits.json:1",
        "id '99' of the split 'test' is not in",
    ),
    "scienceqa: grade": (
        "scienceqa",
        files.scienceqa,
        edit("problems.json", '"grade": "grade7"', '"grade": "grade13"'),
        "problems.json:15, entry '12'",
        "field 'grade' is 'grade13'; it must be one of grade1 to grade12",
    ),
    "textvqa: nine answers": (
        "textvqa",
        files.textvqa,
        edit("TextVQA_0.5.1_val.json", '    "unanswerable"', "    7"),
        "TextVQA_0.5.1_val.json:5, entry '34602'",
        "must be a list of texts",
    ),
    "textvqa: no tokens": (
        "textvqa",
        files.textvqa,
        remove("llava_textvqa_val_v051_ocr.jsonl"),
        "",
        "looked for llava_textvqa_val_v051_ocr.jsonl, TextVQA_Rosetta_OCR_v0.2_val.json",
    ),
    "textvqa: prompt without OCR line": (
        "textvqa",
        files.textvqa,
        edit("llava_textvqa_val_v051_ocr.jsonl", "\\nReference OCR token: PERFECT, DAKOTA", ""),
        "llava_textvqa_val_v051_ocr.jsonl:1",
        "three lines",
    ),
    "pope: label": (
        "pope",
        files.pope,
        edit(POPE, '"label": "no"', '"label": "maybe"'),
        f"{POPE}:2",
        "field 'label' is 'maybe'; it must be yes or no",
    ),
    "pope: id": (
        "pope",
        files.pope,
        edit(POPE, '"question_id": 3', '"question_id": "x3"'),
        f"{POPE}:3",
        "field 'question_id' is 'x3'; it must be an integer",
    ),
    "mme: a tab too many": ("mme", files.mme, edit(MME, "cat?", "cat?\t"), f"{MME}:1", "the line has 2 tabs"),
    "mme: no tab": ("mme", files.mme, edit(MME, "\tNo", " No"), f"{MME}:2", "the line has 0 tabs"),
    "mme: three questions": (
        "mme",
        files.mme,
        append(MME, "Is it a cow?\tNo\n"),
        f"{MME}:3",
        "more than two",
    ),
    "mme: neither yes nor no": ("mme", files.mme, edit(MME, "\tNo", "\tNope"), f"{MME}:2", "is 'Nope'"),
    "mmbench: header": (
        "mmbench",
        files.mmbench,
        edit(TSV, "l2-category", "level"),
        f"{TSV}:1",
        "no column 'l2-category'",
    ),
    "mmbench: answer": (
        "mmbench",
        files.mmbench,
        edit(TSV, "\tA\tcolor", "\tD\tcolor"),
        f"{TSV}:14",
        "field 'answer' is 'D'; it must be one of A, B",
    ),
    "mmbench: cells": (
        "mmbench",
        files.mmbench,
        append(TSV, "7\tx\n"),
        f"{TSV}:16",
        "does not have the 14 cells",
    ),
    "mmbench: image": ("mmbench", files.mmbench, edit(TSV, "iVBOR", "%%%%%"), f"{TSV}:2", "image in base64"),
    "mmbench: index": (
        "mmbench",
        files.mmbench,
        edit(TSV, "\n252\t", "\nabc\t"),
        f"{TSV}:14",
        "field 'index' is 'abc'",
    ),
    "mmvet: capability": (
        "mmvet",
        files.mmvet,
        edit("mm-vet/mm-vet.json", '"rec"', '"smell"'),
        "mm-vet.json:12, entry 'v1_1'",
        "must list some of rec, ocr, know, gen, spat, math",
    ),
    "llava-w: category": (
        "llava-w",
        files.llava_w,
        edit("questions.jsonl", '"detail"', '"chat"'),
        "questions.jsonl:2",
        "must be conv or detail or complex",
    ),
    "llava-w: no caption": (
        "llava-w",
        files.llava_w,
        edit("context.jsonl", '"image": "002', '"image": "003'),
        "questions.jsonl:3",
        "image '002.jpg' has no caption",
    ),
    "llava-w: no reference": (
        "llava-w",
        files.llava_w,
        edit("answers_gpt4.jsonl", '"question_id": 3', '"question_id": 9'),
        "questions.jsonl:4",
        "question 3 has no reference answer",
    ),
    "llava-w: list for record": (
        "llava-w",
        files.llava_w,
        append("questions.jsonl", "[1]\n"),
        "questions.jsonl:5",
        "the line is [1]; it must be a record",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_names_file_line_and_fix(case: str, tmp_path: Path) -> None:
    name, write, break_it, place, gist = CASES[case]
    break_it(write(tmp_path))
    with pytest.raises(DataError) as caught:
        BENCHMARKS[name].load(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert place in message
    assert gist in message
    assert re.search(r"`tinyllava data benchmarks|another protocol", message)


def test_there_are_at_least_twenty_kinds() -> None:
    assert len(CASES) >= 20


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if not name.startswith("starter")])
def test_an_empty_folder_is_told_what_was_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looked for .* lists their source"):
        BENCHMARKS[name].load(tmp_path)


def test_pope_refuses_the_later_random_split(tmp_path: Path) -> None:
    files.pope(tmp_path)
    records = [{"question_id": n, "image": "a.jpg", "text": "?", "label": "no"} for n in range(2911)]
    files.write_lines(tmp_path / "coco_pope_random.json", records)
    with pytest.raises(DataError, match=r"coco_pope_random.json:2911: .*2,910.*e3e3926.*pope-pooled"):
        BENCHMARKS["pope"].load(tmp_path)
    assert len(BENCHMARKS["pope-pooled"].load(tmp_path)) == 8 + 2911


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    files.pope_parquet(tmp_path)
    (path,) = tmp_path.rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"not a complete parquet file"):
        BENCHMARKS["pope"].load(tmp_path)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    files.pope(tmp_path)
    (tmp_path / "coco_pope_random.json").write_bytes(b'{"question_id": 1, "image": "\xff"}')
    with pytest.raises(DataError, match=r"coco_pope_random.json:1: byte 29 of the line is not UTF-8"):
        BENCHMARKS["pope"].load(tmp_path)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    files.mmbench(tmp_path)
    (path,) = tmp_path.glob("*.tsv")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(BENCHMARKS["mmbench"].load(tmp_path)) == 6


def test_the_line_of_an_entry_in_a_document_on_one_line(tmp_path: Path) -> None:
    files.gqa(tmp_path)
    document = json.loads((tmp_path / GQA).read_text())
    del document["203"]["answer"]
    (tmp_path / GQA).write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"questions.json:1, entry '203': no field 'answer'"):
        BENCHMARKS["gqa"].load(tmp_path)
