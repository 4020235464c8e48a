"""Toy parts in the real layouts: Llama, Phi and StableLM with CLIP and SigLIP, saved as Hugging Face folders.

Tokenizers are trained here on a few sentences, in the kinds that the real models have: a byte-level BPE
without
BOS (Phi, StableLM, ChatML) and a SentencePiece-like BPE with BOS and a leading-space mark (Llama).
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GemmaConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
)

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: A red circle and 12 blue squares.",
    "Is there a dog? yes no. Answer the question using a single word or phrase.",
]
WIDTH = 32


def byte_level_tokenizer(eos: str) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer: byte level, no BOS, padding with EOS (as Phi-2's users do)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=eos, eos_token=eos, pad_token=eos)


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """A ChatML tokenizer: byte level with <|im_start|> and <|im_end|>."""
    tokenizer = byte_level_tokenizer("<|endoftext|>")
    tokenizer.add_special_tokens(
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    )
    return tokenizer


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer: '▁' for a space, one in front of the text, <s> in front, byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        "▁", "merged_with_next"
    )  # words, while the merges are learnt
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.pre_tokenizer = None  # as in Llama's own file
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    saved = json.loads(tokenizer.to_str())  # bytes are ordinary tokens in Llama's file, not special ones
    saved["added_tokens"] = saved["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


_COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def make_language_model(folder: Path, kind: str, num_rows: int = 0) -> Path:
    """Save a toy language model: 'llama', 'phi', 'stablelm', 'gemma', 'qwen2' or 'chatml' (a Llama, tied).

    Args:
        num_rows: of the embedding; 0 means as its toy tokenizer needs.
    """
    tokenizer = {
        "llama": llama_tokenizer,
        "gemma": llama_tokenizer,
        "chatml": chatml_tokenizer,
        "qwen2": chatml_tokenizer,
        "phi": lambda: byte_level_tokenizer("<|endoftext|>"),
        "stablelm": lambda: byte_level_tokenizer("<|endoftext|>"),
    }[kind]()
    rows = num_rows or len(tokenizer) + (
        0 if kind == "llama" else 20
    )  # Phi-2 and StableLM-2 have rows to spare
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    llama = {"vocab_size": rows, "num_key_value_heads": 2, **_COMMON, **ids}
    config = {
        "llama": lambda: LlamaConfig(**llama),
        "chatml": lambda: LlamaConfig(tie_word_embeddings=True, **llama),
        "qwen2": lambda: Qwen2Config(tie_word_embeddings=True, **llama),
        "gemma": lambda: GemmaConfig(head_dim=8, tie_word_embeddings=True, **llama),
        "phi": lambda: PhiConfig(vocab_size=rows, partial_rotary_factor=0.5, **_COMMON, **ids),
        "stablelm": lambda: StableLmConfig(
            vocab_size=rows, num_key_value_heads=4, use_qkv_bias=True, **_COMMON, **ids
        ),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config)
    if kind == "phi":
        torch.nn.init.normal_(model.lm_head.bias)  # the bias that stock LLaVA drops
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_vision_encoder(
    folder: Path, kind: str, image_size_px: int = 28, num_layers: int = 4, width: int = WIDTH
) -> Path:
    """Save a toy encoder of 2 x 2 patches: 'clip' (CLS, centre crop) or 'siglip' (no CLS, no crop)."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "image_size": image_size_px,
        "patch_size": 14,
    }
    side = {"height": image_size_px, "width": image_size_px}
    if kind == "clip":
        CLIPVisionModel(CLIPVisionConfig(**sizes, projection_dim=width)).save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": image_size_px}, crop_size=side).save_pretrained(folder)
    else:
        SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder)
        SiglipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


def make_dino(folder: Path) -> Path:
    """Save a toy DINOv2: trained at 56 pixels, its image processor crops to 28."""
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder
    )
    return folder
