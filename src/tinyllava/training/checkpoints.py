"""What stays of a stage: its trained tensors, its papers, and a key by which the same stage is found again.

Differs: the published code tells a stage by its folder's name; here the key is made from what went in.
"""

import dataclasses
import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import tinyllava
from tinyllava.config import Run, Stage, to_json
from tinyllava.errors import CheckpointError, TrainingError
from tinyllava.model.adapters import save_adapters
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.quantised import quantised_layers
from tinyllava.model.tuning import Ledger
from tinyllava.training.trainer import choose_precision, trained_tensors

PAPERS = "stage.json"
TENSORS = "trained.safetensors"
# What a config says of where it came from; the same model may have come by another way.
_NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version")
ADAPTERS = "adapters"


def stage_key(
    run: Run,
    stage: Stage,
    ledger: Ledger,
    data_digest: str,
    template: str,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
) -> str:
    """Return a digest of everything that decides a stage's result: model before, pixels, plan, data, seed.

    Weights alone do not tell a model: connectors that average to 1 and to 4 tokens have the same.
    """
    settings = dataclasses.asdict(stage)
    settings["data"] = data_digest
    inputs = {
        "tensors": [(row.name, row.trained, row.before) for row in ledger.rows],
        "stage": settings,
        "template": template,
        "seed": run.seed,
        "precision": choose_precision(run.hardware.precision),
        "model": {k: v for k, v in model.config.to_dict().items() if k not in _NOT_OF_THE_MODEL},
        "pixels": [processor.image_aspect, processor.transparency, processor.image_processor.to_dict()],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:24]


def find_stage(runs: Path, key: str) -> Path | None:
    """Return the folder of a finished stage with that key, in any run beside this one."""
    for papers in sorted(runs.glob(f"*/*/{PAPERS}")):
        if (
            _is_json(papers)  # a full disk may have cut it short
            and json.loads(papers.read_text(encoding="utf-8")).get("key") == key
            and (papers.parent / TENSORS).is_file()
        ):
            return papers.parent
    return None


def save_stage(folder: Path, model: TinyLlavaForConditionalGeneration, papers: Mapping[str, Any]) -> None:
    """Write trained tensors, adapters for PEFT, and papers; these last: they say that the stage is done."""
    save_adapters(folder / ADAPTERS, model)
    save_file(trained_tensors(model), folder / TENSORS, metadata={"format": "pt"})
    (folder / PAPERS).write_text(json.dumps(papers, indent=2) + "\n", encoding="utf-8")


def load_stage(folder: Path, model: TinyLlavaForConditionalGeneration) -> None:
    """Put a finished stage's tensors into a model whose plan was applied.

    Raises:
        CheckpointError: the tensors are not exactly those that the plan trains, or the file is damaged.
    """
    path = folder / TENSORS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); delete {folder} and train the stage again."
        ) from error
    expected = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    wrong = [
        n
        for n in expected.keys() | tensors.keys()
        if n not in expected or n not in tensors or tensors[n].shape != expected[n]
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: does not fit the stage's plan: {', '.join(sorted(wrong)[:5])} ({len(wrong)} tensors)."
        )
    model.load_state_dict(tensors, strict=False)


def save_model(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    run: Run,
    provenance: Mapping[str, Any],
) -> None:
    """Write a self-contained folder; it appears whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor.save_pretrained(part)
    (part / "run.json").write_text(to_json(run), encoding="utf-8")
    (part / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of a stage; one that a kill cut short lacks its state."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if (path / "trainer_state.json").is_file() and _is_json(path / "trainer_state.json")
    ]
    return str(max(found)[1]) if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def require_space(folder: Path, model: TinyLlavaForConditionalGeneration) -> None:
    """Refuse to begin what cannot be saved.

    Raises:
        TrainingError: less free space than two checkpoints and the model take.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = quantised_layers(model)  # dequantised in the end
    whole = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n not in held)
    whole += sum(torch.Size(m.shape).numel() * m.dtype.itemsize for m in held.values())
    needed = (
        2 * 3 * trained + whole
    )  # a checkpoint holds weights and AdamW's two moments; the next one overlaps it
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"{folder}: {free / 1e9:.1f} GB free, checkpoints and model need {needed / 1e9:.1f} GB; "
            "free some space, or choose another folder with --output."
        )


def describe_environment() -> dict[str, Any]:
    """Return versions and hardware, for the run's papers."""
    return {
        "tinyllava": tinyllava.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
    }
