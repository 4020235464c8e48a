"""The inputs that determine a stage's result. They decide whether a stage is resumed, reused or started over.

Paper: none. Contents count (records, images, weights, template), and settings that change the computation.
Paths and hardware settings do not.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tinyllava.config import Run, Stage, flatten
from tinyllava.data.sources import parse_source
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.tuning import Ledger, weights_digest
from tinyllava.parts.folders import resolved
from tinyllava.parts.user_code import code_digest
from tinyllava.training.precision import choose_precision
from tinyllava.training.prepare import Prepared
from tinyllava.training.trainer import micro_batch

FORMAT = 3
"""Of the key; a stage under an older one is trained again."""
# What a config says of where it came from; the same model may have come by another way.
_NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
_BY_CONTENT = ("data", "template", "max_length_tokens", "truncate")
"""Settings of a stage that count by what they lead to: records that are left, and the template's text."""
_PARTS = ("vision_encoder", "language_model", "template", "code", "add_tokens")
"""Settings of the model that count by what they lead to."""
_SOURCES = {
    "records": (
        "data.records",
        "data.keep_image_places",
        "data.skip",
        "data_root",
        "max_length_tokens",
        "truncate",
        "validation.held_out",
    ),
    "images": (
        "data.records",
        "data.images",
        "data.skip",
        "data_root",
        "max_length_tokens",
        "validation.held_out",
    ),
    "held-out records": ("validation.held_out", "data.skip", "data_root", "max_length_tokens"),
    "held-out images": ("validation.held_out", "data.images", "data.skip", "data_root", "max_length_tokens"),
    "template": ("template", "model.template", "model.code", "start_from", "model.language_model"),
}
_MODEL_SOURCES = (
    "start_from",
    "model.vision_encoder",
    "model.language_model",
    "model.code",
    "model.add_tokens",
)


@dataclass(frozen=True, kw_only=True)
class StageIdentity:
    """Everything that a stage's result depends on."""

    settings: Mapping[str, Any]
    """Dotted name -> value of each setting that changes what is computed."""
    contents: Mapping[str, str]
    """Name -> digest of what goes in: records, images, weights, template, tokenizer, ..."""
    sources: Mapping[str, Any]
    """Dotted name -> value of each setting that says where contents come from; not part of the key."""

    @property
    def key(self) -> str:
        """A digest: equal keys, equal results."""
        inputs = {"format": FORMAT, "settings": self.settings, "contents": self.contents}
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]

    @classmethod
    def read(cls, value: Any) -> Self | None:
        """Return the content of a file; None if it has another form."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, dict) or not all(isinstance(value.get(name), dict) for name in names):
            return None
        return cls(**{name: value[name] for name in names})

    def changed_contents(self, now: Self) -> list[str]:
        """Return the names of the contents that differ."""
        names = {**self.contents, **now.contents}
        return [name for name in names if self.contents.get(name) != now.contents.get(name)]

    def find_other_sources(self, now: Self) -> list[str]:
        """Return the settings, with both values, that may be why the contents differ."""
        asked = {
            source for name in self.changed_contents(now) for source in _SOURCES.get(name, _MODEL_SOURCES)
        }
        before, after = (
            {name: value for name, value in one.sources.items() if name in asked} for one in (self, now)
        )
        return differences(before, after)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return, in words, each name whose value has changed."""
    return [
        f"{name} = {before.get(name)!r} before, {now.get(name)!r} now"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def decisive_settings(run: Run, stage: Stage) -> dict[str, Any]:
    """Return the settings that change what a stage computes, as JSON would give them back."""
    values = {name: value for name, value in stage.decisive().items() if name not in _BY_CONTENT}
    values |= {
        f"model.{name}": value for name, value in dataclasses.asdict(run.model).items() if name not in _PARTS
    }
    values |= {"seed": run.seed, "precision": choose_precision(run.hardware.precision)}
    if stage.loss_norm == "micro":  # the mean of the micro-batches' means depends on their size
        values["micro_batch_size"] = micro_batch(stage, run.hardware)
    return dict(flatten(json.loads(json.dumps(values))))


def identify(
    run: Run,
    stage: Stage,
    ledger: Ledger,
    prepared: Prepared,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
) -> StageIdentity:
    """Return the inputs that determine the result of a stage.

    Args:
        model: with the stage's plan applied. Its weights alone do not tell it: connectors that average to 1
            and to 4 tokens have the same.
    """
    contents = {
        "records": prepared.records_digest,
        "images": prepared.images_digest,
        "weights": weights_digest(ledger, model),
        "template": _digest(prepared.examples.template or processor.chat_template),
        "tokenizer": _digest(_describe_tokenizer(processor)),
        "architecture": _digest(_without_origin(model.config.to_dict())),
        "image processor": _digest(
            [processor.image_aspect, processor.transparency, processor.image_processor.to_dict()]
        ),
    }
    if prepared.held_out and stage.validation.decides:
        contents["held-out records"] = prepared.held_out.records_digest
        contents["held-out images"] = prepared.held_out.images_digest
    if digest := code_digest(run.model.connector):
        contents["connector's code"] = digest
    return StageIdentity(
        settings=decisive_settings(run, stage), contents=contents, sources=_sources(run, stage)
    )


def _sources(run: Run, stage: Stage) -> dict[str, Any]:
    later = {"data.keep_image_places": stage.data.keep_image_places, "truncate": stage.truncate}
    return {
        **{name: value for name, value in later.items() if value},
        "data.records": [resolved(s.name) + s.options for s in map(parse_source, stage.data.records)],
        "data.images": resolved(stage.data.images),
        "data.skip": sorted(set(stage.data.skip)),
        "data_root": resolved(run.data_root),
        "validation.held_out": resolved(stage.validation.held_out),
        "max_length_tokens": stage.max_length_tokens,
        "template": stage.template,
        "model.template": run.model.template,
        "model.code": run.model.code,
        "model.vision_encoder": resolved(run.model.vision_encoder),
        "model.language_model": resolved(run.model.language_model),
        "start_from": resolved(run.start_from),
        "model.add_tokens": list(run.model.add_tokens),
    }


def _describe_tokenizer(processor: TinyLlavaProcessor) -> Any:
    """Return all that a tokenizer does, less what the last call asked of it."""
    tokenizer = processor.tokenizer
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole.pop("padding", None)
    whole.pop("truncation", None)
    return [whole, tokenizer.special_tokens_map, processor.num_image_tokens]


def _without_origin(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_origin(value) for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
    return config


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]
