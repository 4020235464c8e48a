"""A run: the stages in order, each resumed, reused or trained, and a self-contained folder as the result.

Paper: section 3.2, pre-training for feature alignment, then supervised fine-tuning.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import set_seed

from tinyllava.config import Run, Stage, flatten, to_json
from tinyllava.data.dataset import Collator
from tinyllava.data.reporting import Callback, reporting, say
from tinyllava.data.workers import naming_dead_workers
from tinyllava.errors import DataError, TinyLlavaError, TrainingError
from tinyllava.files import held, is_full_disk, read_object, write_json, write_text
from tinyllava.inference.logits import refuse_broken_weights
from tinyllava.model.assemble import save_model
from tinyllava.model.compat import causal_without_looking, forget_preparation, waiting_at_most
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processing import TinyLlavaProcessor
from tinyllava.model.quiet import keeping_random_state, transformers_errors_only, without_loading_bars
from tinyllava.model.rebuild import RESUMED_TENSORS, describe_origin, open_start, whole_model
from tinyllava.model.tuning import apply_tuning, check_trained, close_ledger, merge_adapters, open_ledger
from tinyllava.planning.check import check
from tinyllava.planning.lost import is_of_another_process, lost_process
from tinyllava.training import checkpoints
from tinyllava.training.compiling import check_compiler, compile_layers
from tinyllava.training.devices import fit_hardware, out_of_memory
from tinyllava.training.identity import StageIdentity, decisive_settings, differences, identify
from tinyllava.training.lean import make_lean
from tinyllava.training.precision import choose_precision, hold_frozen_in_half, multiplying
from tinyllava.training.prepare import Prepared, check_data, pin, prepare
from tinyllava.training.progress import StageProgress, announce
from tinyllava.training.stopping import StopRequests
from tinyllava.training.trainer import StageTrainer, make_arguments
from tinyllava.training.validation import Validator

_PREPARING = timedelta(days=2)
"""How long a process waits for another one while no stage trains: the first prepares the data alone."""


@keeping_random_state()
@without_loading_bars()
def train(run: Run, *, wait: bool = False, progress: Callback | None = None) -> Path:
    """Train every stage of a run and return the folder of the finished model.

    Calling it again after a kill resumes from the last checkpoint and gives the same weights, bit by bit.
    A finished stage of this run, or of another run next to it, is reused if its inputs are the same. If
    its records, images or weights have changed, a stage starts over. Under ``torchrun``, every process
    calls this function, and the first one writes.

    Args:
        run: what to train.
        wait: wait for another process that trains in the same folder instead of giving up.
        progress: called with every step; without it, nothing is reported.

    Raises:
        ConfigError: the run cannot work; the error lists all problems.
        OutputError: another process trains in the same folder.
        DataError, ImageError, CheckpointError, TrainingError: a stage failed.
    """
    run = dataclasses.replace(run, start_from=str(whole_model(run.start_from)) if run.start_from else "")
    run = pin(run)
    check(run)
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=_PREPARING)
    with ExitStack() as stack:
        if processes.is_main_process:
            _make_folder(run)
            stack.enter_context(held(run.folder, wait=wait))
            _refuse_another_run(run)
        processes.wait_for_everyone()
        stack.enter_context(reporting(progress))
        stack.enter_context(multiplying(choose_precision(run.hardware.precision)))
        try:
            if run.hardware.compile:
                check_compiler(processes.device)
            return _train(run, processes)
        except TinyLlavaError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_full_disk(error):
                raise
            raise TrainingError(
                f"{run.folder}: the disk is full. Free some space and run the same command again."
            ) from error


def _train(run: Run, processes: PartialState) -> Path:
    model, processor = open_start(run)
    refuse_broken_weights(model)
    check_data(run, processor)
    metadata: dict[str, Any] = {}
    before: dict[str, Path] = {}
    for name, stage in run.stages.items():
        metadata[name], before[name] = _run_stage(run, name, stage, model, processor, before)
    folder = run.folder / "model"
    provenance = {"environment": checkpoints.describe_environment(), "stages": metadata}
    if processes.is_main_process:
        _save_settings(run)
        save_model(folder, model, processor, run, provenance, checkpoints.describe_beside(run))
    processes.wait_for_everyone()
    return folder


def _make_folder(run: Run) -> None:
    """Make the run folder.

    Raises:
        TrainingError: it cannot be made.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"{run.folder}: cannot be created ({error.strerror}). Choose another folder with --output."
        ) from error


def _refuse_another_run(run: Run) -> None:
    """Fail rather than overwrite a run with other settings in this folder.

    Where nothing was trained there is nothing to lose. What else may differ is known only when a stage's
    contents are: see ``_refuse_or_start_over``.

    Raises:
        TrainingError: each such setting is named with both values.
    """
    problems = []
    for name, stage in run.stages.items():
        before = checkpoints.recorded_identity(run.folder / name)
        if before is not None:
            found = differences(before.settings, decisive_settings(run, stage))
            problems += [f"stages.{name}.{problem}" for problem in found]
    recorded = read_object(run.folder / "run.json") or {}
    known = list(recorded["stages"]) if isinstance(recorded.get("stages"), dict) else []
    trained = [name for name in known if checkpoints.recorded_identity(run.folder / name) is not None]
    if any(name not in run.stages for name in trained):
        problems.append(f"stages = {', '.join(known)} before, {', '.join(run.stages)} now")
    if problems:
        raise TrainingError(_other_run(run, problems))
    if trained:
        _say_what_differs(run, recorded)


def _other_run(run: Run, problems: list[str]) -> str:
    listed = "".join(f"\n  {problem}" for problem in problems)
    return (
        f"{run.folder}: a run with other settings was trained in this folder:{listed}\n"
        f"Choose another --output, or delete {run.folder} to start over."
    )


def _save_settings(run: Run) -> None:
    """Write down the run that this folder holds from now on."""
    write_text(run.folder / "run.json", to_json(run))
    write_json(run.folder / "environment.json", checkpoints.describe_environment())


def _run_stage(
    run: Run,
    name: str,
    stage: Stage,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    before: Mapping[str, Path],
) -> tuple[dict[str, Any], Path]:
    """Bring the model through one stage and return the stage's metadata and folder.

    Args:
        before: folders of the stages before it.
    """
    folder = run.folder / name
    set_seed(run.seed)  # adapters begin alike, whether the stage before was trained just now or reused
    apply_tuning(model, stage)
    ledger = open_ledger(model)
    prepared = prepare(run, stage, model, processor)
    identity = identify(run, stage, ledger, prepared, model, processor)
    done, resumed = _find_work(run, name, identity)
    if done is not None:
        _say(f"{name}: already trained, reusing {done}")
        checkpoints.load_stage(done, model)
        metadata = checkpoints.read_metadata(done)
    else:
        announce(name, stage, ledger, prepared)
        origin = describe_origin(run, name, before, checkpoints.describe_beside(run))
        keeper = checkpoints.CheckpointKeeper(folder, identity, origin, run.hardware.keep_checkpoints)
        last = checkpoints.load_last(resumed, model, stage.validation) if resumed else None
        with causal_without_looking(model.language_model):
            metadata = last or _train_stage(run, name, stage, model, processor, prepared, keeper, resumed)
        best = metadata.get("validation", {}).get("best_step")
        if best and stage.validation.result == "best":
            checkpoints.load_best(folder, best, model)
        ledger = close_ledger(ledger, model)
        ledger.require_movement()
        for component in ledger.unmoved():
            _say(
                f"  {component} should be trained but did not change: nothing in these records depends on it."
            )
        metadata = {"key": identity.key, "stage": name, **metadata, "data": prepared.summary()}
        if PartialState().is_main_process:
            ledger.save(folder / "ledger.json")
            checkpoints.save_stage(folder, model, metadata, identity)
    if PartialState().is_main_process and done in (None, folder):  # it is done: nothing resumes from them
        best = metadata.get("validation", {}).get("best_step")
        checkpoints.keep_newest(folder, run.hardware.keep_checkpoints, best)
    merge_adapters(model)
    model.requires_grad_(False)
    return metadata, done or folder


def _find_work(run: Run, name: str, identity: StageIdentity) -> tuple[Path | None, Path | None]:
    """Return the finished stage to reuse and the checkpoint to resume from; the first process decides.

    Raises:
        TrainingError: see ``_refuse_or_start_over``.
    """
    folder = run.folder / name
    done = resumed = None
    if PartialState().is_main_process:
        done = checkpoints.find_stage(folder, identity.key, _say)
        if done is None:
            resumed = checkpoints.find_checkpoint(folder, identity.key, _say)
        if done is None and resumed is None:
            _refuse_or_start_over(run, name, identity)
        if resumed is not None:
            _say(f"{name}: resuming from {resumed}")
            checkpoints.drop_newer(folder, resumed)
        folder.mkdir(exist_ok=True)
        if done is None:  # a later stage may still refuse: until then the folder holds the run before
            _save_settings(run)
    done, resumed = broadcast_object_list([done, resumed])
    return done, resumed


def _refuse_or_start_over(run: Run, name: str, identity: StageIdentity) -> None:
    """Look at what another try has left of a stage that cannot be gone on with.

    Raises:
        TrainingError: it was trained from other places, which are named with both values.
    """
    before = checkpoints.recorded_identity(run.folder / name)
    if before is None:
        return
    if problems := before.find_other_sources(identity):
        raise TrainingError(_other_run(run, [f"stages.{name}.{problem}" for problem in problems]))
    changed = before.changed_contents(identity)
    why = (
        f"{', '.join(changed)} changed since it was trained here"
        if changed
        else "its files are missing or damaged"
    )
    _say(f"{name}: {why}; starting over")
    checkpoints.keep_newest(run.folder / name, 0)


def _say_what_differs(run: Run, before: Mapping[str, Any]) -> None:
    """Say which settings are others than in the last try, and that the result stays the same."""
    known, now = (
        dict(flatten({"hardware": values.get("hardware"), "report_to": values.get("report_to")}))
        for values in (before, json.loads(to_json(run)))
    )
    for problem in differences(known, now):
        _say(f"{problem}: it does not change the result")


@transformers_errors_only()  # its notes on our lean checkpoints would only mislead
def _train_stage(
    run: Run,
    name: str,
    stage: Stage,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    prepared: Prepared,
    keeper: checkpoints.CheckpointKeeper,
    resumed: Path | None,
) -> dict[str, Any]:
    folder, stopper = keeper.folder, StopRequests()
    num_checkpoints = max(2, run.hardware.keep_checkpoints) + (prepared.held_out is not None)
    checkpoints.require_space(folder, model, num_checkpoints)
    progress = StageProgress(name, folder / "metrics.jsonl")
    callbacks: list[transformers.TrainerCallback] = [progress, stopper, keeper]
    validator = None
    if prepared.held_out is not None:
        held = prepared.held_out.examples.conversations
        validator = Validator(stage.validation, processor, held, folder)
        callbacks.insert(2, validator)  # the keeper makes room for what a validation wants saved
    trainer = make_trainer(run, stage, model, processor, prepared, folder, callbacks)
    progress.trainer = keeper.trainer = trainer
    if validator is not None:
        validator.trainer = trainer
    if resumed is not None:
        check_trained(resumed / RESUMED_TENSORS, model)
    start = time.monotonic()
    try:
        with (
            naming_dead_workers("--hardware.num-workers"),
            waiting_at_most(trainer.args.ddp_timeout_delta, otherwise=_PREPARING),
            keeper.writing(),
            stopper.listening(),
        ):
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except DataError as error:  # a worker process hands over its whole traceback as the message
        kind = type(error)
        raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from error
    except torch.OutOfMemoryError as error:
        size, checkpointing = trainer.args.train_batch_size, model.is_gradient_checkpointing
        can_divide = trainer.args.world_size > 1 and trainer.args.sharding != "all"
        raise TrainingError(
            f"{out_of_memory(size, checkpointing, can_divide)} Run the same command with it to resume."
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_full_disk(error):
            raise TrainingError(
                f"{folder}: the disk is full. Free some space and run the same command again."
            ) from error
        if is_of_another_process(error):
            raise lost_process(error, run.hardware.timeout_seconds) from error
        raise
    finally:
        progress.progress.stop()
    release(trainer)
    return {
        "num_steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - start, 1),
        **checkpoints.summarise_losses(trainer.state.log_history),
    }


def make_trainer(
    run: Run,
    stage: Stage,
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    prepared: Prepared,
    folder: Path,
    callbacks: list[transformers.TrainerCallback],
) -> StageTrainer:
    """Return the Trainer of a stage whose plan was applied; call ``release`` when it is done."""
    precision = choose_precision(run.hardware.precision)
    undo = [hold_frozen_in_half(model, precision), make_lean(model, precision)]
    undo += [compile_layers(model)] if run.hardware.compile else []
    hardware, prefetch_factor, packed = fit_hardware(run, stage, model, processor, prepared)
    num_samples = len(prepared.examples)
    arguments = make_arguments(run, stage, hardware, folder, num_samples, prefetch_factor, packed)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared.examples,
        eval_dataset=prepared.held_out.examples if prepared.held_out else None,
        stage=stage,
        packed=packed,
        data_collator=Collator(
            processor.tokenizer.pad_token_id, processor.image_token_id, packed is not None
        ),
        callbacks=callbacks,
    )
    trainer.undo = undo
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def release(trainer: StageTrainer) -> None:
    """Give the model back as it was before the Trainer and accelerate prepared it, so that the next can.

    Accelerate leaves a model with its mark alone: the next stage would run without autocast.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    forget_preparation(model)
    # The Trainer's own; a model of reused stages is saved without.
    vars(trainer.whole.config).pop("use_cache", None)
    trainer.accelerator.free_memory()
    for undo in trainer.undo:
        undo()


def _say(text: str) -> None:
    if PartialState().is_main_process:
        say(text)
