"""The pages in a browser: no console error, every image loads, nothing sticks out or is fetched."""

from pathlib import Path

import pytest

from evaluation import benchmark_files as files
from studies.report.chromium import open_page
from studies.studies import FOLDER, MEASURED
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.compare import compare_predictions
from tinyllava.studies.report.flips import write_flips

PHONE, DESKTOP = 390, 1280


@pytest.mark.parametrize("width_px", [PHONE, DESKTOP])
def test_the_report_of_a_study(width_px: int, tmp_path: Path) -> None:
    seen = open_page(FOLDER / "report.html", tmp_path, width_px)
    assert seen.console == []
    assert len(seen.images) == 8  # three panels, losses, POPE, three examples
    assert min(seen.images) > 0
    assert (seen.width, seen.overflow) == (width_px, 0)
    assert seen.fetched == []


@pytest.mark.parametrize("width_px", [PHONE, DESKTOP])
def test_the_report_of_the_starters_grid(width_px: int, tmp_path: Path) -> None:
    seen = open_page(MEASURED / "report.html", tmp_path, width_px)
    assert seen.console == []
    assert len(seen.images) == 17  # four panels, losses, twelve examples
    assert min(seen.images) > 0
    assert (seen.width, seen.overflow) == (width_px, 0)
    assert seen.fetched == []


def test_the_page_of_flips(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["pope"]
    questions = benchmark.load(files.pope_parquet(tmp_path))
    a, b = (benchmark.score(questions, {q.id: text for q in questions}).predictions for text in ("yes", "no"))
    page = tmp_path / "flips.html"
    comparison = compare_predictions(a, b, benchmark, num_resamples=50)
    write_flips([comparison], page, a="base-C-TL", b="share-Sig-Phi", questions={"pope": questions})
    seen = open_page(page, tmp_path, PHONE)
    assert seen.console == []
    assert len(seen.images) == 11
    assert min(seen.images) > 0
    assert seen.overflow == 0


def test_what_is_wrong_with_a_page_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text(
        '<!doctype html><link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">'
        '<img src="data:image/png;base64,AAAA"><p style="width: 3000px">wide</p>'
        '<script>console.error("a word for the console")</script>'
    )
    seen = open_page(page, tmp_path, PHONE)
    assert "a word for the console" in seen.console[0]
    assert seen.images == [0]
    assert seen.overflow > 2000
