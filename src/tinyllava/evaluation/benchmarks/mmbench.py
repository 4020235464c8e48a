"""MMBench (dev, English): multiple choice, each question asked once for every rotation of its options.

Paper: appendix A; the column MMB of Table 3 came from the server of early 2024, which no longer runs.
Differs: scored locally. VLMEvalKit's rules read letters and option texts. An answer that they cannot read is
wrong, never guessed. ``mmbench-judge`` asks a judge with this project's own prompt what such an answer means.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.data.readers.columns import LETTER
from tinyllava.errors import DataError, require
from tinyllava.evaluation.benchmark import Benchmark, Grade, Prediction, Summary, means_by_group
from tinyllava.evaluation.metrics.choices import NONE_OF_THEM, extract_option
from tinyllava.evaluation.question import JudgeRequest, Judging, Question, QuestionList, Wording, no_source
from tinyllava.evaluation.read import NeededFile, Record, find_parquet, read_parquet, read_table, unpack_image

if TYPE_CHECKING:
    from tinyllava.conversation import ImageRef

BODY = "{hint}{question}\n{options}"
PROMPT = f"{BODY}\n{LETTER}"
SPLIT = "dev (English)"
LETTERS = "ABCD"
ROTATION = 1_000_000
TABLES = (
    "mmbench_dev.tsv",
    "mmbench_dev_2*.tsv",
    "mmbench_dev_en*.tsv",
    "MMBench_DEV_EN*.tsv",
    "MMBENCH_DEV_EN*.tsv",
)
"""File names of the English dev set: the first release's bear a date and no language."""
RELEASES = {4_377: 1_176, 4_329: 1_164}
"""Rows of a release -> its base questions: mmbench_dev_20230712, which LLaVA and the paper use; all later
ones. Both have questions with four options and three rotations."""
SOURCE = "the TSV files of VLMEvalKit or OpenCompass (MMBench_DEV_EN, mmbench_dev_20230712)"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_NOT_IN_UPLOAD = ("hint", "category", "source", "image", "comment", "l2-category")

# A cell that pandas reads as "not available" (its default words) or that LLaVA's script takes for empty.
_EMPTY = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"}
    | {"NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)


def load(folder: Path) -> list[Question]:
    """Read the TSV (the legacy one, or VLMEvalKit's with one image a group), or a parquet mirror.

    A question's image is that of its base row: index modulo 1,000,000.
    """
    questions = QuestionList()
    rows: Counter[str] = Counter()  # of each base question in the whole file
    images: dict[str, ImageRef] = {}
    num_chinese = 0
    for record in _read_records(folder):
        index = record.integer("index")
        base = str(index % ROTATION)
        if base not in rows and index >= ROTATION and str(record.field("image")).strip().isdigit():
            record.fail(f"no row with index {base} before this rotation of it.")
        rows[base] += 1
        num_chinese += _CHINESE.search(record.text("question")) is not None
        options = _read_options(record)
        answer = record.text("answer").strip()
        if answer not in options:
            record.fail(f"field 'answer' is {answer!r}; it must be one of {', '.join(options)}.")
        hint = "" if _is_empty(record.values.get("hint")) else f"{record.text('hint')}\n"
        text = BODY.format(
            hint=hint,
            question=record.text("question"),
            options="\n".join(f"{letter}. {option}" for letter, option in options.items()),
        )
        level2 = "l2-category" if "l2-category" in record.values else "L2-category"
        groups = (f"category={record.text('category')}", f"l2-category={record.text(level2)}")
        target = {"answer": answer, "options": options}
        if base not in images:
            images[base] = unpack_image(record, "image", folder, f"{base}.jpg")
        questions.add(
            record,
            id=str(index),
            text=f"{text}\n{LETTER}",
            image=images[base],
            image_name=base,
            target=target,
            groups=groups,
            meta={"llava_prompt": text, "rows": rows},  # its answer files leave out the suffix
        )
    if 2 * num_chinese > rows.total():
        raise DataError(
            f"{folder}: {num_chinese:,} of {rows.total():,} questions are in Chinese; this benchmark is "
            f"{SPLIT}. Replace the file with the English one, {TABLES[-2]}."
        )
    return questions.finish(folder)


def find_table(folder: Path) -> Path | None:
    """Return the TSV of the English dev set, if there is one. Tables of other languages may be next to it.

    Raises:
        DataError: there are several releases, whose scores differ.
    """
    tables = sorted({path for pattern in TABLES for path in folder.glob(pattern)})
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise DataError(
            f"{folder}: several tables of the {SPLIT} set: {names}. Their questions differ. Keep one in the "
            "folder."
        )
    return tables[0] if tables else None


def _read_records(folder: Path) -> Iterator[Record]:
    table = find_table(folder)
    if table is not None:
        columns = ("index", "question", "hint", "A", "B", "answer", "category", "image", "l2-category")
        return read_table(table, *columns)
    shards = find_parquet(folder, "dev")
    shards = [path for path in shards if path.parent.name == "en"] or shards
    if not shards:
        raise no_source(folder, "mmbench", *TABLES, "parquet shards (dev)")
    return read_parquet(shards)


def _is_empty(cell: object) -> bool:
    return cell is None or str(cell) in _EMPTY or str(cell).lower() in ("nan", "none")


def _read_options(record: Record) -> dict[str, str]:
    options: dict[str, str] = {}
    for letter in LETTERS:
        if _is_empty(record.values.get(letter)):
            break
        options[letter] = record.text(letter)
    if len(options) < 2:
        record.fail(f"there are {len(options)} options before the first empty one; there must be 2 to 4.")
    return options


def grade(question: Question, answer: str) -> Grade:
    """Compare letters; an answer that no rule can read is wrong."""
    parsed = extract_option(answer, question.target["options"])
    is_clear = parsed in question.target["options"]
    return Grade(parsed, float(parsed == question.target["answer"]), is_clear)


def summarise(predictions: Sequence[Prediction]) -> Summary:
    """Return CircularEval over base questions (right in all rotations), its groups, and the single pass."""
    worst: dict[int, Prediction] = {}
    for prediction in sorted(predictions, key=lambda one: int(one.question_id)):
        base = int(prediction.question_id) % ROTATION
        first = worst.setdefault(base, prediction)
        worst[base] = replace(first, score=min(first.score or 0.0, prediction.score or 0.0))
    single = [prediction for prediction in predictions if int(prediction.question_id) < ROTATION]
    circular = _means("circular", list(worst.values()))
    return {**circular, **means_by_group(list(worst.values())), **_means("single_pass", single)}


def _means(name: str, predictions: Sequence[Prediction]) -> Summary:
    plain = [replace(prediction, groups=(name,)) for prediction in predictions]
    return means_by_group(plain)


def count_base(questions: Sequence[Question]) -> int:
    """Return the number of questions that are there in all their rotations.

    That is one for each option, unless the file is a whole release: then what it has of the question.
    """
    rotations = Counter(question.image for question in questions)
    needed = {q.image: len(q.target["options"]) for q in questions}
    if questions and (rows := questions[0].meta["rows"]).total() in RELEASES:
        needed = {base: rows[base] for base in needed}
    return sum(rotations[base] >= num for base, num in needed.items())


def expect_base(questions: Sequence[Question]) -> int:
    """Return the number of base questions of the release that the questions were read from."""
    rows: Counter[str] = questions[0].meta["rows"] if questions else Counter()
    first, later = RELEASES.values()
    return RELEASES.get(rows.total(), later if len(rows) <= later else first)


def export_xlsx(
    questions: Sequence[Question], answers: Mapping[str, str], folder: Path, out: Path
) -> Sequence[Path]:
    """Write the xlsx of the former server: the TSV less six columns, with ``prediction`` as the seventh.

    Control characters, which the format cannot hold, are left out. A parquet mirror has lost the order of
    the columns: nothing is written then.
    """
    require("openpyxl", "report", "writes MMBench's upload")
    import openpyxl
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    table = find_table(folder)
    if table is None:
        return ()
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def to_cell(value: str | int | None) -> object:
        if not isinstance(value, str):
            return value
        cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
        cell.data_type = "s"  # text, also where it begins as a formula does
        return cell

    for number, record in enumerate(read_table(table, "index")):
        cells = {name: value for name, value in record.values.items() if name not in _NOT_IN_UPLOAD}
        index = record.integer("index")
        cells |= {"index": index}
        values = [None if value == "" else value for value in cells.values()]
        if number == 0:
            sheet.append([*list(cells)[:6], "prediction", *list(cells)[6:]])
        sheet.append(list(map(to_cell, [*values[:6], answers.get(str(index)), *values[6:]])))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "mmbench_upload.xlsx"
    book.save(path)
    return (path,)


_WORDING = (
    "A model was asked a multiple-choice question. Say which option its reply means. Reply with the option's "
    "letter alone, or with Z if the reply means none of them.\n\n"
    "Question: Which animal is shown?\nOptions:\nA. a bear\nB. a hare\nReply: a small brown teddy\n"
    "Letter: A\n\n"
    "Question: Which animal is shown?\nOptions:\nA. a bear\nB. a hare\nReply: a spider\nLetter: Z\n\n"
    "{prompt}\nReply: {answer}\nLetter:"
)


def _ask(wording: Wording, question: Question, answer: str, num_tries: int) -> JudgeRequest:
    prompt = "Question: " + question.prompt.removesuffix("\n" + LETTER)
    content = wording["prompt"].replace("{prompt}", prompt).replace("{answer}", answer)
    return JudgeRequest(
        messages=({"role": "user", "content": content},), temperature=0.5 * num_tries, max_tokens=16
    )


def _read_letter(question: Question, reply: str) -> str:
    options = question.target["options"]
    return extract_option(reply, options)


def _grade_reply(question: Question, reply: str) -> tuple[str, float]:
    parsed = _read_letter(question, reply) or NONE_OF_THEM
    return parsed, float(parsed == question.target["answer"])


BENCHMARK = Benchmark(
    name="mmbench",
    title="MMB",
    protocol="mmbench/circular/exact-matching",
    split=SPLIT,
    metric="circular",
    num_questions=1_164,
    prompt=PROMPT,
    has_number_ids=True,
    load=load,
    grade=grade,
    unclear="no option",
    summarise=summarise,
    count=count_base,
    expect=expect_base,
    unit="questions in all their rotations",
    unit_of=lambda prediction: str(int(prediction.question_id) % ROTATION),
    max_new_tokens=1024,
    export=export_xlsx,
    export_package="openpyxl",
    files=(
        NeededFile(
            names=(*TABLES, "**/dev*.parquet"),
            purpose="1,164 questions (1,176 in the first release) with their rotations, images inside",
            source=SOURCE,
            licence="Apache-2.0 (of the repository open-compass/MMBench; not stated for the images)",
            known_md5={
                "b6caf1133a01c6bb705cf753bb527ed8": "MMBench_DEV_EN",
                "30c05be8f2f347a50be25aa067248184": "MMBench_DEV_EN_V11",
            },
        ),
    ),
    notes=("scored locally by CircularEval; unreadable answers are wrong",),
)

WITH_JUDGE = replace(
    BENCHMARK,
    name="mmbench-judge",
    title="MMB (judge)",
    protocol="mmbench/circular/judge-own-wording",
    judging=Judging(
        official_judge="gpt-3.5-turbo class",
        wording=lambda _: {"prompt": _WORDING},
        ask=_ask,
        is_valid=lambda question, reply: bool(_read_letter(question, reply)),
        grade=_grade_reply,
        max_tries=3,
        is_needed=lambda question, answer: (
            bool(answer) and not extract_option(answer, question.target["options"])
        ),
    ),
    notes=("a judge with our own prompt reads answers that the rules cannot; not comparable with MMB",),
)
