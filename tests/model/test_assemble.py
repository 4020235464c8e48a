"""What a language model was published with does not decide how the assembled model answers."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import GenerationConfig
from transformers.utils import logging

from tinyllava.config import ModelConfig
from tinyllava.model.assemble import assemble, open_checkpoint


def test_sampling_and_penalties_of_the_language_model_stay_behind(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    language = parts["chatml"]
    published = tmp_path / "qwen"
    published.mkdir()
    for file in language.iterdir():
        (published / file.name).write_bytes(file.read_bytes())
    GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        eos_token_id=[0, 1],
        pad_token_id=0,
    ).save_pretrained(published)
    answers = []
    for folder in (language, published):
        torch.manual_seed(0)
        model, processor = assemble(
            ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(folder))
        )
        model.save_pretrained(tmp_path / f"out-{folder.name}")
        processor.save_pretrained(tmp_path / f"out-{folder.name}")
        again, _ = open_checkpoint(tmp_path / f"out-{folder.name}")
        for opened in (model, again):
            inputs = processor(text="What is it?")
            ids = inputs["input_ids"]
            answers.append(opened.generate(input_ids=ids, max_new_tokens=12, min_new_tokens=12))
            assert opened.generation_config.do_sample is False
            assert opened.generation_config.repetition_penalty in (None, 1.0)
            assert opened.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert all(torch.equal(answer, answers[0]) for answer in answers[1:])


def test_bars_are_off_while_parts_and_checkpoints_are_opened_and_those_of_downloads_stay(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.enable_progress_bar()
    model, processor = assemble(
        ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["llama"]))
    )
    assert capsys.readouterr().err == ""
    model.save_pretrained(tmp_path / "out")  # the caller's own, which draws them
    processor.save_pretrained(tmp_path / "out")
    assert "100%" in capsys.readouterr().err
    open_checkpoint(tmp_path / "out")
    assert capsys.readouterr().err == ""
    assert not are_progress_bars_disabled()
    assert logging.is_progress_bar_enabled()
