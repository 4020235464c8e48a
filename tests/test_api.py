"""The public API: lazy, silent, and equal to what the commands do."""

import base64
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import tinyllava
from chats import make_chat
from tinyllava.conversation import to_ref
from tinyllava.data.images import open_image
from tinyllava.data.reporting import Step
from training_toys import toy_run


def test_importing_the_package_loads_nothing_and_every_name_is_there() -> None:
    code = (
        "import sys, tinyllava\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(tinyllava.__all__) <= set(dir(tinyllava))\n"
        "for name in tinyllava.__all__:\n"
        "    getattr(tinyllava, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Chatt'; public names: .*Chat"):
        _ = tinyllava.Chatt


def make_image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_an_image_is_the_same_in_every_form(tmp_path) -> None:
    image = make_image()
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    forms = [image, content, url, str(tmp_path / "a.png"), tmp_path / "a.png"]
    for form in forms:
        np.testing.assert_array_equal(np.asarray(open_image(to_ref(form))), np.asarray(image))


def test_a_pillow_image_keeps_its_rotation() -> None:
    image = make_image()
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    turned = open_image(to_ref(opened))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("url", ["data:image/png;base64,@@", "data:image/png,abc", "data:"])
def test_a_data_url_that_cannot_be_read_is_named(url: str) -> None:
    with pytest.raises(tinyllava.ImageError, match="data URL"):
        tinyllava.ask("What is it?", url)


def test_chat_ask_and_a_dialogue_equal_the_conversations_they_stand_for(tmp_path, capfd) -> None:
    chat = make_chat(tmp_path, "llama")
    image = make_image()
    first = tinyllava.ask("What is it?", image)
    answer = chat.ask("What is it?", image, max_new_tokens=6)
    assert answer == chat.answer([first], 6)[0]
    talk = chat.start(image)
    assert talk.ask("What is it?", max_new_tokens=6) == answer
    assert (
        "".join(talk.stream("And why?", max_new_tokens=6))
        == chat.answer(
            [
                tinyllava.Conversation(
                    messages=(
                        *first.messages,
                        tinyllava.Message(role="assistant", text=answer),
                        *tinyllava.ask("And why?").messages,
                    )
                )
            ],
            6,
        )[0]
    )
    assert [message.role for message in talk.messages] == ["user", "assistant"] * 2
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["ask", "stream"])
def test_a_question_that_cannot_be_asked_leaves_a_dialogue_as_it_was(tmp_path, name: str) -> None:
    chat, image = make_chat(tmp_path, "llama"), make_image()
    talk = chat.start(image)
    with pytest.raises(tinyllava.ImageError, match="no such image"):
        getattr(talk, name)("What is it?", tmp_path / "none.png", max_new_tokens=6)
    assert talk.messages == ()
    answer = chat.ask("What is it?", image, max_new_tokens=6)
    assert "".join(getattr(talk, name)("What is it?", max_new_tokens=6)) == answer
    assert talk.is_cut == answer.is_cut
    assert [message.role for message in talk.messages] == ["user", "assistant"]
    assert talk.messages[0].images == tinyllava.ask("", image).images


def test_training_is_silent_and_tells_its_callback(parts, records, tmp_path, capfd) -> None:
    steps: list[Step] = []
    run = toy_run(parts, records, tmp_path)
    tinyllava.train(run, progress=steps.append)
    assert capfd.readouterr().out == ""
    assert {step.task for step in steps} >= set(run.stages)
    last = [step for step in steps if step.task == list(run.stages)[-1]][-1]
    assert last.done == last.total > 0
    assert "loss" in last.note


def test_the_hub_is_asked_for_a_name_that_is_no_folder(monkeypatch, tmp_path) -> None:
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(tinyllava.CheckpointError, match=r"owner/model.*hf auth login"):
        tinyllava.Chat.open("owner/model")
    assert asked == ["owner/model"]
