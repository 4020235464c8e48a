"""A connector that starts from words: its image tokens are the words of the caption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tinyllava.config import ModelConfig
from tinyllava.conversation import Conversation, ImageRef, Message, ask
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.starter.recipe import starter_model
from tinyllava.starter.words import Start, make_start, make_starts, start_key, word_ids

CAPTIONS = {"red": "a red circle", "blue": "a dog, blue", "green": "a picture", "yellow": "an image"}


def talk(image: Path, caption: str) -> Conversation:
    reference = ImageRef(data=image.read_bytes(), name=f"set/{image.name}")
    answer = Message(role="assistant", text=caption)
    return Conversation(messages=(*ask("Describe the image.", reference).messages, answer))


@pytest.fixture
def captions(tmp_path: Path) -> list[Conversation]:
    talks = []
    for colour, caption in CAPTIONS.items():
        for size in (20, 24):
            path = tmp_path / f"{colour}{size}.png"
            Image.new("RGB", (size, size), colour).save(path)
            talks.append(talk(path, caption))
    return talks


def start_in(folder: Path, config: ModelConfig, captions, name: str = "start", seed: int = 0) -> Start:
    return Start(
        config=config, captions=captions, folder=folder / name, features=folder / "features", seed=seed
    )


RESAMPLER = {"num_queries": 4, "num_layers": 1, "width": 64, "num_heads": 2, "head_width": 32}


@pytest.mark.parametrize("connector", ["slots", "resampler"])
def test_image_tokens_are_the_words_of_the_caption(parts, captions, tmp_path: Path, connector) -> None:
    config = starter_model(parts["chatml"], parts["siglip"])
    if connector == "resampler":  # sees the whole grid, not its mean
        config = replace(config, connector=connector, connector_options=RESAMPLER)
    before = assemble(config)[0].state_dict()
    folder = make_start(start_in(tmp_path, config, captions))
    model, processor = open_checkpoint(folder)
    embeddings = model.get_input_embeddings().weight.detach()
    for conversation in captions:
        caption = conversation.messages[-1].text
        ids = word_ids(processor, caption)[: processor.num_image_tokens]
        words = caption.replace(",", "").partition(" ")[2]
        assert f" {words}".startswith(processor.tokenizer.decode(ids))
        with Image.open(tmp_path / Path(conversation.images[0].name).name) as image:
            pixels = processor.to_pixels([image.convert("RGB")])
        with torch.inference_mode():
            tokens = model.model.get_image_features(pixels)[0]
        distances = torch.cdist(tokens[: len(ids)], embeddings)
        assert distances.argmin(1).tolist() == ids
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert all("multi_modal_projector" in name for name in moved)  # nothing else was trained
    assert moved


def test_a_start_that_is_there_is_used_and_another_has_another_name(parts, captions, tmp_path: Path) -> None:
    config = starter_model(parts["chatml"], parts["siglip"])
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "kept").touch()
    make_start(start_in(tmp_path, config, captions))
    assert [path.name for path in (tmp_path / "start").iterdir()] == ["kept"]
    key = start_key(config, captions, seed=0)
    assert start_key(config, list(captions), seed=0) == key
    assert key not in (start_key(config, captions[1:], seed=0), start_key(config, captions, seed=1))


def test_starts_made_at_the_same_time_are_those_made_alone(parts, captions, tmp_path: Path) -> None:
    config = starter_model(parts["chatml"], parts["siglip"])
    starts = [start_in(tmp_path, config, captions, f"{n}", n % 3) for n in range(4)]
    make_starts([*starts, starts[0]])  # the same model in two panels of a grid
    alone = make_start(start_in(tmp_path, config, captions, "alone", 1))
    weights = [(start.folder / "model.safetensors").read_bytes() for start in starts]
    assert weights[1] == (alone / "model.safetensors").read_bytes()
    assert weights[0] == weights[3]
    assert len(set(weights)) == 3
