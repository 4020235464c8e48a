"""What a benchmark needs on disk, told present, missing or doubtful; and what listing the names costs."""

import base64
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import benchmark_files as files
from tinyllava.evaluation.benchmark import hash_questions
from tinyllava.evaluation.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from tinyllava.evaluation.read import NeededFile, check_files, find_files

WRITERS = {
    "gqa": files.gqa,
    "scienceqa": files.scienceqa,
    "textvqa": files.textvqa,
    "mme": files.mme,
    "mmbench": files.mmbench,
    "mmvet": files.mmvet,
    "llava-w": files.llava_w,
    "pope": files.pope,
    "vqav2": files.vqav2_test,
    "vqav2-val": files.vqav2_val,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_files_that_load_reads_are_the_files_that_are_asked_for(name: str, tmp_path: Path) -> None:
    before = check_files(tmp_path, BENCHMARKS[name].files)
    assert before
    assert not any(status.is_present for status in before)
    WRITERS[name](tmp_path)
    BENCHMARKS[name].load(tmp_path)
    present = [status for status in check_files(tmp_path, BENCHMARKS[name].files) if status.is_present]
    assert present
    missing = {status.needed.purpose for status in check_files(tmp_path, BENCHMARKS[name].files)} - {
        status.needed.purpose for status in present
    }
    assert all("image" in purpose or "prompts" in purpose for purpose in missing)


def test_another_release_in_the_folder_brings_its_own_images(tmp_path: Path) -> None:
    """Releases of MMBench number other questions alike, and the images stand below these numbers."""
    (first, *_) = BENCHMARKS["mmbench"].load(files.mmbench_new_table(tmp_path))
    (image,) = first.conversation.images
    before = image.path.read_bytes()
    rows = files.mmbench_rows()
    for row in rows:
        row["image"] = base64.b64encode(files.png(7)).decode()
    (tmp_path / "MMBench_DEV_EN.tsv").rename(tmp_path / "old.tsv")
    files.write_table(tmp_path / "MMBench_DEV_EN_V11.tsv", rows)
    (again, *_) = BENCHMARKS["mmbench"].load(tmp_path)
    assert again.conversation.images == (image,)
    assert image.path.read_bytes() == files.png(7) != before


def test_an_image_that_cannot_be_written_leaves_nothing_half(tmp_path: Path) -> None:
    (first, *_) = BENCHMARKS["mmbench"].load(files.mmbench_new_table(tmp_path))
    (image,) = first.conversation.images
    image.path.unlink()
    image.path.mkdir()  # its place is taken
    before = sorted(image.path.parent.iterdir())
    with pytest.raises(IsADirectoryError):
        BENCHMARKS["mmbench"].load(tmp_path)
    assert sorted(image.path.parent.iterdir()) == before


def test_line_ends_of_windows_change_no_prompt(tmp_path: Path) -> None:
    before = BENCHMARKS["mmbench"].load(files.mmbench(tmp_path))
    (table,) = tmp_path.glob("*.tsv")
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n"))
    assert hash_questions(BENCHMARKS["mmbench"].load(tmp_path)) == hash_questions(before)


def test_an_incomplete_folder_is_doubtful(tmp_path: Path) -> None:
    needed = NeededFile(names=("images",), purpose="images", source="there", num_files=2)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").touch()
    status = find_files(tmp_path, needed)
    assert not status.is_present
    assert str(status).startswith("doubtful (1 of 2 files): images: images; from there")
    (tmp_path / "images" / "2.jpg").touch()
    assert find_files(tmp_path, needed).is_present
    mirror = NeededFile(names=("photos", "*.parquet"), purpose="images", source="there", num_files=2)
    (tmp_path / "test-00000-of-00001.parquet").touch()
    assert find_files(tmp_path, mirror).is_present  # one shard may hold all images


def test_a_known_release_is_told_by_its_md5(tmp_path: Path) -> None:
    files.mmbench(tmp_path)
    (status,) = check_files(tmp_path, BENCHMARKS["mmbench"].files)
    md5 = hashlib.md5((tmp_path / "mmbench_dev_20230712.tsv").read_bytes()).hexdigest()
    assert status.release == f"unknown release, md5 {md5}"
    known = NeededFile(names=("*.tsv",), purpose="p", source="s", known_md5={md5: "V1"})
    assert find_files(tmp_path, known).release == f"V1, md5 {md5}"


def test_every_benchmark_says_what_it_needs() -> None:
    assert len(PAPER_BENCHMARKS) == 9
    for benchmark in PAPER_BENCHMARKS.values():
        assert benchmark.files
        assert all(needed.source and needed.purpose for needed in benchmark.files)


def test_listing_the_names_imports_no_torch() -> None:
    script = (
        "import sys\nfrom tinyllava.evaluation.benchmarks import BENCHMARKS\n"
        "import tinyllava.studies.report.flips\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'openpyxl', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert 'pope' in BENCHMARKS\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
