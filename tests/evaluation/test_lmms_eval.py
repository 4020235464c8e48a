"""The adapter does what lmms-eval asks of a model, and answers its requests as Chat does."""

from importlib import import_module
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from PIL import Image

from chats import make_chat
from evaluation import lmms_eval_contract
from tinyllava.conversation import ask
from tinyllava.errors import ConfigError
from tinyllava.evaluation import lmms_eval as adapter


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The adapter as lmms-eval makes it: found by its entry point, made from --model_args."""
    lmms_eval_contract.install(monkeypatch)
    adapter._make_class.cache_clear()
    chat = make_chat(tmp_path, "llama")
    chat.model.save_pretrained(tmp_path / "model")
    chat.processor.save_pretrained(tmp_path / "model")
    (entry,) = entry_points(group="lmms_eval.models", name="tinyllava")
    manifest = entry.load()()
    module, name = manifest.simple_class_path.rsplit(".", 1)
    found = getattr(import_module(module), name)
    made = found.create_from_arg_string(
        f"pretrained={tmp_path / 'model'}", {"batch_size": 1, "device": "cpu"}
    )
    yield made
    adapter._make_class.cache_clear()


def request(context, options, doc_id):
    return SimpleNamespace(args=(context, options, lambda doc: doc["images"], doc_id, "toy", "test"))


def test_requests_are_answered_as_chat_does(model, tmp_path):
    images = {}
    for colour in ("red", "blue"):
        images[colour] = Image.new("RGBA", (30, 40), colour)
        images[colour].convert("RGB").save(tmp_path / f"{colour}.png")
    documents = [{"images": [images["red"]]}, {"images": [images["blue"]]}, {"images": []}]
    model.task_dict = {"toy": {"test": documents}}
    texts = ["Is there a dog?", "<image>\nIs there a dog?", "Is there a dog?", "What is in the picture?"]
    options = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    requests = [request(text, dict(options), n % 3) for n, text in enumerate(texts)]
    requests.append(request(texts[0], {**options, "max_new_tokens": 2}, 0))
    paths = [tmp_path / "red.png", tmp_path / "blue.png", None]
    expected = [
        model.chat.answer([ask(text.removeprefix("<image>\n"), *([p] if (p := paths[n % 3]) else []))], 8)[0]
        for n, text in enumerate(texts)
    ]
    answers = model.generate_until(requests)
    assert answers[:4] == [text.split("\n\n")[0].strip() for text in expected]
    assert answers[4] == model.chat.answer([ask(texts[0], paths[0])], 2)[0]
    assert len({*answers}) >= 4


def test_what_it_cannot_do_is_refused_by_name(model):
    model.task_dict = {"toy": {"test": [{"images": ["clip.mp4"]}]}}
    with pytest.raises(ConfigError, match="task toy: str is not an image"):
        model.generate_until([request("What?", {}, 0)])
    with pytest.raises(ConfigError, match="likelihood"):
        model.loglikelihood([])
    with pytest.raises(ConfigError, match="multi-round"):
        model.generate_until_multi_round([])


def test_lmms_eval_accepts_it_under_its_name(model):
    manifest = adapter.manifest()
    assert (manifest.model_id, manifest.chat_class_path) == ("tinyllava", None)
    assert isinstance(model, import_module("lmms_eval.api.model").lmms)
    assert model.is_simple
    assert (model.rank, model.world_size) == (0, 1)
