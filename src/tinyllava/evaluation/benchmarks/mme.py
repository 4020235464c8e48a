"""MME: two yes/no questions on each image, fourteen tasks; the paper reports the perception sum.

Paper: appendix A; the column MME of Table 3.
Differs: the appendix says that GPT-4 grades MME; the benchmark's own rule, followed here, looks for yes or
no in the first four characters. Images are paired by name, not by consecutive lines.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tinyllava.conversation import ImageRef
from tinyllava.evaluation.benchmark import Benchmark, Grade, Prediction, Summary, mean_of, write_export
from tinyllava.evaluation.metrics.choices import NO, OTHER, YES, parse_mme
from tinyllava.evaluation.metrics.statistics import Ratio
from tinyllava.evaluation.question import SHORT, Question, QuestionList, no_source
from tinyllava.evaluation.read import NeededFile, Record, find_parquet, read_parquet, read_text, unpack_image

PROMPT = "{question}\n" + SHORT
ENDING = "Please answer yes or no."
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TREE = "MME_Benchmark_release_version"
_ONE_LINE = str.maketrans("\t\n\r", "   ")


def load(folder: Path) -> list[Question]:
    """Read the release's tree (both of its layouts), or a parquet mirror."""
    questions = QuestionList()
    seen: dict[str, int] = defaultdict(int)
    last: Record | None = None
    for task, name, record, image in _read_records(folder):
        last = record
        seen[name] += 1
        gold = record.one_of("answer", YES, NO)
        original = record.text("question")
        question = original.replace(ENDING, "").strip()
        meta = {"llava_id": name, "question": original, "file": name.rsplit("/", 1)[-1]}
        questions.add(
            record,
            id=f"{name}#{seen[name]}",
            text=PROMPT.format(question=question),
            image=image,
            image_name=name,
            target=gold,
            category=task,
            meta=meta,
        )
        if seen[name] > 2:
            record.fail(f"image {name!r} has more than two questions.")
    odd = [name for name, num in seen.items() if num != 2]
    if odd and last is not None:
        last.fail(f"{len(odd)} images do not have two questions, such as {odd[0]!r}.")
    return questions.finish(folder)


def _read_records(folder: Path) -> Iterator[tuple[str, str, Record, ImageRef]]:
    root = folder / TREE if (folder / TREE).exists() else folder
    tasks = [task for task in (*PERCEPTION, *COGNITION) if (root / task).is_dir()]
    shards = find_parquet(folder, "")
    if not tasks and not shards:
        raise no_source(folder, "mme", f"{TREE}/existence and the other tasks", "parquet shards")
    for task in tasks:
        has_folders = (root / task / "questions_answers_YN").is_dir()
        texts = root / task / "questions_answers_YN" if has_folders else root / task
        for path in sorted(texts.glob("*.txt")):
            image = _find_image(root / task / "images" if has_folders else root / task, path)
            name = str(image.relative_to(root))
            for record in _read_pair(path):
                yield task, name, record, ImageRef(path=image, name=name)
    for record in read_parquet(shards) if not tasks else ():
        name, task = record.text("question_id"), record.text("category")
        if task not in (*PERCEPTION, *COGNITION):
            record.fail(f"field 'category' is {task!r}; it must be one of the fourteen tasks.")
        yield task, name, record, unpack_image(record, "image", folder, name.replace("/", "_"))


def _find_image(folder: Path, text: Path) -> Path:
    found = [folder / (text.stem + ending) for ending in (".jpg", ".png", ".jpeg")]
    return next((path for path in found if path.exists()), found[0])


def _read_pair(path: Path) -> Iterator[Record]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.split("\t")
        record = Record(values=dict(zip(("question", "answer"), cells, strict=False)), path=path, line=number)
        if len(cells) != 2:
            record.fail(f"the line has {len(cells) - 1} tabs; it must be question, tab, Yes or No.")
        yield record


def grade(question: Question, answer: str) -> Grade:
    """Compare the yes or no at the start of the answer."""
    parsed = parse_mme(answer)
    return Grade(parsed, float(parsed == question.target), parsed != OTHER)


def summarise(predictions: Sequence[Prediction]) -> Summary:
    """Return the three sums, then each task's score (at most 200) and its two parts.

    A task scores the share of right answers plus the share of images with both right, each in percent.
    """
    tasks = {
        task: _rate_task([p for p in predictions if p.category == task])
        for task in (*PERCEPTION, *COGNITION)
        if any(p.category == task for p in predictions)
    }
    perception = [ratio for task in PERCEPTION for ratio in tasks.get(task, ())]
    cognition = [ratio for task in COGNITION for ratio in tasks.get(task, ())]
    summary = {"perception": perception, "cognition": cognition, "total": [*perception, *cognition]}
    for task, (accuracy, both) in tasks.items():
        alone = replace(both, num_questions=len(accuracy.numerators))
        summary |= {task: [accuracy, both], f"{task} acc": [accuracy], f"{task} acc+": [alone]}
    return summary


def _rate_task(predictions: Sequence[Prediction]) -> tuple[Ratio, Ratio]:
    images: dict[str, float] = {}
    for prediction in predictions:
        images[prediction.image] = min(images.get(prediction.image, 1.0), prediction.score or 0.0)
    both = Ratio(numerators=list(images.values()), clusters=list(images), num_questions=0)
    return mean_of(predictions), both


def export_lines(
    questions: Sequence[Question], answers: Mapping[str, str], folder: Path, out: Path
) -> Sequence[Path]:
    """Write ``{task}.txt`` for the official calculation.py: file, question, gold and answer, tabs between.

    A tab or a line break within an answer becomes one space: the tool splits at them, and it looks at the
    first four characters, which have to stay where they are.
    """
    lines: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        answer = answers.get(question.id, "").translate(_ONE_LINE)
        gold = question.target.capitalize()
        cells = (question.meta["file"], question.meta["question"], gold, answer)
        lines[question.category].append("\t".join(cells))
    written = [write_export(out / f"{task}.txt", "\n".join(rows) + "\n") for task, rows in lines.items()]
    return [path for (path,) in written]


BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    protocol="mme/llava-1.5",
    split="test",
    metric="perception",
    num_questions=2_374,
    prompt=PROMPT,
    load=load,
    grade=grade,
    unclear="neither yes nor no",
    summarise=summarise,
    unit="questions of perception",
    unit_of=lambda prediction: prediction.question_id if prediction.category in PERCEPTION else None,
    export=export_lines,
    folders=("MME",),
    files=(
        NeededFile(
            names=(TREE, "existence", "**/*.parquet"),
            purpose="1,187 images with two questions each, fourteen tasks",
            source="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (on request)",
            licence="not stated",
        ),
    ),
    notes=("perception is the sum over ten tasks, at most 2,000; cognition and total are extra",),
)
