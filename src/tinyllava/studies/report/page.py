"""The report of a grid: one HTML page from a study's folder, and its tables and figures as files.

Paper: Figures 1 and 4 to 9, Tables 3 and A1, drawn from measured numbers. The page needs no other file and no
network. The same folder gives the same bytes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from tinyllava.errors import DataError
from tinyllava.evaluation.benchmarks import known_benchmarks
from tinyllava.evaluation.compare import RIGHT
from tinyllava.files import data_url, page_environment, write_text
from tinyllava.studies.report.analysis import CellAnatomy, Verdict, dissect_study, draw_anatomy, judge_claims
from tinyllava.studies.report.figures import (
    draw_answers,
    draw_bars,
    draw_losses,
    draw_radar,
    printable,
    to_png,
    to_svg,
)
from tinyllava.studies.report.tables import (
    PAPER,
    Row,
    Table,
    models_of,
    study_table,
    to_csv,
    to_latex,
    to_markdown,
)
from tinyllava.studies.study import Claim, Example, Study, load_examples, load_scores, load_study

WORDS = {"holds": "holds", "reversed": "reversed", "open": "inconclusive", "not measured": "not measured"}
"""What the page says for each outcome of a verdict."""


class EmbeddedImage(NamedTuple):
    """A figure as the page shows it; sizes in CSS pixels."""

    source: str
    alt: str
    width: int
    height: int


def write_report(folder: Path) -> Path:
    """Write ``report.html``, ``tables/`` and ``figures/`` into a study's folder; return the page.

    Raises:
        DataError: the study cannot be read, or an image of an example is missing.
    """
    study, scores, examples = load_study(folder), load_scores(folder), load_examples(folder)
    table = study_table(study)
    verdicts, anatomy = judge_claims(study, scores), dissect_study(study, scores)
    shown = [_show(one, study, folder) for one in examples]
    figures = _draw_all(study, table, anatomy, examples, folder)
    page = (
        _environment()
        .get_template("page.jinja")
        .render(
            study=study,
            table=table,
            verdicts=_by_claim(verdicts),
            anatomy=anatomy,
            examples=shown,
            bars=[figures[name] for name in figures if name.startswith(("bars", "radar"))],
            anatomy_figure=figures.get("pope"),
            curves=figures.get("losses"),
            **_facts(study, table, verdicts, anatomy, examples),
        )
    )
    _write_tables(table, folder / "tables")
    path = folder / "report.html"
    write_text(path, page + "\n")
    return path


def _environment() -> jinja2.Environment:
    environment = page_environment(Path(__file__).parent)
    environment.filters["groupby_order"] = _group_in_order
    environment.globals.update(
        millions=_millions,
        time=_time,
        words=WORDS,
        statuses={"done": "done", "failed": "failed", "missing": "not run yet"},
        titles={name: benchmark.title for name, benchmark in known_benchmarks().items()},
    )
    return environment


def _group_in_order(rows: Iterable[Any], attribute: str) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(getattr(row, attribute), []).append(row)
    return list(groups.items())


def _by_claim(verdicts: Sequence[Verdict]) -> list[tuple[Claim, list[Verdict], list[Verdict]]]:
    """Return each claim with its tests, and with the comparisons that nothing was measured for."""
    groups: dict[int, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(id(verdict.claim), []).append(verdict)
    return [
        (
            group[0].claim,
            [one for one in group if one.difference],
            [one for one in group if not one.difference],
        )
        for group in groups.values()
    ]


def _facts(
    study: Study,
    table: Table,
    verdicts: Sequence[Verdict],
    anatomy: Sequence[CellAnatomy],
    examples: Sequence[Example],
) -> dict[str, Any]:
    """Return the small values of the page."""
    entries = [entry for row in table.rows if not row.source for entry in row.entries if entry]
    stages = {stage.key: stage.seconds for cell in study.cells for stage in cell.stages}
    shown = {
        "run": True,
        "results": True,
        "claims": verdicts,
        "anatomy": anatomy,
        "curves": any(stage.losses for cell in study.cells for stage in cell.stages),
        "examples": examples,
        "cost": True,
    }
    titles = {
        "run": "Models",
        "results": "Results",
        "claims": "Claims",
        "anatomy": "Hallucination",
        "curves": "Loss",
        "examples": "Answers",
        "cost": "Cost",
    }
    tested = [verdict for verdict in verdicts if verdict.difference]
    return {
        "sections": [(name, titles[name]) for name, is_there in shown.items() if is_there],
        "num_done": sum(cell.status == "done" for cell in study.cells),
        "seeds": len({cell.seed for cell in study.cells}),
        "total_time": _time(sum(stages.values())),
        "failed": [cell for cell in study.cells if cell.status == "failed"],
        "tally": _tally(verdicts),
        "num_tests": len(tested),
        "num_resamples": f"{tested[0].difference.num_resamples:,}" if tested and tested[0].difference else "",
        "has_claim_published": any(verdict.published is not None for verdict in verdicts),
        "has_published": any(row.source for row in table.rows),
        "has_spread": any(entry.spread is not None for entry in entries),
        "has_partial": any(entry.is_partial for entry in entries),
        "splits": [split.split for split in anatomy[0].anatomy.splits] if anatomy else [],
    }


def _tally(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdict.outcome for verdict in verdicts)
    parts = [f"{words}: {counts[outcome]}" for outcome, words in WORDS.items() if counts[outcome]]
    return f"{len(verdicts)} comparisons. {', '.join(parts).capitalize()}."


def _draw_all(
    study: Study, table: Table, anatomy: Sequence[CellAnatomy], examples: Sequence[Example], folder: Path
) -> dict[str, EmbeddedImage]:
    """Draw every figure of the study, write it as SVG and PNG, and return those for the page."""
    figures: dict[str, tuple[Any, str]] = {}
    if table.columns:
        for number, panel in enumerate(study.panels, start=1):
            figures[f"bars-{number}"] = (draw_bars(table, panel), _describe_bars(table, panel))
    radar = _radar_rows(table)
    if study.paper == "Figure 1" and radar:
        figures["radar"] = (
            draw_radar(table, radar),
            "Scores of the models on their common benchmarks. The numbers are in the table.",
        )
    if any(stage.losses for cell in study.cells for stage in cell.stages):
        figures["losses"] = (draw_losses(study), "Loss of each model over the steps of its stages.")
    if anatomy:
        figures["pope"] = (
            draw_anatomy(anatomy),
            "False positives and share of yes answers over trained parameters. The numbers are in the table.",
        )
    first_two = [cells[0] for cells in models_of(study) if cells[0].status == "done"][:2]
    if examples and len(first_two) == 2:
        names = {cell.id: cell.label for cell in first_two}
        figures["answers"] = (draw_answers(examples, folder, names), "Answers of two models.")
    (folder / "figures").mkdir(exist_ok=True)
    return {name: _save(figure, alt, folder / "figures" / name) for name, (figure, alt) in figures.items()}


def _describe_bars(table: Table, panel: str) -> str:
    """Return the alternative text for the bars of a panel."""
    models = [row.model for row in table.rows if row.panel == panel and not row.source]
    titles = [column.title for column in table.columns]
    return f"{panel}: bars of {', '.join(models)} on {', '.join(titles)}. The numbers are in the table."


def _radar_rows(table: Table) -> list[Row]:
    """Return the measured models, and the published ones in place of those without numbers."""
    rows = [row for row in table.rows if sum(entry is not None for entry in row.entries) >= 3]
    measured = {row.model for row in rows if not row.source}
    return [row for row in rows if not row.source or (row.source == PAPER and row.model not in measured)]


def _save(figure: Any, alt: str, path: Path) -> EmbeddedImage:
    svg = to_svg(figure)
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    path.with_suffix(".png").write_bytes(to_png(figure))
    width, height = figure.get_size_inches()
    return EmbeddedImage(data_url(svg.encode(), "image/svg+xml"), alt, round(96 * width), round(96 * height))


def _write_tables(table: Table, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in (("md", to_markdown(table)), ("tex", to_latex(table)), ("csv", to_csv(table))):
        (folder / f"table.{name}").write_text(text, encoding="utf-8")


def _show(example: Example, study: Study, folder: Path) -> Mapping[str, Any]:
    """Return an example as the page shows it: each model's answer, of its first seed."""
    image = ""
    if example.image:
        try:
            image = data_url((folder / example.image).read_bytes(), "image/jpeg")
        except OSError:
            raise DataError(
                f"{folder / 'examples.json'}: image {example.image!r} of question "
                f"{example.question_id!r} is not in the folder; copy it there or delete the example."
            ) from None
    answers = []
    several, last = len(study.panels) > 1, ""
    for cells in models_of(study):
        cell = next((cell for cell in cells if cell.id in example.answers), None)
        if cell is not None:
            panel = cell.panel if several and cell.panel != last else ""
            last = cell.panel
            is_right = (example.scores.get(cell.id) or 0) >= RIGHT
            answers.append((panel, f"{cell.label}:", printable(example.answers[cell.id]), is_right))
    return {
        "image": image,
        "alt": f"image of question {example.question_id}",
        "truth": example.truth,
        "question": example.prompt.partition("\n")[0],
        "answers": answers,
    }


def _millions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not seconds:
        return "none"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
