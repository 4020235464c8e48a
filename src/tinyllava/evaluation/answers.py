"""Answers on disk while they come: appended line by line, complete or not there, whenever a run is killed.

Paper: section 4.1.3. The lines have those fields of LLaVA's answer files that say something.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from tinyllava.errors import ConfigError, DataError
from tinyllava.evaluation.question import Question


class AnswerFile:
    """The answers of one process in a folder where several may write, each to its own file."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.path = folder / f"answers-{process:03}.jsonl"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("ab")
        self._file.truncate(_whole_bytes(self.path))  # a line that a kill cut short is asked again
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None
        self._file.close()

    def append(self, answers: Iterable[tuple[Question, str]]) -> None:
        """Write answers and hand them to the system, so that they outlive this process."""
        assert self._file is not None, "open the file with `with`"
        lines = [{"question_id": q.id, "prompt": q.prompt, "text": text} for q, text in answers]
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()


def read_answers(folder: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Return what a folder already has of the answers to these questions, by question id.

    Raises:
        DataError: an answer was given to another prompt, or a question was answered twice.
    """
    prompts = {question.id: question.prompt for question in questions}
    answers: dict[str, str] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for number, line in enumerate(_whole_lines(path), start=1):
            record = json.loads(line)
            question_id = record["question_id"]
            if question_id not in prompts:
                continue  # of a run with a higher limit
            if record["prompt"] != prompts[question_id]:
                raise DataError(
                    f"{path}:{number}: question {question_id!r} was asked as {record['prompt']!r}, now it is "
                    f"{prompts[question_id]!r}: other data files. Choose another output folder, or delete "
                    f"{folder}."
                )
            if question_id in answers:
                raise DataError(
                    f"{path}:{number}: question {question_id!r} has two answers; delete one line."
                )
            answers[question_id] = record["text"]
    return answers


def claim_folder(folder: Path, run: Mapping[str, Any]) -> None:
    """Make the folder of a run, or make sure that it is the same run's: answers of two are never mixed.

    Raises:
        ConfigError: the folder holds answers of another model, protocol or setting.
    """
    path = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    known = json.loads(path.read_text(encoding="utf-8"))
    for name in known.keys() | run.keys():
        if known.get(name) != run.get(name):
            raise ConfigError(
                f"{folder}: holds answers of a run with {name} = {known.get(name)!r}, this one has "
                f"{run.get(name)!r}. Choose another output folder, or delete this one."
            )


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _whole_bytes(path: Path) -> int:
    return sum(map(len, _whole_lines(path)))
