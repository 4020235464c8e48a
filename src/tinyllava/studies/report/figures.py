"""The figures of a study in the paper's form: grouped bars, radar, answered images, loss curves.

Paper: Figures 4 to 8 (bars), Figure 1 (radar), Figure 9 (answered images of two models). Differs: bars have
error bars, published values are hollow marks next to them, and a cell without a measurement is an empty
frame.
"""

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllava.errors import require
from tinyllava.studies.report.tables import PAPER, Column, Entry, Row, Table
from tinyllava.studies.study import Example, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (
    "#2f6f9f",
    "#d98032",
    "#5b9660",
    "#a2548b",
    "#8a7a3d",
    "#5f6b7a",
    "#3aa6a0",
    "#b3423b",
    "#6a5acd",
    "#9aa63a",
    "#c77fb0",
    "#7a4a2b",
)
WIDEST = 12.5
"""Inches; benchmarks that would make bars wider go into a further row."""
FULL_SCORE = {"mme": 2000.0}
"""Benchmarks that are not out of 100; a bar shows the share in percent."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tinyllava",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator["Figure"]:
    """Give a figure of this size in inches, drawn in the style of all figures."""
    require("matplotlib", "report", "draws the figures")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def draw_bars(table: Table, panel: str) -> "Figure":
    """Draw one panel: for each benchmark a bar of each model, its 95% interval and its published value."""
    measured = [row for row in table.rows if row.panel == panel and not row.source]
    colours = _colours(table)
    printed = {row.model: row for row in table.rows if row.panel == panel and row.source == PAPER}
    width = 0.8 / max(1, len(measured))
    inches = (0.3 if len(measured) < 7 else 0.2) * (len(measured) + 1)
    in_a_row = max(1, min(len(table.columns), int((WIDEST - 1.4) / inches)))
    num_rows = -(-len(table.columns) // in_a_row)
    with new_figure(max(4.2, 1.4 + inches * in_a_row), 0.9 + 2.2 * num_rows) as figure:
        rows = figure.subplots(num_rows, 1, squeeze=False)[:, 0]
        for i, axes in enumerate(rows):
            shown = range(i * in_a_row, min((i + 1) * in_a_row, len(table.columns)))
            for number, row in enumerate(measured):
                places = {k: k + (number - (len(measured) - 1) / 2) * width for k in shown}
                _draw_row(axes, row, printed.get(row.model), table, places, width, colours[row.model])
            axes.set_xticks(shown, [_heading(one) for one in table.columns[shown[0] : shown[-1] + 1]])
            axes.tick_params(axis="x", length=0, labelsize=9)
            axes.set_xlim(shown[0] - 0.55, shown[0] + in_a_row - 0.45)
            axes.set_ylim(0, 101)
            axes.set_ylabel("score, percent")
            axes.grid(axis="y", color="#e5e7eb")
        rows[0].set_title(panel, loc="left")
        _add_legend(rows[-1], measured, colours, bool(printed))
    return figure


def _heading(column: Column) -> str:
    full = FULL_SCORE.get(column.benchmark)
    return f"{column.title}\n/ {full / 100:.0f}" if full else column.title


def _share(value: float, benchmark: str) -> float:
    return 100 * value / FULL_SCORE.get(benchmark, 100.0)


def _draw_row(
    axes: Any,
    row: Row,
    printed: Row | None,
    table: Table,
    places: Mapping[int, float],
    width: float,
    colour: str,
) -> None:
    for i, place in places.items():
        column, entry = table.columns[i], row.entries[i]
        published = printed.entries[i] if printed else None
        if entry is not None:
            value = _share(entry.value, column.benchmark)
            axes.bar(place, value, width * 0.92, color=colour, alpha=0.55 if entry.is_partial else 1)
            _draw_error(axes, entry, column.benchmark, place)
        else:
            height = _share(published.value, column.benchmark) if published else 100
            axes.bar(
                place,
                height,
                width * 0.82,
                fill=False,
                edgecolor=colour,
                linestyle=(0, (2, 2)),
                linewidth=0.9,
            )
            if not published:
                axes.text(
                    place, 50, "not measured", rotation=90, ha="center", va="center", fontsize=7, color=colour
                )
        if published:
            beside = place + (0.28 * width if entry else 0)  # of the error bar, which it would hide
            axes.plot(
                beside,
                _share(published.value, column.benchmark),
                "D",
                markersize=4,
                markerfacecolor="white",
                markeredgecolor="#111827",
                markeredgewidth=0.9,
                zorder=4,
            )


def _draw_error(axes: Any, entry: Entry, benchmark: str, place: float) -> None:
    if entry.interval is None:
        return
    value, low, high = (_share(one, benchmark) for one in (entry.value, *entry.interval))
    axes.errorbar(
        place,
        value,
        [[max(0.0, value - low)], [max(0.0, high - value)]],
        color="#111827",
        capsize=2,
        linewidth=1,
        zorder=5,
    )


def _colours(table: Table) -> dict[str, str]:
    """Return a colour for each label, the same in all panels."""
    labels = dict.fromkeys(row.model for row in table.rows if not row.source)
    return {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}


def _add_legend(axes: Any, measured: Sequence[Row], colours: Mapping[str, str], has_published: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Any] = [Patch(color=colours[row.model], label=row.model) for row in measured]
    if has_published:
        hollow: Any = {"markerfacecolor": "white", "markeredgecolor": "#111827", "linestyle": "none"}
        marks.append(Line2D([], [], marker="D", markersize=5, label="published", **hollow))
    if any(entry is None for row in measured for entry in row.entries):
        marks.append(Patch(fill=False, edgecolor="#6b7280", linestyle=":", label="not measured"))
    axes.legend(
        handles=marks,
        ncols=min(5, len(marks)),
        loc="upper left",
        bbox_to_anchor=(0, -0.16),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.2,
    )


def draw_radar(table: Table, rows: Sequence[Row]) -> "Figure":
    """Draw models over the benchmarks that all have, each axis scaled to its best (Figure 1)."""
    shared = [i for i in range(len(table.columns)) if all(row.entries[i] for row in rows)]
    angles = [2 * math.pi * k / max(1, len(shared)) for k in range(len(shared))]
    with new_figure(6, 4.6) as figure:
        axes = figure.add_subplot(projection="polar")
        for number, row in enumerate(rows):
            values = [entry.value for entry in (row.entries[i] for i in shared) if entry]
            tops = [max(other.entries[i].value for other in rows) for i in shared]  # type: ignore[union-attr]
            reach = [value / top for value, top in zip(values, tops, strict=True)]
            name = f"{row.model}, {row.source}" if row.source else row.model
            line = "--" if row.source else "-"
            axes.plot(
                [*angles, *angles[:1]],
                [*reach, *reach[:1]],
                line,
                color=COLOURS[number % len(COLOURS)],
                label=name,
            )
            axes.fill(angles, reach, color=COLOURS[number % len(COLOURS)], alpha=0.08)
        axes.set_xticks(angles, [""] * len(angles))
        for angle, i in zip(angles, shared, strict=True):
            side = round(math.cos(angle), 1)
            where: Any = "left" if side > 0 else "right" if side < 0 else "center"
            axes.text(angle, 1.1, _radar_label(table, rows, i), ha=where, va="center", fontsize=8)
        axes.set_ylim(0, 1.02)
        axes.set_yticks([0.25, 0.5, 0.75, 1], [])
        axes.grid(color="#d1d5db")
        axes.spines["polar"].set_color("#d1d5db")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, ncols=1, fontsize=9)
    return figure


def _radar_label(table: Table, rows: Sequence[Row], i: int) -> str:
    return (
        table.columns[i].title
        + "\n"
        + " / ".join(f"{entry.value:.1f}" for row in rows if (entry := row.entries[i]))
    )


def draw_losses(study: Study) -> "Figure":
    """Draw the loss of the stages: a row for each panel, in the colours of its bars, a column for each stage.

    Stages of one name have one scale in all panels; what models of a panel share is drawn once, in grey.
    """
    labels = list(dict.fromkeys(cell.label for cell in study.cells))
    rows = [(panel, _curves(study, panel)) for panel in study.panels]
    rows = [(panel, stages) for panel, stages in rows if stages]
    num_columns = max((len(stages) for _, stages in rows), default=1)
    tops: dict[str, float] = {}
    with new_figure(4.2 * num_columns, 0.4 + 2.9 * max(1, len(rows))) as figure:
        grid = figure.subplots(max(1, len(rows)), num_columns, squeeze=False)
        for (panel, stages), places in zip(rows, grid, strict=False):
            for name, axes in zip_longest(stages, places):
                if name is None:
                    axes.set_axis_off()
                    continue
                tops[name] = max(tops.get(name, 0.0), _draw_stage(axes, stages[name], labels))
                axes.set_title(f"{panel}: {name}" if len(study.panels) > 1 else name, loc="left", fontsize=10)
        for (_, stages), places in zip(rows, grid, strict=False):
            for name, axes in zip(stages, places, strict=False):
                axes.set_ylim(0, min(tops[name] * 1.05, 10) or 1)
    return figure


Curves = dict[str, tuple[list[str], tuple[tuple[int, float], ...]]]
"""Key of a stage -> labels of the models that it stands behind, its (step, loss)."""


def _curves(study: Study, panel: str) -> dict[str, Curves]:
    """Return the curves of a panel by stage, in the order in which its longest run has them."""
    cells = [cell for cell in study.cells if cell.panel == panel]
    longest_first = sorted(cells, key=lambda cell: -len(cell.stages))
    names = [stage.name for cell in longest_first for stage in cell.stages if stage.losses]
    found: dict[str, Curves] = {name: {} for name in names}
    for cell in cells:
        for stage in cell.stages:
            if stage.losses:
                users, _ = found[stage.name].setdefault(stage.key, ([], stage.losses))
                users += [cell.label] if cell.label not in users else []
    return found


def _draw_stage(axes: Any, curves: Curves, labels: Sequence[str]) -> float:
    """Draw the curves of one stage and return the highest point."""
    top = 0.0
    for users, points in curves.values():
        steps, losses = zip(*points, strict=True)
        smooth = _running_mean(losses, max(1, len(losses) // 20))
        top = max(top, *smooth)
        is_one = len(users) == 1
        colour = COLOURS[labels.index(users[0]) % len(COLOURS)] if is_one else "#6b7280"
        text = users[0] if is_one else f"shared by {len(users)} models"
        axes.plot(steps, smooth, color=colour, linewidth=1, alpha=0.85, label=text)
    handles, texts = axes.get_legend_handles_labels()
    once = dict(zip(texts, handles, strict=True))
    axes.legend(
        once.values(),
        once.keys(),
        loc="upper left",
        bbox_to_anchor=(0, -0.22),  # below the axes: inside it would cover curves
        frameon=False,
        fontsize=8,
        ncols=2,
    )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(color="#e5e7eb")
    return top


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw_answers(
    examples: Sequence[Example], folder: Path, names: Mapping[str, str], columns: int = 3
) -> "Figure":
    """Draw images with the answers of two cells (id -> name) below, as in Figure 9."""
    from PIL import Image

    shown = [one for one in examples if one.image and all(cell in one.answers for cell in names)]
    num_rows = -(-len(shown) // columns)
    heights = [2.9, 1.2] * max(1, num_rows)  # a row of images, and the text below it
    with new_figure(columns * 2.9, sum(heights)) as figure:
        grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, below, one in zip(grid[::2].flat, grid[1::2].flat, shown, strict=False):
            axes.set_anchor("S")
            with Image.open(folder / one.image) as image:
                axes.imshow(image.convert("RGB"))
            axes.set_title(
                "\n".join(textwrap.wrap(one.prompt.partition("\n")[0], 40)), fontsize=9, loc="left"
            )
            _write_answers(below, one, names)
    return figure


def _write_answers(axes: Any, example: Example, names: Mapping[str, str]) -> None:
    """Write the answers and the truth below an image, each below the last line of the one before."""
    lines = 0
    said = [
        (f"{name}: {example.answers[cell] or '(nothing)'}", (example.scores.get(cell) or 0) >= 0.5)
        for cell, name in names.items()
    ]
    for text, is_right in [*said, (f"truth: {example.truth}", None)]:
        wrapped = textwrap.wrap(printable(text), 44, max_lines=3, placeholder=" ...")
        axes.annotate(
            "\n".join(wrapped),
            (0, 1),
            (0, -10.5 * lines),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=8,
            annotation_clip=False,
            in_layout=False,
            color="#111827" if is_right is None else "#1d6b34" if is_right else "#b3261e",
        )
        lines += len(wrapped)


def printable(text: str) -> str:
    """Return a model's answer with a mark for control characters, which XML forbids."""
    return "".join(mark if mark.isprintable() or mark in "\n\t" else "\ufffd" for mark in text)


def to_svg(figure: "Figure") -> str:
    """Return the figure as SVG text, equal for equal content."""
    return _save(figure, "svg", metadata={"Date": None, "Creator": None}).decode()


def to_png(figure: "Figure") -> bytes:
    """Return the figure as PNG at 160 dots per inch."""
    return _save(figure, "png", dpi=160, metadata={"Software": None})


def _save(figure: "Figure", kind: str, **options: Any) -> bytes:
    from matplotlib import rc_context

    with rc_context(_STYLE):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, **options)
    return stream.getvalue()
