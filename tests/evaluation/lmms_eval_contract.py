"""What lmms-eval 0.7.3 asks of a model and gives to it, in our words, for tests without that package.

Its needs (some forty packages, a pinned tracker and a video downloader among them) are too much for this
suite. The real command was run once against the adapter, as docs/guides/evaluate.md says; where lmms-eval is
installed, the tests take its own classes instead of these.
"""

import abc
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Self

IS_INSTALLED = importlib.util.find_spec("lmms_eval") is not None


class Model(abc.ABC):
    """The base of all its models: three ways to be asked, and what the evaluator sets or reads."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
        self._rank, self._world_size = 0, 1

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @abc.abstractmethod
    def loglikelihood(self, requests: list) -> list: ...

    @abc.abstractmethod
    def generate_until(self, requests: list) -> list: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list) -> list: ...

    @classmethod
    def create_from_arg_string(cls, arguments: str, additional: dict[str, Any]) -> Self:
        """``pretrained=FOLDER,...`` of --model_args; batch size and device come as additional ones."""
        given = dict(one.split("=", maxsplit=1) for one in arguments.split(",") if one)
        return cls(**given, **{name: value for name, value in additional.items() if value is not None})


@dataclass(frozen=True)
class Manifest:
    """What an entry point of the group ``lmms_eval.models`` returns: a name and where its class is."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


def install(monkeypatch: Any) -> None:
    """Put the contract in the place of lmms-eval's modules, unless the package itself is there."""
    if IS_INSTALLED:
        return
    for name in ("", ".api", ".api.model", ".models", ".models.registry_v2"):
        monkeypatch.setitem(sys.modules, f"lmms_eval{name}", ModuleType(f"lmms_eval{name}"))
    sys.modules["lmms_eval.api.model"].lmms = Model
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = Manifest
