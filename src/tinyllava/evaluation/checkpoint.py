"""Evaluate a checkpoint on benchmarks: the Python form of ``tinyllava evaluate``.

Paper: section 4.1.3.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from tinyllava.data.readers.folder import is_image_folder
from tinyllava.data.readers.hub import is_hub_name
from tinyllava.errors import ConfigError, DataError
from tinyllava.evaluation.benchmark import Benchmark
from tinyllava.evaluation.benchmarks import PAPER_BENCHMARKS, find_benchmark
from tinyllava.evaluation.own_data import MAX_TOKENS, OwnSettings, own_benchmark
from tinyllava.evaluation.own_metrics import AUTO
from tinyllava.parts.user_code import is_reference

if TYPE_CHECKING:
    from tinyllava.data.reporting import Callback
    from tinyllava.evaluation.judge import Judge, Reviews
    from tinyllava.evaluation.results import Result


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    benchmarks: str | Sequence[str] = "all",
    output: str | Path = "",
    limit: int = 0,
    blind: bool = False,
    device: str = "",
    dtype: str = "auto",
    bits: int = 16,
    judge: "Judge | Reviews | None" = None,
    progress: "Callback | None" = None,
    **own: Unpack[OwnSettings],
) -> "dict[str, Result]":
    """Ask a checkpoint the questions of benchmarks or of a user's own file; return the results by name.

    Questions with saved answers are not asked again. Under ``torchrun``, every process calls this function,
    and the first one returns results.

    Args:
        model: checkpoint folder, or its name on the Hub.
        data: folder with one subfolder per benchmark, or a record file with questions and right answers.
        benchmarks: names, or ``all``: the nine of the paper.
        output: folder of answers and results; empty means ``evaluations/NAME-HASH``.
        limit: ask only the first questions; 0 means all.
        blind: replace every image by one of the mean colour.
        device: a torch device; empty means a GPU if available.
        dtype: type of the weights; ``auto`` chooses one for the device.
        bits: 4 or 8 quantises the linear layers of the language model.
        judge: grades MM-Vet and LLaVA-W; without one, their answers are saved but not scored.
        progress: called with every step; without it, nothing is reported.
        own: settings of a record file, such as metric and tolerance; see ``own_data.own_benchmark``.

    Raises:
        CheckpointError: the folder is not a checkpoint, or logits are NaN or infinite.
        ConfigError: the output folder holds answers of another model.
        JudgeError: the judge does not answer.
        DataError, UnknownNameError: see ``find_questions``.
    """
    from tinyllava.data.reporting import reporting
    from tinyllava.evaluation.run import Settings, answer_benchmark, processes
    from tinyllava.evaluation.score import score
    from tinyllava.inference.chat import Chat
    from tinyllava.model.rebuild import whole_model
    from tinyllava.parts.folders import default_name, local_folder

    chosen, folders = find_questions(data, benchmarks, **own)
    folder = whole_model(local_folder(model))
    output = Path(output or f"evaluations/{default_name(folder)}")
    on = device or (str(processes().device) if processes().num_processes > 1 else "")
    chat = Chat.open(folder, device=on, dtype=dtype, bits=bits)
    settings = Settings(blind=blind, limit=limit)
    results = {}
    with reporting(progress):
        for name, benchmark in chosen.items():
            grader, place = judge if benchmark.judging is not None else None, folders[name]
            if answer_benchmark(chat, benchmark, place, output, model=str(folder), settings=settings):
                results[name] = score(benchmark, place, output, blind=blind, limit=limit, judge=grader)
    return results


def score_answers(
    model: str,
    data: str | Path,
    *,
    benchmarks: str | Sequence[str] = "all",
    output: str | Path = "",
    answers: str | Path = "",
    reviews: str | Path = "",
    limit: int = 0,
    blind: bool = False,
    judge: "Judge | Reviews | None" = None,
    **own: Unpack[OwnSettings],
) -> "dict[str, Result]":
    """Score saved answers without a model: the Python form of ``tinyllava evaluate --score-only``.

    Args:
        model: name of the model that gave the answers.
        data: see ``evaluate``, also for all other arguments.
        answers: answers written by LLaVA's scripts: a file, or a folder with one file per benchmark; by
            default those in ``output``.
        reviews: recorded reviews of the judge: a file, or a folder with one file per benchmark.

    Raises:
        DataError: answers are missing or damaged, or belong to other questions.
        ConfigError, JudgeError, UnknownNameError: see ``evaluate``.
    """
    from tinyllava.evaluation.score import score
    from tinyllava.parts.folders import default_name

    chosen, folders = find_questions(data, benchmarks, **own)
    folder = Path(output or f"evaluations/{default_name(Path(model))}")
    recorded = find_recorded(chosen, reviews) if reviews else {}
    results = {}
    for name, benchmark in chosen.items():
        if answers:
            take_answers(benchmark, folders[name], folder, model=model, answers=Path(answers))
        grader = recorded.get(name, judge) if benchmark.judging is not None else None
        results[name] = score(
            benchmark, folders[name], folder, blind=blind, limit=limit, judge=grader, model=model
        )
    return results


def take_answers(benchmark: Benchmark, data: Path, output: Path, *, model: str, answers: Path) -> None:
    """Put another program's answers to a benchmark into an output folder.

    Args:
        model: name of that program's model; its last part is the name of the file.
        answers: a file, or a folder with ``NAME.jsonl`` or ``NAME/answers/MODEL.jsonl`` per benchmark.

    Raises:
        DataError: there are no answers, or they belong to other questions.
    """
    from tinyllava.evaluation.answers import find_llava_answers, take_llava_answers
    from tinyllava.evaluation.score import answers_folder

    source = find_llava_answers(answers, folder_names(benchmark), Path(model).name)
    questions, place = benchmark.load(data), answers_folder(output, benchmark)
    take_llava_answers(source, questions, place, model=model, protocol=benchmark.protocol)


def find_recorded(
    benchmarks: Mapping[str, Benchmark], reviews: str | Path, judge: str = ""
) -> "dict[str, Reviews | None]":
    """Return the recorded reviews of each benchmark that a judge grades, or None if there are none.

    Args:
        reviews: a file, or a folder with ``NAME.jsonl``, ``NAME.json`` or ``NAME/reviews-JUDGE.jsonl``.
        judge: name of their author, if the reviews do not contain it.

    Raises:
        DataError: the path does not exist, or the reviews cannot be read.
    """
    from tinyllava.evaluation.judge import find_reviews, read_reviews

    judged = [name for name, benchmark in benchmarks.items() if benchmark.judging is not None]
    files = {name: find_reviews(Path(reviews), name) for name in judged}
    return {name: read_reviews(file, judge=judge) if file else None for name, file in files.items()}


def find_questions(
    data: str | Path, benchmarks: str | Sequence[str], **own: Unpack[OwnSettings]
) -> tuple[dict[str, Benchmark], dict[str, Path]]:
    """Return benchmarks by name with the path of their data: a folder, or a user's own file.

    Args:
        data: folder of the benchmarks, or the file.
        benchmarks: see ``find_benchmarks``.
        own: settings of a file, see ``own_data.own_benchmark``.

    Raises:
        UnknownNameError: no such benchmark, or no such metric.
        ConfigError: benchmarks were named for a file, or settings of a file were given for a folder.
        DataError: a folder is missing, or a record of the file has a defect.
    """
    if is_own(Path(data), benchmarks, own.get("reader", "")):
        if benchmarks != "all":
            raise ConfigError(
                f"--data {data} is a file of your own questions, which excludes --benchmarks. Give the "
                "folder of the benchmarks, or remove --benchmarks."
            )
        benchmark = own_benchmark(data, **own)
        return {benchmark.name: benchmark}, {benchmark.name: Path(data)}
    chosen = find_benchmarks(benchmarks)
    usual = {"metric": AUTO, "tolerance": "0", "max_tokens": MAX_TOKENS}
    if given := [name for name, value in own.items() if value != usual.get(name, type(value)())]:
        option = given[0].replace("_", "-")
        raise ConfigError(
            f"--{option} is for a file of your own questions, but --data {data} is not a file. Remove the "
            "option, or give the file."
        )
    return chosen, find_folders(chosen, Path(data))


def is_own(data: Path, benchmarks: str | Sequence[str], reader: str) -> bool:
    """Whether the data is a user's own: a file, a folder of images, or the input of the user's reader."""
    if is_hub_name(str(data)) or data.is_file() or (reader and data.exists()):
        return True
    names = (name for benchmark in PAPER_BENCHMARKS.values() for name in folder_names(benchmark))
    return benchmarks == "all" and is_image_folder(data) and not any((data / name).is_dir() for name in names)


def find_benchmarks(names: str | Sequence[str]) -> dict[str, Benchmark]:
    """Return benchmarks by name: a list of names, names separated by commas, or ``all``.

    Raises:
        UnknownNameError: no such benchmark.
    """
    if names == "all":
        return dict(PAPER_BENCHMARKS)
    listed = names.split(",") if isinstance(names, str) else names
    found = {name: find_benchmark(name) for name in listed}
    return {benchmark.name if is_reference(name) else name: benchmark for name, benchmark in found.items()}


def find_folders(benchmarks: Mapping[str, Benchmark], data: Path) -> dict[str, Path]:
    """Return each benchmark's folder in ``data``. Another protocol uses the folder of its benchmark.

    Raises:
        DataError: folders are missing; the error lists all of them.
    """
    folders, missing = {}, []
    for name, benchmark in benchmarks.items():
        found = [data / one for one in folder_names(benchmark) if (data / one).is_dir()]
        folders[name] = found[0] if found else data / name
        missing += [] if found else [name]
    if missing:
        raise DataError(
            f"--data {data}: no folder for {', '.join(missing)}. `tinyllava data benchmarks {missing[0]} "
            f"{data / missing[0]}` lists its files. Or choose benchmarks with --benchmarks."
        )
    return folders


def folder_names(benchmark: Benchmark) -> tuple[str, ...]:
    """Return the possible folder names of a benchmark: its own, that of its base, or LLaVA's."""
    bases = (base for base in PAPER_BENCHMARKS if benchmark.name.startswith(f"{base}-"))
    return (benchmark.name, *bases, *benchmark.folders)
