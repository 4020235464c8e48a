"""A pair of GGUF files becomes a checkpoint again: our own exports, of every family and every type."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize
from PIL import Image
from transformers import AutoTokenizer

from exporting_toys import make
from tinyllava.checkpoints.exporting.compare import encode_example, example_logits
from tinyllava.checkpoints.exporting.gguf import write_gguf
from tinyllava.checkpoints.importing import Given, import_checkpoint
from tinyllava.cli import main
from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import open_checkpoint

FAMILIES = ["llama", "phi", "stablelm", "chatml", "qwen2", "qwen3", "gemma"]


def written(folder: Path, checkpoint: Path, quantized: Any = "f32") -> Any:
    """Write the pair; return the model whose weights are rounded to what was written, and its processor."""
    model, processor = open_checkpoint(checkpoint, dtype="float32")
    folder.mkdir()
    write_gguf(folder, model, processor, "toy", quantized)
    return model, processor


@pytest.mark.parametrize("vision", ["siglip", "clip"])
@pytest.mark.parametrize("language", FAMILIES)
def test_our_own_pair_becomes_the_same_model(tmp_path: Path, language: str, vision: str) -> None:
    model, processor = written(tmp_path / "pair", make(tmp_path, language, vision))
    report = import_checkpoint(tmp_path / "pair", tmp_path / "back")
    assert report.kind == "GGUF of llama.cpp"
    other, other_processor = open_checkpoint(tmp_path / "back")
    expected, found = model.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    unused = {name for name in expected if "post_layernorm" in name}
    scaled = {name for name in expected if language == "gemma" and "linear_2" in name}  # there and back
    for name in expected.keys() - unused - scaled:
        if language == "gemma" and name.endswith("norm.weight"):  # stored one higher
            torch.testing.assert_close(found[name], expected[name], atol=2e-7, rtol=0)
        else:
            assert torch.equal(found[name], expected[name]), name
    limit = 1e-4 if language == "gemma" else 0.0
    difference = example_logits(other, other_processor) - example_logits(model, processor)
    assert difference.abs().max() <= limit
    assert other.config.num_language_rows == model.config.num_language_rows
    assert other.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_prompts_and_pixels_are_the_same(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, "llama", "siglip", image_aspect="square", transparency="drop")
    _, processor = written(tmp_path / "pair", checkpoint)
    assert main(["import", str(tmp_path / "pair" / "mmproj.gguf"), str(tmp_path / "back")]) == 0
    _, other = open_checkpoint(tmp_path / "back")
    assert (other.image_aspect, other.transparency) == ("square", "drop")
    assert other.chat_template == processor.chat_template
    expected, found = encode_example(processor), encode_example(other)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    said = "12 dogs\nare <image> here, </s> it's\t\u00e4 \u732b"
    messages = (Message(role="user", text=said, images=(ImageRef(name="i"),)),)
    ids = [p.encode(Conversation(messages=messages), open_answer=True).input_ids for p in (processor, other)]
    assert ids[0] == ids[1]
    image = Image.effect_noise((90, 40), 50).convert("RGB")
    assert torch.equal(processor.to_pixels([image]), other.to_pixels([image]))


def rewrite_as_others(file: Path) -> None:
    """Name everything as llama.cpp's own converter for LLaVA's encoders does.

    Its real files, of toys of every family, were imported with differences of 0 once, Gemma with a tokenizer
    of SentencePiece's among them. Of SigLIP it writes the pooling head, and no GELU: only "gelu" counts.
    """
    reader = GGUFReader(file)
    writer = GGUFWriter(file.with_name("mmproj-model-f32.gguf"), "clip")
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    is_clip = any(tensor.name == "v.class_embd" for tensor in reader.tensors)
    writer.add_bool("clip.use_gelu", is_clip and "clip.use_gelu" in reader.fields)
    if not is_clip:
        writer.add_tensor("v.head.probe", np.zeros((1, 1, 32), np.float32))
    for name, field in reader.fields.items():
        if name.startswith("clip.vision.") and not name.endswith(("feature_layer", "projector_type")):
            writer.add_key_value(name, field.contents(), *field.types[:2])
    names = {"ffn_up": "ffn_down", "ffn_down": "ffn_up", "mm.1": "mm.2"}
    for tensor in reader.tensors:
        part = next((part for part in names if part in tensor.name), "")
        writer.add_tensor(tensor.name.replace(part, names[part]) if part else tensor.name, tensor.data.copy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file.unlink()


@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_an_encoder_as_others_convert_it_is_imported_exactly(tmp_path: Path, vision: str) -> None:
    model, processor = written(tmp_path / "pair", make(tmp_path, "llama", vision))
    rewrite_as_others(tmp_path / "pair" / "mmproj.gguf")
    for name in ("mmproj-of-another-model.gguf", "one-more.gguf"):
        (tmp_path / "pair" / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"one language model.*Give the path of the language model's"):
        import_checkpoint(tmp_path / "pair", tmp_path / "back")
    model_file = tmp_path / "pair" / "model.gguf"
    with pytest.raises(CheckpointError, match=r"one file with mmproj in its name.*--mmproj FILE"):
        import_checkpoint(model_file, tmp_path / "back")
    encoder = (tmp_path / "pair" / "mmproj-model-f32.gguf").rename(tmp_path / "encoder.gguf")
    arguments = ["--mmproj", str(encoder), "--template", "llama"]
    assert main(["import", str(model_file), str(tmp_path / "back"), *arguments]) == 0
    report = json.loads((tmp_path / "back" / "import.json").read_text())
    assert report["dropped"] == ([] if vision == "clip" else ["head.probe"])
    assert ("SigLIP's (tanh GELU)" in " ".join(report["notes"])) == (vision == "siglip")
    other, other_processor = open_checkpoint(tmp_path / "back")
    assert torch.equal(example_logits(other, other_processor), example_logits(model, processor))
    with pytest.raises(CheckpointError, match=r"--mmproj .*is not a GGUF file"):
        import_checkpoint(tmp_path / "model", tmp_path / "again", given=Given(mmproj=encoder))


@pytest.mark.parametrize("quantized", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("language", ["llama", "phi"])
def test_fewer_bits_are_what_the_gguf_package_dequantises(
    tmp_path: Path, language: str, quantized: Any
) -> None:
    model, processor = written(tmp_path / "pair", make(tmp_path, language), quantized)
    import_checkpoint(tmp_path / "pair", tmp_path / "back")
    other, other_processor = open_checkpoint(tmp_path / "back")
    assert torch.equal(example_logits(other, other_processor), example_logits(model, processor))
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "pair" / "model.gguf").tensors}
    there = tensors["blk.1.ffn_down.weight"]
    name = {"llama": "down_proj", "phi": "fc2"}[language]
    found = other.model.language_model.layers[1].mlp.get_submodule(name).weight
    assert torch.equal(found, torch.from_numpy(dequantize(there.data, there.tensor_type).copy()))


def test_what_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "pair", make(tmp_path, "chatml"))
    back = tmp_path / "back"
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(tmp_path / "pair" / "model.gguf", alone / "model.gguf")
    with pytest.raises(CheckpointError, match=r"one file with mmproj in its name.*found model\.gguf"):
        import_checkpoint(alone, back)
    (alone / "mmproj.gguf").write_bytes((tmp_path / "pair" / "mmproj.gguf").read_bytes()[:64])
    with pytest.raises(CheckpointError, match=r"mmproj\.gguf: not a readable GGUF file"):
        import_checkpoint(alone, back)
    shutil.copyfile(tmp_path / "pair" / "model.gguf", alone / "mmproj.gguf")
    with pytest.raises(CheckpointError, match=r"projector type None; allowed: janus_pro, mlp"):
        import_checkpoint(alone, back)
    monkeypatch.setattr("gguf.Keys.Tokenizer.HF_JSON", "tokenizer.of.nobody")  # as in the files of others
    with pytest.raises(CheckpointError, match=r"not every rule of the tokenizer.*--language-model DIR"):
        import_checkpoint(tmp_path / "pair", back)
    assert not back.exists()
    language = tmp_path / "language"
    AutoTokenizer.from_pretrained(language).save_pretrained(tmp_path / "tokenizer")
    import_checkpoint(tmp_path / "pair", back, given=Given(language_model=tmp_path / "tokenizer"))
    assert (back / "model.safetensors").is_file()
