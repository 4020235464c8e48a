"""tinyllava: build, train, evaluate and ship small vision-language models.

Paper: TinyLLaVA: A Framework of Small-scale Large Multimodal Models (arXiv 2402.14289).

Every name below is imported on first use, so that ``import tinyllava`` is fast. Names outside ``__all__`` are
private and may change in any release.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllava.checkpoints.exporting import Exported as Exported
    from tinyllava.checkpoints.exporting import export_checkpoint as export_checkpoint
    from tinyllava.checkpoints.importing import import_checkpoint as import_checkpoint
    from tinyllava.config import FROZEN as FROZEN
    from tinyllava.config import FULL as FULL
    from tinyllava.config import DataConfig as DataConfig
    from tinyllava.config import Hardware as Hardware
    from tinyllava.config import ModelConfig as ModelConfig
    from tinyllava.config import Run as Run
    from tinyllava.config import Stage as Stage
    from tinyllava.config import Tune as Tune
    from tinyllava.config import from_layer as from_layer
    from tinyllava.config import lora as lora
    from tinyllava.config import run_from_json as run_from_json
    from tinyllava.conversation import Answer as Answer
    from tinyllava.conversation import Conversation as Conversation
    from tinyllava.conversation import ImageRef as ImageRef
    from tinyllava.conversation import Message as Message
    from tinyllava.conversation import ask as ask
    from tinyllava.data.reporting import Step as Step
    from tinyllava.errors import CheckpointError as CheckpointError
    from tinyllava.errors import ConfigError as ConfigError
    from tinyllava.errors import DataError as DataError
    from tinyllava.errors import ImageError as ImageError
    from tinyllava.errors import TinyLlavaError as TinyLlavaError
    from tinyllava.errors import TrainingError as TrainingError
    from tinyllava.errors import UnknownNameError as UnknownNameError
    from tinyllava.evaluation.checkpoint import evaluate as evaluate
    from tinyllava.evaluation.checkpoint import score_answers as score_answers
    from tinyllava.evaluation.results import Metric as Metric
    from tinyllava.evaluation.results import Result as Result
    from tinyllava.inference.chat import Chat as Chat
    from tinyllava.inference.dialogue import Dialogue as Dialogue
    from tinyllava.parts.user_code import run_code as run_code
    from tinyllava.planning.check import check as check
    from tinyllava.planning.plan import plan_run as plan_run
    from tinyllava.recipes.variants import make_run as make_run
    from tinyllava.recipes.variants import variant as variant
    from tinyllava.studies.reproduce import Reproduced as Reproduced
    from tinyllava.studies.reproduce import reproduce as reproduce
    from tinyllava.training.run import train as train

__version__ = "0.1.0"

_HOMES = {
    "Answer": "conversation",
    "Chat": "inference.chat",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Conversation": "conversation",
    "DataConfig": "config",
    "DataError": "errors",
    "Dialogue": "inference.dialogue",
    "Exported": "checkpoints.exporting",
    "FROZEN": "config",
    "FULL": "config",
    "Hardware": "config",
    "ImageError": "errors",
    "ImageRef": "conversation",
    "Message": "conversation",
    "Metric": "evaluation.results",
    "ModelConfig": "config",
    "Reproduced": "studies.reproduce",
    "Result": "evaluation.results",
    "Run": "config",
    "Stage": "config",
    "Step": "data.reporting",
    "TinyLlavaError": "errors",
    "TrainingError": "errors",
    "Tune": "config",
    "UnknownNameError": "errors",
    "ask": "conversation",
    "check": "planning.check",
    "evaluate": "evaluation.checkpoint",
    "export_checkpoint": "checkpoints.exporting",
    "from_layer": "config",
    "import_checkpoint": "checkpoints.importing",
    "lora": "config",
    "make_run": "recipes.variants",
    "plan_run": "planning.plan",
    "reproduce": "studies.reproduce",
    "run_code": "parts.user_code",
    "run_from_json": "config",
    "score_answers": "evaluation.checkpoint",
    "train": "training.run",
    "variant": "recipes.variants",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 (they are strings)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(
            f"module 'tinyllava' has no attribute {name!r}; public names: {', '.join(_HOMES)}"
        )
    found = getattr(import_module(f"tinyllava.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
