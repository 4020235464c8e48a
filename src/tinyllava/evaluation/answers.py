"""Answers on disk: raw answers, scored predictions, and the answer files of LLaVA's scripts.

Paper: section 4.1.3. A line is complete or missing, whenever a run is killed. Scoring starts from the answers
and needs no model. Comparing starts from the scored predictions (predictions.jsonl).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

from tinyllava.conversation import Answer
from tinyllava.errors import ConfigError, DataError
from tinyllava.evaluation.benchmark import Prediction
from tinyllava.evaluation.question import Question
from tinyllava.evaluation.read import Record, parse_line, read_lines
from tinyllava.files import held, read_object, sha256_of, whole_file, whole_lines, write_text
from tinyllava.inference.file import claim_answers

_FIX = "Delete the line, or the file, and evaluate again."


class AnswerFile:
    """The answers of one process in a folder where several may write, each to its own file."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.path = folder / f"answers-{process:03}.jsonl"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("ab")
        self._file.truncate(
            sum(map(len, whole_lines(self.path)))
        )  # a line that a kill cut short is asked again
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None
        self._file.close()

    def append(self, answers: Iterable[tuple[Question, str]]) -> None:
        """Write answers and hand them to the system, so that they outlive this process."""
        assert self._file is not None, "open the file with `with`"
        lines = [
            {"question_id": q.id, "image": q.image, "prompt": q.prompt, "text": text}
            | ({"is_cut": True} if isinstance(text, Answer) and text.is_cut else {})
            for q, text in answers
        ]
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()


def read_answers(folder: Path, questions: Sequence[Question]) -> dict[str, Answer]:
    """Return the saved answers of a folder to these questions, by question id.

    Raises:
        DataError: a line is damaged, was given to another prompt or image, or answers a question a second
            time.
    """
    asked = {question.id: question for question in questions}
    by_content = "asked" in (read_object(folder / "run.json") or {})  # see check_edited
    answers: dict[str, Answer] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for number, line in enumerate(whole_lines(path), start=1):
            record = parse_line(line.decode(errors="replace"), path, number, _FIX)
            question_id, prompt = record.text("question_id"), record.text("prompt")
            if question_id not in asked:
                continue  # of a run with a higher limit
            question = asked[question_id]
            image = question.image if by_content else record.values.get("image", question.image)
            for about, was, now in (
                ("asked as", prompt, question.prompt),
                ("about the image", image, question.image),
            ):
                if was != now:
                    record.fail(
                        f"question {question_id!r} was {about} {was!r}, but is now {now!r}: the data files "
                        "differ.",
                        f"Choose another output folder, or delete {folder}.",
                    )
            if question_id in answers:
                record.fail(f"question {question_id!r} has two answers.", "Delete one line.")
            answers[question_id] = Answer(record.text("text"), is_cut=record.values.get("is_cut") is True)
    return answers


def write_refusals(folder: Path, refused: Sequence[tuple[Question, Exception]], process: int = 0) -> None:
    """Record the questions that this process could not ask, with the reasons."""
    if not refused:
        return
    lines = [{"question_id": question.id, "error": str(error)} for question, error in refused]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(folder / f"refused-{process:03}.jsonl", text)


def forget_refusals(folder: Path) -> None:
    """Delete the refusals of an earlier run, because these questions are asked again."""
    for path in folder.glob("refused-*.jsonl"):
        path.unlink(missing_ok=True)


def read_refusals(folder: Path) -> list[str]:
    """Return a line for each question that could not be asked in the last run: its id and why."""
    return [
        f"{record.text('question_id')}: {record.text('error')}"
        for path in sorted(folder.glob("refused-*.jsonl"))
        for record in read_lines(path)
    ]


def write_llava_answers(
    questions: Sequence[Question], answers: Mapping[str, str], path: Path, *, model: str, number_ids: bool
) -> None:
    """Write the answers in the form of LLaVA's scripts, for its own scoring tools.

    These look ids up as they are in the question files: numbers in some benchmarks, texts in others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for question in questions:
            if question.id not in answers:
                continue
            given_id = question.meta.get("llava_id", question.id)
            entry: dict[str, object] = {
                "question_id": int(given_id) if number_ids else given_id,
                "prompt": question.meta.get("llava_prompt", question.prompt),
                "text": answers[question.id],
                "answer_id": question.id,
                "model_id": model,
                "metadata": {},
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_llava_answers(path: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Return the answers of a file of LLaVA's scripts by our question ids, joined by id and prompt.

    Raises:
        DataError: a line that belongs to no question, or to one that was answered before.
    """
    by_key = {
        (q.meta.get("llava_id", q.id), _words(prompt.removeprefix("<image>\n"))): q.id
        for q in questions
        for prompt in (q.prompt, q.meta.get("llava_prompt", q.prompt))
    }
    answers: dict[str, str] = {}
    for record in read_lines(path):
        key = (record.text("question_id"), _words(record.text("prompt").removeprefix("<image>\n")))
        if key not in by_key:
            record.fail(
                f"no question with id {key[0]!r} and this prompt. The answers are for other data.", _FIX
            )
        if by_key[key] in answers:
            record.fail(f"question {key[0]!r} has a second answer.", _FIX)
        answers[by_key[key]] = record.text("text")
    return answers


def find_llava_answers(path: Path, names: Sequence[str], model: str) -> Path:
    """Return the file with a model's answers to one benchmark, as LLaVA's scripts leave it.

    Args:
        path: the file itself; or a folder with ``NAME.jsonl``, or in LLaVA's layout: ``NAME/answers`` has,
            at any depth, ``MODEL.jsonl`` or ``MODEL/merge.jsonl``.
        names: what the benchmark's folder may be called.
        model: the model's name.

    Raises:
        DataError: no such file, or several.
    """
    if path.is_file():
        return path
    patterns = [f"{name}.jsonl" for name in names]
    for name in names:
        patterns += [f"{name}/answers/**/{model}.jsonl", f"{name}/answers/**/{model}/merge.jsonl"]
    found = sorted({one for pattern in patterns for one in path.glob(pattern)})
    if len(found) != 1:
        listed = ", ".join(map(str, found)) or "none"
        raise DataError(
            f"{path}: expected one file with the answers of {model} to {names[0]}, found: {listed}. Looked "
            f"for {', '.join(patterns)}. Give the file itself: --benchmarks {names[0]} --answers FILE."
        )
    return found[0]


def take_llava_answers(
    source: Path, questions: Sequence[Question], folder: Path, *, model: str, protocol: str
) -> None:
    """Put the answers of a file of LLaVA's scripts into the folder of a run, those there already excepted.

    Raises:
        DataError: see ``read_llava_answers``.
        ConfigError: the folder holds other answers.
    """
    answers = read_llava_answers(source, questions)
    run = {
        "model": model,
        "source": source.name,
        "sha256": sha256_of(source),
        "protocol": protocol,
        "dtype": "",
    }
    with held(folder):
        claim_folder(folder, run)
        done = read_answers(folder, questions)
        with AnswerFile(folder) as file:
            file.append((q, answers[q.id]) for q in questions if q.id in answers and q.id not in done)


def claim_folder(folder: Path, run: Mapping[str, Any], edited: Sequence[Question] = ()) -> None:
    """Make the folder of a run, or make sure that it is the same run's.

    Args:
        folder: of the answers.
        run: what they depend on, by name.
        edited: questions that the user may edit; what was asked is kept as hashes.

    Raises:
        ConfigError: the folder holds answers of another model, protocol or setting.
        DataError: see ``check_edited``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fix = "Choose another output folder, or delete this one."
    identity = folder / "run.json"
    if not identity.exists() and any(path.stat().st_size for path in folder.glob("answers-*.jsonl")):
        raise ConfigError(f"{folder}: has answers, but no {identity.name} names their model. {fix}")
    blind = run.get("blind") is True
    check_edited(folder, edited, blind=blind)
    known = (read_object(identity) or {}).get("asked") or {}
    noted = {"asked": {**known, **{question.id: _hash_asked(question, blind) for question in edited}}}
    told_by = {"model": "weights"}
    claim_answers(folder, identity, run, fix=fix, told_by=told_by, noted=noted if edited else {})


def check_edited(folder: Path, questions: Sequence[Question], *, blind: bool) -> None:
    """Make sure that the questions with an answer in a folder are as they were when they were asked.

    Raises:
        DataError: the image or an earlier turn of one has changed (``read_answers`` compares the prompts).
    """
    asked = (read_object(folder / "run.json") or {}).get("asked") or {}
    answered = read_answers(folder, questions) if asked else {}
    for question in questions:
        if question.id in answered and asked.get(question.id) != _hash_asked(question, blind):
            raise DataError(
                f"{question.conversation.place}: its image, the image's place or an earlier turn changed "
                f"since it was answered. Choose another output folder, or delete {folder}."
            )


def _hash_asked(question: Question, blind: bool) -> str:
    """Return a hash of the turns and, unless they are blanked, of the content of the images."""
    digest = hashlib.sha256()
    for message in question.conversation.messages:
        places = [list(message.places)] * bool(message.places)
        digest.update(json.dumps([message.role, message.text, len(message.images), *places]).encode())
        for image in () if blind else message.images:
            if image.data is not None:
                digest.update(hashlib.sha256(image.data).digest())
            elif image.path is not None and image.path.is_file():
                digest.update(bytes.fromhex(sha256_of(image.path)))
            else:
                digest.update(b"missing")
    return digest.hexdigest()[:16]


def _words(prompt: str) -> str:
    return " ".join(prompt.split())


_TEXTS = ("benchmark", "question_id", "image", "prompt", "answer", "parsed", "category")
_LATER_TEXTS = ("judge", "target")
"""Texts that older files do not have."""
_MARKS = ("is_clear", "is_cut")


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    """Write a file of predictions, whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in predictions))


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file of predictions of one benchmark.

    Raises:
        DataError: a line that does not follow the format, a question twice, or two benchmarks in the file.
    """
    if path.exists() and path.stat().st_size == 0:
        return []
    predictions: list[Prediction] = []
    lines: dict[str, int | None] = {}
    for record in read_lines(path):
        prediction = _parse(record)
        if prediction.question_id in lines:
            first = lines[prediction.question_id]
            record.fail(f"question {prediction.question_id!r} was already answered on line {first}.", _FIX)
        if predictions and prediction.benchmark != predictions[0].benchmark:
            record.fail(
                f"field 'benchmark' is {prediction.benchmark!r}, but the previous lines are of "
                f"{predictions[0].benchmark!r}.",
                _FIX,
            )
        lines[prediction.question_id] = record.line
        predictions.append(prediction)
    return predictions


def _parse(record: Record) -> Prediction:
    score = record.field("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        record.fail(f"field 'score' is {score!r}; it must be a number or null.", _FIX)
    marks: dict[str, Any] = {name: record.values[name] for name in _MARKS if name in record.values}
    for name, value in marks.items():
        if not isinstance(value, bool):
            record.fail(f"field {name!r} is {value!r}; it must be true or false.", _FIX)
    unknown = set(record.values) - {*_TEXTS, *_MARKS, *_LATER_TEXTS, "score", "groups"}
    if unknown:
        record.fail(f"unknown field {min(unknown)!r}.", _FIX)
    texts: dict[str, Any] = {name: record.text(name) for name in _TEXTS}
    texts |= {name: record.text(name) for name in _LATER_TEXTS if name in record.values}
    return Prediction(**texts, **marks, score=score, groups=tuple(record.texts("groups")))
