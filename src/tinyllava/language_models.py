"""Table 1, upper half: the small-scale language models, their prompt templates and their limits.

Paper: section 3.1, the small-scale LLM F_theta; section 4.1.1 for the choice.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tinyllava.errors import ConfigError
from tinyllava.lookup import look_up
from tinyllava.vision_encoders import read_config


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """What the framework must know of a language model before its weights are there."""

    name: str
    abbreviation: str
    path: str
    """Hugging Face path, or a local folder."""
    template: str
    """Name of the prompt template (templates/<name>.jinja)."""
    eos_token: str
    """What ends an assistant turn; the template writes it, generation stops at it."""
    context_tokens: int
    """Number of positions."""
    width: int
    """Length D of a token embedding."""
    num_layers: int
    vocab_size: int
    """Rows of the embedding, which may be more than the tokens of the tokenizer."""
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    num_parameters: int
    tied: bool = False
    """Whether the head shares the embedding's rows."""
    licence: str = ""


LANGUAGE_MODELS: dict[str, LanguageModel] = {
    model.name: model
    for model in (
        LanguageModel(
            name="TinyLlama", abbreviation="TL", path="TinyLlama/TinyLlama-1.1B-Chat-v1.0", template="llama",
            eos_token="</s>", context_tokens=2048, width=2048, num_layers=22, vocab_size=32_000, num_heads=32,
            num_kv_heads=4, mlp_width=5632, num_parameters=1_100_048_384, licence="Apache-2.0",
        ),
        LanguageModel(
            name="StableLM-2", abbreviation="SLM", path="stabilityai/stablelm-2-zephyr-1_6b", template="phi",
            eos_token="<|endoftext|>", context_tokens=4096, width=2048, num_layers=24, vocab_size=100_352,
            num_heads=32, num_kv_heads=32, mlp_width=5632, num_parameters=1_644_515_328,
            licence="StabilityAI Non-Commercial Research Community",
        ),
        LanguageModel(
            name="Phi-2", abbreviation="Phi", path="microsoft/phi-2", template="phi",
            eos_token="<|endoftext|>", context_tokens=2048, width=2560, num_layers=32, vocab_size=51_200,
            num_heads=32, num_kv_heads=32, mlp_width=10_240, num_parameters=2_779_683_840, licence="MIT",
        ),
        LanguageModel(
            name="SmolLM2-135M", abbreviation="Smol135M", path="HuggingFaceTB/SmolLM2-135M-Instruct",
            template="chatml", eos_token="<|im_end|>", context_tokens=8192, width=576, num_layers=30,
            vocab_size=49_152, num_heads=9, num_kv_heads=3, mlp_width=1536, num_parameters=134_515_008,
            tied=True, licence="Apache-2.0",
        ),
    )
}  # fmt: skip

# The template that fits a local folder, by the token that its tokenizer ends a turn with.
_TEMPLATE_OF_EOS = {"</s>": "llama", "<|endoftext|>": "phi", "<|im_end|>": "chatml", "<eos>": "gemma"}


def find_language_model(name: str, template: str = "") -> LanguageModel:
    """Return the language model of that name or abbreviation, or the description of a local folder.

    Raises:
        UnknownNameError: neither a known name nor a folder.
        CheckpointError: a folder without a readable config.json.
        ConfigError: a folder whose end-of-turn token has no known template, when none is given.
    """
    if Path(name).is_dir():
        return _describe_folder(Path(name), template)
    by_abbreviation = {model.abbreviation: model for model in LANGUAGE_MODELS.values()}
    if name in by_abbreviation:
        return by_abbreviation[name]
    return look_up(LANGUAGE_MODELS, name, "language model (or local folder)")


def _describe_folder(folder: Path, template: str) -> LanguageModel:
    config = read_config(folder)
    eos_token = _eos_token(folder)
    template = template or _TEMPLATE_OF_EOS.get(eos_token, "")
    if not template:
        raise ConfigError(
            f"{folder}: no template is known for a tokenizer that ends a turn with {eos_token!r}; "
            "name one with model.template (see `tinyllava show templates`)."
        )
    num_heads = int(config["num_attention_heads"])
    return LanguageModel(
        name=folder.name, abbreviation=folder.name, path=str(folder), template=template, eos_token=eos_token,
        context_tokens=int(config.get("max_position_embeddings", 2048)), width=int(config["hidden_size"]),
        num_layers=int(config["num_hidden_layers"]), vocab_size=int(config["vocab_size"]), num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        mlp_width=int(config.get("intermediate_size") or 4 * config["hidden_size"]),
        num_parameters=0, tied=bool(config.get("tie_word_embeddings", False)),
    )  # fmt: skip


def _eos_token(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return ""
    eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token") or ""
    return str(eos["content"] if isinstance(eos, dict) else eos)
