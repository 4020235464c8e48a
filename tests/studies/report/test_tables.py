"""The table of a study in its three forms, with the numbers worked out from its results."""

import csv
import io
from dataclasses import replace
from statistics import fmean, stdev

from studies.studies import make_study
from tinyllava.evaluation.results import Metric, Result
from tinyllava.studies.report.tables import study_table, to_csv, to_latex, to_markdown
from tinyllava.studies.study import Study, StudyCell

STUDY, _ = make_study()
TABLE = study_table(STUDY)


def test_seeds_become_a_mean_and_a_spread() -> None:
    row = next(row for row in TABLE.rows if (row.panel, row.model, row.source) == ("Phi-2", "base", ""))
    place = [column.benchmark for column in TABLE.columns].index("pope")
    of_seeds = [STUDY.table.cell(f"base-C-Phi-2-seed{seed}", "pope") for seed in (0, 1)]
    values = [result.value for result in of_seeds]
    entry = row.entries[place]
    assert (entry.value, entry.spread, entry.num_seeds) == (fmean(values), stdev(values), 2)
    lows = [result.metric_named("f1").interval[0] for result in of_seeds]
    assert entry.interval[0] == fmean(lows)


def test_what_failed_or_was_not_run_stays_open() -> None:
    rows = {(row.panel, row.model): row for row in TABLE.rows if not row.source}
    assert rows["StableLM-2", "share"].status == "missing"
    assert set(rows["StableLM-2", "share"].entries) == {None}
    # one seed of TinyLlama with share failed: the other one stands alone, without a spread
    alone = [entry for entry in rows["TinyLlama", "share"].entries if entry]
    assert [(entry.num_seeds, entry.spread) for entry in alone] == [(1, None), (1, None)]


def test_published_rows_are_apart_and_never_the_best() -> None:
    printed = [row for row in TABLE.rows if row.source]
    assert [(row.panel, row.source) for row in printed] == [
        ("TinyLlama", "the paper"),
        ("StableLM-2", "the paper"),
        ("Phi-2", "the paper"),
    ]
    assert not any(entry.is_best for row in printed for entry in row.entries if entry)
    best = [entry.value for row in TABLE.rows for entry in row.entries if entry and entry.is_best]
    measured = [row for row in TABLE.rows if not row.source]
    for value, place in zip(sorted(best), (1, 4), strict=True):  # GQA and POPE
        assert value == max(row.entries[place].value for row in measured if row.entries[place])


def test_markdown() -> None:
    lines = to_markdown(TABLE).splitlines()
    assert lines[0] == (
        "| model | VQAv2 | GQA (n = 80) | SQA-I | TextVQA | POPE (n = 120) | MM-Vet | LLaVA-W | MME | MMB |"
    )
    assert len({line.count("|") for line in lines}) == 1
    assert "| *share, the paper* | *75.2* | *59.4* | *58.8* | *48.1* | *85.9* | *25.1* | *55.6* |" in lines[5]
    assert sum(cell.strip() == "not measured" for line in lines for cell in line.split("|")) == 5 * 7 + 2


def test_latex() -> None:
    text = to_latex(TABLE)
    lines = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count("&") for line in lines} == {9}
    assert text.count(r"\begin") == text.count(r"\end") == 1
    assert text.count("{") == text.count("}")
    assert r"\textbf{" in text


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(TABLE))))
    named = {(row["panel"], row["model"], row["source"], row["benchmark"]): row for row in rows}
    one = named["Phi-2", "share", "the paper", "mme"]
    assert (one["value"], one["low"], one["num_seeds"]) == ("1437.3000", "", "")
    measured = [row for row in rows if row["source"] == "measured"]
    assert len(measured) == 5 * 9
    assert (
        sum(row["value"] == "" for row in measured) == sum(row["num_seeds"] == "0" for row in measured) == 37
    )


def one_benchmark(name: str) -> Study:
    metrics = (
        Metric(name="accuracy", value=80.0, num_questions=40, interval=(70.0, 88.0)),
        Metric(name="kind=colour", value=90.0, num_questions=20),
        Metric(name="source=shop", value=70.0, num_questions=20),
    )
    result = Result(
        benchmark="starter",
        protocol="p",
        split="s",
        model="a",
        metric="accuracy",
        metrics=metrics,
        num_questions=40,
        num_images=20,
    )
    cell = StudyCell(
        id="a", panel="all", label="a", labels={"recipe": "base"}, status="done", results=(result,)
    )
    return Study(name=name, title="", axes={"recipe": ("base",)}, panels=("all",), cells=(cell,))


def test_a_single_benchmark_shows_its_kinds_of_questions() -> None:
    table = study_table(one_benchmark("starter"))
    assert [column.title for column in table.columns] == ["Starter", "colour"]
    assert [entry.value for entry in table.rows[0].entries] == [80.0, 90.0]


def test_the_number_of_questions_stands_in_the_heads_and_beside_each_number() -> None:
    table = study_table(one_benchmark("starter"))
    assert [column.head for column in table.columns] == ["Starter (n = 40)", "colour (n = 20)"]
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["num_questions"] for row in rows] == ["40", "20"]


def test_columns_are_those_that_a_study_is_to_be_measured_on() -> None:
    table = study_table(replace(STUDY, benchmarks=("gqa", "mmvet")))
    assert [column.benchmark for column in table.columns] == ["gqa", "pope", "mmvet"]  # POPE was measured


def test_marks_of_latex_in_names_are_escaped() -> None:
    table = study_table(one_benchmark("starter"))
    name = r"50% of {a_b} & #1 $x^2$ ~ \temp"
    text = to_latex(replace(table, rows=(replace(table.rows[0], model=name),)))
    wanted = r"50\% of \{a\_b\} \& \#1 \$x\textasciicircum{}2\$ \textasciitilde{} \textbackslash{}temp & "
    assert wanted in text


def test_other_groups_models_stand_where_the_paper_puts_them() -> None:
    table = study_table(replace(STUDY, paper="Table 3"))
    others = [row for row in table.rows if row.panel == "Other models, published"]
    assert len(others) == 8
    assert [row.model for row in study_table(replace(STUDY, paper="Figure 1")).rows][
        -1
    ] == "LLaVA-1.5, 7B, 336 px"
