"""Table 2's files under one data root, the user's own, and how files are mixed."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllava.config import DataConfig
from tinyllava.data.conversion import read_stored
from tinyllava.data.held_out import hold_out
from tinyllava.data.mixtures import MIXTURES, resolve
from tinyllava.data.records import read_configured
from tinyllava.data.sources import Source, count_samples, draw_rows, parse_source
from tinyllava.data.store import distinct
from tinyllava.errors import ConfigError, DataError, UnknownNameError
from tinyllava.recipes.recipe import DATASETS


def test_the_rows_are_those_of_table_2() -> None:
    thousands = {name: (m.stage, round(m.num_samples, -3)) for name, m in MIXTURES.items()}
    assert thousands == {
        "LLaVA-1.5-558k": ("PT", 558_000),
        "LLaVA-1.5-mix-665k": ("SFT", 665_000),
        "ShareGPT4V-PT-1246k": ("PT", 1_246_000),
        "ShareGPT4V-mix-665k": ("SFT", 665_000),
    }
    assert [name for pair in DATASETS.values() for name in pair] == list(MIXTURES)


def lay_out(root: Path, record: str, in_root: bool = False) -> Path:
    mixture = MIXTURES[record]
    file = root / (Path(mixture.records).name if in_root else mixture.records)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[]")
    (root / mixture.images).mkdir(parents=True, exist_ok=True)
    return file


def places(*settings: object) -> list[tuple[Path, Path]]:
    return [place for _, of_source in resolve(*settings) for place in of_source]


@pytest.mark.parametrize("in_root", [False, True])
def test_the_two_roots_of_the_same_images(tmp_path: Path, in_root: bool) -> None:
    first = lay_out(tmp_path, "LLaVA-1.5-558k", in_root)
    second = lay_out(tmp_path, "ShareGPT4V-PT-1246k", in_root)
    data = DataConfig(records=("LLaVA-1.5-558k", "ShareGPT4V-PT-1246k"))
    images = tmp_path / "llava" / "llava_pretrain" / "images"
    assert places(data, tmp_path) == [(first, images), (second, tmp_path)]


def test_own_files_stand_beside_a_mixture(tmp_path: Path) -> None:
    own = tmp_path / "own" / "records.jsonl"
    own.parent.mkdir()
    own.write_text("")
    assert places(DataConfig(records=(str(own),))) == [(own, own.parent)]
    elsewhere = DataConfig(records=(str(own),), images=str(tmp_path))
    assert places(elsewhere) == [(own, tmp_path)]


def test_everything_that_is_missing_is_listed_at_once(tmp_path: Path) -> None:
    data = DataConfig(records=("LLaVA-1.5-558k", "LLaVA-1.5-mix-665k", "mine.json"))
    with pytest.raises(DataError) as caught:
        resolve(data, tmp_path)
    text = str(caught.value)
    for named in (
        "blip_laion_cc_sbu_558k.json",
        "liuhaotian/LLaVA-Pretrain",
        "llava_pretrain/images",
        "llava_v1_5_mix665k.json",
        "mine.json: no such record file",
    ):
        assert named in text


def test_a_mixture_needs_a_root_and_a_name_needs_to_be_known() -> None:
    with pytest.raises(ConfigError, match=r"needs data_root.*text_files/llava_v1_5"):
        resolve(DataConfig(records=("LLaVA-1.5-mix-665k",)))
    with pytest.raises(UnknownNameError, match=r"Did you mean .LLaVA-1\.5-558k."):
        resolve(DataConfig(records=("LLaVA-1.5-559k",)), "root")


def test_an_entry_is_a_name_and_its_options(tmp_path: Path) -> None:
    assert parse_source("my.json") == Source(name="my.json")
    whole = parse_source("a b.json,weight=0.3, limit=500,seed=7")
    assert whole == Source(name="a b.json", weight=0.3, limit=500, seed=7)
    assert whole.options == ",weight=0.3,limit=500,seed=7"
    assert parse_source(whole.name + whole.options) == whole
    odd = tmp_path / "odd,repeat=2"
    assert parse_source(str(odd)) == Source(name=str(tmp_path / "odd"), repeat=2)
    odd.touch()
    assert parse_source(str(odd)) == Source(name=str(odd))  # a file of that name is that file


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (("a.json,share=2",), "a.json,share=2: option 'share': unknown; known: weight, repeat, limit, seed"),
        (("a.json,limit=2,limit=3",), "option 'limit': given twice"),
        (("a.json,repeat=0",), "repeat=0: must be a number above 0"),
        (("a.json,weight=nan",), "weight=nan: must be a number above 0"),
        (("a.json,limit=2.5",), "limit=2.5: must be a whole number from 1"),
        (("a.json,seed=-1",), "seed=-1: must be a whole number from 0"),
        (
            ("a.json,weight=2", "b.json,repeat=2"),
            "a.json,weight=2 and b.json,repeat=2: weight and repeat both",
        ),
    ],
)
def test_a_wrong_option_is_named(records: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(DataConfig(records=records))
    assert said in str(caught.value)


def test_the_counts_of_a_mixture_by_hand() -> None:
    def counts(*entries: str) -> list[int]:
        return count_samples(
            [parse_source(e.partition(":")[2]) for e in entries], [int(e.partition(":")[0]) for e in entries]
        )

    assert counts("10:a", "5:b") == [10, 5]
    assert counts("10:a,repeat=2", "5:b,repeat=0.5", "3:c,repeat=1.5") == [20, 3, 5]  # 2.5 and 4.5: a half up
    assert counts("100:a,weight=3", "20:b") == [90, 30]
    assert counts("10:a,weight=1", "10:b,weight=1", "10:c,weight=1,limit=2") == [
        8,
        7,
        7,
    ]  # 22 / 3, first first
    assert counts("7:a,limit=50", "1000:b,limit=50") == [7, 50]
    with pytest.raises(ConfigError, match=r"b,weight=0.01: no sample of its 10 records"):
        counts("10:a,weight=9", "10:b,weight=0.01")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 40)), min_size=1, max_size=5))
def test_weights_split_the_records_exactly(drawn: list[tuple[int, int]]) -> None:
    sources = [Source(name=str(i), weight=weight / 4) for i, (_, weight) in enumerate(drawn)]
    total = sum(count for count, _ in drawn)
    exact = [total * Fraction(weight, sum(w for _, w in drawn)) for _, weight in drawn]
    try:
        found = count_samples(sources, [count for count, _ in drawn])
    except ConfigError:
        assert min(exact) < 1
        return
    assert sum(found) == total
    assert all(abs(one - share) < 1 for one, share in zip(found, exact, strict=True))


def test_what_is_drawn_follows_from_the_seed_and_a_larger_limit_keeps_it() -> None:
    small, large = (set(draw_rows(Source(name="a", limit=n), 100, n).tolist()) for n in (10, 30))
    assert len(small) == 10
    assert small < large
    assert draw_rows(Source(name="a", limit=5, seed=1), 100, 5).tolist() == [33, 80, 81, 84, 93]  # for ever
    assert set(draw_rows(Source(name="a", limit=10, seed=1), 100, 10).tolist()) != small
    times = Counter(draw_rows(Source(name="a", repeat=2.3, limit=40), 100, 92).tolist())
    assert sorted(times.values()) == [2] * 28 + [3] * 12


def test_a_mixture_is_the_same_samples_read_at_once_or_out_of_converted_files(tmp_path: Path) -> None:
    for name in "ab":
        turns = [
            [{"from": "human", "value": f"Q {name}{n}"}, {"from": "gpt", "value": "A"}] for n in range(20)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"conversations": one} for one in turns]))
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    data = DataConfig(records=(f"{a},repeat=1.25", f"{b},limit=4,seed=3"))
    stored, plain = read_stored(data, "", tmp_path / "store"), read_configured(data)
    assert list(stored.conversations) == list(plain.conversations)
    assert [str(share) for share in stored.mixture] == [
        f"{a},repeat=1.25: 25 samples of 20 records",
        f"{b},limit=4,seed=3: 4 samples of 20 records",
    ]
    assert plain.mixture == stored.mixture
    held = np.array(hold_out(stored.conversations, {}, 0.2))
    kept = stored.conversations.select(np.setdiff1d(np.arange(29), held))
    once = distinct(stored.conversations.select(held))
    assert not {one.place for one in kept} & {one.place for one in once}  # copies are on one side
    assert len(once) == len({one.place for one in once}) <= len(held)
