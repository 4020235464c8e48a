"""The adapter for lmms-eval: ``lmms-eval --model tinyllava --model_args pretrained=FOLDER --tasks ...``.

Paper: none. lmms-eval finds ``manifest`` by the entry point group ``lmms_eval.models``. The class is created
on first access, so that this module can be imported without lmms-eval.
"""

import hashlib
import tempfile
from collections import defaultdict
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from tinyllava.conversation import Answer, Conversation, ask
from tinyllava.errors import ConfigError
from tinyllava.evaluation.run import Settings, ask_groups, processes
from tinyllava.inference.batches import group_by_image
from tinyllava.inference.chat import Chat

DEFAULT_MAX_NEW_TOKENS = 128


def manifest() -> Any:
    """Return the manifest for lmms-eval. This model replaces lmms-eval's own of the same name."""
    return import_module("lmms_eval.models.registry_v2").ModelManifest(
        model_id="tinyllava", simple_class_path=f"{__name__}.TinyLlava"
    )


def __getattr__(name: str) -> Any:
    """Make the class ``TinyLlava`` when it is asked for: its base is lmms-eval's."""
    if name == "TinyLlava":
        return _make_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Answering:
    """The work of the adapter, to be combined with lmms-eval's base class. Images are written once.

    Args:
        pretrained: checkpoint folder.
        device: of torch; empty or ``cuda`` means this process's own GPU if there is one.
    """

    is_simple = True
    task_dict: dict[str, Any]
    cache_hook: Any

    def __init__(self, pretrained: str, device: str = "", dtype: str = "auto", **ignored: object) -> None:
        super().__init__()
        from accelerate import Accelerator

        state = processes()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.accelerator = Accelerator(cpu=state.device.type == "cpu")
        own = str(state.device) if device in ("", "cuda", "cuda:0") else device
        self.chat = Chat.open(pretrained, device=own, dtype=dtype)
        self._folder = tempfile.TemporaryDirectory(prefix="tinyllava-")

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer requests, those on one image together."""
        conversations = [self._to_conversation(request) for request in requests]
        by_options: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_options[repr(sorted(request.args[1].items()))].append(i)
        answers = [""] * len(requests)
        for indices in by_options.values():
            options = requests[indices[0]].args[1]
            for i, text in self._answer(conversations, indices, options):
                answers[i] = _cut(text, options.get("until") or [])
                self.cache_hook.add_partial("generate_until", requests[i].args[:2], answers[i])
        return answers

    def _answer(
        self, conversations: list[Conversation], indices: list[int], options: dict[str, Any]
    ) -> list[tuple[int, str]]:
        max_new_tokens = int(options.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS)
        if options.get("do_sample") and float(options.get("temperature") or 0) > 0:
            sampling = {key: options[key] for key in ("temperature", "top_p", "top_k") if options.get(key)}
            asked = [conversations[i] for i in indices]
            texts = self.chat.answer(asked, max_new_tokens, do_sample=True, **sampling)
            return list(zip(indices, texts, strict=True))
        groups = group_by_image(conversations, indices)
        parts = ask_groups(self.chat, conversations, groups, max_new_tokens, Settings())
        answers: list[tuple[int, str]] = []
        for i, answer in (pair for part in parts for pair in part):
            if not isinstance(answer, Answer):  # lmms-eval has no place for a question without an answer
                raise answer
            answers.append((i, answer))
        return answers

    def _to_conversation(self, request: Any) -> Conversation:
        context, _, doc_to_visual, doc_id, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for image in images:
            if not isinstance(image, Image.Image):
                kind = type(image).__name__
                raise ConfigError(f"task {task}: {kind} is not an image; choose a task about images.")
        text = context.replace("<image>", "").strip()
        return ask(text, *map(self._keep, images), id=f"{task} {doc_id}")

    def _keep(self, image: Image.Image) -> Path:
        """Write an image to disk once, so that memory stays bounded and equal images are known as such."""
        rgb = image.convert("RGB")
        digest = hashlib.sha256(rgb.tobytes() + str(rgb.size).encode()).hexdigest()
        path = Path(self._folder.name) / f"{digest}.png"
        if not path.exists():
            rgb.save(path, compress_level=1)
        return path

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refuse: the paper's protocols generate."""
        raise ConfigError("likelihood tasks are not supported; choose a generation task.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse: no protocol of the paper asks in rounds."""
        raise ConfigError("multi-round tasks are not supported; choose a single-round task.")


@cache
def _make_class() -> type:
    lmms = import_module("lmms_eval.api.model").lmms
    return type("TinyLlava", (Answering, lmms), {"__doc__": Answering.__doc__, "__module__": __name__})


def _cut(text: str, until: str | list[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop, maxsplit=1)[0] if stop else text
    return text.strip()
