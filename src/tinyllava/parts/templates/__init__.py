"""Prompt templates: one Jinja file each, with marks around the model's answers.

Paper: section 3.2; the text between ``{% generation %}`` and ``{% endgeneration %}`` is the set A of equation
3. A template is saved in the checkpoint, so training, chat, evaluation and serving use the same one.
Text that several templates share is in a ``.part`` file, which is inserted when a template is read.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from tinyllava.errors import ConfigError, look_up
from tinyllava.parts.user_code import is_reference, recall_value

_FOLDER = files("tinyllava.parts.templates")
_INCLUDED = re.compile(r"\{%- include '(\w+\.part)' -%\}\n")
_SAID = (_FOLDER / "said.part").read_text(encoding="utf-8")
_IS_SAID = re.compile(r"said\(messages?(\[0\])?\.content\)")
_TRIMMED = "{%- set trimmed = true -%}"
_UNTRIMMED = "{%- set trimmed = false -%}"
# The one line of a template that says what stands between BOS, or an image, and the text behind it.
NO_GAP = "{%- set gap = '' -%}"
GAP = "{%- set gap = ' ' -%}"
TEMPLATE_OF_END = {
    "</s>": "llama",
    "<|endoftext|>": "phi",
    "<|im_end|>": "chatml",
    "<eos>": "gemma",
    "<|eot_id|>": "llama3",
}
"""The template that fits a local folder, by the token that its tokenizer ends a turn with."""


def template_names() -> list[str]:
    """Return the names of all templates."""
    return sorted(
        entry.name.removesuffix(".jinja") for entry in _FOLDER.iterdir() if entry.name.endswith(".jinja")
    )


@dataclass(frozen=True, kw_only=True)
class Template:
    """A prompt template."""

    name: str
    text: str
    """Jinja."""


def find_template(name: str) -> Template:
    """Return the template of that name.

    Raises:
        UnknownNameError: no such template.
    """
    if is_reference(name):
        text = recall_value(name)
        if not isinstance(text, str) or "endgeneration" not in text:
            raise ConfigError(
                f"{name}: not a template; write a Jinja text with {{% generation %}} and {{% endgeneration "
                f"%}} around the model's answers (docs/guides/models.md)."
            )
        return Template(name=name, text=text)
    entry = look_up({known: f"{known}.jinja" for known in template_names()}, name, "template")
    text = (_FOLDER / entry).read_text(encoding="utf-8")
    return Template(
        name=name, text=_INCLUDED.sub(lambda part: (_FOLDER / part[1]).read_text(encoding="utf-8"), text)
    )


def read_template(name: str) -> str:
    """Return the text of a template; raises as ``find_template``."""
    return find_template(name).text


def as_published(template: str) -> str:
    """Return a template that keeps the outer blanks of every turn, as the published code does.

    They are part of the labels there. A question that is an image alone gets no line of its own.
    """
    return template.replace(_TRIMMED, _UNTRIMMED)


def gap_of(template: str) -> str:
    """Return the text that a template puts between an image and the text after it, if that is a space."""
    return " " if GAP in template else ""


@lru_cache(maxsize=16)
def is_packaged(template: str) -> bool:
    """Whether a template is one of the package's, in any of its variants.

    All of them use a turn's text only as a whole, see ``tinyllava.model.rendering``.
    """
    plain = template.replace(GAP, NO_GAP).replace(_UNTRIMMED, _TRIMMED)
    return plain in map(read_template, template_names())


@lru_cache(maxsize=16)
def takes_plain_text(template: str) -> bool:
    """Whether a template gives the same for a turn's text as for typed content of that text alone.

    It does where ``said.part`` alone looks at the content. Rendering takes a third less time.
    """
    return _SAID in template and "content" not in _IS_SAID.sub("", template.replace(_SAID, ""))
