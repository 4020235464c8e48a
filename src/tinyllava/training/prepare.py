"""What is decided of a stage before its first step: records, lengths, features, digests of the data.

Paper: section 4.1.2, Table 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate import PartialState
from rich.progress import Progress

from tinyllava.config import DataConfig, Run, Stage
from tinyllava.conversation import Conversation
from tinyllava.data.dataset import Examples, measure
from tinyllava.data.features import FeatureCache
from tinyllava.data.hashes import ImageHashes, images_digest, records_digest
from tinyllava.data.records import Records, drop_broken_images, read_configured
from tinyllava.data.reporting import say
from tinyllava.errors import DataError
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.parts.templates import as_published, read_template
from tinyllava.parts.user_code import is_reference, run_value
from tinyllava.training.progress import make_progress


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

    def summary(self) -> dict[str, object]:
        """Return counts for the run's metadata."""
        return {
            "num_samples": len(self.examples),
            "num_with_image": sum(bool(c.images) for c in self.examples.conversations),
            "num_tokens": sum(self.examples.lengths),
            "num_supervised_tokens": sum(self.examples.supervised_lengths),
            "longest_tokens": max(self.examples.lengths),
            "skipped": dict(self.skipped),
            "records_digest": self.records_digest,
            "images_digest": self.images_digest,
        }


def read_data(data: DataConfig, data_root: str) -> Records:
    """Read the records of a stage.

    Raises:
        ConfigError, DataError: see ``read_configured``.
    """
    records = read_configured(data, data_root)
    conversations = records.conversations
    if records.ignored and PartialState().is_main_process:
        named = ", ".join(f"{name} ({count:,})" for name, count in records.ignored.items())
        say(f"fields of the records that are not used: {named}")
    if "broken_image" in data.skip:
        with make_progress() as bar:
            task = bar.add_task("decoding images", total=len(conversations), note="")
            records = drop_broken_images(records, lambda n: bar.advance(task, n))
    return records


def prepare(
    run: Run, stage: Stage, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor
) -> Prepared:
    """Make the examples of a stage: every record read, tokenised once and measured, features computed.

    Raises:
        ConfigError, DataError, ImageError: the first thing that is wrong and was not asked to be skipped.
    """
    records = read_data(stage.data, run.data_root)
    if is_reference(stage.template):
        run_value(stage.template)
    template = read_template(stage.template) if stage.template else None
    if template and run.model.code:
        template = as_published(template)
    examples = Examples(
        conversations=records.conversations,
        processor=processor,
        template=template,
        separate_questions=stage.separate_questions,
    )
    with make_progress() as bar:
        task = bar.add_task("reading records", total=len(examples), note="")
        examples, skipped = measure(
            examples, stage.max_length_tokens, stage.data.skip, lambda n: bar.advance(task, n)
        )
        if not len(examples):
            raise DataError(f"{', '.join(stage.data.records)}: no record left after skips {dict(skipped)}.")
        if run.hardware.cache_features and not stage.vision_encoder.trains:
            examples.features = _fill_features(run, model, processor, examples, bar)
        images = _hash_images(run, examples.conversations, bar) if PartialState().is_main_process else ""
    return Prepared(
        examples=examples,
        skipped={**records.skipped, **skipped},
        images_digest=images,
        records_digest=records_digest(examples.conversations),
    )


def _hash_images(run: Run, conversations: Sequence[Conversation], bar: Progress) -> str:
    num_images = len({ref for conversation in conversations for ref in conversation.images})
    task = bar.add_task("checking images", total=num_images, note="")
    hashes = ImageHashes(run.folder.parent / ".image-hashes.sqlite")
    return images_digest(conversations, hashes.find(conversations, lambda n: bar.advance(task, n)))


def _fill_features(
    run: Run,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    examples: Examples,
    bar: Progress,
) -> FeatureCache:
    model.vision_encoder.to(PartialState().device)
    cache = FeatureCache(run.folder.parent / ".features", model, processor)
    num_images = sum(len(conversation.images) for conversation in examples.conversations)
    task = bar.add_task("encoding images", total=num_images, note="")
    cache.fill(examples.conversations, progress=lambda n: bar.advance(task, n))
    return cache
