"""How much the starter trains: fixed amounts, given amounts, or what fits into some minutes on this machine.

Paper: none. A CPU with bf16 arithmetic trains twice as fast as one without, so the default amount is
measured: one batch of each kind is encoded, pre-trained and fine-tuned, and the total is computed from their
times.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tinyllava.training  # noqa: F401  (first: it imports transformers' Trainer quietly)

# isort: split
from pydantic import TypeAdapter, ValidationError
from transformers import TrainerCallback

from tinyllava.config import ModelConfig, Run
from tinyllava.data.features import FeatureCache
from tinyllava.data.records import read_records
from tinyllava.errors import ConfigError, DataError
from tinyllava.files import write_json
from tinyllava.model.assemble import assemble
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.tuning import apply_tuning
from tinyllava.starter.datasets.default import LabelledImage
from tinyllava.starter.recipe import starter_run
from tinyllava.starter.records import Amount, RecordFiles, write_records
from tinyllava.training.precision import HALF, choose_precision
from tinyllava.training.prepare import prepare
from tinyllava.training.run import make_trainer, release

FILE = "amounts.json"
DEFAULT_MINUTES = 12.0
"""Of training; what a newcomer waits for."""
NUM_STEPS = {"pretrain": 12, "finetune": 7}
"""That a stage is timed for: a few seconds each, because a step of captions is short."""
FIXED_SECONDS = 45.0
"""Estimated: fitting words, assembling, reading records, hashing tensors, saving checkpoints and model."""
NUM_START_IMAGES = 1400
"""Images of each data set, where it has as many, whose captions the connector is started from."""
SMALLEST = 0.02
"""Of the base amounts; less than that learns nothing."""
SAMPLE = Amount(captions=64, conversations=16)
"""Records of each data set that the speed is measured with: enough for the steps of both stages."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds that this machine takes for one piece of each kind of work."""

    image_seconds: float
    """To encode one image; it happens once."""
    caption_seconds: float
    conversation_seconds: float

    def training_seconds(self, amounts: Mapping[str, Amount], num_images: Mapping[str, int]) -> float:
        """Estimate encoding and both stages.

        Args:
            num_images: training images of each data set; an amount beyond them repeats some.
        """
        seconds = FIXED_SECONDS
        for name, amount in amounts.items():
            used = min(num_images[name], max(amount.captions, amount.conversations, NUM_START_IMAGES))
            seconds += used * self.image_seconds
            seconds += amount.captions * self.caption_seconds
            seconds += amount.conversations * self.conversation_seconds
        return seconds


def fit_amounts(
    speed: Speed, minutes: float, num_images: Mapping[str, int], base: Mapping[str, Amount]
) -> dict[str, Amount]:
    """Return the largest multiple of the base amounts that is trained within the minutes.

    Raises:
        ConfigError: not even a fiftieth of them fits.
    """
    low, high = SMALLEST, 64.0
    least = speed.training_seconds(scale_amounts(base, low), num_images)
    if least > 60 * minutes:
        raise ConfigError(
            f"--minutes {minutes:g}: this machine needs {least / 60:.1f} minutes for the smallest amount; "
            "give more minutes, or use --short for a quick check."
        )
    while high - low > 0.002:
        middle = (low + high) / 2
        fits = speed.training_seconds(scale_amounts(base, middle), num_images) <= 60 * minutes
        low, high = (middle, high) if fits else (low, middle)
    return share_out(total(scale_amounts(base, low)), base)


def scale_amounts(base: Mapping[str, Amount], factor: float) -> dict[str, Amount]:
    """Return a multiple of the base amounts; of captions its root, for they are learned sooner."""
    return {
        name: Amount(
            captions=max(1, round(amount.captions * factor**0.5)),
            conversations=max(1, round(amount.conversations * factor)),
        )
        for name, amount in base.items()
    }


def share_out(whole: Amount, base: Mapping[str, Amount]) -> dict[str, Amount]:
    """Divide totals among the data sets in the proportions of the base amounts; the last takes the rest."""
    of_base, rest, shares = total(base), whole, {}
    for name, amount in base.items():
        share = Amount(
            captions=round(whole.captions * amount.captions / of_base.captions),
            conversations=round(whole.conversations * amount.conversations / of_base.conversations),
        )
        shares[name] = rest if name == list(base)[-1] else share
        rest = Amount(
            captions=rest.captions - share.captions, conversations=rest.conversations - share.conversations
        )
    return shares


def total(amounts: Mapping[str, Amount]) -> Amount:
    """Return the sum over data sets."""
    return Amount(
        captions=sum(amount.captions for amount in amounts.values()),
        conversations=sum(amount.conversations for amount in amounts.values()),
    )


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The amounts with which a run folder was started."""

    amounts: dict[str, Amount]
    minutes: float = 0.0
    """Minutes that the amounts were chosen for; 0 where they were given."""


def read_begun(folder: Path) -> Begun | None:
    """Return the amounts with which a run folder was started; None if it was not.

    Raises:
        DataError: the file has another form.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Begun).validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{path}: does not contain the amounts of a run; delete {folder} to start over."
        ) from error


def save_begun(folder: Path, begun: Begun) -> None:
    """Write the amounts of a run, so that running it again resumes it whatever the machine does meanwhile."""
    write_json(folder / FILE, asdict(begun))


class StepClock(TrainerCallback):
    """Remembers when each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.monotonic())

    def usual_step(self) -> float:
        """Seconds of a step, a third of the others being faster: another program's burst does not count.

        The first step, which warms up, is not among them.
        """
        steps = sorted(after - before for before, after in pairwise(self.ends))
        return steps[len(steps) // 3]


def measure_speed(config: ModelConfig, images: Sequence[LabelledImage]) -> Speed:
    """Encode, pre-train and fine-tune a few batches as the run does, and time all but the first of each.

    Args:
        config: the starter's parts.
        images: training images to measure with.
    """
    with TemporaryDirectory() as folder:
        sources = sorted({image.source for image in images})
        files = write_records(images, Path(folder) / "records", dict.fromkeys(sources, SAMPLE))
        run = starter_run(config, Path(folder) / "records", Path(folder) / "run", None)
        model, processor = assemble(config)
        image_seconds = _encode(run, model, processor, files)
        seconds = {name: _step(run, name, model, processor) for name in run.stages}
    return Speed(
        image_seconds=image_seconds,
        caption_seconds=seconds["pretrain"] / run.stages["pretrain"].global_batch_size,
        conversation_seconds=seconds["finetune"] / run.stages["finetune"].global_batch_size,
    )


def _encode(
    run: Run, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, files: RecordFiles
) -> float:
    """Return the seconds that one image takes, and leave the features of all to the stages."""
    half = HALF.get(choose_precision(run.hardware.precision))
    cache = FeatureCache(run.folder.parent / ".features", model, processor, half)
    conversations = read_records(files.pretrain, files.images).conversations
    cache.fill(conversations[:8])
    start, before = time.monotonic(), cache.num_rows
    cache.fill(conversations)
    return (time.monotonic() - start) / (cache.num_rows - before)


def _step(
    run: Run, name: str, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor
) -> float:
    """Return the seconds of one optimizer step of a stage."""
    stage = replace(run.stages[name], max_steps=NUM_STEPS[name])
    apply_tuning(model, stage)
    prepared = prepare(run, stage, model, processor)
    clock = StepClock()
    folder = run.folder / name
    folder.mkdir(parents=True)
    trainer = make_trainer(run, stage, model, processor, prepared, folder, [clock])
    trainer.train()
    release(trainer)
    return clock.usual_step()
