"""Measure a stage on held-out records during training: loss, best checkpoint, early stopping, answers.

Paper: none; its stages run one epoch and are measured by benchmarks afterwards.
Validation does not change the weights that the steps compute: the random state is restored, and the model
returns to its previous mode.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinyllava.config import Validation
from tinyllava.conversation import Conversation
from tinyllava.data.checking import STYLES
from tinyllava.data.images import thumbnail_url
from tinyllava.files import append_lines, page_environment, whole_objects, write_text
from tinyllava.inference.chat import Chat
from tinyllava.model.compat import looking_at_padding
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.training.precision import computing_in

if TYPE_CHECKING:
    from tinyllava.training.trainer import StageTrainer
ANSWERS = "held-out.jsonl"
PAGE = "held-out.html"
Curve = list[tuple[int, float]]
"""(step, mean loss over the held-out records' supervised tokens), in order of the steps."""
_ANSWER_TOKENS = 128


def read_curve(log_history: Sequence[Mapping[str, Any]]) -> Curve:
    """Return the held-out loss of each validation from the Trainer's log. Step 0 is before the first."""
    return [(int(entry["step"]), float(entry["eval_loss"])) for entry in log_history if "eval_loss" in entry]


def best_step(curve: Curve) -> int | None:
    """Return the step with the lowest loss, the earliest of equals; None before a step was validated."""
    return min(((loss, step) for step, loss in curve if step), default=(0.0, None))[1]


def is_stopped(curve: Curve, validation: Validation) -> bool:
    """Whether so many validations in a row had no lower loss that the stage ends early."""
    best = best_step(curve)
    return best is not None and 0 < validation.patience <= sum(step > best for step, _ in curve)


class Validator(TrainerCallback):
    """Requests validations, keeps the best checkpoint, stops early, and writes the answers to a sample.

    Args:
        validation: of the stage.
        processor: which the sample is asked with.
        held: the held-out records.
        folder: of the stage.
    """

    def __init__(
        self,
        validation: Validation,
        processor: TinyLlavaProcessor,
        held: Sequence[Conversation],
        folder: Path,
    ) -> None:
        self.validation, self.processor, self.folder = validation, processor, folder
        self.sample = [held[i] for i in range(min(validation.num_answers, len(held)))]
        self.trainer: StageTrainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Validate before the first step; drop answers of steps that are done again."""
        if state.is_world_process_zero and (self.folder / ANSWERS).exists():
            given = whole_objects(self.folder / ANSWERS) if state.global_step else []
            kept = [json.dumps(line) + "\n" for line in given if line["step"] <= state.global_step]
            write_text(self.folder / ANSWERS, "".join(kept))
        if state.global_step == 0 and self.trainer is not None:
            self.trainer.evaluate()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Validate after the last step too."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Save a step that is the best so far, and end the stage where no validation gets better."""
        curve = read_curve(state.log_history)
        if state.global_step and best_step(curve) == state.global_step:
            control.should_save = True
        if is_stopped(curve, self.validation):
            control.should_save = control.should_training_stop = True
        if self.sample and state.is_world_process_zero:
            precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
            with computing_in(precision, args.device):
                self._answer(options["model"], state.global_step)
            write_page(self.folder, self.sample, curve)
        PartialState().wait_for_everyone()

    def _answer(self, model: TinyLlavaForConditionalGeneration, step: int) -> None:
        chat = Chat(model, self.processor)
        with looking_at_padding(model.language_model):
            answers = chat.answer_each([open_question(one) for one in self.sample], _ANSWER_TOKENS)
        lines = [
            {"step": step, "record": one.place, "answer": str(answer)}
            for one, answer in zip(self.sample, answers, strict=True)
        ]
        append_lines(self.folder / ANSWERS, [json.dumps(line) for line in lines])


def open_question(conversation: Conversation) -> Conversation:
    """Return a conversation up to its first answer, which is to be given."""
    messages = conversation.messages
    end = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
    return replace(conversation, messages=messages[:end])


def write_page(folder: Path, sample: Sequence[Conversation], curve: Curve) -> None:
    """Write the page of the sample's answers so far, with images inside."""
    given: dict[str, list[tuple[int, str]]] = {}
    for line in whole_objects(folder / ANSWERS):
        given.setdefault(line["record"], []).append((line["step"], line["answer"]))
    records = []
    for one in sample:
        asked = open_question(one).messages
        expected = one.messages[len(asked)].text if len(asked) < len(one.messages) else ""
        records.append(
            {
                "images": [thumbnail_url(ref) for ref in open_question(one).images],
                "question": asked[-1].text,
                "expected": expected.strip(),
                "answers": given.get(one.place, []),
                "place": one.place,
            }
        )
    losses, last = [loss for _, loss in curve], max([step for step, _ in curve], default=0) or 1
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    points = " ".join(
        f"{50 + 580 * step / last:.1f},{190 - 180 * (loss - low) / ((high - low) or 1):.1f}"
        for step, loss in curve
    )
    template = page_environment(Path(__file__).parent, STYLES).get_template("held_out.html")
    values = {"records": records, "curve": curve, "points": points, "low": low, "high": high}
    write_text(folder / PAGE, template.render(values))
