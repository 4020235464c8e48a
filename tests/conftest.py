"""Shared fixtures: toy parts, toy images and records in the real formats, made once per test session."""

import gc
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import toys

torch.set_num_threads(1)
# What an example takes says nothing on a busy machine.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Keep what is imported by now out of the collections to come.

    Each training of a toy makes four whole ones, and spends three quarters of its time in them otherwise.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def port() -> Iterator[str]:
    """A port of this machine for a server, which nobody else is given before it starts, nor while it stops.

    A socket that does not listen keeps it: Linux then gives the port to no other program that takes any, and
    a server can listen on it all the same.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        number = keeper.getsockname()[1]
        if sys.platform != "linux":  # there the two exclude each other
            keeper.close()
        yield str(number)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Toy language models and encoders by kind."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    made = {
        kind: toys.make_language_model(folder / kind, kind) for kind in ("llama", "phi", "stablelm", "chatml")
    }
    return made | {kind: toys.make_vision_encoder(folder / kind, kind) for kind in ("clip", "siglip")}


def make_records(folder: Path, num_records: int = 12, text_only_every: int = 4) -> Path:
    """Write images of one colour and LLaVA-format records about them; every n-th record has no image."""
    colours = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 60, 220)}
    random = np.random.default_rng(0)
    records = []
    for number in range(num_records):
        colour = list(colours)[number % 3]
        question, name = f"What colour is number {number}?", f"{number}.png"
        record = {
            "id": f"r{number}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": colour},
                {"from": "human", "value": "Is it " + "really " * (number % 3) + f"{colour}?"},
                {"from": "gpt", "value": "yes"},
            ],
        }
        if number % text_only_every == text_only_every - 1:
            record["conversations"][0]["value"] = question
        else:
            pixels = np.clip(np.array(colours[colour]) + random.integers(-20, 20, (40, 50, 3)), 0, 255)
            (folder / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
            record["image"] = name
        records.append(record)
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve records, three of them without an image."""
    return make_records(tmp_path_factory.mktemp("records"))
