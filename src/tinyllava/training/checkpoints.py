"""The files of a stage: checkpoints during training, then its trained tensors and metadata.

Differs: the published code identifies a stage by its folder's name. Here each stage has a key of its inputs.

Adapters are saved merged, and also separately in PEFT's two files for servers that load adapters, because
they cannot be recovered from merged weights.
"""

import dataclasses
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import tinyllava
from tinyllava.config import Run, Validation
from tinyllava.data.mixtures import LICENCES, gather_licences
from tinyllava.errors import Stopped, TrainingError
from tinyllava.files import (
    bytes_below,
    describe_files,
    find_damage,
    flush,
    found_below,
    open_to_others,
    read_object,
    whole_file,
    write_json,
)
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.quantised import quantised_layers
from tinyllava.model.rebuild import MANIFEST, RESUMED_TENSORS, STAGE_TENSORS
from tinyllava.model.token_rows import TrainedRows
from tinyllava.model.tuning import load_trained
from tinyllava.training.identity import StageIdentity
from tinyllava.training.trainer import StageTrainer, trained_tensors
from tinyllava.training.validation import best_step, is_stopped, read_curve
from tinyllava.training.writing import CheckpointWriter

METADATA = "stage.json"
ADAPTERS = "adapters"


class CheckpointKeeper(TrainerCallback):
    """Makes checkpoints of a stage that can be trusted, and lets go of old ones.

    A checkpoint is complete when its manifest is there, written last: the key of what it was made from, and
    size and hash of every file. Two are kept, so that if one is damaged, the previous one remains, and the
    one with the lowest held-out loss.

    Args:
        folder: of the stage.
        identity: what decides the stage's result.
        origin: see ``describe_origin``.
        num_kept: how many stay when the stage is done.
    """

    def __init__(
        self, folder: Path, identity: StageIdentity, origin: Mapping[str, Any], num_kept: int = 0
    ) -> None:
        self.folder, self.identity, self.origin, self.num_kept = folder, identity, origin, num_kept
        self.trainer: StageTrainer | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Make room for a checkpoint that is about to be written, once the one before it is.

        All processes wait for it: one that began to write would find its files removed as those of a kill.

        Raises:
            OSError, RuntimeError, SafetensorError, TrainingError: the one before could not be written.
        """
        if not control.should_save:
            self.writer.check()
            return
        self.writer.wait()
        if state.is_world_process_zero:
            # What is best now may have been so only since this step: until it is saved, the one before stays.
            before = [entry for entry in state.log_history if entry["step"] < state.global_step]
            keep_newest(self.folder, max(1, self.num_kept - 1), best_step(read_curve(before)))
        PartialState().wait_for_everyone()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Make room for a checkpoint that a validation has asked for."""
        self.on_step_end(args, state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have the checkpoint written, and its manifest once every process has written its share."""
        PartialState().wait_for_everyone()
        self.writer.write(self._write_manifest if state.is_world_process_zero else lambda _: None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Wait until the last checkpoint is written, in all processes.

        A process that ends earlier takes the others with it: launchers give them half a minute.
        """
        self.writer.wait()
        PartialState().wait_for_everyone()

    @property
    def writer(self) -> CheckpointWriter:
        """That of the stage's Trainer."""
        assert self.trainer is not None
        return self.trainer.writer

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within it checkpoints are written; at the end the last one is, but for a second Ctrl-C."""
        try:
            yield
        except Stopped:
            self.writer.close(gives_up=True)
            raise
        finally:
            self.writer.close()

    def _write_manifest(self, checkpoint: Path) -> None:
        files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
        for path in files:
            open_to_others(path)
            flush(path)
        names = sorted(str(path.relative_to(checkpoint)) for path in files)
        manifest = {
            **self.origin,
            "key": self.identity.key,
            "identity": dataclasses.asdict(self.identity),
            "files": describe_files(checkpoint, names),
        }
        write_json(checkpoint / MANIFEST, manifest)
        flush(checkpoint.parent)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and folder of each checkpoint, the newest first: by step, for clocks go wrong."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def keep_newest(folder: Path, count: int, best: int | None = None) -> None:
    """Remove all but the newest complete checkpoints of a stage, and the one of its best step."""
    complete = [path for _, path in _checkpoints(folder) if (path / MANIFEST).is_file()]
    for step, path in _checkpoints(folder):
        if path not in complete[:count] and (step != best or path not in complete):
            shutil.rmtree(path)


def drop_newer(folder: Path, checkpoint: Path) -> None:
    """Remove checkpoints newer than the chosen one, because they would be taken for the newest."""
    for _, path in _checkpoints(folder):
        if path == checkpoint:
            return
        shutil.rmtree(path)


def find_checkpoint(folder: Path, key: str, say: Callable[[str], None]) -> Path | None:
    """Return the newest intact checkpoint made from the same inputs, and report skipped ones.

    Args:
        folder: of the stage.
        key: of what decides the stage's result; checkpoints that were made from something else are left out.
        say: prints a line.
    """
    for _, path in _checkpoints(folder):
        manifest = read_object(path / MANIFEST)
        if manifest is None:
            say(f"{path}: incomplete; skipped")
        elif manifest.get("key") == key:
            damage = find_damage(path, manifest.get("files"))
            if not damage:
                return path
            say(f"{path}: {damage}; skipped")
    return None


def recorded_identity(folder: Path) -> StageIdentity | None:
    """Return the inputs that determined the work in a stage's folder, finished or not; None without work."""
    files = [path / MANIFEST for _, path in _checkpoints(folder)] + [folder / METADATA]
    found = (StageIdentity.read((read_object(path) or {}).get("identity")) for path in files)
    return next((identity for identity in found if identity is not None), None)


def find_stage(folder: Path, key: str, say: Callable[[str], None] = lambda text: None) -> Path | None:
    """Return the folder of a finished stage with that key, in this run or in a run next to it.

    Args:
        folder: of the stage in its own run.
        key: of what decides the stage's result.
        say: prints a line.
    """
    for file in (folder / METADATA, *found_below(folder.parent.parent, f"*/*/{METADATA}")):
        values = read_object(file)
        if values is None or values.get("key") != key:
            continue
        damage = find_damage(file.parent, values.get("files"))
        if not damage:
            return file.parent
        say(f"{file.parent}: {damage}; not reused")
    return None


def save_stage(
    folder: Path,
    model: TinyLlavaForConditionalGeneration,
    metadata: Mapping[str, Any],
    identity: StageIdentity,
) -> None:
    """Write trained tensors, adapters for PEFT, and metadata; these last: they say that the stage is done."""
    save_adapters(folder / ADAPTERS, model)
    with whole_file(folder / STAGE_TENSORS) as partial:
        save_file(trained_tensors(model), partial, metadata={"format": "pt"})
    files = describe_files(folder, [STAGE_TENSORS])
    write_json(folder / METADATA, {**metadata, "files": files, "identity": dataclasses.asdict(identity)})


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a finished stage, without the fields used only to find it."""
    metadata = read_object(folder / METADATA) or {}
    return {name: value for name, value in metadata.items() if name not in ("files", "identity")}


def load_stage(folder: Path, model: TinyLlavaForConditionalGeneration) -> None:
    """Load a finished stage's tensors into a model with the same plan.

    Raises:
        CheckpointError: the tensors are not exactly those that the plan trains, or the file is damaged.
    """
    load_trained(folder / STAGE_TENSORS, model)


def load_last(
    checkpoint: Path, model: TinyLlavaForConditionalGeneration, validation: Validation
) -> dict[str, Any] | None:
    """Load a stage's result from the checkpoint of its last step; None if steps are left.

    A kill may come between that checkpoint and the stage's own files; the Trainer, which resumes within an
    epoch, would do one step too many.
    """
    state = read_object(checkpoint / "trainer_state.json") or {}
    curve = read_curve(state.get("log_history", []))
    if state.get("global_step", 0) < state.get("max_steps", 1) and not is_stopped(curve, validation):
        return None
    load_trained(checkpoint / RESUMED_TENSORS, model)
    return {"num_steps": state["global_step"], "seconds": 0.0, **summarise_losses(state["log_history"])}


def summarise_losses(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the losses that a stage's metadata have, out of the Trainer's log."""
    losses = [entry["loss"] for entry in log_history if "loss" in entry]
    found = {"first_loss": losses[0], "last_loss": losses[-1]}
    if curve := read_curve(log_history):
        best = best_step(curve)
        held = {"best_step": best, "best_loss": dict(curve)[best or 0], "last_loss": curve[-1][1]}
        found["validation"] = held
    return found


def load_best(folder: Path, step: int, model: TinyLlavaForConditionalGeneration) -> None:
    """Put the tensors of a stage's best checkpoint into its model.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    load_trained(folder / f"checkpoint-{step}" / RESUMED_TENSORS, model)


def describe_beside(run: Run) -> dict[str, Any]:
    """Return the contents of the JSON files next to a run's weights, by name: the licences of its data."""
    records = [record for stage in run.stages.values() for record in stage.data.records]
    licences = gather_licences(records, run.start_from)
    return {LICENCES: licences} if licences else {}


def require_space(folder: Path, model: TinyLlavaForConditionalGeneration, num_checkpoints: int = 2) -> None:
    """Fail early if the disk has no room for the checkpoints.

    Args:
        num_checkpoints: as many as there are at one time.

    Raises:
        TrainingError: less free space than these checkpoints and the model take.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = quantised_layers(model)  # dequantised in the end
    whole = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n not in held)
    whole += sum(torch.Size(m.shape).numel() * m.dtype.itemsize for m in held.values())
    needed = (
        num_checkpoints * 3 * trained + whole
    )  # a checkpoint holds weights and AdamW's two moments; the next one overlaps it
    kept = sum(map(bytes_below, found_below(folder, "checkpoint-*")))
    free = shutil.disk_usage(folder).free + kept  # these make room as new ones come
    if free < needed:
        raise TrainingError(
            f"{folder}: {free / 1e9:.1f} GB free, but checkpoints and model need {needed / 1e9:.1f} GB. "
            "Free some disk space, or choose another folder with --output."
        )


def describe_environment() -> dict[str, Any]:
    """Return versions and hardware, for the run's metadata."""
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


_PREFIX = "base_model.model."  # what PEFT's wrapper puts in front of a module's name


def save_adapters(folder: Path, model: TinyLlavaForConditionalGeneration) -> None:
    """Write ``folder/COMPONENT/adapter_config.json`` and ``adapter_model.safetensors``, where there are some.

    The layers are listed one by one, so that PEFT finds the same ones whatever else the model has. What was
    trained in full beside the adapters (the connector) is PEFT's ``modules_to_save`` of the last component's,
    so that the adapters are never opened without it.

    Args:
        model: with the adapters of a stage in place, not merged yet.
    """
    configs = getattr(model, "peft_config", {})
    for component, config in configs.items():
        beside = _trained_beside(model) if component == list(configs)[-1] else []
        tensors = {
            f"{_PREFIX}{module}.{name}": tensor.detach().contiguous()
            for module in beside
            for name, tensor in _state(model.get_submodule(module)).items()
        }
        for name, parameter in model.named_parameters():
            for factor in ("lora_A", "lora_B"):
                layer, found, rest = name.partition(f".{factor}.{component}.")
                if found:
                    tensors[f"{_PREFIX}{layer}.{factor}.{rest}"] = parameter.detach().contiguous()
        adapted = (name for name in tensors if ".lora_" in name)
        layers = sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in adapted})
        settings = {**config.to_dict(), "target_modules": layers, "inference_mode": True}
        if beside:
            settings["modules_to_save"] = beside
        (folder / component).mkdir(parents=True, exist_ok=True)
        with whole_file(folder / component / "adapter_model.safetensors") as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True)
        (folder / component / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors as the model has them without what trains single rows."""
    return module.state_when_merged() if isinstance(module, TrainedRows) else module.state_dict()


def _trained_beside(model: nn.Module) -> list[str]:
    """Return the largest modules without adapters that hold everything else that was trained."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    rows = [name for name, module in model.named_modules() if isinstance(module, TrainedRows)]
    trained -= {f"{name}.rows" for name in rows}
    found: list[str] = []
    for module_name, module in model.named_modules():  # outer ones come first
        inside = {f"{module_name}.{name}" for name, _ in module.named_parameters()}
        own = {f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)}
        is_whole = bool(inside) and inside <= trained
        if (is_whole or own & trained) and not module_name.startswith(tuple(f"{name}." for name in found)):
            found.append(module_name)
    return found + rows
