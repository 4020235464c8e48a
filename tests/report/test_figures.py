"""What the figures draw, read from their axes."""

import pytest
from matplotlib.colors import to_hex

from report.studies import make_study
from tinyllava.report.figures import COLOURS, draw_bars, draw_losses, to_png, to_svg
from tinyllava.report.tables import study_table

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


def test_a_label_has_one_colour_in_all_panels() -> None:
    (axes,) = draw_bars(TABLE, "StableLM-2").axes
    assert {to_hex(bar.get_edgecolor()) for bar in axes.patches} == {COLOURS[1]}


def test_a_shared_stage_is_one_curve() -> None:
    pretrain, finetune = draw_losses(STUDY).axes
    assert [len(axes.lines) for axes in (pretrain, finetune)] == [7, 7]
    assert pretrain.get_title(loc="left") == "pretrain"


def test_figures_are_equal_when_drawn_again() -> None:
    assert to_svg(draw_bars(TABLE, "Phi-2")) == to_svg(draw_bars(TABLE, "Phi-2"))
    assert to_png(draw_losses(STUDY)) == to_png(draw_losses(STUDY))
