"""Prepare a stage before its first step: records, lengths, features, digests of the data.

Paper: section 4.1.2, Table 2.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from rich.progress import Progress, TaskID

from tinyllava.config import DataConfig, Run, Stage
from tinyllava.conversation import Conversation
from tinyllava.data.conversion import read_stored
from tinyllava.data.dataset import Examples, measure
from tinyllava.data.defects import Defect, raise_defects
from tinyllava.data.distinct_images import DistinctImages
from tinyllava.data.features import FeatureCache
from tinyllava.data.hashes import ImageDigests, ImageHashes, images_digest, records_digest
from tinyllava.data.held_out import hold_out
from tinyllava.data.readers.hub import is_hub_name, pinned
from tinyllava.data.records import Records
from tinyllava.data.reporting import say
from tinyllava.data.sources import Share
from tinyllava.data.store import distinct, image_counts, kept_digest, record_numbers, select
from tinyllava.errors import DataError, ImageError
from tinyllava.files import read_object
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.packing import ImagePacking
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.parts.templates import as_published, read_template
from tinyllava.parts.user_code import is_reference, run_value
from tinyllava.training.precision import HALF, choose_precision, multiplying
from tinyllava.training.progress import make_progress

_IMAGES = ".image-hashes.sqlite"
_LONG_SECONDS = 5
"""Of decoding: above it, what it took is said."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The records that a stage is measured on and does not train on."""

    examples: Examples
    skipped: Mapping[str, int]
    records_digest: str
    images_digest: str
    """Empty in processes other than the first."""
    num_seen: int
    """Records with an image that is trained on; 0 where the share of a stage's own records is held out, and
    in processes other than the first."""

    def summary(self) -> dict[str, object]:
        """Return counts for the run's metadata."""
        return {
            "num_samples": len(self.examples),
            "num_supervised_tokens": sum(self.examples.supervised_lengths),
            "num_with_seen_image": self.num_seen,
            "skipped": dict(self.skipped),
            "records_digest": self.records_digest,
            "images_digest": self.images_digest,
        }


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The data of one stage, ready to be trained on."""

    examples: Examples
    skipped: Mapping[str, int]
    """Records left out, by the name of the defect; only names that the stage asked for."""
    records_digest: str
    """Of what the records that are left say."""
    images_digest: str
    """Of the content of their images; empty in processes other than the first, which need not know."""
    mixture: Sequence[Share] = ()
    """What each file gives, where not every record is one sample; before skips of this stage."""
    held_out: HeldOut | None = None

    def summary(self) -> dict[str, object]:
        """Return counts for the run's metadata."""
        return {
            "num_samples": len(self.examples),
            "num_with_image": int((image_counts(self.examples.conversations) > 0).sum()),
            "num_tokens": sum(self.examples.lengths),
            "num_supervised_tokens": sum(self.examples.supervised_lengths),
            "longest_tokens": max(self.examples.lengths),
            "skipped": dict(self.skipped),
            **({"truncated": self.examples.num_truncated} if self.examples.num_truncated else {}),
            **({"mixture": [one.summary() for one in self.mixture]} if self.mixture else {}),
            "records_digest": self.records_digest,
            "images_digest": self.images_digest,
            **({"held_out": self.held_out.summary()} if self.held_out else {}),
        }


def pin(run: Run) -> Run:
    """Return a run with the commit of each data set of the hub; one that its folder records already stays.

    Raises:
        ConfigError, DataError: see ``tinyllava.data.readers.hub.pinned``.
    """
    before = (read_object(run.folder / "run.json") or {}).get("stages")
    known: dict[str, str] = {}
    for text in re.findall(r"hf:[^\",]+@[0-9a-f]{40}", json.dumps(before)):
        known[text.rpartition("@")[0]] = text

    def pinned_entry(entry: str) -> str:
        name, comma, options = entry.partition(",")
        if not is_hub_name(name):
            return entry
        if name not in known and not re.search(r"@[0-9a-f]{40}$", name):
            known[name] = pinned(name)
        return known.get(name, name) + comma + options

    def pinned_stage(stage: Stage) -> Stage:
        records = tuple(map(pinned_entry, stage.data.records))
        held_out = pinned_entry(stage.validation.held_out)
        return replace(
            stage,
            data=replace(stage.data, records=records),
            validation=replace(stage.validation, held_out=held_out),
        )

    return replace(run, stages={name: pinned_stage(stage) for name, stage in run.stages.items()})


def read_data(run: Run, data: DataConfig, *, decode: bool = True) -> Records:
    """Read records; they are converted once, for every run in this folder.

    Args:
        decode: also leave out records with a broken image, where that was asked for.

    Raises:
        ConfigError, DataError: see ``read_stored``.
    """
    records = read_stored(data, run.data_root, run.folder.parent / ".records")
    if not decode or "broken_image" not in data.skip:
        return records
    bad: list[int] = []
    if PartialState().is_main_process:
        with make_progress() as bar:
            bad = list(_find_broken(run, data, records.conversations, bar))
    [bad] = broadcast_object_list([bad])
    numbers = record_numbers(records.conversations)
    return replace(
        records,
        conversations=select(records.conversations, np.setdiff1d(np.arange(len(numbers)), bad)),
        skipped={**records.skipped, "broken_image": len(np.unique(numbers[np.array(bad, dtype=np.int64)]))},
    )


def _find_broken(
    run: Run, data: DataConfig, conversations: Sequence[Conversation], bar: Progress
) -> dict[int, ImageError]:
    """Return the places of conversations with a broken image, each with the reason."""
    images, start = DistinctImages(conversations), time.monotonic()
    task = bar.add_task("decoding images", total=len(images), note="")
    hashes = ImageHashes(run.folder.parent / _IMAGES)
    broken = hashes.find_broken(images, lambda n: bar.advance(task, n))
    seconds = time.monotonic() - start
    if seconds > _LONG_SECONDS:
        files = ", ".join(data.records)
        say(
            f"{files}: {hashes.num_decoded:,} images checked in {seconds:,.0f} s (repeated only if they "
            "change)"
        )
    return {place: broken[number] for place, number in images.showing(broken)}


def _check_images(run: Run, data: DataConfig, conversations: Sequence[Conversation], bar: Progress) -> None:
    """Raise Defect or Defects for records with images that cannot be decoded, unless they are skipped."""
    once = distinct(conversations)
    found = _find_broken(run, data, once, bar)
    if "broken_image" not in data.skip:
        defects = [
            Defect("broken_image", once[place].place, str(error).rstrip("."))
            for place, error in found.items()
        ]
        raise_defects(Path(once[0].source) if len(once) else Path(), defects)


def check_data(run: Run, processor: TinyLlavaProcessor) -> None:
    """Read and measure the records of every stage, and decode their images, before the first stage trains.

    What is found is kept, so that a stage's own turn and later starts cost little.

    Raises:
        ConfigError, DataError: see ``read_data`` and ``measure``.
    """
    with make_progress() as bar:
        for stage in run.stages.values():
            template = _template_of(run, stage)
            wanted = stage.validation
            own = wanted.held_out and wanted.share is None
            files = [stage.data, *([replace(stage.data, records=(wanted.held_out,))] if own else [])]
            for data in files:
                records = read_data(run, data, decode=False)
                _say_ignored(data, records)
                examples, _ = _measure(
                    stage, processor, template, records.conversations, "counting tokens", bar
                )
                if run.hardware.check_images and PartialState().is_main_process:
                    _check_images(run, data, examples.conversations, bar)


def _say_ignored(data: DataConfig, records: Records) -> None:
    if records.ignored and PartialState().is_main_process:
        named = ", ".join(f"{name} ({count:,})" for name, count in records.ignored.items())
        say(f"{', '.join(data.records)}: unused fields: {named}")


def _template_of(run: Run, stage: Stage) -> str | None:
    if is_reference(stage.template):
        run_value(stage.template)
    template = read_template(stage.template) if stage.template else None
    return as_published(template) if template and run.model.code else template


def prepare(
    run: Run, stage: Stage, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor
) -> Prepared:
    """Make the examples of a stage: every record read, tokenised once and measured, features computed.

    Raises:
        ConfigError, DataError, ImageError: what is wrong and was not asked to be skipped.
    """
    records = read_data(run, stage.data)
    template = _template_of(run, stage)
    with make_progress() as bar:
        trained, held = _hold_out(run, stage, records, bar)
        examples, skipped = _measure(stage, processor, template, trained, "counting tokens", bar)
        if not len(examples):
            raise DataError(f"{', '.join(stage.data.records)}: no records left after skips {dict(skipped)}.")
        measured, held_skipped = None, Counter[str]()
        if held is not None:
            measured, held_skipped = _measure(stage, processor, template, held, "held-out records", bar)
            if not len(measured):
                raise DataError(
                    f"{stage.validation.held_out}: no held-out records left after skips {dict(held_skipped)}."
                )
        both = [examples, *([measured] if measured else [])]
        has_features = run.hardware.cache_features and not stage.vision_encoder.trains
        is_first = PartialState().is_main_process
        hashes = (
            [_find_hashes(run, part.conversations, bar) for part in both] if is_first or has_features else []
        )
        if has_features:
            _fill_features(run, model, processor, both, hashes, bar)
        else:
            packing = ImagePacking(processor)
            for part in both:
                part.packing = packing
        hashes = hashes if is_first else []
    return Prepared(
        examples=examples,
        skipped={**records.skipped, **skipped},
        images_digest=_digest_images(examples, hashes[0]) if hashes else "",
        records_digest=kept_digest(examples.conversations, "records", records_digest),
        mixture=records.mixture,
        held_out=_describe_held(examples, measured, held_skipped, hashes) if measured else None,
    )


def _hold_out(
    run: Run, stage: Stage, records: Records, bar: Progress
) -> tuple[Sequence[Conversation], Sequence[Conversation] | None]:
    """Return the records to train on and those to measure on; None without validation.

    The first process hashes images and decides; see ``tinyllava.data.held_out``.
    """
    wanted, conversations = stage.validation, records.conversations
    if not wanted.held_out:
        return conversations, None
    if wanted.share is None:
        file = replace(stage.data, records=(wanted.held_out,))
        return conversations, read_data(run, file).conversations
    chosen: list[int] = []
    if PartialState().is_main_process:
        chosen = hold_out(conversations, _find_hashes(run, conversations, bar), wanted.share)
    [chosen] = broadcast_object_list([chosen])
    held = np.array(chosen, dtype=np.int64)
    trained = np.setdiff1d(np.arange(len(conversations)), held)
    return select(conversations, trained), distinct(select(conversations, held))


def _measure(
    stage: Stage,
    processor: TinyLlavaProcessor,
    template: str | None,
    conversations: Sequence[Conversation],
    task_name: str,
    bar: Progress,
) -> tuple[Examples, Counter[str]]:
    examples = Examples(
        conversations=conversations,
        processor=processor,
        template=template,
        separate_questions=stage.separate_questions,
    )
    tasks: list[TaskID] = []

    def advance(number: int) -> None:  # which is not called where all tokens are counted already
        if not tasks:
            tasks.append(bar.add_task(task_name, total=len(examples), note=""))
        bar.advance(tasks[0], number)

    return measure(examples, stage.max_length_tokens, stage.data.skip, advance, truncate=stage.truncate)


def _describe_held(
    trained: Examples, held: Examples, skipped: Mapping[str, int], hashes: Sequence[ImageDigests]
) -> HeldOut:
    """Describe held-out records.

    Args:
        hashes: of the images of the trained and of the held-out records; empty in processes other than the
            first.
    """
    num_seen, images = 0, ""
    if hashes:
        seen = set(chain.from_iterable(hashes[0].of_each()))
        num_seen = sum(not seen.isdisjoint(shown) for shown in hashes[1].of_each())
        images = images_digest(hashes[1])
    return HeldOut(
        examples=held,
        skipped=dict(skipped),
        records_digest=kept_digest(held.conversations, "records", records_digest),
        images_digest=images,
        num_seen=num_seen,
    )


def _find_hashes(run: Run, conversations: Sequence[Conversation], bar: Progress) -> ImageDigests:
    images = DistinctImages(conversations)
    task = bar.add_task("hashing images", total=len(images), note="")
    hashes = ImageHashes(run.folder.parent / _IMAGES)
    with FileLock(hashes.path.with_suffix(".lock")):  # one process reads them, the others find them known
        return hashes.find(images, lambda n: bar.advance(task, n))


def _digest_images(examples: Examples, hashes: ImageDigests) -> str:
    """Return the digest of the images, which is kept for as long as no image changes."""
    name = f"images-{hashes.digest[:24]}"
    return kept_digest(examples.conversations, name, lambda _: images_digest(hashes))


def _fill_features(
    run: Run,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    parts: Sequence[Examples],
    hashes: Sequence[ImageDigests],
    bar: Progress,
) -> None:
    """Give the examples the features of their images, after computing missing ones."""
    model.vision_encoder.to(PartialState().device)
    half = HALF.get(choose_precision(run.hardware.precision))
    cache = FeatureCache(run.folder.parent / ".features", model, processor, half)
    conversations = [examples.conversations for examples in parts]
    num_images = sum(int(image_counts(examples.conversations).sum()) for examples in parts)
    task = bar.add_task("encoding images", total=num_images, note="")
    with multiplying("fp32"):  # the same in every precision: runs share them
        cache.fill(*conversations, progress=lambda n: bar.advance(task, n), hashes=hashes)
    for examples in parts:
        examples.features = cache
