"""The published layouts with small random weights, each with an independent computation of its logits.

The reference never touches the package: transformers' text and vision classes, functional layers between.
At the end, a checkpoint of ours to export.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, linear
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import toys
from tinyllava.checkpoints.exporting.compare import example_image
from tinyllava.config import ModelConfig
from tinyllava.conversation import ImageRef, ask
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.model.token_rows import add_tokens

Tensors = dict[str, Tensor]
IMAGE_SIZE_PX = 28
FINAL_NORM = {"phi": "final_layernorm"}
BENCH_TYPES = {
    "llama": "tiny_llava",
    "phi": "tiny_llava_phi",
    "stablelm": "tiny_llava_stablelm",
    "qwen2": "tiny_llava_qwen",
}
ARCHITECTURES = {
    "llama": "TinyLlavaLlamaForCausalLM",
    "phi": "TinyLlavaPhiForCausalLM",
    "stablelm": "TinyLlavaStablelmForCausalLM",
    "qwen2": "TinyLlavaQwen2ForCausalLM",
}


@dataclass
class Toy:
    """A language model and an encoder, folder and model, and the tensors of a connector (nn.Sequential)."""

    language_folder: Path
    vision_folder: Path
    language_kind: str
    vision_kind: str
    llm: Any
    encoder: Any
    connector: Tensors

    @property
    def text(self) -> Tensors:
        return dict(self.llm.state_dict())

    @property
    def vision(self) -> Tensors:
        """The encoder under the hub's names, which all begin with vision_model."""
        return {f"vision_model.{name}": tensor for name, tensor in self.encoder.state_dict().items()}

    def text_config(self) -> dict[str, Any]:
        return json.loads((self.language_folder / "config.json").read_text())

    def vision_config(self) -> dict[str, Any]:
        return json.loads((self.vision_folder / "config.json").read_text())


def make_toy(
    folder: Path, language: str = "llama", vision: str = "clip", seed: int = 0, num_rows: int = 0
) -> Toy:
    torch.manual_seed(seed)
    language_folder = toys.make_language_model(folder / "llm", language, num_rows)
    vision_folder = toys.make_vision_encoder(folder / "encoder", vision)
    connector = {
        "0.weight": torch.randn(toys.WIDTH, toys.WIDTH) / 4,
        "0.bias": torch.randn(toys.WIDTH),
        "2.weight": torch.randn(toys.WIDTH, toys.WIDTH) / 4,
        "2.bias": torch.randn(toys.WIDTH),
    }
    return Toy(
        language_folder,
        vision_folder,
        language,
        vision,
        AutoModelForCausalLM.from_pretrained(language_folder).eval(),
        AutoModel.from_pretrained(vision_folder).eval(),
        connector,
    )


def images() -> Tensor:
    return torch.randn(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=torch.Generator().manual_seed(5))


def mlp(connector: Tensors, features: Tensor) -> Tensor:
    hidden = gelu(linear(features, connector["0.weight"], connector["0.bias"]))
    return linear(hidden, connector["2.weight"], connector["2.bias"])


@torch.no_grad()
def reference_logits(
    toy: Toy,
    before: list[int],
    after: list[int],
    *,
    num_dropped: int,
    layer: int = -2,
    llm: Any = None,
    tokens: Any = None,
) -> Tensor:
    """Logits of text, image, text: embeddings put together by hand and run through the text class."""
    llm = llm or toy.llm
    features = toy.encoder(images(), output_hidden_states=True).hidden_states[layer][:, num_dropped:]
    image = (tokens or mlp)(toy.connector, features)
    embed = llm.get_input_embeddings()
    parts = [embed(torch.tensor([before])), image, embed(torch.tensor([after]))]
    return llm(inputs_embeds=torch.cat(parts, dim=1)).logits


@torch.no_grad()
def model_logits(model: Any, before: list[int], after: list[int]) -> Tensor:
    """Logits of our model for the same sequence."""
    ids = [*before, *[model.config.image_token_id] * model.config.num_image_tokens, *after]
    return model(input_ids=torch.tensor([ids]), pixel_values=images()).logits


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def save_tokenizer(toy: Toy, folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((toy.language_folder / file).read_bytes())


def bench_config(toy: Toy, **changes: Any) -> dict[str, Any]:
    """config.json of TinyLLaVABench: the language model's keys and those of the connector and the encoder."""
    config = toy.text_config() | {
        "model_type": BENCH_TYPES[toy.language_kind],
        "architectures": [ARCHITECTURES[toy.language_kind]],
        "auto_map": {"AutoConfig": "configuration_phi.PhiConfig"},
        "mm_vision_tower": "owner/not-there",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": toys.WIDTH,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_projector_lr": None,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 3072,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tune_vision_tower": True,
        "tune_entire_model": True,
        "tune_embed_tokens": False,
        "pad_token": "<unk>",
        "transformers_version": "4.37.2",
    }
    return config | changes


def bench_text(toy: Toy) -> Tensors:
    """The language model as TinyLLaVABench saves it: its class declares the head without a bias."""
    return {name: tensor for name, tensor in toy.text.items() if name != "lm_head.bias"}


def bench_llm(toy: Toy) -> Any:
    """The language model as TinyLLaVABench computes it, from the toy's weights."""
    llm = copy.deepcopy(toy.llm)
    if llm.get_output_embeddings().bias is not None:
        torch.nn.init.zeros_(llm.get_output_embeddings().bias)
    return llm


def bench_vision(toy: Toy) -> Tensors:
    """What TinyLLaVABench keeps of an encoder: of SigLIP all layers but the last and no pooling head."""
    vision = toy.vision
    if toy.vision_kind == "siglip":
        vision = {
            n: t for n, t in vision.items() if "encoder.layers.3." not in n and "vision_model.head." not in n
        }
    return vision


def write_bench(
    toy: Toy, folder: Path, *, num_shards: int = 2, with_encoder: bool = True, **changes: Any
) -> Path:
    """The whole model: sharded safetensors with an index, the encoder's config in a folder of its own."""
    tensors = bench_text(toy) | {f"model.mm_projector.{n}": t for n, t in toy.connector.items()}
    if with_encoder:
        tensors |= {f"model.vision_tower.vision_tower.{n}": t for n, t in bench_vision(toy).items()}
        write_json(folder / "some_tower" / "config.json", toy.vision_config())
    write_json(folder / "config.json", bench_config(toy, **changes))
    save_tokenizer(toy, folder)
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        chosen = names[shard::num_shards]
        save_file(
            {name: tensors[name].contiguous().clone() for name in chosen}, folder / file, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(chosen, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def factory_config(toy: Toy, **changes: Any) -> dict[str, Any]:
    """config.json of TinyLLaVA Factory."""
    return {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "llm_model_name_or_path": "owner/not-there",
        "tokenizer_name_or_path": "owner/not-there",
        "vision_model_name_or_path": "owner/not-there-either",
        "vision_model_name_or_path2": "",
        "connector_type": "mlp2x_gelu",
        "text_config": toy.text_config(),
        "vision_config": toy.vision_config(),
        "hidden_size": toys.WIDTH,
        "vocab_size": toy.text_config()["vocab_size"],
        "vision_hidden_size": toys.WIDTH,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "ignore_index": -100,
        "image_token_index": -200,
        "num_queries": 128,
        "num_resampler_layers": 3,
        "resampler_hidden_size": 768,
        "tokenizer_model_max_length": 3072,
        "tune_type_llm": "full",
    } | changes


def factory_parts(toy: Toy) -> dict[str, Tensors]:
    return {
        "language_model": toy.text,
        "vision_tower": toy.vision,
        "connector": {f"_connector.{n}": t for n, t in toy.connector.items()},
    }


def write_factory(toy: Toy, folder: Path, *, three_folders: bool = False, **changes: Any) -> Path:
    write_json(folder / "config.json", factory_config(toy, **changes))
    save_tokenizer(toy, folder)
    parts = factory_parts(toy)
    if three_folders:
        for name, tensors in parts.items():
            (folder / name).mkdir()
            torch.save(tensors, folder / name / "pytorch_model.bin")
        return folder
    prefixes = {
        "language_model": "language_model.",
        "vision_tower": "vision_tower._vision_tower.",
        "connector": "connector.",
    }
    tensors = {prefixes[part] + n: t.contiguous().clone() for part in parts for n, t in parts[part].items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def change_tensors(path: Path, *, add: Tensors | None = None, remove: str = "") -> None:
    """Spoil a safetensors file."""
    tensors = load_file(path) | (add or {})
    tensors.pop(remove, None)
    save_file(tensors, path, {"format": "pt"})


def load_config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder)


def make_checkpoint(
    parts: dict[str, Path], folder: Path, language: str, vision: str, **settings: Any
) -> Path:
    """A checkpoint of ours, of toy parts and a connector that is not near zero."""
    torch.manual_seed(3)
    config = ModelConfig(vision_encoder=str(parts[vision]), language_model=str(parts[language]), **settings)
    model, processor = assemble(config)
    if config.add_tokens:
        add_tokens(model, processor, config.add_tokens)
    for parameter in model.connector.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def chat_logits(checkpoint: Path, text: str) -> tuple[Any, torch.Tensor]:
    """A prompt about the example image, and our model's logits for it."""
    model, processor = open_checkpoint(checkpoint)
    prompt, _ = processor.render(ask(text, ImageRef(name="p")), open_answer=True)
    inputs = processor(images=example_image(), text=prompt)
    with torch.no_grad():
        return inputs, model(**inputs).logits


def make_adapter(checkpoint: Path, folder: Path) -> Any:
    """Train nothing, but save what peft would: adapters with weights of their own."""
    model, _ = open_checkpoint(checkpoint)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(checkpoint)
    adapted.save_pretrained(folder)
    return adapted
