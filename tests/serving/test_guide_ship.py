"""The guide to shipping a model, followed literally: trained, served, asked with its requests and Python."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx2 as httpx
import pytest
from PIL import Image

from chats import make_chat
from conftest import make_records
from documents import ROOT, blocks, commands
from tinyllava.cli import main

# Its second half, the exports, is followed in tests/checkpoints/exporting/test_formats.py.
GUIDE = (ROOT / "docs" / "guides" / "ship.md").read_text(encoding="utf-8").partition("\n## Export")[0]


def curl(command: str) -> httpx.Response:
    """Do what a curl command of the guide does, and run it too where curl is installed."""
    words = shlex.split(command)
    _, address, *options = words
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert set(given) <= {"-H", "-d"}
    headers = dict([given["-H"].split(": ")]) if "-H" in given else {}
    response = httpx.request(
        "POST" if "-d" in given else "GET", address, content=given.get("-d"), headers=headers, timeout=600
    )
    if shutil.which(words[0]):
        done = subprocess.run([*words, "--silent"], capture_output=True, check=True)
        assert json.loads(done.stdout).keys() == response.json().keys()
    return response


def wait_until_up(address: str, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()[1]
        try:
            httpx.get(address, timeout=600)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


def train_as_it_says(toy: Path, folder: Path) -> None:
    """Run the guide's first commands in a folder, from a toy and for two steps."""
    train, copy = commands(GUIDE)[:2]
    records = make_records(folder / "images", 8)
    named = json.loads(records.read_text())
    for record in named:
        if "image" in record:
            record["image"] = str(records.parent / "images" / record["image"])
    (folder / "my.json").write_text(json.dumps(named))
    shutil.copytree(toy, folder / "a-model")
    quickly = "--hardware.num-workers 0 --finetune.max-steps 2 --finetune.max-length-tokens 256"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*shlex.split(train)[1:], *quickly.split()]) == 0
    subprocess.run(shlex.split(copy), cwd=folder, check=True)


def test_its_commands_run(toy: Path, tmp_path: Path, port: str) -> None:
    install, serve, models, ask, open_to_all = (line.replace("8000", port) for line in commands(GUIDE)[2:7])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert install == "pip install 'tinyllava[serve]'"
    assert "serve" in project["optional-dependencies"]
    train_as_it_says(toy, tmp_path)
    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "image.jpg")
    key, program, *arguments = shlex.split(open_to_all)
    assert (program, *arguments[:2]) == tuple(shlex.split(serve)[:3])
    for line, environment in ((serve, {}), (open_to_all, dict([key.split("=")]))):
        words = shlex.split(line)
        options = [*words[words.index("tinyllava") + 1 :]]
        process = subprocess.Popen(
            [sys.executable, "-m", "tinyllava", *options],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until_up(f"http://127.0.0.1:{port}/health", process)
            if environment:
                assert curl(models).status_code == 401
                continue
            assert [model["id"] for model in curl(models).json()["data"]] == ["my-model"]
            assert curl(ask).json()["choices"][0]["message"]["content"]
            (example,) = blocks(GUIDE, "python")
            code = example.replace("8000", port)
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout
        finally:
            process.terminate()
            process.communicate()


def test_its_commands_for_llama_cpp_run(tmp_path: Path, port: str) -> None:
    install, export, serve = (line.replace("8001", port) for line in commands(GUIDE)[7:10])
    assert install == "pip install 'tinyllava[serve,gguf]'"
    chat = make_chat(tmp_path / "parts", "phi", "siglip")
    for part in (chat.model, chat.processor):
        part.save_pretrained(tmp_path / "my-model")
    program = [sys.executable, "-m"]
    subprocess.run([*program, *shlex.split(export)], cwd=tmp_path, check=True, capture_output=True)
    process = subprocess.Popen(
        [*program, *shlex.split(serve)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until_up(f"http://127.0.0.1:{port}/health", process)
        listed = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=600).json()["data"]
        assert [model["id"] for model in listed] == ["my-gguf"]
    finally:
        process.terminate()
        process.communicate()


def test_its_export_for_vllm_is_written(tmp_path: Path) -> None:
    """vLLM itself needs an environment of its own; the guide says how it was tried."""
    (export,) = commands(GUIDE)[10:]
    chat = make_chat(tmp_path / "parts", "llama", "siglip")
    for part in (chat.model, chat.processor):
        part.save_pretrained(tmp_path / "my-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(shlex.split(export)[1:]) == 0
    config = json.loads((tmp_path / "my-vllm" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
