"""``tinyllava evaluate MODEL``: evaluate a checkpoint on benchmarks."""

import argparse
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.cli.parser import CommandParser, add_bits, add_data_options, check_model, reading_settings
from tinyllava.data.cores import num_cores
from tinyllava.parts.folders import default_name, is_stage_checkpoint
from tinyllava.planning.launch import choose_processes, launch

if TYPE_CHECKING:
    from tinyllava.evaluation.benchmark import Benchmark, Prediction
    from tinyllava.evaluation.judge import Judge, Reviews
    from tinyllava.evaluation.own_data import OwnSettings
    from tinyllava.evaluation.results import Result

_MOST_SHOWN = 10  # questions that could not be asked, and readings; files have all
_MOST_QUOTED = 3  # answers that could not be read
_GLUE = "\N{NO-BREAK SPACE}"  # keeps a name and its number on one line

_HELP = """
Evaluate a checkpoint on the benchmarks of the paper, with their published
prompts, parsing and metrics, or on your own questions. Run the same command
again to resume.

  tinyllava evaluate MODEL --data /data/bench
      all nine benchmarks, in /data/bench/vqav2, /data/bench/gqa and so on
  tinyllava evaluate MODEL --data /data/bench --benchmarks pope,gqa
  tinyllava evaluate MODEL --data /data/bench --benchmarks pope --limit 100
  tinyllava evaluate MODEL --data /data/bench --benchmarks pope --blind
      with blank images: shows how much of a score needs no image
  tinyllava evaluate MODEL --data /data/bench --score-only
  tinyllava evaluate NAME --data /data/bench --score-only --answers FOLDER
      scores answers written by LLaVA's scripts
  tinyllava evaluate MODEL --data /data/bench --gpus 4
      one process for each of four GPUs (default: all of this machine)

  tinyllava evaluate MODEL --data my_test.json
      your own questions, with a metric that fits the right answers
  tinyllava evaluate MODEL --data my_test.json --metric exact --blind

MM-Vet and LLaVA-W need a judge model, or a folder with its recorded reviews:
  tinyllava evaluate MODEL --data /data/bench --benchmarks mmvet,llava-w \\
      --judge-url http://localhost:8000/v1 --judge-model NAME
  tinyllava evaluate MODEL --data /data/bench --reviews reviews

`tinyllava data benchmarks` lists the names. `tinyllava data benchmarks pope
/data/bench/pope` lists the files that POPE needs and where to download them.
"""


def main(arguments: list[str]) -> int:
    """Evaluate; print one line for each benchmark, and the results file as the last line."""
    known = _parse(arguments)
    from tinyllava.evaluation.checkpoint import find_questions

    if is_stage_checkpoint(Path(known.model)):
        known.model = str(check_model(known.model))
    own: OwnSettings = {
        **reading_settings(known),
        "metric": known.metric,
        "tolerance": known.tolerance,
        "max_tokens": known.max_tokens,
    }
    benchmarks, folders = find_questions(known.data, known.benchmarks, **own)
    output = Path(known.output or f"evaluations/{default_name(Path(known.model))}")
    judges = _make_judges(known, output, benchmarks)
    num_processes = 1 if known.score_only or known.device else choose_processes(known.gpus)
    if num_processes > 1:
        return launch(["evaluate", *arguments], num_processes)
    ask = _take_answers(known, output) if known.score_only else _open_model(known, output)
    is_whole = True
    for name, benchmark in benchmarks.items():
        if ask(benchmark, folders[name]):
            _announce(judges[name], benchmark, folders[name], output, known)
            is_whole &= _score(benchmark, folders[name], output, known, judges[name])
    print(output / "results.json")
    return int(not is_whole)


def _take_answers(known: argparse.Namespace, output: Path) -> Callable[["Benchmark", Path], bool]:
    """Return a function that puts given answers of another program into ``output``."""
    from tinyllava.evaluation.checkpoint import take_answers

    def take(benchmark: "Benchmark", data: Path) -> bool:
        if known.answers:
            take_answers(benchmark, data, output, model=known.model, answers=Path(known.answers))
        return True

    return take


def _open_model(known: argparse.Namespace, output: Path) -> Callable[["Benchmark", Path], bool]:
    """Return a function that answers a benchmark and returns whether this process scores it."""
    from tinyllava.evaluation.run import Settings, answer_benchmark, processes
    from tinyllava.inference.chat import Chat

    device = known.device or (str(processes().device) if processes().num_processes > 1 else "")
    chat = Chat.open(known.model, device=device, dtype=known.dtype, bits=known.bits)
    settings = Settings(
        blind=known.blind, limit=known.limit, batch_tokens=known.batch_tokens, num_workers=known.workers
    )
    return lambda benchmark, data: answer_benchmark(
        chat, benchmark, data, output, model=known.model, settings=settings
    )


def _score(
    benchmark: "Benchmark",
    data: Path,
    output: Path,
    known: argparse.Namespace,
    judge: "Judge | Reviews | None",
) -> bool:
    """Score a benchmark, print the result, and return whether every question has an answer."""
    from tinyllava.evaluation.answers import read_predictions, read_refusals
    from tinyllava.evaluation.results import load_results
    from tinyllava.evaluation.score import answers_folder, score, set_aside_if_damaged

    path = output / "results.json"
    if aside := set_aside_if_damaged(output):
        print(f"{path}: damaged, moved to {aside}. Score the other benchmarks again with --score-only.")
    before = load_results(path) if path.exists() else ()
    model = known.model if known.score_only else ""
    result = score(benchmark, data, output, blind=known.blind, limit=known.limit, judge=judge, model=model)
    headline = [metric for metric in result.metrics if metric.name == result.metric]
    waits = benchmark.judging is not None and judge is None
    print(
        f"{benchmark.name} ({result.protocol}): "
        + (
            str(headline[0])
            if headline
            else "answers saved, no score" + (" without a judge" if waits else " on this machine")
        )
    )
    for line in describe_metrics(result):
        print(f"  {line}")
    folder = answers_folder(output, benchmark, blind=known.blind)
    predictions = read_predictions(folder / "predictions.jsonl")
    print("  " + describe_answers(result, benchmark))
    for line in describe_readings(predictions):
        print(f"  {line}")
    if result.num_missing:
        many = result.num_missing != 1
        what = "questions have no answer and count" if many else "question has no answer and counts"
        print(f"  {result.num_missing:,} {what} as wrong")
        refusals = read_refusals(folder)
        for line in refusals[:_MOST_SHOWN]:
            print(f"    {line}")
        if len(refusals) > _MOST_SHOWN:
            print(f"    and {len(refusals) - _MOST_SHOWN:,} more in {folder / 'refused-*.jsonl'}")
    for note in result.notes:
        print(f"  {note}")
    print(f"  {_write_page(benchmark, data, folder, path, result, predictions)}")
    kept = {(one.model, one.benchmark) for one in load_results(path)}
    for one in before:
        if (one.model, one.benchmark) not in kept:
            print(f"  dropped from {path}: {one.model}, from other data or another judge. Score it again.")
    return not result.num_missing


def _write_page(
    benchmark: "Benchmark",
    data: Path,
    folder: Path,
    results: Path,
    result: "Result",
    predictions: Sequence["Prediction"],
) -> Path:
    """Write the page with right and wrong answers; it and a line have the score of blank images, if any."""
    from tinyllava.evaluation.results import BLANK, load_results
    from tinyllava.studies.report.answers import write_answers

    name = f"{result.model}{BLANK}"
    results_of = {(one.model, one.benchmark): one for one in load_results(results)}
    blind = results_of.get((name, result.benchmark))
    for metric in blind.metrics if blind else ():
        if metric.name == result.metric:
            print(f"  with blank images: {metric}")
    asked = {prediction.question_id for prediction in predictions}
    questions = [question for question in benchmark.load(data) if question.id in asked]
    return write_answers(folder / "answers.html", benchmark, questions, predictions, result, blind)


def describe_readings(predictions: Sequence["Prediction"]) -> list[str]:
    """Return lines with the most frequent readings of the answers, and some unreadable answers."""
    answered = [one for one in predictions if one.answer.strip()]
    counts = Counter(_shorten(one.parsed) for one in answered if one.is_clear and one.parsed)
    listed = ", ".join(f"{text} {number:,}" for text, number in counts.most_common(_MOST_SHOWN))
    more = f", and {len(counts) - _MOST_SHOWN:,} other readings" if len(counts) > _MOST_SHOWN else ""
    unread = [one for one in answered if not one.is_clear][:_MOST_QUOTED]
    quoted = "; ".join(f"{_shorten(one.answer)!r} (question {one.question_id})" for one in unread)
    texts = [f"read as: {listed}{more}"] * bool(counts) + [f"not read: {quoted}"] * bool(unread)
    return [line for text in texts for line in textwrap.wrap(text, 110, subsequent_indent="  ")]


def _shorten(text: str) -> str:
    text = "".join(character if character.isprintable() else " " for character in text)
    return textwrap.shorten(text, 40, placeholder="...") or text[:40]


def describe_answers(result: "Result", benchmark: "Benchmark") -> str:
    """Return a line with the number of unclear answers and of truncated answers."""
    line = f"unclear answers ({benchmark.unclear}): {result.num_unclear:,}"
    if result.num_cut:
        limit = result.decoding.get("max_new_tokens", benchmark.max_new_tokens)
        line += f"; cut off at {limit} tokens or at the end of the context: {result.num_cut:,}"
    return line


def describe_metrics(result: "Result") -> list[str]:
    """Return the metrics other than the headline, each kind of group (``kind=value``) on its own lines."""
    lines: dict[str, list[str]] = {}
    for metric in result.metrics:
        kind, _, group = metric.name.rpartition("=")
        if metric.name != result.metric:
            value = f"{metric.value:.0f}" if metric.value == int(metric.value) else f"{metric.value:.2f}"
            lines.setdefault(kind, []).append(f"{group} {value}".replace(" ", _GLUE))
    texts = [(f"{kind}: " if kind else "") + ", ".join(parts) for kind, parts in lines.items()]
    lines_of = (textwrap.wrap(text, 110, subsequent_indent="  ") for text in texts)
    return [line.replace(_GLUE, " ") for wrapped in lines_of for line in wrapped]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser("evaluate", _HELP)
    add = parser.add_argument
    add("model", help="checkpoint folder")
    add(
        "--data",
        required=True,
        help="folder with one subfolder per benchmark, or a file with your own questions and right answers",
    )
    add("--benchmarks", default="all", help="names separated by commas, or all: the nine of the paper")
    add("--output", default="", help="folder for answers and results (default: evaluations/MODEL-HASH)")
    add("--blind", action="store_true", help="replace every image with its mean colour")
    add("--limit", type=int, default=0, help="ask only the first LIMIT questions (default: all)")
    add("--score-only", action="store_true", help="score existing answers without loading the model")
    add(
        "--answers",
        default="",
        help="with --score-only: answers written by LLaVA's scripts; a file, or a folder with NAME.jsonl or "
        "NAME/answers/MODEL.jsonl per benchmark",
    )
    add_data_options(parser)
    add(
        "--metric",
        default="auto",
        help="own questions: exact, yes_no, number, choice, contains, vqa, f1, rouge, judge, FILE.py:NAME "
        "or auto (default: a metric that fits the right answers)",
    )
    add("--tolerance", default="0", help="own questions: how far a number may be off: 0.5, or 5%%")
    add("--max-tokens", type=int, default=256, help="own questions: max length of an answer (default: 256)")
    add("--gpus", type=int, default=0, help="GPUs, one process each (default: all of this machine)")
    add("--device", default="", help="torch device (default: a GPU if available)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights; auto: float32 on a CPU, as saved on a GPU (float32 becomes bfloat16)",
    )
    add_bits(parser)
    add("--batch-tokens", type=int, default=0, help="tokens per batch (default: depends on the device)")
    add(
        "--workers",
        type=int,
        default=max(1, min(4, num_cores() - 1)),
        help="processes that load images (default: number of cores minus one, at most 4)",
    )
    _add_judge(parser)
    known = parser.parse_args(arguments)
    _check(parser, known)
    return known


def _add_judge(parser: CommandParser) -> None:
    add = parser.add_argument
    add("--judge-url", default="", help="OpenAI-compatible endpoint of the judge, up to and including /v1")
    add("--judge-model", default="", help="model name of the judge; with --reviews, their author")
    add("--judge-key", default="OPENAI_API_KEY", help="environment variable with the API key")
    add("--judge-timeout", type=float, default=120.0, help="seconds to wait for a reply (default: 120)")
    add("--judge-concurrent", type=int, default=8, help="concurrent requests (default: 8)")
    add("--judge-price", type=float, nargs=2, metavar=("IN", "OUT"), help="price per million tokens")
    add(
        "--reviews",
        default="",
        help="recorded reviews: a file (.jsonl, or MM-Vet's .json), or a folder with NAME.jsonl, NAME.json "
        "or NAME/reviews-JUDGE.jsonl per benchmark",
    )


def _check(parser: CommandParser, known: argparse.Namespace) -> None:
    """Refuse options that exclude each other or cannot be."""
    for name, least in (("limit", 0), ("max_tokens", 1), ("batch_tokens", 0), ("workers", 0)):
        if getattr(known, name) < least:
            option = name.replace("_", "-")
            parser.error(f"--{option} is {getattr(known, name)}; it must be {least} or more")
    if known.device and known.gpus:
        parser.error("--device and --gpus exclude each other: --device is for one process")
    if known.judge_timeout <= 0 or known.judge_concurrent < 1:
        parser.error("--judge-timeout must be above 0, and --judge-concurrent at least 1")
    if known.answers and (not known.score_only or known.blind):
        parser.error("--answers needs --score-only and excludes --blind, because no model runs")
    if known.judge_url and known.reviews:
        parser.error("--judge-url and --reviews exclude each other: a score has one judge")


def _make_judges(
    known: argparse.Namespace, output: Path, benchmarks: Mapping[str, "Benchmark"]
) -> Mapping[str, "Judge | Reviews | None"]:
    """Return the judge of each benchmark, None for those that need none or have none."""
    from tinyllava.evaluation.checkpoint import find_recorded

    unjudged = dict.fromkeys(benchmarks)
    if known.reviews:
        return unjudged | find_recorded(benchmarks, known.reviews, known.judge_model)
    judged = [name for name, benchmark in benchmarks.items() if benchmark.judging is not None]
    return unjudged | dict.fromkeys(judged, _open_judge(known, output) if known.judge_url else None)


def _open_judge(known: argparse.Namespace, output: Path) -> "Judge":
    from tinyllava.errors import ConfigError
    from tinyllava.evaluation.judge import Endpoint, Judge, ReplyCache

    if not known.judge_model:
        raise ConfigError("--judge-url needs --judge-model: every result records the name of its judge.")
    if not known.judge_url.startswith(("http://", "https://")):
        raise ConfigError(
            f"--judge-url {known.judge_url!r} is not a URL. It must start with http:// or https:// "
            "and end with /v1, such as http://localhost:8000/v1."
        )
    key = os.environ.get(known.judge_key, "")
    endpoint = Endpoint(
        url=known.judge_url,
        model=known.judge_model,
        api_key=key,
        num_concurrent=known.judge_concurrent,
        timeout_seconds=known.judge_timeout,
    )
    return Judge(endpoint=endpoint, cache=ReplyCache(output / "judge_replies.jsonl"))


def _announce(
    judge: "Judge | Reviews | None",
    benchmark: "Benchmark",
    data: Path,
    output: Path,
    known: argparse.Namespace,
) -> None:
    """Print the number of requests to the judge and their cost before sending them."""
    from tinyllava.evaluation.answers import read_answers
    from tinyllava.evaluation.judge import Judge
    from tinyllava.evaluation.score import answers_folder

    if benchmark.judging is None or not isinstance(judge, Judge):
        return
    questions = benchmark.load(data)[: known.limit or None]
    answers = read_answers(answers_folder(output, benchmark, blind=known.blind), questions)
    price_in, price_out = known.judge_price or (None, None)
    cost = judge.estimate_cost(benchmark, questions, answers, data, price_in=price_in, price_out=price_out)
    print(f"{benchmark.name}: judge {judge.endpoint.model}: {cost}")
