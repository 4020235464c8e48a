"""TinyLLaVABench's layouts: the imported model computes what transformers' own classes compute."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration, MistralConfig, MistralForCausalLM

import layouts
from layouts import Toy, make_toy, model_logits, reference_logits, write_bench
from parity.vocabularies import write_bpe
from tinyllava.checkpoints.exporting import export_checkpoint
from tinyllava.checkpoints.importing import Given, import_checkpoint
from tinyllava.conversation import ImageRef, ask
from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import open_checkpoint

GOLDEN = json.loads((Path(__file__).parents[2] / "parity" / "tokens.json").read_text(encoding="utf-8"))
BEFORE, AFTER = [1, 5, 9, 30], [40, 41, 7]


def assert_same(folder: Path, expected: torch.Tensor) -> None:
    model, _ = open_checkpoint(folder)
    found = model_logits(model, BEFORE, AFTER)
    num_rows = expected.shape[-1]
    assert torch.allclose(found[..., :num_rows], expected, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize("language", ["llama", "phi", "stablelm"])
@pytest.mark.parametrize(("vision", "num_tokens"), [("clip", 4), ("siglip", 4)])
def test_whole_model(tmp_path: Path, language: str, vision: str, num_tokens: int) -> None:
    toy = make_toy(tmp_path, language, vision)
    source = write_bench(toy, tmp_path / "anything")
    report = import_checkpoint(source, tmp_path / "out")
    expected = reference_logits(
        toy, BEFORE, AFTER, num_dropped=int(vision == "clip"), llm=layouts.bench_llm(toy)
    )
    assert_same(tmp_path / "out", expected)
    assert report.num_image_tokens == num_tokens
    assert report.kind == "TinyLLaVABench, whole model"


@pytest.mark.parametrize("name", ["TinyLLaVA-3.1B-phi-lora", "finetune-stablelm-2.0b", "pretrain"])
def test_the_name_of_the_folder_decides_nothing(tmp_path: Path, name: str) -> None:
    toy = make_toy(tmp_path, "llama", "clip")
    report = import_checkpoint(write_bench(toy, tmp_path / name), tmp_path / "out")
    assert report.kind == "TinyLLaVABench, whole model"
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1))


def test_every_tensor_is_accounted_for_by_name(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama", "clip")
    report = import_checkpoint(write_bench(toy, tmp_path / "source"), tmp_path / "out")
    cut = sorted(name for name in toy.vision if "encoder.layers.3." in name)
    assert report.dropped == cut
    assert report.num_tensors + len(cut) == len(toy.text) + len(toy.vision) + len(toy.connector)
    assert json.loads((tmp_path / "out" / "import.json").read_text())["dropped"] == cut


def test_the_encoder_of_another_folder_with_a_text_half(tmp_path: Path) -> None:
    """The weights come from the hub's form of the encoder; its text half is dropped."""
    toy = make_toy(tmp_path, "llama", "siglip")
    source = write_bench(toy, tmp_path / "source", with_encoder=False)
    both = tmp_path / "both"
    layouts.write_json(both / "config.json", {"model_type": "siglip", "vision_config": toy.vision_config()})
    halves = toy.vision | {"text_model.final.weight": torch.ones(2), "logit_scale": torch.ones(1)}
    torch.save(halves, both / "pytorch_model.bin")
    report = import_checkpoint(source, tmp_path / "out", given=Given(vision_encoder=both))
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=0))
    assert sum("vision_model.head." in name for name in report.dropped) == 11
    assert {"logit_scale", "text_model.final.weight"} <= set(report.dropped)
    assert report.notes == [f"vision encoder: {both}"]  # one line, not one for each tensor that is left out


@pytest.mark.parametrize("as_file", [False, True])
def test_connector_of_stage_1(tmp_path: Path, as_file: bool) -> None:
    toy = make_toy(tmp_path, "phi", "clip")
    source = tmp_path / "run"
    layouts.write_json(source / "config.json", layouts.bench_config(toy))
    weights = {f"model.mm_projector.{n}": t for n, t in toy.connector.items()}
    file = source / "mm_projector" / "checkpoint-24.bin" if as_file else source / "mm_projector.bin"
    file.parent.mkdir(exist_ok=True)
    torch.save(weights, file)
    given = Given(vision_encoder=toy.vision_folder, language_model=toy.language_folder)
    report = import_checkpoint(file if as_file else source, tmp_path / "out", given=given)
    expected = reference_logits(toy, BEFORE, AFTER, num_dropped=1, llm=layouts.bench_llm(toy))
    assert_same(tmp_path / "out", expected)
    with_bias = reference_logits(toy, BEFORE, AFTER, num_dropped=1)
    assert not torch.allclose(with_bias, expected, atol=0.01)
    assert "lm_head.bias" in report.dropped


def test_stage_1_with_a_tuned_encoder_inside(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "phi", "siglip")
    source = tmp_path / "run"
    layouts.write_json(source / "config.json", layouts.bench_config(toy))
    torch.save({f"model.mm_projector.{n}": t for n, t in toy.connector.items()}, source / "mm_projector.bin")
    layouts.write_json(source / "vision_tower" / "config.json", toy.vision_config())
    torch.save(layouts.bench_vision(toy), source / "vision_tower" / "pytorch_model.bin")
    import_checkpoint(source, tmp_path / "out", given=Given(language_model=toy.language_folder))
    expected = reference_logits(toy, BEFORE, AFTER, num_dropped=0, llm=layouts.bench_llm(toy))
    assert_same(tmp_path / "out", expected)


def write_lora(toy: Toy, folder: Path, *, rslora: bool = False) -> torch.nn.Module:
    """Save what TinyLLaVABench saves of a LoRA run, and return peft's own model, adapters not merged."""
    base = layouts.bench_llm(toy)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "fc1", "down_proj"],
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path="owner/not-there",
    )
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    layouts.write_json(folder / "config.json", layouts.bench_config(toy))
    config.base_model_name_or_path = "owner/not-there"  # peft has put the toy's folder there
    config.save_pretrained(folder)
    adapter = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if "lora_" in n}
    torch.save(adapter, folder / "adapter_model.bin")
    others = {f"base_model.model.model.mm_projector.{n}": t for n, t in toy.connector.items()}
    torch.save(others, folder / "non_lora_trainables.bin")
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_a_language_model(tmp_path: Path, rslora: bool) -> None:
    toy = make_toy(tmp_path, "phi", "siglip")
    peft_model = write_lora(toy, tmp_path / "run", rslora=rslora)
    given = Given(vision_encoder=toy.vision_folder, language_model=toy.language_folder)
    report = import_checkpoint(tmp_path / "run", tmp_path / "out", given=given)
    expected = reference_logits(toy, BEFORE, AFTER, num_dropped=0, llm=peft_model)
    assert_same(tmp_path / "out", expected)
    plain = reference_logits(toy, BEFORE, AFTER, num_dropped=0, llm=layouts.bench_llm(toy))
    assert not torch.allclose(expected, plain, atol=0.01)
    assert report.notes[-1].startswith("6 weights merged")


def test_lora_on_a_whole_model_takes_the_trained_connector(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama", "clip")
    write_bench(toy, tmp_path / "base")
    toy.connector = {name: tensor + 0.5 for name, tensor in toy.connector.items()}
    peft_model = write_lora(toy, tmp_path / "run")
    given = Given(vision_encoder=toy.vision_folder, language_model=tmp_path / "base")
    import_checkpoint(tmp_path / "run", tmp_path / "out", given=given)
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1, llm=peft_model))


def test_stored_constants_are_recomputed_and_compared(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama", "clip")
    source = write_bench(toy, tmp_path / "source", num_shards=1)
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    positions = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    file = source / "model-00001-of-00001.safetensors"
    layouts.change_tensors(file, add={name: frequencies.half(), positions: torch.arange(5)[None]})
    report = import_checkpoint(source, tmp_path / "out")
    assert report.recomputed == [name, "vision_model.embeddings.position_ids"]
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1))


def test_llava_1_5(tmp_path: Path) -> None:
    """LLaVA-1.5 has TinyLLaVABench's names, its own model_type, and the encoder elsewhere."""
    toy = make_toy(tmp_path, "llama", "clip")
    source = write_bench(toy, tmp_path / "source", with_encoder=False, model_type="llava_llama")
    report = import_checkpoint(source, tmp_path / "out", given=Given(vision_encoder=toy.vision_folder))
    assert report.kind == "LLaVA-1.5, whole model"
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1))


def test_types_are_widened_without_loss_and_the_template_is_the_trained_one(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "stablelm", "clip")
    toy.llm.half()
    import_checkpoint(write_bench(toy, tmp_path / "source"), tmp_path / "out")
    model, processor = open_checkpoint(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "USER: " in processor.chat_template
    assert processor.image_aspect == "pad"
    assert processor.tokenizer.model_max_length == 512
    import_checkpoint(tmp_path / "source", tmp_path / "half", dtype=torch.float16)
    assert {p.dtype for p in open_checkpoint(tmp_path / "half")[0].parameters()} == {torch.float16}


def test_old_names_of_stablelm_settings(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "stablelm", "clip")
    source = write_bench(toy, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    rotary = config.pop("rope_parameters", {})
    config |= {
        "rope_pct": rotary.get("partial_rotary_factor", config.pop("partial_rotary_factor", 0.25)),
        "rope_theta": 10000,
        "norm_eps": config.pop("layer_norm_eps"),
    }
    layouts.write_json(source / "config.json", config)
    import_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1))


def test_tinyllava_3_1b_can_be_exported_as_stock_llava(tmp_path: Path) -> None:
    """Phi-2's head bias is what transformers' LLaVA cannot hold; TinyLLaVABench's models have none."""
    toy = make_toy(tmp_path, "phi", "siglip")
    import_checkpoint(write_bench(toy, tmp_path / "source"), tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "stock", layout="llava")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock")
    ids = [*BEFORE, *[stock.config.image_token_index] * 4, *AFTER]
    found = stock(input_ids=torch.tensor([ids]), pixel_values=layouts.images()).logits
    expected = reference_logits(toy, BEFORE, AFTER, num_dropped=0, llm=layouts.bench_llm(toy))
    assert torch.allclose(found[..., : expected.shape[-1]], expected, atol=1e-5)


def test_lora_with_a_partly_tuned_encoder(tmp_path: Path) -> None:
    """The run saves the layers that it tuned; the others come from the encoder's own folder."""
    toy = make_toy(tmp_path, "phi", "siglip")
    peft_model = write_lora(toy, tmp_path / "run")
    tuned = {
        n: t + 0.1 for n, t in layouts.bench_vision(toy).items() if ".layers.1." in n or ".layers.2." in n
    }
    others = torch.load(tmp_path / "run" / "non_lora_trainables.bin")
    others |= {f"base_model.model.model.vision_tower.vision_tower.{n}": t for n, t in tuned.items()}
    torch.save(others, tmp_path / "run" / "non_lora_trainables.bin")
    given = Given(vision_encoder=toy.vision_folder, language_model=toy.language_folder)
    report = import_checkpoint(tmp_path / "run", tmp_path / "out", given=given)
    untuned = reference_logits(toy, BEFORE, AFTER, num_dropped=0, llm=peft_model)
    state = {f"vision_model.{n}": t for n, t in toy.encoder.state_dict().items()} | tuned
    toy.encoder.load_state_dict({n.removeprefix("vision_model."): t for n, t in state.items()})
    expected = reference_logits(toy, BEFORE, AFTER, num_dropped=0, llm=peft_model)
    assert_same(tmp_path / "out", expected)
    assert not torch.allclose(untuned, expected, atol=0.01)
    assert any(
        note.startswith("vision encoder: 32 tuned tensors of the source over") for note in report.notes
    )


def test_the_base_of_an_adapter_is_the_one_that_it_names(tmp_path: Path) -> None:
    toy, other = make_toy(tmp_path, "phi", "siglip"), make_toy(tmp_path / "other", "phi", "siglip", seed=1)
    peft_model = write_lora(toy, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": str(toy.language_folder)}
    layouts.write_json(tmp_path / "run" / "adapter_config.json", named)
    wrong = Given(vision_encoder=toy.vision_folder, language_model=other.language_folder)
    with pytest.raises(
        CheckpointError, match=r"was trained on .*llm, which is available\. Remove the option"
    ):
        import_checkpoint(tmp_path / "run", tmp_path / "out", given=wrong)
    tokens = (
        tmp_path / "tokens"
    )  # a folder with a tokenizer alone gives that, and the weights are the named ones
    tokens.mkdir()
    layouts.save_tokenizer(toy, tokens)
    given = Given(vision_encoder=toy.vision_folder, language_model=tokens)
    import_checkpoint(tmp_path / "run", tmp_path / "out", given=given)
    expected = reference_logits(toy, BEFORE, AFTER, num_dropped=0, llm=peft_model)
    assert_same(tmp_path / "out", expected)
    layouts.write_json(
        tmp_path / "run" / "adapter_config.json", config
    )  # a hub path: the sizes have to agree
    sizes = json.loads((other.language_folder / "config.json").read_text())
    layouts.write_json(other.language_folder / "config.json", sizes | {"num_hidden_layers": 9})
    with pytest.raises(
        CheckpointError, match=r"not the language model .*num_hidden_layers 9, not 2.*owner/not"
    ):
        import_checkpoint(tmp_path / "run", tmp_path / "out2", given=wrong)


def test_llava_on_mistral_is_taken_and_tiles_are_refused_by_name(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama", "clip")
    source = write_bench(toy, tmp_path / "source", with_encoder=False, model_type="llava_mistral")
    config = json.loads((source / "config.json").read_text())
    given = Given(vision_encoder=toy.vision_folder)
    with pytest.raises(
        CheckpointError, match=r"no prompt template is named, and several templates end a turn with '</s>'"
    ):
        import_checkpoint(source, tmp_path / "out", given=given)
    given = Given(vision_encoder=toy.vision_folder, template="llama")
    layouts.write_json(source / "config.json", config | {"sliding_window": None})
    import_checkpoint(source, tmp_path / "out", given=given)
    mistral = MistralForCausalLM(MistralConfig(**toy.text_config() | {"sliding_window": None})).eval()
    mistral.load_state_dict(toy.text)
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1, llm=mistral))
    for key, value in (("image_aspect_ratio", "anyres"), ("mm_patch_merge_type", "spatial_unpad")):
        layouts.write_json(source / "config.json", config | {key: value})
        with pytest.raises(CheckpointError, match=f"{key}.*{value}.*tiles"):
            import_checkpoint(source, tmp_path / "tiles", given=given)


@pytest.mark.parametrize("model_type", ["llava_qwen", "llava_qwen2"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_llava_next_on_qwen2(tmp_path: Path, model_type: str, vision: str) -> None:
    """The flat form of LLaVA-NeXT and LLaVA-OneVision where images are not cut into tiles."""
    toy = make_toy(tmp_path, "qwen2", vision)
    source = write_bench(toy, tmp_path / "source", model_type=model_type, mm_vision_select_layer=-2)
    report = import_checkpoint(source, tmp_path / "out")
    assert (report.kind, report.template) == ("LLaVA-NeXT, whole model", "qwen")
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=int(vision == "clip")))
    _, processor = open_checkpoint(tmp_path / "out")
    text, _ = processor.render(ask(" What? ", ImageRef(name="p")), open_answer=True)
    # As its code writes a training sample: a system line in front, nothing trimmed.
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\n What? <|im_end|>\n<|im_start|>assistant\n"
    )
    config = json.loads((source / "config.json").read_text())
    for key, value in (
        ("image_aspect_ratio", "anyres_max_9"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_resampler_type", "spatial_pool"),
    ):
        layouts.write_json(source / "config.json", config | {key: value})
        with pytest.raises(CheckpointError, match=f"{key}.*{value}.*not supported"):
            import_checkpoint(source, tmp_path / "tiles")


def test_stablelm_2_as_vocabulary_and_merges(tmp_path: Path) -> None:
    """What TinyLLaVABench and Factory save of StableLM-2's and Phi-2's tokenizers."""
    toy = make_toy(tmp_path, "stablelm", "clip", num_rows=20_040)
    source = write_bench(toy, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    write_bpe(source, "stablelm")
    import_checkpoint(source, tmp_path / "out")
    _, processor = open_checkpoint(tmp_path / "out")
    text = GOLDEN["texts"][0]
    expected = GOLDEN["tokens"]["stablelm"]["texts"][0]
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_stablelm_2_as_tiktoken_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Its first release: how a text is split is in Python beside the ranks, which is never run."""
    toy = make_toy(tmp_path, "stablelm", "clip")
    source = write_bench(toy, tmp_path / "source")
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (source / "arcade100k.tiktoken").write_text("IQ== 0\nIg== 1\n")
    (source / "tokenization_arcade100k.py").write_text("raise SystemExit('was run')")
    with pytest.raises(CheckpointError, match=r"arcade100k\.tiktoken: .* Copy tokenizer\.json.*--language"):
        import_checkpoint(source, tmp_path / "out")
    shutil.copy(tmp_path / "tokenizer.json", source)
    import_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", reference_logits(toy, BEFORE, AFTER, num_dropped=1))
