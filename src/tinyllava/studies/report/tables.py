"""The table of a study, measured next to published numbers, as Markdown, LaTeX and CSV.

Paper: Tables 3 and A1. Measured and published rows are of two types, and only measured ones can be the best
of a column. A cell without a measurement stays visibly empty.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from tinyllava.evaluation.benchmarks import known_benchmarks
from tinyllava.evaluation.results import Metric
from tinyllava.studies.published import other_name, published_scores, published_table
from tinyllava.studies.study import Study, StudyCell

OPEN = "not measured"
PAPER = "the paper"
"""Source of a row that the paper prints."""
CSV_COLUMNS = (
    "panel",
    "model",
    "source",
    "benchmark",
    "metric",
    "value",
    "low",
    "high",
    "seed_standard_deviation",
    "num_seeds",
    "num_questions",
)
_OTHERS = {
    "Figure 1": ("LLaVA-1.5",),
    "Table 3": ("I-9B", "InstructBLIP", "LLaVA-1.5", "Qwen-VL", "MoE-LLaVA", "LLaVA-Phi", "MobileVLM"),
}
_LATEX = {mark: "\\" + mark for mark in "&%#_${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
}
"""Marks that LaTeX reads as commands -> how they are written."""
_STEMS = ("kind=", "capability=", "category=", "level=")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric of one benchmark."""

    benchmark: str
    metric: str
    """"" for the headline."""
    title: str
    num_questions: int = 0
    """Questions behind each measured number; 0 where nothing was measured."""

    @property
    def head(self) -> str:
        """The title with the number of questions."""
        return f"{self.title} (n = {self.num_questions:,})" if self.num_questions else self.title


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The content of one cell of the table."""

    value: float
    interval: tuple[float, float] | None = None
    """95%, over questions; the mean of the seeds' intervals, because they share the questions."""
    spread: float | None = None
    """Standard deviation between the seeds; None below two of them."""
    num_seeds: int = 1
    is_best: bool = False
    is_partial: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model, measured here (``source`` is "") or published (``source`` says where)."""

    panel: str
    model: str
    entries: tuple[Entry | None, ...]
    source: str = ""
    status: str = "done"
    """``failed`` or ``missing`` where no seed of the model is done."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows in the order of the study, with published numbers of the same model below each measured row."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def study_table(study: Study) -> Table:
    """Lay out a study, seeds of a model together.

    Raises:
        DataError: a column would mix protocols, data sets or judges.
    """
    columns = _columns(study)
    rows: list[Row] = []
    for cells in models_of(study):
        first = cells[0]
        done = [cell for cell in cells if cell.results]
        status = "done" if done else first.status
        entries = tuple(_measured(done, column) for column in columns)
        rows.append(Row(panel=first.panel, model=first.label, entries=entries, status=status))
        for source in (PAPER, "factory"):
            rows += _published_row(first, source, columns)
    rows += _others(study.paper, columns)
    return Table(title=study.title, columns=columns, rows=_mark_best(rows, len(columns)))


def _others(paper: str, columns: Sequence[Column]) -> list[Row]:
    """Return the rows of other groups' models, for tables in which the paper compares with them."""
    printed = published_table("table-3")
    return [
        Row(
            panel="Other models, published",
            model=other_name(row),
            entries=tuple(
                Entry(value=score.value) if score else None
                for score in (printed.score(row, column.benchmark) for column in columns)
            ),
            source=PAPER,
        )
        for row in printed.rows
        if row[0] in _OTHERS.get(paper, ())
    ]


def models_of(study: Study) -> list[list[StudyCell]]:
    """Return the cells of each model of each panel: its seeds."""
    groups: dict[tuple[str, str], list[StudyCell]] = {}
    for cell in sorted(study.cells, key=lambda cell: study.panels.index(cell.panel)):
        groups.setdefault((cell.panel, cell.label), []).append(cell)
    return list(groups.values())


def _columns(study: Study) -> tuple[Column, ...]:
    """Return a column for each benchmark, measured or to be measured; of a single one also its kinds."""
    first = {result.benchmark: result for cell in reversed(study.cells) for result in cell.results}
    wanted = study.benchmarks or [n for cell in study.cells for n in published_scores(cell.published)]
    known = known_benchmarks()
    columns = [
        Column(
            benchmark=name,
            metric="",
            title=known[name].title if name in known else name,
            num_questions=first[name].num_questions if name in first else 0,
        )
        for name in dict.fromkeys([*known, *first])
        if name in {*first, *wanted}
    ]
    if len(columns) == 1 and first:
        (result,) = first.values()
        columns += [
            Column(
                benchmark=result.benchmark,
                metric=metric.name,
                title=metric.name.partition("=")[2].replace("_", " "),
                num_questions=metric.num_questions,
            )
            for metric in result.metrics
            if metric.name.startswith(_STEMS)
        ]
    return tuple(columns)


def _measured(cells: Sequence[StudyCell], column: Column) -> Entry | None:
    results = [r for cell in cells for r in cell.results if r.benchmark == column.benchmark and r.metrics]
    if not results:
        return None
    metrics = [result.metric_named(column.metric or result.metric) for result in results]
    values = [metric.value for metric in metrics]
    return Entry(
        value=fmean(values),
        interval=_mean_interval(metrics),
        spread=stdev(values) if len(values) > 1 else None,
        num_seeds=len(values),
        is_partial=any(result.is_partial for result in results),
    )


def _mean_interval(metrics: Sequence[Metric]) -> tuple[float, float] | None:
    known = [metric.interval for metric in metrics if metric.interval]
    if len(known) < len(metrics):
        return None
    return fmean(low for low, _ in known), fmean(high for _, high in known)


def _published_row(cell: StudyCell, source: str, columns: Sequence[Column]) -> list[Row]:
    if source == "factory":
        scores, name = published_table("factory").scores(cell.published), "TinyLLaVA Factory"
    else:
        scores, name = published_scores(cell.published), PAPER
    found = [scores.get(column.benchmark) if not column.metric else None for column in columns]
    if not any(found):
        return []
    entries = tuple(Entry(value=score.value) if score else None for score in found)
    return [Row(panel=cell.panel, model=cell.label, entries=entries, source=name)]


def _mark_best(rows: Sequence[Row], num_columns: int) -> tuple[Row, ...]:
    """Mark the best measured value of each column; equal as printed is equally good."""
    measured = [row.entries for row in rows if not row.source]
    best = [
        max((round(entries[i].value, 1) for entries in measured if entries[i]), default=None)  # type: ignore[union-attr]
        for i in range(num_columns)
    ]
    return tuple(
        replace(
            row,
            entries=tuple(
                replace(entry, is_best=not row.source and round(entry.value, 1) == top) if entry else None
                for entry, top in zip(row.entries, best, strict=True)
            ),
        )
        for row in rows
    )


def to_markdown(table: Table) -> str:
    """Return the table as Markdown; published rows in italics, open cells as ``not measured``."""
    head = ["model", *(column.head for column in table.columns)]
    lines = [_pipe(head), _pipe(["---", *["---:"] * len(table.columns)])]
    panel = ""
    for row in table.rows:
        if row.panel != panel:
            panel = row.panel
            lines.append(_pipe([f"**{panel}**", *[""] * len(table.columns)]))
        cells = [_spell(entry, row, bold="**{}**", italics="*{}*") for entry in row.entries]
        lines.append(_pipe([row.model if not row.source else f"*{row.model}, {row.source}*", *cells]))
    return "\n".join(lines) + "\n"


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def to_latex(table: Table) -> str:
    """Return a ``tabular`` in the style of the ``booktabs`` package."""
    head = ["Model", *(column.head for column in table.columns)]
    lines = [
        r"\begin{tabular}{l" + "r" * len(table.columns) + "}",
        r"\toprule",
        " & ".join(map(_escape, head)) + r" \\",
    ]
    panel = ""
    for row in table.rows:
        if row.panel != panel:
            panel = row.panel
            lines += [r"\midrule", rf"\multicolumn{{{len(head)}}}{{l}}{{{_escape(panel)}}} \\"]
        name = _escape(row.model if not row.source else f"{row.model}, {row.source}")
        cells = [
            _spell(entry, row, bold=r"\textbf{{{}}}", italics=r"\textit{{{}}}", plus_minus=r"$\pm$")
            for entry in row.entries
        ]
        name = rf"\textit{{{name}}}" if row.source else name
        lines.append(" & ".join([name, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)


def _spell(entry: Entry | None, row: Row, *, bold: str, italics: str, plus_minus: str = "±") -> str:
    if entry is None:
        return "" if row.source else OPEN
    text = f"{entry.value:.1f}"
    if entry.spread is not None:
        text += f" {plus_minus} {entry.spread:.1f}"
    if entry.is_best:
        text = bold.format(text)
    if entry.interval:
        text += f" [{entry.interval[0]:.1f}, {entry.interval[1]:.1f}]"
    return italics.format(text) if row.source else text


def to_csv(table: Table) -> str:
    """Return one line a number, in ``CSV_COLUMNS``; no number of seeds for published ones."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in table.rows:
        for column, entry in zip(table.columns, row.entries, strict=True):
            if entry is None and row.source:
                continue
            where = [row.panel, row.model, row.source or "measured", column.benchmark, column.metric]
            numbers = _numbers(entry)
            counts = [entry.num_seeds, column.num_questions] if entry else [0, 0]
            writer.writerow([*where, *numbers, *(["", ""] if row.source else map(str, counts))])
    return text.getvalue()


def _numbers(entry: Entry | None) -> list[str]:
    if entry is None:
        return [""] * 4
    values = [entry.value, *(entry.interval or (None, None)), entry.spread]
    return ["" if value is None else f"{value:.4f}" for value in values]
