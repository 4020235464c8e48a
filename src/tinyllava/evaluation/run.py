"""Run a benchmark: ask the questions without an answer, score, and write results.json.

Paper: section 4.1.3. Folder of a benchmark: ``answers-*.jsonl`` (raw answers), ``predictions.jsonl``
(scored), ``run.json`` (which model gave the answers) and ``upload/`` (files for official servers and tools).
Differs: a stopped run resumes, and several processes share the images.
"""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tinyllava.conversation import Answer, Conversation
from tinyllava.data.bars import Bars
from tinyllava.errors import DataError, require
from tinyllava.evaluation.answers import (
    AnswerFile,
    claim_folder,
    forget_refusals,
    read_answers,
    write_refusals,
)
from tinyllava.evaluation.benchmark import Benchmark
from tinyllava.evaluation.judge import Judge, Reviews
from tinyllava.evaluation.question import Question, check_images
from tinyllava.evaluation.results import Result
from tinyllava.evaluation.score import answers_folder, refuse_other_weights, score
from tinyllava.files import held
from tinyllava.inference.batches import (
    Prepared,
    blank,
    blank_image,
    fill_batches,
    group_by_image,
    prepare,
    unpacked,
)
from tinyllava.inference.chat import Chat, decode
from tinyllava.inference.logits import stop_ids
from tinyllava.inference.shared_prefix import answer_groups, can_share
from tinyllava.model.packing import ImagePacking
from tinyllava.parts.folders import fingerprint


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a benchmark is run; none of it but ``blind`` and ``limit`` changes an answer."""

    blind: bool = False
    """Replace every image by one of the mean colour."""
    limit: int = 0
    """Ask only the first questions; 0 means all."""
    batch_tokens: int = 0
    """Most tokens of one batch; 0 means what suits the device."""
    num_workers: int = 1
    """Background processes that open images and tokenise, for each process with a model."""


def processes() -> PartialState:
    """Return the processes that ``torchrun`` or ``accelerate launch`` started; otherwise this one."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(days=2))


def evaluate(
    chat: Chat,
    benchmark: Benchmark,
    data: Path,
    output: Path,
    *,
    model: str,
    settings: Settings = Settings(),
    judge: Judge | Reviews | None = None,
) -> Result | None:
    """Answer, score and record one benchmark; all processes call it, the first returns the result.

    Args:
        data: the benchmark's folder.
        output: the answers are kept in ``output/<benchmark>``, results in ``output/results.json``.
        model: checkpoint folder, and the model's name in results.
        judge: see ``score``.

    Raises:
        DataError: files of the benchmark are missing or broken. A single broken image, or a question that
            is too long, is left without an answer instead, see ``read_refusals``.
        ConfigError: the output folder holds the answers of another run.
        OutputError: another process asks the same questions into the same folder.
        JudgeError: the judge does not answer.
    """
    if not answer_benchmark(chat, benchmark, data, output, model=model, settings=settings):
        return None
    return score(benchmark, data, output, blind=settings.blind, limit=settings.limit, judge=judge)


def answer_benchmark(
    chat: Chat, benchmark: Benchmark, data: Path, output: Path, *, model: str, settings: Settings
) -> bool:
    """Do the first half of ``evaluate``: ask; return whether this is the process that is to score."""
    if benchmark.export_package:  # before hours of work, not after them
        require(benchmark.export_package, "report", f"writes the upload files of {benchmark.name}")
    state = processes()
    questions = benchmark.load(data)[: settings.limit or None]
    if not settings.blind:
        check_images(questions)
    folder = answers_folder(output, benchmark, blind=settings.blind)
    with ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(held(folder))
            weights = fingerprint(Path(model))
            identity = {
                "model": spell(model),
                "weights": weights,
                "protocol": benchmark.prompting or benchmark.protocol,
                "max_new_tokens": benchmark.max_new_tokens,
                "blind": settings.blind,
                "dtype": chat.dtype,
            }
            refuse_other_weights(output, spell(model), weights, chat.dtype)
            claim_folder(folder, identity, questions if benchmark.is_edited else ())
            forget_refusals(folder)
        state.wait_for_everyone()
        answer_questions(chat, questions, folder, benchmark.name, benchmark.max_new_tokens, settings, state)
    return bool(state.is_main_process)


def spell(model: str) -> str:
    """Return a checkpoint's folder in one spelling, without ``./`` and ``/`` at its ends."""
    return str(Path(model))


def answer_questions(
    chat: Chat,
    questions: Sequence[Question],
    folder: Path,
    name: str,
    max_new_tokens: int,
    settings: Settings,
    state: PartialState,
) -> None:
    """Ask this process's share of the questions without an answer; return when all are done."""
    done = read_answers(folder, questions)
    state.wait_for_everyone()  # nobody writes before all have read: they have to divide the same work
    asked: Sequence[Conversation] = [question.conversation for question in questions]
    if settings.blind:
        image = blank_image(chat.processor.mean_colour)
        asked = [blank(conversation, image) for conversation in asked]
    groups = group_by_image(asked, (i for i, question in enumerate(questions) if question.id not in done))
    mine = groups[state.process_index :: state.num_processes]
    total = sum(map(len, mine))
    refused: list[tuple[Question, DataError]] = []
    with AnswerFile(folder, state.process_index) as file, _progress(name, total, state) as bar:
        for answers in ask_groups(chat, asked, mine, max_new_tokens, settings):
            file.append((questions[i], text) for i, text in answers if isinstance(text, Answer))
            refused += [(questions[i], text) for i, text in answers if isinstance(text, DataError)]
            bar.advance(bar.task_ids[0], len(answers))
    write_refusals(folder, refused, state.process_index)
    state.wait_for_everyone()


def ask_groups(
    chat: Chat,
    conversations: Sequence[Conversation],
    groups: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    settings: Settings,
) -> Iterator[list[tuple[int, Answer | DataError]]]:
    """Yield (index, answer) of the conversations in the groups, a batch at a time.

    A conversation that cannot be asked gets its error in place of an answer.
    """
    if not can_share(chat.model):
        for indices in groups:
            texts = chat.answer_each([conversations[i] for i in indices], max_new_tokens)
            yield list(zip(indices, texts, strict=True))
        return
    num_workers = min(settings.num_workers, len(groups) // 4)
    packing = ImagePacking(chat.processor)
    batch_tokens = settings.batch_tokens or suitable_batch_tokens(chat.model)
    prepared = prepare(
        chat.processor,
        conversations,
        groups,
        num_workers=num_workers,
        packing=packing,
        batch_tokens=batch_tokens,
    )
    refused: list[tuple[int, Answer | DataError]] = []

    def askable() -> Iterator[Prepared]:
        for one in prepared:
            if isinstance(one, Prepared):
                yield one
            else:
                refused.append((one.index, one.error))

    for batch in fill_batches(askable(), batch_tokens):
        parts = _answer_batch(chat, batch, packing, max_new_tokens)
        yield [answer for part in parts for answer in part]
    if refused:
        yield refused


def _answer_batch(
    chat: Chat, batch: list[Prepared], packing: ImagePacking, max_new_tokens: int
) -> Iterator[list[tuple[int, Answer | DataError]]]:
    """Answer a batch; one that the GPU has no room for is answered in halves."""
    try:
        groups = [unpacked(prepared, packing, chat.model.device) for prepared in batch]
        ids = answer_groups(chat.model, groups, max_new_tokens, chat.context_tokens)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        torch.cuda.empty_cache()
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            yield from _answer_batch(chat, half, packing, max_new_tokens)
        return
    stops = set(stop_ids(chat.model).tolist())
    for prepared, rows in zip(batch, ids, strict=True):
        answers = zip(prepared.indices, decode(chat.processor, rows), rows, strict=True)
        yield [(i, Answer(text, is_cut=row[-1] not in stops)) for i, text, row in answers]


def suitable_batch_tokens(model: Any) -> int:
    """Return the tokens of a batch: enough to fill a CPU core, or a third of the GPU's free memory."""
    if model.device.type != "cuda":
        return 8_192
    text = model.config.text_config
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = text.hidden_size // text.num_attention_heads
    # Keys and values of all layers, and the activations of one layer at their widest.
    numbers = 2 * text.num_hidden_layers * num_heads * head_width + 6 * text.intermediate_size
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(min(262_144, max(8_192, free / 3 / (numbers * model.dtype.itemsize))))


class _Speed(ProgressColumn):
    """Questions per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} questions/s")


@contextmanager
def _progress(name: str, total: int, state: PartialState) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    with Bars(*columns, disable=not state.is_main_process) as progress:
        progress.add_task(name + share, total=total)
        yield progress
