"""GGUF files of toys in llama.cpp: every family, every type of weights, text and image."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, TokenType

from exporting_toys import make
from tinyllava.checkpoints import exporting
from tinyllava.checkpoints.exporting import export_checkpoint, gguf, llama_cpp
from tinyllava.cli import main
from tinyllava.errors import CheckpointError

# What was measured (F32: text 1e-3, image 2e-3), with room for another CPU's order of sums.
LIMITS = {"f32": 5e-3, "f16": 0.02, "q8_0": 0.3, "q4_0": 0.3}
# The keys that llama.cpp's own converter writes of the same models: convert_hf_to_gguf.py as it comes with
# llama_cpp_python 0.3.36, run by hand on these toys. All tensors were bit by bit ours.
THEIRS_ALWAYS = {
    *(f"general.{name}" for name in ("architecture", "file_type", "name", "quantization_version")),
    *("general.size_label", "general.type", "*.attention.head_count", "*.attention.head_count_kv"),
    *("*.block_count", "*.context_length", "*.embedding_length", "*.feed_forward_length"),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")),
    *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "token_type", "tokens")),
}
_RMS = {"*.attention.key_length", "*.attention.value_length", "*.attention.layer_norm_rms_epsilon"}
_MERGES, _SCORES = {"tokenizer.ggml.merges"}, {"tokenizer.ggml.scores"}
_LLAMA = {*_RMS, "*.rope.dimension_count", "*.rope.freq_base", "*.vocab_size"}
_LAYER_NORM = {"*.attention.layer_norm_epsilon", "*.rope.dimension_count"}
THEIRS = {
    "llama": {*_LLAMA, *_SCORES, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.unknown_token_id"},
    "chatml": _LLAMA | _MERGES,
    "phi": {*_LAYER_NORM, *_MERGES, "tokenizer.ggml.add_bos_token"},
    "stablelm": {*_LAYER_NORM, *_MERGES, "*.use_parallel_residual"},
    "qwen2": {*_RMS, *_MERGES, "*.rope.freq_base"},
    "qwen3": {*_RMS, *_MERGES, "*.rope.freq_base"},
    "gemma": {*_RMS, *_SCORES, "tokenizer.ggml.add_space_prefix"},  # and eot = 107, which is CodeGemma's
}
# Ours say besides: defaults of llama.cpp, spelt out; that the template writes BOS and blanks; the rest of the
# tokenizer; and the template, which their converter takes from files that the toys do not have.
OURS_BESIDES = {
    *("*.rope.dimension_count", "*.rope.freq_base", "*.vocab_size", "tokenizer.ggml.unknown_token_id"),
    *("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix"),
    *("tokenizer.huggingface.json", "tokenizer.chat_template"),
}


@pytest.mark.parametrize("quantized", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("language", ["llama", "phi", "stablelm", "chatml", "qwen2", "qwen3", "gemma"])
def test_llama_cpp_computes_the_same(tmp_path: Path, language: str, quantized: Any) -> None:
    checkpoint = make(tmp_path, language)
    exported = export_checkpoint(checkpoint, tmp_path / "out", layout="gguf", quantized=quantized)
    found = exported.agreement
    assert found is not None
    assert max(found.text, found.image) == exported.largest_difference <= LIMITS[quantized]
    if quantized in ("f32", "f16"):  # as good as exact, and nothing that one type would hide
        assert max(found.text_rounding, found.image_rounding) <= 0.05
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.gguf", "mmproj.gguf", "Modelfile", "README.md"}
    if quantized == "f32":
        check_keys(tmp_path / "out", language)


def check_keys(folder: Path, language: str) -> None:
    """Compare the keys with those of llama.cpp's converter, and what a user's <image> would be read as."""
    fields = GGUFReader(folder / "model.gguf").fields
    prefix = f"{fields['general.architecture'].contents()}."
    keys = {name.replace(prefix, "*.", 1) if name.startswith(prefix) else name for name in fields}
    keys = {name for name in keys if not name.startswith("GGUF.")}
    theirs = THEIRS_ALWAYS | THEIRS[language]
    assert theirs - keys == set()
    assert keys - theirs <= OURS_BESIDES
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert types[tokens.index("<image>")] == TokenType.UNUSED
    kinds = [fields["general.type"], GGUFReader(folder / "mmproj.gguf").fields["general.type"]]
    assert [kind.contents() for kind in kinds] == ["model", "mmproj"]


def test_the_command_says_what_it_measured_and_the_card_how_to_send_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make(tmp_path, "phi")
    out = tmp_path / "out"
    assert main(["export", str(checkpoint), str(out), "--format", "gguf", "--quantize", "q4_0"]) == 0
    printed = capsys.readouterr().out
    assert "opened in llama.cpp (xllamacpp " in printed
    assert "with the weights before rounding" in printed
    card = (out / "README.md").read_text()
    assert "The weights are q4_0." in card
    assert "llama.cpp first resizes and then pads" in card
    assert "ideally at 28 x 28 pixels" in card
    assert "llama-server -m out/model.gguf --mmproj out/mmproj.gguf" in card
    assert str(tmp_path) not in card
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out / "model.gguf").tensors}
    assert {types["blk.0.attn_q.weight"], types["blk.1.ffn_down.weight"]} == {"Q4_0"}
    assert {types["token_embd.weight"], types["output.weight"]} == {"Q8_0"}
    assert {types["output.bias"], types["blk.0.attn_norm.weight"]} == {"F32"}
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\nFROM ./mmproj.gguf\n")
    assert 'PARAMETER stop "<|endoftext|>"' in modelfile
    assert '{{ if eq .Role "user" }}USER: {{ .Content }} ASSISTANT:' in modelfile


def test_clip_is_right_or_refused_with_the_faults_of_llama_cpp(tmp_path: Path) -> None:
    """Decided by the comparison: once llama.cpp is right, the export goes through by itself."""
    checkpoint = make(tmp_path, "llama", "clip")
    refused = ""
    try:
        exported = export_checkpoint(checkpoint, tmp_path / "out", layout="gguf")
    except CheckpointError as error:
        refused = str(error)
    if not refused:
        assert exported.largest_difference is not None
        assert exported.largest_difference <= LIMITS["f32"]
        return
    for part in ("after a prompt with image", "#25814", "#25844", "#25817", "#25845"):
        assert part in refused
    assert not (tmp_path / "out").exists()


def test_without_xllamacpp_nothing_is_said_to_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    checkpoint = make(tmp_path, "chatml")
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--format", "gguf"]) == 0
    assert "not compared, because xllamacpp is not installed" in capsys.readouterr().out
    assert (
        "Not measured, because `xllamacpp` was not installed." in (tmp_path / "out" / "README.md").read_text()
    )
    clip = make(tmp_path / "second", "llama", "clip")
    with pytest.raises(CheckpointError, match=r"(?s)pip install tinyllava\[gguf\].*#25814"):
        export_checkpoint(clip, tmp_path / "clip", layout="gguf")


@pytest.mark.parametrize("quantized", ["f32", "q4_0"])
def test_a_wrong_order_of_rows_is_found_in_every_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: Any
) -> None:
    monkeypatch.setattr(gguf, "_rotated_heads", lambda there, text: 0)
    checkpoint = make(tmp_path, "llama")
    with pytest.raises(CheckpointError, match=r"not exported: after a prompt with text.*differ by up to"):
        export_checkpoint(checkpoint, tmp_path / "out", layout="gguf", quantized=quantized)
    assert not (tmp_path / "out").exists()


def test_what_rounding_of_activations_does_is_told_from_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real models move by more than the limit of the toys; then the same weights are compared in 16 bits."""
    checkpoint = make(tmp_path, "llama")
    monkeypatch.setitem(llama_cpp.LARGEST_DIFFERENCE, "q8_0", 1e-6)
    exported = export_checkpoint(checkpoint, tmp_path / "out", layout="gguf", quantized="q8_0")
    assert exported.largest_difference is not None
    assert 1e-6 < exported.largest_difference <= LIMITS["q8_0"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.gguf",
        "mmproj.gguf",
        "Modelfile",
        "README.md",
    }
    monkeypatch.setattr(llama_cpp, "LARGEST_DIVERGENCE", 1e-12)
    with pytest.raises(CheckpointError, match=r"diverges by .* nats .*agree in 16 bits.*--quantize f16"):
        export_checkpoint(checkpoint, tmp_path / "refused", layout="gguf", quantized="q8_0")


def test_files_that_llama_cpp_does_not_open_are_refused_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gguf.TEXT_NAMES, "norm", "output_norm_of_nobody")
    checkpoint = make(tmp_path, "llama")
    with pytest.raises(CheckpointError, match=r"ended with exit status .*output_norm"):
        export_checkpoint(checkpoint, tmp_path / "out", layout="gguf")


def test_what_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make(tmp_path, "llama", connector="resampler")
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    (checkpoint / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(exporting, "open_merged", None)  # which would load the weights
    with pytest.raises(CheckpointError, match=r"(?s)rotary embedding of type 'yarn'.*connector 'resampler'"):
        export_checkpoint(checkpoint, tmp_path / "out", layout="gguf")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantize", "f16"], "--quantize works only with --format gguf"),
        (["--format", "gguf", "--dtype", "float16"], "--dtype does not work with --format gguf"),
    ],
)
def test_options_of_other_formats_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", "nowhere", "out", *arguments])
    assert said in capsys.readouterr().err
