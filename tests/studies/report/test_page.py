"""The report of a study: the same bytes again, nothing fetched, what users wrote escaped."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from studies.studies import FOLDER, MEASURED, make_study, write_study
from tinyllava.errors import DataError
from tinyllava.studies.report.page import write_report
from tinyllava.studies.study import pack_predictions, save_scores, save_study


@pytest.mark.parametrize("folder", [FOLDER, MEASURED], ids=["toy answers", "the starter's grid"])
def test_the_report_of_a_committed_folder_is_written_again_byte_for_byte(
    tmp_path: Path, folder: Path
) -> None:
    """In another process with other hash seeds, from the study's own files alone."""
    for name in ("study.json", "scores.json", "examples.json"):
        shutil.copy(folder / name, tmp_path / name)
    shutil.copytree(folder / "images", tmp_path / "images")
    code = (
        "import pathlib; from tinyllava.studies.report.page import write_report; "
        "write_report(pathlib.Path.cwd())"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    same = "python tests/studies/studies.py writes the committed reports anew, if the change is meant"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), f"{path.name}: {same}"


PAGE = (FOLDER / "report.html").read_text(encoding="utf-8")


def test_the_page_says_what_there_is() -> None:
    assert "<title>Training recipes on toy answers</title>" in PAGE
    assert "7 of 9" in PAGE
    assert "loss is not a number &lt;at step 41&gt;" in PAGE
    assert not re.search(r'(src|href)="(?!data:|#)', PAGE)
    assert "<script" not in PAGE
    assert PAGE.count('<img src="data:image/') == 8
    HTMLParser().feed(PAGE)


def test_the_time_counts_a_shared_stage_once(tmp_path: Path) -> None:
    study, _ = make_study()
    shared = replace(study.cells[0].stages[0], key="shared", seconds=100.0)
    cells = [replace(c, stages=(shared,) if c.stages else ()) for c in study.cells]
    save_study(replace(study, cells=tuple(cells)), tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<dt>total training time</dt><dd>1 min 40 s</dd>" in page


def test_a_study_of_which_nothing_was_run_has_a_report(tmp_path: Path) -> None:
    study, _ = make_study()
    cells = [replace(c, status="missing", results=(), stages=(), error="") for c in study.cells]
    save_study(replace(study, cells=tuple(cells)), tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "0 of 9" in page
    assert "Not measured: 19." in page
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"bars-{n}.{kind}" for n in (1, 2, 3) for kind in ("svg", "png")
    }


def test_models_that_answer_alike_have_a_report(tmp_path: Path) -> None:
    """A benchmark that all get right alike: no draw differs, so neither an interval nor a p can be given."""
    write_study(tmp_path)
    _, answers = make_study()
    alike = {cell: [replace(one, score=1.0) for one in given] for cell, given in answers["gqa"].items()}
    save_scores({"gqa": pack_predictions(alike)}, tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "no interval: the same on 20 of 20 images" in page
    assert '<td class="number">none</td>' in page


def test_figure_1_has_a_radar(tmp_path: Path) -> None:
    study, _ = make_study()
    save_study(replace(study, paper="Figure 1"), tmp_path)
    write_report(tmp_path)
    svg = (tmp_path / "figures" / "radar.svg").read_text(encoding="utf-8")
    assert "LLaVA-1.5, 7B, 336 px, the paper" in svg


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    write_study(tmp_path)
    (tmp_path / "images" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"image 'images/1\.jpg' of question '0011' is not in the folder"):
        write_report(tmp_path)
