"""Checkpoint folders that somebody changed, by accident or on purpose: opened, or refused in one line.

Nothing in them may end in a traceback, run for ever, fill the memory or be executed.
"""

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllava.cli import main
from tinyllava.config import ModelConfig
from tinyllava.conversation import ImageRef, ask, to_chat
from tinyllava.errors import CheckpointError, TinyLlavaError
from tinyllava.inference.chat import Chat
from tinyllava.model.assemble import assemble, open_checkpoint
from tinyllava.parts import untrusted
from tinyllava.parts.templates import read_template, template_names

FILES = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "generation_config.json", "model.safetensors.index.json",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**7, 10**30, 0.5, float("nan"), "", "x", "../../outside.safetensors", "/etc/passwd",
    [], {},
    [[]], [1, 2, 3], {"a": 1}, "{{ 1 }}", "__import__('pathlib').Path('executed').touch()",
)  # fmt: skip
EXTRA = ("auto_map", "quantization_config", "chat_template", "tokenizer_class", "dtype", "architectures")
NUM_EACH = 16
"""Changes of each file that one run of the tests tries."""


@pytest.fixture(scope="module")
def checkpoint(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = assemble(
        ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts["llama"]))
    )
    model.save_pretrained(folder, max_shard_size="60KB")
    processor.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*place, key)
        yield from places(one, (*place, key))


def change(folder: Path, name: str, place: tuple[Any, ...], value: Any) -> None:
    document = json.loads((folder / name).read_text())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / name).write_text(json.dumps(document))


@pytest.mark.parametrize("name", FILES)
def test_a_changed_setting_is_taken_or_refused_in_one_line(copy: Path, name: str) -> None:
    generator = random.Random(name)
    original = (copy / name).read_text()
    found = [*places(json.loads(original)), *((extra,) for extra in EXTRA)]
    for _ in range(NUM_EACH):
        place, value = generator.choice(found), generator.choice(VALUES)
        change(copy, name, place, value)
        told = ""
        try:
            model, processor = open_checkpoint(copy)
            Chat(model, processor).answer([ask("Is there a dog?")], 2)
        except TinyLlavaError as error:
            told = str(error)
        assert "\n" not in told, (place, value)
        assert len(told) < 1000, (place, value)
        (copy / name).write_text(original)
        assert not Path("executed").exists(), (place, value)


REFUSED = {
    "layers": ("config.json", ("text_config", "num_hidden_layers"), 10**7, "layers = 10000000: at most"),
    "vision": ("config.json", ("vision_config", "num_hidden_layers"), 10**7, "layers = 10000000: at most"),
    "type": ("config.json", ("vision_config",), 7, "config.json: vision_config = 7: must be an object"),
    "outside": (
        "model.safetensors.index.json", ("weight_map", "lm_head.weight"), "../outside.safetensors",
        "is in '../outside.safetensors', which is not the name of a .safetensors file in this folder",
    ),
    "absolute": (
        "model.safetensors.index.json", ("weight_map", "lm_head.weight"), "/etc/x.safetensors",
        "is in '/etc/x.safetensors', which is not the name of",
    ),
    "no map": ("model.safetensors.index.json", ("weight_map",), [], "weight_map and metadata must be"),
    "image size": (
        "processor_config.json", ("image_processor", "size", "shortest_edge"), 10**6,
        "image_processor.size.shortest_edge = 1000000: at most 16,384 allowed",
    ),
    "image tokens": ("processor_config.json", ("num_image_tokens",), 10**9, "num_image_tokens = 1000000000"),
    "other tokens": (
        "processor_config.json", ("num_image_tokens",), 5,
        "says 5 tokens per image, but the connector in config.json produces 4",
    ),
    "pad": ("generation_config.json", ("pad_token_id",), "x", "pad_token_id = 'x': must be the id"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_bound_is_refused_by_name(
    copy: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, place, value, message = REFUSED[case]
    change(copy, name, place, value)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(copy)
    assert message in str(caught.value)
    assert str(copy) in str(caught.value)
    assert main(["chat", "-", "Hello?", "--model", str(copy), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_in_the_folder_is_never_run(copy: Path, name: str) -> None:
    classes = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    (copy / "evil.py").write_text("import pathlib\npathlib.Path('executed').touch()\nclass E: pass\n")
    change(copy, name, ("auto_map",), dict.fromkeys(classes, "evil.E"))
    with pytest.raises(CheckpointError, match=r"auto_map names code .* is never run"):
        open_checkpoint(copy)
    assert not Path("executed").exists()


def test_adapters_of_another_folder_are_not_followed(copy: Path) -> None:
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: adapters of a model in another folder"):
        open_checkpoint(copy)


MARKED = "{% generation %}x{% endgeneration %}"
_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_SETS = "{% set many = range(99999) %}{% for a in many %}{% for b in many %}{% endfor %}{% endfor %}"
_DOUBLE = "{% set ns = namespace(x='xxxxxxxxxxxxxxxx') %}" + "{% set ns.x = ns.x ~ ns.x %}" * 40
TEMPLATES = {
    "loop": (MARKED + _SETS, "it does not finish within 2 seconds"),
    "later": (MARKED + "{% if messages | length > 9 %}{{ 1 / 0 }}{% endif %}", "zero"),
    "nested ranges": (
        MARKED + "{% if messages | length > 99 %}" + _LOOP + "{% endif %}",
        r"nested loops over range\(\)",
    ),
    "far loop": (
        MARKED + "{% if messages | length > 9 %}" + _SETS + "{% endif %}",
        "does not finish within|memory",
    ),
    "hidden loop": (
        MARKED + "{% if messages | length > 1 %}" + _SETS + "{% endif %}",
        "does not finish within",
    ),
    "growth": (MARKED + _DOUBLE, "it needs too much memory|MemoryError|does not finish within"),
    "product": (MARKED + "{{ 'x' * 10 ** 11 }}", "it needs too much memory|MemoryError"),
    "recursion": (MARKED + "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "attributes": (MARKED + "{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined|access"),
}


@pytest.mark.parametrize(
    ("case", "system"),
    [*((case, "linux") for case in TEMPLATES), *((case, "darwin") for case in ("loop", "growth", "product"))],
)
def test_a_template_without_end_is_refused(
    copy: Path, case: str, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other systems than Linux a fresh interpreter renders it first."""
    monkeypatch.setattr(untrusted.sys, "platform", system)
    monkeypatch.setattr(untrusted, "_TRIAL_SECONDS", 2.0)
    template, message = TEMPLATES[case]
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=rf"chat_template\.jinja: no chat template .*({message})"):
        open_checkpoint(copy)


def test_a_trial_has_its_seconds_of_a_core_however_busy_the_machine_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(untrusted, "_TRIAL_SECONDS", 1.0)
    assert untrusted.try_out(lambda: time.sleep(1.1)) == ""
    monkeypatch.setattr(untrusted, "_WAITED_SECONDS", 0.1)
    assert untrusted.try_out(lambda: time.sleep(600)) == "it does not finish within 0 seconds"


def test_our_own_templates_end_in_a_fresh_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted.sys, "platform", "darwin")
    texts = "".join(read_template(name) for name in template_names())
    assert untrusted.try_out(lambda: None, texts, [to_chat(ask("What?", ImageRef(name="an image")))]) == ""
    assert untrusted.try_out(lambda: 1 // 0, texts, []) == "integer division or modulo by zero"


def test_a_machine_that_is_short_of_memory_is_not_told_to_copy_the_folder(tmp_path):
    told = r"cannot be opened \(.*\); it needs more memory than is free\.$"
    with pytest.raises(CheckpointError, match=told), untrusted.refusing(tmp_path, "cannot be opened"):
        torch.empty(2**60, dtype=torch.uint8)
