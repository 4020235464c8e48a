"""Folders that transformers' own class wrote, and the hub's older names of the same tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

import layouts
from layouts import Toy, make_toy, model_logits, reference_logits
from tinyllava.checkpoints.importing import Given, import_checkpoint
from tinyllava.checkpoints.importing.tensors import take
from tinyllava.cli import main
from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import open_checkpoint

BEFORE, AFTER = [1, 5, 9, 30], [40, 41, 7]


def write_stock(toy: Toy, folder: Path, **changes: object) -> LlavaForConditionalGeneration:
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy.language_folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    settings = {
        "vision_feature_select_strategy": "default" if toy.vision_kind == "clip" else "full"
    } | changes
    config = LlavaConfig(
        vision_config=toy.encoder.config,
        text_config=toy.llm.config,
        image_token_index=image_id,
        image_seq_length=4,
        **settings,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.resize_token_embeddings(image_id + 1, mean_resizing=False)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:image_id] = toy.llm.get_input_embeddings().weight[
            :image_id
        ]
    model.save_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(toy.vision_folder, backend="pil")
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=settings["vision_feature_select_strategy"],
        num_additional_image_tokens=int(toy.vision_kind == "clip"),
        chat_template="{{ messages[0].content }}",
    )
    processor.save_pretrained(folder)
    return model


@torch.no_grad()
def expected_logits(toy: Toy, model: LlavaForConditionalGeneration, layer: int = -2) -> torch.Tensor:
    """The reference from the stock model's tensors: its parts, joined by hand."""
    llm = type(toy.llm)(model.config.text_config).eval()
    state = {f"model.{n}": t for n, t in model.model.language_model.state_dict().items()}
    llm.load_state_dict(state | {"lm_head.weight": model.lm_head.weight})
    projector = model.model.multi_modal_projector
    toy.connector = {
        "0.weight": projector.linear_1.weight,
        "0.bias": projector.linear_1.bias,
        "2.weight": projector.linear_2.weight,
        "2.bias": projector.linear_2.bias,
    }
    toy.encoder = model.model.vision_tower
    num_dropped = int(model.config.vision_feature_select_strategy == "default")
    return reference_logits(toy, BEFORE, AFTER, num_dropped=num_dropped, layer=layer, llm=llm)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("names", ["now", "4.52", "hub"])
def test_every_version_of_the_names(tmp_path: Path, vision: str, names: str) -> None:
    toy = make_toy(tmp_path, "llama", vision)
    model = write_stock(toy, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    renamed = {
        "now": {},
        "4.52": {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": "model.vision_tower.vision_model.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
        "hub": {"vision_tower.": "vision_tower.vision_model."},
    }[names]
    save_file(take(tensors, renamed) | tensors, file, {"format": "pt"})
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    ours, processor = open_checkpoint(tmp_path / "out")
    assert torch.allclose(model_logits(ours, BEFORE, AFTER), expected_logits(toy, model), atol=1e-5)
    assert report.num_new_rows == 0
    assert processor.chat_template == "{{- bos_token -}}{{ messages[0].content }}"  # as its tokenizer puts it
    assert "--template" in report.notes[0]


@pytest.mark.parametrize("layer", [-1, 2])
def test_other_feature_layers_and_all_features(tmp_path: Path, layer: int) -> None:
    toy = make_toy(tmp_path, "llama", "clip")
    model = write_stock(
        toy, tmp_path / "s", vision_feature_layer=layer, vision_feature_select_strategy="full"
    )
    report = import_checkpoint(tmp_path / "s", tmp_path / "out", given=Given(template="llama"))
    ours, processor = open_checkpoint(tmp_path / "out")
    assert torch.allclose(model_logits(ours, BEFORE, AFTER), expected_logits(toy, model, layer), atol=1e-5)
    assert report.num_image_tokens == 5
    assert "{% generation %}" in processor.chat_template.replace("{%- generation -%}", "{% generation %}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision_feature_layer", [-2, -5]),
        ("projector_hidden_act", "relu"),
        ("multimodal_projector_bias", False),
        ("vision_feature_select_strategy", "class"),
    ],
)
def test_settings_without_counterpart_are_refused(tmp_path: Path, key: str, value: object) -> None:
    toy = make_toy(tmp_path)
    write_stock(toy, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    layouts.write_json(tmp_path / "source" / "config.json", config | {key: value})
    with pytest.raises(CheckpointError, match=f"{key} = .* cannot be imported"):
        import_checkpoint(tmp_path / "source", tmp_path / "out")


def test_a_tokenizer_with_another_image_token_is_refused(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    write_stock(toy, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    layouts.write_json(tmp_path / "source" / "config.json", config | {"image_token_index": 7})
    with pytest.raises(CheckpointError, match=r"<image> is token 7.*--language-model DIR"):
        import_checkpoint(tmp_path / "source", tmp_path / "out")


def test_a_template_that_leaves_bos_to_the_tokenizer_and_marks_answers_without_their_blank(
    tmp_path: Path,
) -> None:
    """The hub's LLaVA-1.5: no BOS, and answers marked behind the blank in front of them."""
    template = (
        "{% for m in messages %}{{ m.role.upper() + ': ' }}"
        "{% for c in m.content if c.type == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{% for c in m.content if c.type == 'text' %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ c.text + ' ' }}{% endgeneration %}"
        "{% else %}{{ c.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    write_stock(make_toy(tmp_path), tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text(template)
    import_checkpoint(tmp_path / "source", tmp_path / "out")
    _, processor = open_checkpoint(tmp_path / "out")
    source = AutoTokenizer.from_pretrained(tmp_path / "source")
    image = (ImageRef(name="a.png"),)
    turns = (
        Message(role="user", text="What is it?", images=image), Message(role="assistant", text="A dog."),
        Message(role="user", text="Yes?"),
    )  # fmt: skip
    for number, text in (
        (1, "USER: <image>\nWhat is it? ASSISTANT:"),
        (3, "USER: <image>\nWhat is it? ASSISTANT: A dog. USER: Yes? ASSISTANT:"),
    ):
        expected = source(text.replace("<image>", "<image>" * 4))["input_ids"]
        encoded = processor.encode(Conversation(messages=turns[:number]), open_answer=True)
        assert encoded.input_ids == expected
        assert encoded.input_ids[0] == source.bos_token_id


def test_templates_are_recognised_by_their_tokens_or_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for language in ("llama", "chatml"):
        write_stock(make_toy(tmp_path / language, language), tmp_path / language / "source")
        (tmp_path / language / "source" / "chat_template.jinja").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"no prompt template is named, and several templates end a turn with '</s>'.*--template NAME",
    ):
        import_checkpoint(tmp_path / "llama" / "source", tmp_path / "out")
    report = import_checkpoint(tmp_path / "chatml" / "source", tmp_path / "out")
    assert report.template == "chatml"
    assert "<|im_start|>" in open_checkpoint(tmp_path / "out")[1].chat_template
    arguments = [str(tmp_path / "llama" / "source"), str(tmp_path / "other"), "--template", "llama"]
    assert main(["import", *arguments]) == 0
    assert "template: llama" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_tiles_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    write_stock(make_toy(tmp_path), tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    layouts.write_json(tmp_path / "source" / "config.json", config | {"model_type": kind})
    with pytest.raises(CheckpointError, match=f"model_type '{kind}' cuts an image into tiles"):
        import_checkpoint(tmp_path / "source", tmp_path / "out")
