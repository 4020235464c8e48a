"""Results: kept whole in JSON, and never mixed in a column."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tinyllava.errors import DataError, UnknownNameError
from tinyllava.evaluation.results import Metric, Result, ResultTable

RESULT = Result(
    benchmark="mmvet",
    protocol="mmvet/official-prompt",
    split="v1",
    model="share-Sig-Phi",
    metric="accuracy",
    metrics=(
        Metric(name="accuracy", value=32.0, num_questions=218, standard_error=3.1, interval=(26.0, 38.1)),
        Metric(name="capability=ocr", value=30.5, num_questions=108),
    ),
    num_questions=218,
    num_images=200,
    num_expected=218,
    data_sha256="ab",
    decoding={"do_sample": False},
    dtype="float16",
    judge="gpt-4-0613",
    date="2026-01-01T00:00:00+00:00",
    notes=("é",),
)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = ResultTable(results=(RESULT, replace(RESULT, model="base-C-TL"), replace(RESULT, benchmark="x")))
    table.save(tmp_path / "sub" / "results.json")
    assert ResultTable.load(tmp_path / "sub" / "results.json") == table
    assert table.models == ("share-Sig-Phi", "base-C-TL")
    assert table.benchmarks == ("mmvet", "x")
    assert table.cell("base-C-TL", "x") is None
    assert not list(tmp_path.rglob("*.partial"))


def test_headline_and_metrics() -> None:
    assert RESULT.value == 32.0
    assert str(RESULT.metrics[0]) == "accuracy 32.00 [26.0, 38.1] (n=218)"
    assert replace(RESULT, metrics=()).value is None
    assert RESULT.metric_named("capability=ocr").value == 30.5
    with pytest.raises(UnknownNameError, match="Did you mean 'capability=ocr'"):
        RESULT.metric_named("capability=orc")


def test_partial_sets_are_known() -> None:
    assert not RESULT.is_partial
    assert replace(RESULT, num_missing=1).is_partial
    assert replace(RESULT, num_questions=217).is_partial


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("judge", "gpt-4o"),
        ("judge", None),
        ("protocol", "mmvet/own-prompt"),
        ("split", "v2"),
        ("data_sha256", "cd"),
    ],
)
def test_a_column_is_never_mixed(field: str, value: str | None) -> None:
    other = replace(RESULT, model="other", **{field: value})
    with pytest.raises(DataError, match=f"column 'mmvet' would mix two values of {field}"):
        ResultTable(results=(RESULT, other))


def test_a_cell_is_filled_once_and_can_be_replaced() -> None:
    with pytest.raises(DataError, match="two results of 'share-Sig-Phi' on 'mmvet'"):
        ResultTable(results=(RESULT, RESULT))
    newer = replace(RESULT, date="2027")
    assert ResultTable(results=(RESULT,)).with_result(newer).results == (newer,)


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        ("{", "not JSON"),
        ("[]", "version None"),
        ('{"version": 99, "results": []}', "version 99"),
        ('{"version": 1}', "not a results file"),
        ('{"version": 1, "results": [{"metrics": []}]}', "not a results file"),
    ],
)
def test_a_file_that_is_no_table_is_refused(text: str, gist: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match=gist):
        ResultTable.load(tmp_path / "r.json")
    with pytest.raises(DataError, match="no such results file"):
        ResultTable.load(tmp_path / "none.json")


def test_the_file_names_its_version(tmp_path: Path) -> None:
    ResultTable(results=(RESULT,)).save(tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert document["version"] == document["results"][0]["version"] == 1
