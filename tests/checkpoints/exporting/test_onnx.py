"""ONNX graphs in onnxruntime: the same pixels, image tokens, logits and answers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import ConvNextConfig, ConvNextImageProcessorPil, ConvNextModel

from exporting_toys import InOpenVino
from layouts import make_checkpoint
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.checkpoints.exporting.formats import list_formats, refuse_what_does_not_fit
from tinyllava.checkpoints.exporting.graphs import Pixels
from tinyllava.cli import main
from tinyllava.conversation import ask
from tinyllava.errors import CheckpointError, MissingExtraError
from tinyllava.inference.chat import Chat
from tinyllava.model.assemble import open_checkpoint

SIZES = [(61, 90), (90, 61), (28, 28), (7, 5), (400, 31), (31, 400), (1000, 31), (20, 900), (333, 500)]


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def raw(image: Image.Image) -> Any:
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None]


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_pixels_are_pillows_for_every_shape(
    parts: dict[str, Path], tmp_path: Path, vision: str, aspect: Any
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", vision, image_aspect=aspect)
    _, processor = open_checkpoint(checkpoint)
    for has_doubles in (True, False):
        pixels = Pixels(processor, has_doubles=has_doubles)
        for size in SIZES:
            image = noise(*size)
            assert torch.equal(pixels(torch.from_numpy(raw(image))), processor.to_pixels([image])), size


def answer_with_graphs(
    folder: Path, checkpoint: Path, image: Path, suffix: str, num_tokens: int, question: str, runtime: Any
) -> str:
    """Answer as a runtime that knows nothing of tinyllava: three graphs and the exported tokenizer."""
    from transformers import PreTrainedTokenizerFast

    config, own = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "processor_config"))
    vision, embed, decoder = (
        runtime(folder / "onnx" / f"{name}{suffix}.onnx")
        for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    )
    decoder_path = folder / "onnx" / f"decoder_model_merged{suffix}.onnx"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    num_image_tokens = own["num_additional_image_tokens"]
    ids = tokenizer(prompt.replace("<image>", "<image>" * num_image_tokens))["input_ids"]
    model, processor = open_checkpoint(checkpoint)
    assert ids == processor.encode(ask(question, image), open_answer=True).input_ids
    features = vision.run(None, {"pixel_values": raw(Image.open(image))})[0]
    expected = model.model.get_image_features(processor.to_pixels([Image.open(image)]))
    assert np.abs(features - expected.detach().numpy()).max() < (1e-4 if not suffix else 1)
    embeds = embed.run(None, {"input_ids": np.array([ids])})[0]
    embeds[0, np.array(ids) == config["image_token_index"]] = features[0]
    cache = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in onnxruntime.InferenceSession(decoder_path).get_inputs()[3:]
    }
    answer: list[int] = []
    length = 0
    while len(answer) < num_tokens:
        new, length = embeds.shape[1], length + embeds.shape[1]
        logits, *present = decoder.run(
            None,
            {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": np.arange(length - new, length)[None],
                **cache,
            },
        )
        cache = dict(zip(cache, present, strict=True))
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == tokenizer.eos_token_id:
            break
        embeds = embed.run(None, {"input_ids": np.array([answer[-1:]])})[0]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


@pytest.mark.parametrize(
    ("language", "vision", "precision", "settings"),
    [
        (
            "llama",
            "cnn",
            "fp32",
            {"connector": "slots", "add_tokens": ("<loc_0>", "<loc_1>")},
        ),  # the starter's
        ("phi", "clip", "fp32", {"connector": "resampler"}),
        ("stablelm", "siglip", "fp16", {"connector": "pixel_shuffle", "connector_options": {"block": 2}}),
        ("chatml", "clip", "int8", {"image_aspect": "square"}),
    ],
)
def test_graphs_answer_as_the_checkpoint(
    parts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    language: str,
    vision: str,
    precision: str,
    settings: Any,
) -> None:
    sizes = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": 64}
    ConvNextModel(ConvNextConfig(**sizes)).save_pretrained(tmp_path / "cnn")
    ConvNextImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(tmp_path / "cnn")
    parts = {**parts, "cnn": tmp_path / "cnn"}
    checkpoint = make_checkpoint(parts, tmp_path / "own", language, vision, **settings)
    out = tmp_path / "out"
    assert main(["export", str(checkpoint), str(out), "--format", "onnx", "--dtype", precision]) == 0
    said = capsys.readouterr().out
    assert "reloaded and compared: largest logit difference" in said
    assert "same most likely token at" in said
    assert "same most likely token at" in (out / "README.md").read_text()
    suffix = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}[precision]
    graphs = [onnx_ir.load(path).graph for path in (out / "onnx").iterdir()]
    stored = [v.const_value.nbytes for g in graphs for v in g.initializers.values() if v.const_value]
    (row,) = (row for row in list_formats(checkpoint) if row.name == f"onnx {precision}")
    assert row.num_bytes == pytest.approx(sum(stored), rel=0.03)
    noise(70, 45).save(tmp_path / "image.png")
    added = settings.get("add_tokens", ())
    own = open_checkpoint(checkpoint)[1].tokenizer
    assert all(len(own(token, add_special_tokens=False)["input_ids"]) == 1 for token in added)
    question = " ".join(("How many?", *added))
    found, in_openvino = (
        answer_with_graphs(out, checkpoint, tmp_path / "image.png", suffix, 6, question, runtime)
        for runtime in (onnxruntime.InferenceSession, InOpenVino)
    )
    assert in_openvino == found
    if precision == "fp32":
        chat = Chat.open(checkpoint)
        assert found.strip() == chat.answer([ask(question, tmp_path / "image.png")], 6)[0]
    decoder = out / "onnx" / f"decoder_model_merged{suffix}.onnx"
    inputs = onnxruntime.InferenceSession(decoder).get_inputs()
    assert [entry.name for entry in inputs[:4]] == [
        "inputs_embeds", "attention_mask", "position_ids", "past_key_values.0.key",
    ]  # fmt: skip
    assert inputs[3].shape[0] == "batch_size"


def test_what_the_graphs_do_not_compute_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    model, _ = open_checkpoint(checkpoint)
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(CheckpointError, match="layers of kind sliding_attention"):
        refuse_what_does_not_fit(model.config, "onnx")
    model.config.text_config.layer_types = None
    model.config.text_config.sliding_window = 100
    with pytest.raises(CheckpointError, match="a window of 100 tokens"):
        refuse_what_does_not_fit(model.config, "onnx")
    settings = json.loads((checkpoint / "processor_config.json").read_text())
    settings["image_processor"]["resample"] = 1
    (checkpoint / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"Pillow's filter 1.*2 \(bilinear\)"):
        export_checkpoint(checkpoint, tmp_path / "out", layout="onnx")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_and_a_wrong_type_are_named(
    parts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = make_checkpoint(parts, tmp_path / "own", "llama", "clip")
    for layout, dtype, match in (
        ("onnx", "bfloat16", "with --format onnx give fp32, fp16, int8"),
        ("llava", "int8", "with --format llava give float32, bfloat16, float16"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(checkpoint), str(tmp_path / "out"), "--format", layout, "--dtype", dtype])
        assert match in capsys.readouterr().err
    monkeypatch.setattr("tinyllava.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onnx, which .*pip install 'tinyllava\[onnx\]'"):
        export_checkpoint(checkpoint, tmp_path / "out", layout="onnx")
