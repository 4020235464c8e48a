"""Resolve the names, folders and Hub paths of a model's parts, once. All other code reads the result.

Paper: Figure 2, before any weights are loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from tinyllava.config import ModelConfig
from tinyllava.errors import ConfigError, TinyLlavaError
from tinyllava.parts.connectors import Connector, find_connector, num_tokens, resolve_options
from tinyllava.parts.families import LANGUAGE_FAMILIES
from tinyllava.parts.language import LANGUAGE_MODELS, LanguageModel, find_language_model
from tinyllava.parts.templates import Template, find_template
from tinyllava.parts.user_code import is_reference, run_value
from tinyllava.parts.vision import VISION_ENCODERS, VisionEncoder, find_vision_encoder, join_encoders

CODE_FIELDS = ("vision_encoder", "language_model", "connector", "template")
"""Fields of ``ModelConfig`` that can name a value of a user's code."""
T = TypeVar("T")
Part = TypeVar("Part", VisionEncoder, LanguageModel)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a model: the names of ``ModelConfig``, resolved and matched to each other."""

    encoder: VisionEncoder
    connector: Connector
    connector_options: Mapping[str, int]
    """Every option, defaults filled in."""
    language: LanguageModel
    template: Template
    """The prompt of chat and fine-tuning; a stage may have one of its own."""
    num_patches: int
    """M, at the size of the images."""
    num_image_tokens: int
    """T."""


@dataclass(kw_only=True)
class Found:
    """The parts of a model that could be resolved, None for the others, and the reasons."""

    encoder: VisionEncoder | None = None
    connector: Connector | None = None
    connector_options: dict[str, int] | None = None
    language: LanguageModel | None = None
    template: Template | None = None
    num_patches: int | None = None
    num_image_tokens: int | None = None
    errors: dict[str, TinyLlavaError] = field(default_factory=dict)
    """Field of ``ModelConfig`` -> what is wrong with it."""

    def look(self, name: str, find: Callable[[], T]) -> T | None:
        """Return the result of ``find``. Its first error is recorded under the field's name."""
        if name in self.errors:
            return None
        try:
            return find()
        except TinyLlavaError as error:
            self.errors[name] = error
            return None


def find_parts(model: ModelConfig) -> Found:
    """Look up every part of a model; an empty name is left out."""
    found = Found()
    for name in CODE_FIELDS:
        if is_reference(reference := str(getattr(model, name))):
            found.look(name, lambda reference=reference: run_value(reference))  # type: ignore[misc]
    if model.vision_encoder:
        found.encoder = found.look(
            "vision_encoder", lambda: find_vision_encoder(model.vision_encoder, model.code)
        )
    if model.language_model:
        found.language = found.look(
            "language_model", lambda: find_language_model(model.language_model, model.template)
        )
    found.connector = connector = found.look("connector", lambda: find_connector(model.connector))
    if connector:
        found.connector_options = found.look(
            "connector_options", lambda: resolve_options(connector, model.connector_options)
        )
    if found.encoder:
        found.num_patches = found.encoder.num_patches(model.image_size_px)
    options, num_patches = found.connector_options, found.num_patches
    if connector and options is not None and num_patches is not None:
        found.num_image_tokens = found.look(
            "connector_options", lambda: num_tokens(connector, num_patches, options)
        )
    if template := _template_name(model, found.language):
        found.template = found.look("template", lambda: find_template(template))
    return found


def _template_name(model: ModelConfig, language: LanguageModel | None) -> str:
    """Return the name that the config gives, that of the code which it reproduces, or the model's own."""
    family = LANGUAGE_FAMILIES.get(language.family) if language else None
    published = family.published_template if family and model.code else ""
    return model.template or published or (language.template if language else "")


def resolve(model: ModelConfig) -> Parts:
    """Return the parts that a model's config names.

    Raises:
        UnknownNameError, CheckpointError, ConfigError: the first part that cannot be had, or that does not
            fit the others. ``tinyllava.planning.check`` lists all of them.
    """
    found = find_parts(model)
    for error in found.errors.values():
        raise error
    for name in ("vision_encoder", "language_model"):
        if not getattr(model, name):
            raise ConfigError(f"model.{name}: empty; give a name or a folder (`tinyllava show` lists names).")
    values = {name: value for name, value in vars(found).items() if name != "errors"}
    return Parts(**values)


def known_parts(
    vision_encoder: str, language_model: str
) -> tuple[VisionEncoder | None, LanguageModel | None]:
    """Return the rows of the tables that a checkpoint's names mean, None where a name is in no table.

    Names, abbreviations and hub paths are understood; nothing is opened, for a checkpoint may be described
    where the parts that it was made of are not.
    """
    encoder = _row(VISION_ENCODERS, vision_encoder)
    if encoder is None and vision_encoder.count("+") == 1:
        first, second = (_row(VISION_ENCODERS, name) for name in vision_encoder.split("+"))
        encoder = join_encoders(first, second) if first and second else None
    return encoder, _row(LANGUAGE_MODELS, language_model)


def _row(table: dict[str, Part], name: str) -> Part | None:
    return next((part for part in table.values() if name in (part.name, part.abbreviation, part.path)), None)
