"""Token ids and supervised positions equal the published code's, which tokens.json holds (see README.md)."""

import copy
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, CLIPImageProcessorPil

import layouts
import toys
from parity.vocabularies import write_bpe, write_gemma, write_llama
from tinyllava.checkpoints.importing import import_checkpoint
from tinyllava.conversation import Conversation, ImageRef, Message
from tinyllava.data.records import read_records
from tinyllava.errors import CheckpointError
from tinyllava.model.assemble import open_processor
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.tokenizer import fit_template, open_tokenizer
from tinyllava.parts.templates import as_published, read_template

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("tokens.json").read_text(encoding="utf-8"))
LEGACY = {"llama-true": True, "llama-false": False, "llama-absent": None}
NAMES = [*LEGACY, "gemma", "phi", "stablelm", "qwen2"]
FAMILIES = {"gemma": "gemma"} | dict.fromkeys(LEGACY, "llama")
IMAGE = -200  # what the published code writes where an image's tokens come


def write_vocabulary(folder: Path, name: str) -> Path:
    if name in LEGACY:
        return write_llama(folder, LEGACY[name])
    return write_gemma(folder) if name == "gemma" else write_bpe(folder, name)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    return {name: write_vocabulary(folder / name, name) for name in NAMES}


@cache
def opened(folder: Path) -> Any:
    return open_tokenizer(folder, older_first=True)


@cache
def make_processor(folder: Path, name: str) -> TinyLlavaProcessor:
    tokenizer = copy.deepcopy(opened(folder))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    template = as_published(fit_template(read_template(FAMILIES.get(name, "phi")), tokenizer))
    return TinyLlavaProcessor(CLIPImageProcessorPil(), tokenizer, chat_template=template, num_image_tokens=1)


def published_ids(processor: TinyLlavaProcessor, ids: list[int]) -> list[int]:
    return [IMAGE if token == processor.image_token_id else token for token in ids]


@pytest.mark.parametrize("name", NAMES)
def test_text_has_the_pieces_of_the_slow_tokenizer(
    vocabularies: dict[str, Path], name: str, tmp_path: Path
) -> None:
    tokenizer = opened(vocabularies[name])
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        for text, ids in zip(GOLDEN["texts"], GOLDEN["tokens"][name]["texts"], strict=True):
            if name == "llama-false" and text.startswith(" "):
                continue  # a beginning that is a blank already is not marked; templates begin with BOS
            assert one(text, add_special_tokens=False)["input_ids"] == ids, text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["samples", "captions"])
def test_training_samples(vocabularies: dict[str, Path], name: str, stage: str, tmp_path: Path) -> None:
    """Multi-turn, text-only and caption records: the same ids, the same positions supervised."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "records.json").write_text(json.dumps(GOLDEN["records" if stage == "samples" else stage]))
    records = read_records(tmp_path / "records.json", tmp_path)
    processor = make_processor(vocabularies[name], name)
    template = as_published(read_template("caption")) if stage == "captions" else None
    expected = GOLDEN["tokens"][name][stage]
    for conversation, sample in zip(records.conversations, expected, strict=True):
        encoded = processor.encode(conversation, template=template)
        assert published_ids(processor, encoded.input_ids) == sample["ids"], conversation.id
        found = "".join(str(int(is_supervised)) for is_supervised in encoded.supervised)
        assert found == sample["supervised"], conversation.id


@pytest.mark.parametrize("name", NAMES)
def test_prompts(vocabularies: dict[str, Path], name: str) -> None:
    processor = make_processor(vocabularies[name], name)
    image = (ImageRef(name="a.png"),)
    for prompt, ids in zip(GOLDEN["prompts"], GOLDEN["tokens"][name]["prompts"], strict=True):
        message = Message(role="user", text=prompt["question"], images=image * prompt["has_image"])
        encoded = processor.encode(Conversation(messages=(message,)), open_answer=True)
        assert published_ids(processor, encoded.input_ids) == ids, prompt["question"]
    turns = (
        Message(role="user", text="What is it?", images=image),
        Message(role="assistant", text="A cat."),
        Message(role="user", text="Sure?"),
    )
    encoded = processor.encode(Conversation(messages=turns), open_answer=True)
    assert published_ids(processor, encoded.input_ids) == GOLDEN["tokens"][name]["second_turn"]


@pytest.mark.parametrize("name", LEGACY)
def test_an_imported_checkpoint_has_the_tokens_that_it_was_trained_with(name: str, tmp_path: Path) -> None:
    """What TinyLLaVABench and LLaVA save: tokenizer.model and its settings, no tokenizer.json."""
    toy = layouts.make_toy(tmp_path / "parts", "llama", "clip", num_rows=32_000)
    source = layouts.write_bench(toy, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    write_vocabulary(source, name)
    import_checkpoint(source, tmp_path / "out")
    processor = open_processor(tmp_path / "out")
    processor.num_image_tokens = 1
    prompt = GOLDEN["prompts"][0]["question"]
    message = Message(role="user", text=prompt, images=(ImageRef(name="a.png"),))
    encoded = processor.encode(Conversation(messages=(message,)), open_answer=True)
    assert published_ids(processor, encoded.input_ids) == GOLDEN["tokens"][name]["prompts"][0]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "GemmaTokenizer",
        "GPT2Tokenizer",
        "CodeGenTokenizer",
        "Qwen2Tokenizer",
        "PreTrainedTokenizerFast",
    ],
)
def test_a_tokenizer_json_counts_as_it_is_written(tmp_path: Path, kind: str, legacy: bool) -> None:
    """Whatever class tokenizer_config.json names: its pipeline is not built again by the class's rules."""
    folder = tmp_path / "source"
    toys.llama_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    changes = {"tokenizer_class": kind, "legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert isinstance(written.normalizer, normalizers.Sequence)
    tokenizer = open_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    reopened = (open_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved"))
    for one in (tokenizer, *reopened):
        for text in GOLDEN["texts"]:
            expected = written.encode(text, add_special_tokens=False).ids
            assert one(text, add_special_tokens=False)["input_ids"] == expected, text


def test_published_code_reads_the_older_form_first(tmp_path: Path) -> None:
    """TinyLlama's forms disagree behind `</s>`: tokenizer.json marks a beginning there, the pieces do not."""
    folder = write_llama(tmp_path / "both", legacy=True)
    open_tokenizer(folder).save_pretrained(tmp_path / "pipeline")
    write_llama(folder, legacy=False)
    shutil.copy(tmp_path / "pipeline" / "tokenizer.json", folder)
    text = GOLDEN["texts"][0]
    for older_first, name in ((False, "llama-true"), (True, "llama-false")):
        found = open_tokenizer(folder, older_first=older_first)(text, add_special_tokens=False)["input_ids"]
        assert found == GOLDEN["tokens"][name]["texts"][0]
    assert GOLDEN["tokens"]["llama-true"]["texts"][0] != GOLDEN["tokens"]["llama-false"]["texts"][0]


@pytest.fixture(scope="module")
def pieces(vocabularies: dict[str, Path]) -> tuple[Any, sentencepiece.SentencePieceProcessor]:
    folder = vocabularies["llama-true"]
    return opened(folder), sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<"), min_size=1))
def test_any_text_is_split_as_sentencepiece_splits_it(
    pieces: tuple[Any, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    tokenizer, reference = pieces
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("trainer_spec.model_type", 1, "model type 1, not BPE"),
        ("normalizer_spec.remove_extra_whitespaces", True, "extra spaces are removed"),
        ("trainer_spec.treat_whitespace_as_suffix", True, "spaces as suffixes"),
        ("normalizer_spec.precompiled_charsmap", b"x", "a table of normalised characters"),
    ],
)
def test_pieces_that_cannot_be_converted_exactly(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    from sentencepiece import sentencepiece_model_pb2

    folder = write_llama(tmp_path, None)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    part, name = field.split(".")
    setattr(getattr(model, part), name, value)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=f"{message}.*--language-model DIR"):
        open_tokenizer(folder)


def test_damaged_and_missing_vocabularies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CheckpointError, match=r"no tokenizer; expected tokenizer\.json, tokenizer\.model, or voc"
    ):
        open_tokenizer(tmp_path)
    folder = write_llama(tmp_path / "llama", None)
    (folder / "tokenizer.model").write_bytes(b"\xff\xff no pieces")
    with pytest.raises(CheckpointError, match="not a SentencePiece model; download the file again"):
        open_tokenizer(folder)
    folder = write_bpe(tmp_path / "phi", "phi")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["20001"]  # the ids behind the gap move down
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match=r"phi/tokenizer_config.json: .* is token \d+ in this file, but \d+ in the vocabulary",
    ):
        open_tokenizer(folder)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"pip install 'tinyllava\[sentencepiece\]'"):
        open_tokenizer(write_llama(tmp_path / "again", None))
