"""Table 2's files under one data root, and the user's own."""

from pathlib import Path

import pytest

from tinyllava.config import DataConfig
from tinyllava.data.mixtures import MIXTURES, resolve
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


@pytest.mark.parametrize("in_root", [False, True])
def test_the_two_roots_of_the_same_images(tmp_path: Path, in_root: bool) -> None:
    first = lay_out(tmp_path, "LLaVA-1.5-558k", in_root)
    second = lay_out(tmp_path, "ShareGPT4V-PT-1246k", in_root)
    data = DataConfig(records=("LLaVA-1.5-558k", "ShareGPT4V-PT-1246k"))
    images = tmp_path / "llava" / "llava_pretrain" / "images"
    assert resolve(data, tmp_path) == [(first, images), (second, tmp_path)]


def test_own_files_stand_beside_a_mixture(tmp_path: Path) -> None:
    own = tmp_path / "own" / "records.jsonl"
    own.parent.mkdir()
    own.write_text("")
    assert resolve(DataConfig(records=(str(own),))) == [(own, own.parent)]
    elsewhere = DataConfig(records=(str(own),), images=str(tmp_path))
    assert resolve(elsewhere) == [(own, tmp_path)]


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
