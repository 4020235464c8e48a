"""Table 1, upper half: the small-scale language models, their prompt templates and their limits.

Paper: section 3.1, the small-scale LLM F_theta; section 4.1.1 for the choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyllava.errors import CheckpointError, ConfigError, look_up
from tinyllava.parts.families import LANGUAGE_FAMILIES, has_usual_settings
from tinyllava.parts.folders import check_weight_files, download, is_hub_name, read_config
from tinyllava.parts.templates import TEMPLATE_OF_END
from tinyllava.parts.user_code import is_reference, recall_as


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """The properties of a language model that are needed before its weights are loaded."""

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
    family: str = "llama"
    """Architecture, as config.json's model_type names it."""
    head_width: int = 0
    """Length of one attention head; 0 means width / num_heads."""
    is_usual: bool = True
    """Whether its size follows from the record of its family; otherwise it is built and counted."""

    @property
    def num_queries(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * (self.head_width or self.width // self.num_heads)

    @property
    def num_keys(self) -> int:
        """Width of all key heads together, which is that of the value heads too."""
        return self.num_kv_heads * (self.head_width or self.width // self.num_heads)


LANGUAGE_MODELS: dict[str, LanguageModel] = {
    model.name: model
    for model in (
        LanguageModel(
            name="TinyLlama",
            abbreviation="TL",
            path="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            template="llama",
            eos_token="</s>",
            context_tokens=2048,
            width=2048,
            num_layers=22,
            vocab_size=32_000,
            num_heads=32,
            num_kv_heads=4,
            mlp_width=5632,
            num_parameters=1_100_048_384,
            licence="Apache-2.0",
        ),
        LanguageModel(
            name="StableLM-2",
            abbreviation="SLM",
            path="stabilityai/stablelm-2-zephyr-1_6b",
            template="phi",
            eos_token="<|endoftext|>",
            context_tokens=4096,
            width=2048,
            num_layers=24,
            vocab_size=100_352,
            num_heads=32,
            num_kv_heads=32,
            mlp_width=5632,
            num_parameters=1_644_515_328,
            family="stablelm",
            licence="StabilityAI Non-Commercial Research Community",
        ),
        LanguageModel(
            name="Phi-2",
            abbreviation="Phi",
            path="microsoft/phi-2",
            template="phi",
            eos_token="<|endoftext|>",
            context_tokens=2048,
            width=2560,
            num_layers=32,
            vocab_size=51_200,
            num_heads=32,
            num_kv_heads=32,
            mlp_width=10_240,
            num_parameters=2_779_683_840,
            family="phi",
            licence="MIT",
        ),
        LanguageModel(
            name="SmolLM2-135M",
            abbreviation="Smol135M",
            path="HuggingFaceTB/SmolLM2-135M-Instruct",
            template="chatml",
            eos_token="<|im_end|>",
            context_tokens=8192,
            width=576,
            num_layers=30,
            vocab_size=49_152,
            num_heads=9,
            num_kv_heads=3,
            mlp_width=1536,
            num_parameters=134_515_008,
            tied=True,
            licence="Apache-2.0",
        ),
        LanguageModel(
            name="SmolLM2-360M",
            abbreviation="Smol360M",
            path="HuggingFaceTB/SmolLM2-360M-Instruct",
            template="chatml",
            eos_token="<|im_end|>",
            context_tokens=8192,
            width=960,
            num_layers=32,
            vocab_size=49_152,
            num_heads=15,
            num_kv_heads=5,
            mlp_width=2560,
            num_parameters=361_821_120,
            tied=True,
            licence="Apache-2.0",
        ),
        LanguageModel(
            name="SmolLM2-1.7B",
            abbreviation="Smol1.7B",
            path="HuggingFaceTB/SmolLM2-1.7B-Instruct",
            template="chatml",
            eos_token="<|im_end|>",
            context_tokens=8192,
            width=2048,
            num_layers=24,
            vocab_size=49_152,
            num_heads=32,
            num_kv_heads=32,
            mlp_width=8192,
            num_parameters=1_711_376_384,
            tied=True,
            licence="Apache-2.0",
        ),
        LanguageModel(
            name="Qwen2.5-0.5B",
            abbreviation="Qwen2.5_0.5B",
            path="Qwen/Qwen2.5-0.5B-Instruct",
            template="chatml",
            eos_token="<|im_end|>",
            context_tokens=32_768,
            width=896,
            num_layers=24,
            vocab_size=151_936,
            num_heads=14,
            num_kv_heads=2,
            mlp_width=4864,
            num_parameters=494_032_768,
            tied=True,
            family="qwen2",
            licence="Apache-2.0",
        ),
        LanguageModel(
            name="Qwen2.5-1.5B",
            abbreviation="Qwen2.5_1.5B",
            path="Qwen/Qwen2.5-1.5B-Instruct",
            template="chatml",
            eos_token="<|im_end|>",
            context_tokens=32_768,
            width=1536,
            num_layers=28,
            vocab_size=151_936,
            num_heads=12,
            num_kv_heads=2,
            mlp_width=8960,
            num_parameters=1_543_714_304,
            tied=True,
            family="qwen2",
            licence="Apache-2.0",
        ),
        LanguageModel(
            name="Qwen2.5-3B",
            abbreviation="Qwen2.5_3B",
            path="Qwen/Qwen2.5-3B-Instruct",
            template="chatml",
            eos_token="<|im_end|>",
            context_tokens=32_768,
            width=2048,
            num_layers=36,
            vocab_size=151_936,
            num_heads=16,
            num_kv_heads=2,
            mlp_width=11_008,
            num_parameters=3_085_938_688,
            tied=True,
            family="qwen2",
            licence="Qwen Research",
        ),
        LanguageModel(
            name="Qwen3-0.6B",
            abbreviation="Qwen3_0.6B",
            path="Qwen/Qwen3-0.6B",
            template="chatml",
            eos_token="<|im_end|>",
            context_tokens=40_960,
            width=1024,
            num_layers=28,
            vocab_size=151_936,
            num_heads=16,
            num_kv_heads=8,
            head_width=128,
            mlp_width=3072,
            num_parameters=596_049_920,
            tied=True,
            family="qwen3",
            licence="Apache-2.0",
        ),
        LanguageModel(
            name="Qwen3-1.7B",
            abbreviation="Qwen3_1.7B",
            path="Qwen/Qwen3-1.7B",
            template="chatml",
            eos_token="<|im_end|>",
            context_tokens=40_960,
            width=2048,
            num_layers=28,
            vocab_size=151_936,
            num_heads=16,
            num_kv_heads=8,
            head_width=128,
            mlp_width=6144,
            num_parameters=1_720_574_976,
            tied=True,
            family="qwen3",
            licence="Apache-2.0",
        ),
        LanguageModel(
            name="Gemma-2B",
            abbreviation="Gemma",
            path="google/gemma-2b-it",
            template="gemma",
            eos_token="<eos>",
            context_tokens=8192,
            width=2048,
            num_layers=18,
            vocab_size=256_000,
            num_heads=8,
            num_kv_heads=1,
            head_width=256,
            mlp_width=16_384,
            num_parameters=2_506_172_416,
            tied=True,
            family="gemma",
            licence="Gemma Terms of Use",
        ),
        LanguageModel(
            name="Llama-3.2-1B",
            abbreviation="Llama1B",
            path="meta-llama/Llama-3.2-1B-Instruct",
            template="llama3",
            eos_token="<|eot_id|>",
            context_tokens=131_072,
            width=2048,
            num_layers=16,
            vocab_size=128_256,
            num_heads=32,
            num_kv_heads=8,
            mlp_width=8192,
            num_parameters=1_235_814_400,
            tied=True,
            licence="Llama 3.2 Community",
        ),
        LanguageModel(
            name="Llama-3.2-3B",
            abbreviation="Llama3B",
            path="meta-llama/Llama-3.2-3B-Instruct",
            template="llama3",
            eos_token="<|eot_id|>",
            context_tokens=131_072,
            width=3072,
            num_layers=28,
            vocab_size=128_256,
            num_heads=24,
            num_kv_heads=8,
            mlp_width=8192,
            num_parameters=3_212_749_824,
            tied=True,
            licence="Llama 3.2 Community",
        ),
    )
}


def find_language_model(name: str, template: str = "") -> LanguageModel:
    """Return the language model of that name, abbreviation or hub path, or the description of a local folder.

    Raises:
        UnknownNameError: neither a known name nor a folder.
        CheckpointError: a folder or hub repository that is missing, damaged, or holds no language model.
        ConfigError: a folder whose end-of-turn token has no known template, when none is given.
    """
    if Path(name).is_dir():
        return _describe_folder(Path(name), template)
    if is_reference(name):
        return recall_as(name, LanguageModel)
    if found := next((m for m in LANGUAGE_MODELS.values() if name in (m.abbreviation, m.path)), None):
        return found
    if is_hub_name(name):
        described, short = _describe_folder(download(name, only=("*.json",)), template), Path(name).name
        return replace(described, name=short, abbreviation=short, path=name)
    return look_up(LANGUAGE_MODELS, name, "language model (or local folder, owner/name, or FILE.py:NAME)")


def _describe_folder(folder: Path, template: str) -> LanguageModel:
    config = read_config(folder)
    check_weight_files(folder)
    eos_token = _eos_token(folder)
    template = template or TEMPLATE_OF_END.get(eos_token, "")
    if not template:
        raise ConfigError(
            f"{folder}: no template is known for a tokenizer that ends a turn with {eos_token!r}; choose "
            "one with model.template (see `tinyllava show templates`)."
        )
    try:
        return describe_config(
            config, name=folder.name, path=str(folder), template=template, eos_token=eos_token
        )
    except KeyError as error:
        fix = (
            "download it again, or describe it as a LanguageModel in a file of yours (docs/guides/models.md)"
        )
        raise CheckpointError(f"{folder / 'config.json'}: lacks {error}; {fix}.") from error


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Settings without which a config.json describes no language model."""


def describe_config(
    config: Mapping[str, Any], *, name: str, path: str, template: str, eos_token: str
) -> LanguageModel:
    """Describe the language model of a config.json. Raises KeyError if a size is missing."""
    num_heads, family = int(config["num_attention_heads"]), str(config.get("model_type", ""))
    return LanguageModel(
        name=name,
        abbreviation=name,
        path=path,
        template=template,
        eos_token=eos_token,
        context_tokens=int(config.get("max_position_embeddings", 2048)),
        width=int(config["hidden_size"]),
        num_layers=int(config["num_hidden_layers"]),
        vocab_size=int(config["vocab_size"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        mlp_width=_mlp_width(config),
        num_parameters=0,
        tied=bool(config.get("tie_word_embeddings", False)),
        family=family,
        head_width=int(config.get("head_dim") or 0),
        is_usual=has_usual_settings(LANGUAGE_FAMILIES.get(family), config),
    )


def _mlp_width(config: Mapping[str, Any]) -> int:
    """Return the width of the feed-forward block; of a mixture of experts, of those that a token passes."""
    width = int(config.get("intermediate_size") or 4 * config["hidden_size"])
    expert_width = int(config.get("moe_intermediate_size") or width)
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    if "num_experts_per_tok" not in config:
        return width
    return int(config["num_experts_per_tok"]) * expert_width + shared


def _eos_token(folder: Path) -> str:
    name = "tokenizer_config.json"
    eos = read_config(folder, name).get("eos_token") if (folder / name).exists() else ""
    return str(eos["content"] if isinstance(eos, dict) else eos or "")
