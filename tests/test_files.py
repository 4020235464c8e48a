"""JSON with every oddity: one kind of error, with the place."""

import json

import pytest

from tinyllava.config import run_from_json
from tinyllava.errors import ConfigError, DataError
from tinyllava.evaluation.read import read_json
from tinyllava.evaluation.results import load_results
from tinyllava.files import parse_json

ODD = {
    "digits": ('{"a":\n ' + "7" * 5000 + "}", "an integer with 5,000 digits", (2, 2)),
    "lists": ("[[\n" + "[" * 100_000, "nested too deeply", (2, 100_000)),
    "objects": ('{"a":' * 100_000, "nested too deeply", (1, 499_996)),
    "cut": ('{"a": [1, 2', "Expecting ',' delimiter", (1, 12)),
}


@pytest.mark.parametrize("case", ODD)
def test_every_oddity_is_a_json_error_with_its_place(case):
    text, message, place = ODD[case]
    with pytest.raises(json.JSONDecodeError) as caught:
        parse_json(text)
    assert caught.value.msg == message
    assert (caught.value.lineno, caught.value.colno) == place


def test_half_a_character_is_refused_where_it_is_asked_for():
    text = '{"a": "\\ud83d\\ude00", "b": ["x \\ud83d"]}'
    assert parse_json(text)["b"] == ["x \ud83d"]
    with pytest.raises(json.JSONDecodeError, match="an unpaired surrogate: line 1"):
        parse_json(text, whole_characters=True)
    assert parse_json('{"a": "\\ud83d\\ude00"}', whole_characters=True) == {"a": "\U0001f600"}


@pytest.mark.parametrize("text", ['{"seed": ' + "1" * 5000 + "}", '{"name": "\\ud800"}', "[" * 100_000])
def test_configs_results_and_benchmarks_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    for read, error in (
        (lambda: run_from_json(text, str(path)), ConfigError),
        (lambda: read_json(path), DataError),
        (lambda: load_results(path), DataError),
    ):
        with pytest.raises(error) as caught:
            read()
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
