"""What the figures draw, read from their axes."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from studies.studies import make_study
from tinyllava.studies.report.figures import (
    COLOURS,
    WIDEST,
    draw_answers,
    draw_bars,
    draw_losses,
    to_png,
    to_svg,
)
from tinyllava.studies.report.tables import PAPER, Entry, Row, study_table
from tinyllava.studies.study import Example

STUDY, _ = make_study()
TABLE = study_table(STUDY)


def test_bars_marks_and_open_cells() -> None:
    (axes,) = draw_bars(TABLE, "Phi-2").axes
    filled = [bar for bar in axes.patches if bar.get_fill()]
    row = next(row for row in TABLE.rows if (row.panel, row.model, row.source) == ("Phi-2", "share", ""))
    heights = [bar.get_height() for bar in filled if to_hex(bar.get_facecolor()) == COLOURS[1]]
    assert heights == pytest.approx([entry.value for entry in row.entries if entry])
    assert len(filled) == 4  # two recipes on two benchmarks
    assert len(axes.patches) - len(filled) == 2 * 7  # an empty frame for every cell that was not measured
    marks = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert marks == pytest.approx([77.7, 61.0, 70.1, 53.5, 86.3, 31.7, 67.1, 1437.3 / 20, 68.3])
    assert len(axes.containers) >= 4
    assert axes.get_ylim()[0] == 0


def test_bars_that_would_be_too_wide_go_into_further_rows_and_a_mark_never_hides_an_error_bar() -> None:
    models = [f"model {i}" for i in range(12)]
    entries = tuple(Entry(value=50.0, interval=(48.0, 52.0)) for _ in TABLE.columns)
    rows = [
        Row(panel="all", model=model, entries=entries, source=source)
        for model in models
        for source in ("", PAPER)
    ]
    figure = draw_bars(replace(TABLE, rows=tuple(rows)), "all")
    assert figure.get_size_inches()[0] <= WIDEST
    assert [len(axes.get_xticks()) for axes in figure.axes] == [4, 4, 1]
    ticks = [text.get_text() for axes in figure.axes for text in axes.get_xticklabels()]
    assert [text.partition("\n")[0] for text in ticks] == [column.title for column in TABLE.columns]
    for axes in figure.axes:
        bars = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
        assert len(bars) == len(marks) == 12 * len(axes.get_xticks())
        assert all(mark - bar > 0.01 for bar, mark in zip(bars, marks, strict=True))


def test_a_label_has_one_colour_in_all_panels() -> None:
    (axes,) = draw_bars(TABLE, "StableLM-2").axes
    assert {to_hex(bar.get_edgecolor()) for bar in axes.patches} == {COLOURS[1]}


def test_losses_have_a_row_for_each_panel_in_the_colours_of_its_bars() -> None:
    figure = draw_losses(STUDY)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "TinyLlama: pretrain",
        "TinyLlama: finetune",
        "Phi-2: pretrain",
        "Phi-2: finetune",
    ]
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 4, 4]  # a line a seed; one failed
    for panel, axes in (("TinyLlama", figure.axes[1]), ("Phi-2", figure.axes[3])):
        (bars,) = draw_bars(TABLE, panel).axes
        of_bars = {to_hex(bar.get_facecolor()) for bar in bars.patches if bar.get_fill()}
        assert {to_hex(line.get_color()) for line in axes.lines} == of_bars
    assert figure.axes[0].get_ylim() == figure.axes[2].get_ylim() != figure.axes[1].get_ylim()


def test_a_shared_stage_is_one_grey_curve_and_stages_stand_in_their_order() -> None:
    shared = replace(STUDY.cells[0].stages[0], key="once")
    own = STUDY.cells[0].stages[1]
    cells = [
        replace(STUDY.cells[0], stages=(shared, own)),
        replace(STUDY.cells[2], stages=(shared, replace(own, name="share_pretrain", key="x"), own)),
    ]
    figure = draw_losses(replace(STUDY, cells=tuple(cells), panels=("TinyLlama",)))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["pretrain", "share_pretrain", "finetune"]
    (line,) = figure.axes[0].lines
    assert (line.get_label(), to_hex(line.get_color())) == ("shared by 2 models", "#6b7280")


def test_a_missing_stage_leaves_its_place_open() -> None:
    only = [replace(cell, stages=cell.stages[:1]) if cell.panel == "Phi-2" else cell for cell in STUDY.cells]
    figure = draw_losses(replace(STUDY, cells=tuple(only)))
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]


def test_figures_are_equal_when_drawn_again() -> None:
    assert to_svg(draw_bars(TABLE, "Phi-2")) == to_svg(draw_bars(TABLE, "Phi-2"))
    assert to_png(draw_losses(STUDY)) == to_png(draw_losses(STUDY))


def test_control_characters_of_an_answer_leave_the_figure_well_formed(tmp_path: Path) -> None:
    Image.new("RGB", (40, 60)).save(tmp_path / "a.jpg")
    one = Example(
        benchmark="pope",
        question_id="1",
        category="",
        image="a.jpg",
        prompt="What?",
        truth="yes",
        answers={"a": "ye\x16s", "b": "no\x00"},
        scores={"a": 0.0, "b": 0.0},
    )
    svg = to_svg(draw_answers([one], tmp_path, {"a": "A", "b": "B"}))
    assert "ye\ufffds" in "".join(ElementTree.fromstring(svg).itertext())


def test_long_answers_lie_below_one_another_and_within_the_figure(tmp_path: Path) -> None:
    Image.new("RGB", (40, 60)).save(tmp_path / "tall.jpg")
    one = Example(
        benchmark="pope",
        question_id="1",
        category="",
        image="tall.jpg",
        prompt="What?",
        truth="much",
        answers={"a": "many words of an answer " * 9, "b": "more words of an answer " * 9},
        scores={"a": 1.0, "b": 0.0},
    )
    figure = draw_answers([one, one, one, one], tmp_path, {"a": "A", "b": "B"})
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert all(low.y1 <= high.y0 + 1 for high, low in pairwise(boxes))
        assert all(box.y0 >= 0 for box in boxes)
    assert sum(len(axes.texts) for axes in figure.axes) == 12  # two answers and the truth, four times


def test_the_legend_of_losses_covers_no_curve() -> None:
    figure = draw_losses(STUDY)
    figure.draw_without_rendering()
    legends = 0
    for axes in figure.axes:
        legend = axes.get_legend()
        if legend is not None:
            legends += 1
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert legends
